"""How positions enter a model, and what inputs longer than it was made for need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hf_efficient.families.initialised import mark_initialised
from hf_efficient.families.readable import require_rows
from hf_efficient.families.stack import Stack


class LongerInputs(NamedTuple):
    """What a caller asks for: the longest input in tokens, how to reach it, and that method's own numbers."""

    max_positions: int | None = None
    positions: str | None = None
    rope: Mapping[str, Any] | None = None


AS_LONG = LongerInputs()
"""No longer than before."""


@dataclass(frozen=True)
class PositionScheme:
    """How positions enter the stacks of a model: base of all schemes.

    Attributes:
        kind: see `AttentionGeometry.position_scheme`.
        methods: {value of `positions=`: whether inputs up to the old length give what they gave before}, the usual one
            first.
        fields: of the config, which longer inputs change.
    """

    kind: ClassVar[str] = "none"
    methods: ClassVar[dict[str, bool]] = {"unchanged": True}
    fields: ClassVar[tuple[str, ...]] = ()

    def limit(self, config: Any) -> int | None:
        """Longest input, in tokens, that a model built from `config` can take; `None` = any."""
        return None

    def offset(self, config: Any) -> int:
        """Position of a text's first token, in a model that is built from `config`."""
        return 0

    def grid(self, config: Any) -> tuple[int, int] | None:
        """(rows, columns) of the patches of a picture of the config's size; `None` = tokens are none, or not in order."""
        return None

    def prefix_tokens(self, config: Any) -> int:
        """Tokens in front of the patches of a picture."""
        return 0

    # a loaded model computes with its modules, whatever its config says by now

    def length(self, stack: Stack) -> int | None:
        """Longest input, in tokens, that a loaded stack can take; `None` = any."""
        return None

    def made_for(self, stack: Stack) -> int | None:
        """Longest input, in tokens, that a stack was made for, whether or not it takes longer ones; `None` = any."""
        return self.length(stack)

    def first(self, stack: Stack) -> int:
        """Position of a text's first token, in a loaded stack."""
        return 0

    def weights(self, stack: Stack) -> list[tuple[nn.Module, nn.Parameter]]:
        """(module, its weight) of what `lengthen` gives another weight."""
        return []

    def check(self, stack: Stack, wanted: LongerInputs) -> None:
        """Refuse what can't be honoured, as far as the model alone says so; nothing is changed.

        Raises:
            ValueError: names the value and what to give instead.
        """
        count, positions, rope = wanted
        if positions is not None and positions not in self.methods:
            raise ValueError(f"positions={positions!r} is not possible; it must be one of {', '.join(self.methods)}.")
        if rope is not None:
            self.check_rope(stack, wanted)
        if count is None:
            if positions is not None:
                raise ValueError(
                    f"positions={positions!r} says how to lengthen, but not how far: give max_positions too, or neither."
                )
            return
        if type(count) is not int or count < 1:
            raise ValueError(f"max_positions={count!r} is not possible; it must be an integer ≥ 1.")
        before = self.made_for(stack)
        if before is not None and count < before:
            raise ValueError(
                f"max_positions={count} would drop positions; the source has {before}: give at least that."
            )

    def check_rope(self, stack: Stack, wanted: LongerInputs) -> None:
        """Refuse `rope` that can't be honoured; raises as `check`."""
        raise ValueError(
            f"rope={dict(wanted.rope or {})!r}: {stack.module.config.model_type} has no rotary positions; leave it out."
        )

    def method(self, stack: Stack, wanted: LongerInputs, farthest: int | None) -> str:
        """The method that serves, given or not.

        Args:
            farthest: keys that some query is farthest from, of those it will see in any layer; `None` = there is no bound.

        Raises:
            ValueError: the caller must choose one.
        """
        return wanted.positions or next(iter(self.methods))

    def lengthen(self, stack: Stack, count: int, method: str, rope: Mapping[str, Any] | None = None) -> list[str]:
        """Make a stack take inputs of `count` tokens. Returns the names of tensors that have other values.

        Raises:
            ValueError: a method that can't give this length, or tensors that can't be read.
        """
        return []

    def set_length(self, stack: Stack, count: int) -> None:
        """Give a stack that is being built the length that it will be loaded with, where its config has another's."""

    def record(self, stack: Stack) -> dict[str, Any]:
        """What `restore` needs, as JSON."""
        return {"max_positions": self.length(stack)}

    def restore(self, stack: Stack, record: Mapping[str, Any]) -> None:
        """Undo `lengthen`: `record` is what was noted before, and the method as `"positions"`."""


@dataclass(frozen=True)
class NoPositions(PositionScheme):
    """Order enters by something that has no length: masks, convolutions, recurrence."""


@dataclass(frozen=True)
class RelativePositions(PositionScheme):
    """A bias over distances, the same for all that are far: inputs of any length without any change."""

    kind: ClassVar[str] = "relative"


@dataclass(frozen=True)
class UnknownPositions(PositionScheme):
    """Nothing is known, so a model keeps the length that it has."""

    def check(self, stack: Stack, wanted: LongerInputs) -> None:
        super().check(stack, wanted)
        if wanted.max_positions is not None:
            raise ValueError(
                f"max_positions={wanted.max_positions}: nothing is known about the positions of "
                f"{stack.module.config.model_type}, so they can't be lengthened. Leave it out, or write a model family with "
                "a PositionScheme, see CONTRIBUTING.md."
            )


UNKNOWN = UnknownPositions()


@dataclass(frozen=True)
class PositionTable(PositionScheme):
    """A learned row for each position, in an embedding.

    Longer tables are made of the learned rows. `"tile"` repeats them, so that every neighbourhood looks as in training
    (Beltagy et al. 2020, §5). `"interpolate"` puts new rows between them on a straight line; the learned rows become every
    k-th row. The table keeps its class, and what that adds.

    Args:
        table: name of the embedding inside a stack.
        buffers: non-persistent buffers next to it, with one entry per position, by name and fill: `"arange"` or `"zeros"`.
    """

    table: str
    buffers: tuple[tuple[str, str], ...] = ()
    kind: ClassVar[str] = "table"
    methods: ClassVar[dict[str, bool]] = {"tile": True, "interpolate": False}
    fields: ClassVar[tuple[str, ...]] = ("max_position_embeddings",)

    def limit(self, config: Any) -> int | None:
        rows: int = getattr(config, self.fields[0])
        return rows - self.offset(config)

    def length(self, stack: Stack) -> int | None:
        return int(self._table(stack)[1].num_embeddings) - self.rows_in_front(stack)

    def rows_in_front(self, stack: Stack) -> int:
        """Rows of the table before that of the first token."""
        return self.first(stack)

    def weights(self, stack: Stack) -> list[tuple[nn.Module, nn.Parameter]]:
        table = self._table(stack)[1]
        return [(table, table.weight)]

    def _table(self, stack: Stack) -> tuple[nn.Module, Any]:
        """The module that owns the table, and the table."""
        path, _, leaf = self.table.rpartition(".")
        owner = stack.module.get_submodule(path)
        return owner, getattr(owner, leaf)

    def lengthen(self, stack: Stack, count: int, method: str, rope: Mapping[str, Any] | None = None) -> list[str]:
        if count == self.length(stack):
            return []
        name = f"{stack.name}.{self.table}".lstrip(".")
        table = self._table(stack)[1]
        require_rows(name, table)
        self._resize(stack, count, method)
        mark_initialised(table)
        setattr(stack.module.config, self.fields[0], self.first(stack) + count)
        return [f"{name}.weight"]

    def set_length(self, stack: Stack, count: int) -> None:
        if count != self.length(stack):
            self._resize(stack, count, next(iter(self.methods)))

    @torch.no_grad()
    def _resize(self, stack: Stack, count: int, method: str) -> None:
        """The module stays: its class may add an offset to positions, and it may have hooks."""
        owner, table = self._table(stack)
        front, weight = self.rows_in_front(stack), table.weight.data
        rows = torch.cat([weight[:front], self.rows(stack, weight[front:], count, method)])
        table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
        table.num_embeddings = len(rows)
        for buffer, fill in self.buffers:
            entries = torch.arange(len(rows)) if fill == "arange" else torch.zeros(len(rows))
            owner.register_buffer(buffer, entries.long().expand(1, -1).to(weight.device), persistent=False)

    def rows(self, stack: Stack, rows: Tensor, count: int, method: str) -> Tensor:
        """(count, width) rows made from the (n, width) ones of a stack's table."""
        return resize_rows(rows, count, method)

    def restore(self, stack: Stack, record: Mapping[str, Any]) -> None:
        if record.get("max_positions") is not None:
            self.lengthen(stack, record["max_positions"], record["positions"])


@dataclass(frozen=True)
class TableAfterPadding(PositionTable):
    """Positions count from `padding_idx + 1`, and so does the config: the rows up to there belong to padding.

    The embeddings take `padding_idx` from `config.pad_token_id` when they are made, and keep it.
    """

    def offset(self, config: Any) -> int:
        if config.pad_token_id is None:
            raise ValueError(
                f"pad_token_id=None: {config.model_type} counts positions from it; set it to the id of the padding token."
            )
        return int(config.pad_token_id) + 1

    def first(self, stack: Stack) -> int:
        return int(self._table(stack)[0].padding_idx) + 1  # type: ignore[arg-type]


@dataclass(frozen=True)
class TableWithOffset(PositionTable):
    """The table's own class adds `offset` to positions: these and the config count from 0, without the rows in front."""

    def rows_in_front(self, stack: Stack) -> int:
        return int(getattr(self._table(stack)[1], "offset", 0))


def resize_rows(rows: Tensor, count: int, method: str) -> Tensor:
    """(count, width) position rows made from (n, width) learned ones: see `PositionTable`."""
    n = len(rows)
    if method == "tile":
        return rows[torch.arange(count, device=rows.device) % n].clone()
    if count % n and n % count:
        raise ValueError(
            f"interpolating {n} positions to {count} can't be undone; give a multiple of {n}, or positions='tile'."
        )
    if count < n:
        return rows[:: n // count].clone()
    factor = count // n
    at = torch.arange(count, device=rows.device)
    low = at // factor
    share = ((at % factor) / factor)[:, None].to(rows.dtype)
    return torch.where(share == 0, rows[low], torch.lerp(rows[low], rows[(low + 1).clamp(max=n - 1)], share))
