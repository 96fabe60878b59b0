"""Positions as sines and cosines, which a formula of the host's gives for any length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_efficient.families.positions import PositionScheme, PositionTable
from hf_efficient.families.stack import Stack

CLOSE = 1e-2
"""Rows that were rounded, to half precision or by another library, are still those of the formula."""


@dataclass(frozen=True)
class SinusoidTable(PositionTable):
    """Sines and cosines in an embedding that is not trained (Vaswani et al. 2017, §3.5).

    `"recompute"` adds the rows that the host's own formula gives, in O(rows · width) steps of Python; those that are there
    stay. A table that was trained, or filled otherwise, can be lengthened as learned ones are.
    """

    kind: ClassVar[str] = "sinusoidal"
    methods: ClassVar[dict[str, bool]] = {"recompute": True} | PositionTable.methods

    def rows(self, stack: Stack, rows: Tensor, count: int, method: str) -> Tensor:
        if method != "recompute" or count <= len(rows):
            return super().rows(stack, rows, count, "tile" if method == "recompute" else method)
        made = self.formula(stack, count, rows.shape[1]).to(rows)
        if not rows.is_meta and not torch.allclose(made[: len(rows)], rows, rtol=0, atol=CLOSE):
            raise ValueError(
                f"positions='recompute': {stack.name}.{self.table} does not hold the sines and cosines of "
                f"{type(stack.module).__name__}; give positions='tile' or 'interpolate'."
            )
        return torch.cat([rows, made[len(rows) :]])

    def formula(self, stack: Stack, count: int, width: int) -> Tensor:
        """(count, width) sines and cosines of the host's."""
        table: Any = self._table(stack)[1]
        made: Tensor = type(table)(count, width).create_weight()
        return made


@dataclass(frozen=True)
class EndlessSinusoids(PositionScheme):
    """Sines and cosines that the host computes for inputs of any length, and keeps; positions count from `padding_idx + 1`.

    `"recompute"` notes the length in the config. The host computes more rows in the call that needs them.

    Args:
        module: name of the module inside a stack that computes them.
    """

    module: str
    kind: ClassVar[str] = "sinusoidal"
    methods: ClassVar[dict[str, bool]] = {"recompute": True}
    fields: ClassVar[tuple[str, ...]] = ("max_position_embeddings",)

    def offset(self, config: Any) -> int:
        return int(config.pad_token_id) + 1

    def first(self, stack: Stack) -> int:
        return int(stack.module.get_submodule(self.module).padding_idx) + 1  # type: ignore[arg-type]

    def made_for(self, stack: Stack) -> int | None:
        length: int = stack.module.config.max_position_embeddings
        return length

    def lengthen(self, stack: Stack, count: int, method: str, rope: Mapping[str, Any] | None = None) -> list[str]:
        stack.module.config.max_position_embeddings = count
        return []

    def record(self, stack: Stack) -> dict[str, Any]:
        return {"max_position_embeddings": self.made_for(stack)}

    def restore(self, stack: Stack, record: Mapping[str, Any]) -> None:
        if "max_position_embeddings" in record:
            stack.module.config.max_position_embeddings = record["max_position_embeddings"]
