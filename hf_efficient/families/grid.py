"""Positions of the patches of a picture: where they stand, and pictures larger than those of the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_efficient.families.positions import LongerInputs, PositionScheme
from hf_efficient.families.stack import Stack

LARGEST = "efficient_max_positions"
"""Field of the config: tokens of the largest picture, in a model that was made to take larger ones than its own."""


@dataclass(frozen=True)
class GridPositions(PositionScheme):
    """A picture's patches, row by row, behind class and register tokens.

    The position table stays as it is: for pictures of another size the host interpolates it in each call
    (`interpolate_pos_encoding`). So `lengthen` only notes how many tokens the largest picture has.

    Args:
        prefix: tokens in front of the patches, but for those that the config counts as `num_register_tokens`.
        in_order: the tokens of a call are all patches of its pictures, which have one size, row by row.
        is_square: the host interpolates the tables of square pictures alone.
    """

    prefix: int = 1
    in_order: bool = True
    is_square: bool = True
    kind: ClassVar[str] = "grid"
    methods: ClassVar[dict[str, bool]] = {"interpolate": True}
    fields: ClassVar[tuple[str, ...]] = (LARGEST,)

    def size(self, config: Any) -> tuple[int, int] | None:
        """(height, width) of the config's pictures, in pixels; `None` = each call says."""
        found = getattr(config, "image_size", None)
        return None if found is None else _pair(found)

    def patches(self, config: Any, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the patches of a picture of `size` pixels."""
        rows, columns = _pair(config.patch_size)
        return size[0] // rows, size[1] // columns

    def grid(self, config: Any) -> tuple[int, int] | None:
        size = self.size(config)
        return self.patches(config, size) if self.in_order and size is not None else None

    def prefix_tokens(self, config: Any) -> int:
        return self.prefix + getattr(config, "num_register_tokens", 0)

    def largest(self, config: Any) -> int | None:
        """Tokens of the largest picture that a model was made to take beyond its own; `None` = it was not."""
        count: int | None = getattr(config, LARGEST, None)
        return count

    def limit(self, config: Any) -> int | None:
        size = self.size(config)
        if self.largest(config) is not None or size is None:
            return self.largest(config)
        rows, columns = self.patches(config, size)
        return self.prefix_tokens(config) + rows * columns

    def length(self, stack: Stack) -> int | None:
        return self.limit(stack.module.config)

    def check(self, stack: Stack, wanted: LongerInputs) -> None:
        super().check(stack, wanted)
        config: Any = stack.module.config
        size = self.size(config)
        if self.is_square and size is not None and wanted.max_positions not in (None, self.limit(config)):
            rows, columns = self.patches(config, size)
            if rows != columns:
                raise ValueError(
                    f"max_positions={wanted.max_positions}: {config.model_type} interpolates the positions of square "
                    f"pictures alone, and those of this model have {rows} × {columns} patches: leave it out."
                )

    def lengthen(self, stack: Stack, count: int, method: str, rope: Mapping[str, Any] | None = None) -> list[str]:
        config = stack.module.config
        setattr(config, LARGEST, None if count == self.limit(config) else count)
        return []

    def restore(self, stack: Stack, record: Mapping[str, Any]) -> None:
        stack.module.config.__dict__.pop(LARGEST, None)


def _pair(size: Any) -> tuple[int, int]:
    """(height, width)"""
    return (size, size) if isinstance(size, int) else tuple(size)
