"""Patterns made of patterns beside unions and intersections: differences, and one pattern per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def meet(self, other: Pattern) -> Pattern | None:
        if other.num_heads not in (1, self.num_heads):
            return None
        return PerHead(parts=tuple(part & other.head(index) for index, part in enumerate(self.parts)))

    def visible_per_head(self, query: Tensor, key: Tensor) -> Tensor:
        known = {part: part.visible(query, key) for part in dict.fromkeys(self.parts)}
        return torch.stack([known[part] for part in self.parts], dim=-3)

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return Union(parts=tuple(dict.fromkeys(self.parts))).needed(key, following)
