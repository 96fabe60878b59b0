"""Patterns made of patterns: intersections with a window, differences, and one pattern per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_efficient.patterns.kinds import Full, Window
from hf_efficient.patterns.pattern import Pattern, Union


@dataclass(frozen=True, kw_only=True)
class Without(Pattern):
    """What `pattern` shows and `excluded` does not."""

    pattern: Pattern
    excluded: Pattern

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return self.pattern.shift_invariant and self.excluded.shift_invariant

    @property
    def reach(self) -> int | None:
        return self.pattern.reach

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return self.pattern.visible(query, key) & ~self.excluded.visible(query, key)

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        return self.pattern.tiles(num_queries, num_keys, block_q, block_k, offset)

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor] | None:
        keys = [p.tile_key(query, key, block_q, block_k) for p in (self.pattern, self.excluded)]
        return None if any(k is None for k in keys) else [entry for k in keys if k is not None for entry in k]

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return self.pattern.needed(key, following)


def within(pattern: Pattern, window: Window) -> Pattern:
    """What `pattern` shows and an undilated `window` does as well; two undilated windows fold to one."""
    if isinstance(pattern, Full):
        return window
    if isinstance(pattern, Window) and pattern.dilation == 1:
        return Window(left=min(pattern.left, window.left), right=min(pattern.right, window.right))
    return Within(pattern=pattern, window=window)


@dataclass(frozen=True, kw_only=True)
class Within(Pattern):
    """What `pattern` and `window` both show: see `within`."""

    pattern: Pattern
    window: Window

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return self.pattern.shift_invariant

    @property
    def depends_on_length(self) -> bool:  # type: ignore[override]
        return self.pattern.depends_on_length

    @property
    def num_heads(self) -> int:
        return self.pattern.num_heads

    @property
    def reach(self) -> int:
        shown = self.pattern.reach
        return self.window.reach if shown is None else min(shown, self.window.reach)

    def head(self, index: int) -> Pattern:
        return within(self.pattern.head(index), self.window)

    def at_length(self, length: int) -> Pattern:
        return within(self.pattern.at_length(length), self.window)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return self.pattern.visible(query, key) & self.window.visible(query, key)

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        columns = -(-num_keys // block_k)
        near, shown = (
            row * columns + column
            for row, column in (
                part.tiles(num_queries, num_keys, block_q, block_k, offset) for part in (self.window, self.pattern)
            )
        )
        both = near[torch.isin(near, shown)]
        return both // columns, both % columns

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor] | None:
        shown = self.pattern.tile_key(query, key, block_q, block_k)
        return None if shown is None else [*shown, *self.window.tile_key(query, key, block_q, block_k)]

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return self.pattern.needed(key, following) & self.window.needed(key, following)


@dataclass(frozen=True, kw_only=True)
class PerHead(Pattern):
    """One pattern for each head."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not self.parts or any(part.num_heads != 1 for part in self.parts):
            raise ValueError(f"one pattern per head needs patterns of a single head each, not {self.parts}.")

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return all(part.shift_invariant for part in self.parts)

    @property
    def depends_on_length(self) -> bool:  # type: ignore[override]
        return any(part.depends_on_length for part in self.parts)

    @property
    def num_heads(self) -> int:
        return len(self.parts)

    @property
    def reach(self) -> int | None:
        return Union(parts=self.parts).reach

    def head(self, index: int) -> Pattern:
        return self.parts[index]

    def at_length(self, length: int) -> Pattern:
        return PerHead(parts=tuple(part.at_length(length) for part in self.parts))

    def visible_per_head(self, query: Tensor, key: Tensor) -> Tensor:
        known = {part: part.visible(query, key) for part in dict.fromkeys(self.parts)}
        return torch.stack([known[part] for part in self.parts], dim=-3)

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return Union(parts=tuple(dict.fromkeys(self.parts))).needed(key, following)
