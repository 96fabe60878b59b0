"""Attention patterns as data: which keys may a query see, by position alone.

A pattern is a small frozen object. `visible` is its definition; everything else is derived from it in closed form: which
tiles it touches, which tiles look alike, and which keys no later query can see. Patterns unite (`a | b`), intersect
(`a & b`), exclude (`Without`) and differ per head (`PerHead`), and travel as JSON text (`spec`, `parse_pattern`).

Positions count from 0 at a row's first token. Causality is not part of a pattern: callers add `key ≤ query`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_efficient.patterns.pattern import Pattern, _ranges, _row_starts

# ---- single patterns ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Full(Pattern):
    """Every key."""

    shift_invariant = True

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.ones_like(query + key, dtype=torch.bool)

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor]:
        return []

    def meet(self, other: Pattern) -> Pattern:
        return other


@dataclass(frozen=True, kw_only=True)
class Window(Pattern):
    """`key - query = dilation · m` with `-left ≤ m ≤ right`."""

    left: int
    right: int
    dilation: int = 1
    shift_invariant = True
    limits: ClassVar[dict[str, int]] = {"left": 0, "right": 0, "dilation": 1}

    @property
    def reach(self) -> int:
        return max(self.left, self.right) * self.dilation

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        offset = key - query
        near = (offset >= -self.left * self.dilation) & (offset <= self.right * self.dilation)
        return near if self.dilation == 1 else near & (offset % self.dilation == 0)

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        start, end = _row_starts(num_queries, block_q, offset)
        first = (start - self.left * self.dilation).div(block_k, rounding_mode="floor")
        last = (end + self.right * self.dilation).div(block_k, rounding_mode="floor")
        return _ranges(first, last, -(-num_keys // block_k))

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor]:
        beyond = self.dilation * max(self.left, self.right) + block_q + block_k
        inner = block_q + block_k
        # whole tiles inside an undilated window look alike
        offset = (key - query).clamp(-beyond, beyond)
        if self.dilation == 1 and self.left > inner and self.right > inner:
            offset = torch.where((offset > inner - self.left) & (offset < self.right - inner), 0, offset)
        return [offset]

    def meet(self, other: Pattern) -> Pattern | None:
        if not isinstance(other, (Window, Strided)):
            return None
        # offsets that both show are multiples of both steps
        step = math.lcm(self.dilation, other.dilation if isinstance(other, Window) else other.stride)
        windows = [self, other] if isinstance(other, Window) else [self]
        left, right = (min(getattr(w, side) * w.dilation for w in windows) // step for side in ("left", "right"))
        # a window that shows nothing but the token itself has no step
        return Window(left=left, right=right, dilation=step if left or right else 1)

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return key >= following - self.left * self.dilation


@dataclass(frozen=True, kw_only=True)
class GlobalColumns(Pattern, kind="Columns"):
    """Keys at fixed positions, seen by every query."""

    positions: tuple[int, ...]

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return _is_in(key, self.positions).expand(torch.broadcast_shapes(query.shape, key.shape))

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        columns = torch.tensor(sorted({p // block_k for p in self.positions if p < num_keys}), dtype=torch.long)
        rows = -(-num_queries // block_q)
        return torch.arange(rows).repeat_interleave(len(columns)), columns.repeat(rows)

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor]:
        return [_own_tile(key, self.positions, block_k)]

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return self.visible(torch.as_tensor(following, device=key.device), key)


@dataclass(frozen=True, kw_only=True)
class GlobalRows(Pattern, kind="Rows"):
    """Queries at fixed positions, which see every key."""

    positions: tuple[int, ...]

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return _is_in(query, self.positions).expand(torch.broadcast_shapes(query.shape, key.shape))

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        here = {(p - offset) // block_q for p in self.positions if offset <= p < offset + num_queries}
        rows = torch.tensor(sorted(here), dtype=torch.long)
        columns = -(-num_keys // block_k)
        return rows.repeat_interleave(columns), torch.arange(columns).repeat(len(rows))

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor]:
        return [_own_tile(query, self.positions, block_q)]

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        still_to_come = torch.as_tensor(following, device=key.device) <= max(self.positions)
        return still_to_come.expand_as(key + following)


def _is_in(position: Tensor, positions: tuple[int, ...]) -> Tensor:
    if positions == tuple(range(len(positions))):
        return (position >= 0) & (position < len(positions))
    return torch.isin(position, torch.tensor(positions, device=position.device))


def _own_tile(start: Tensor, positions: tuple[int, ...], block: int) -> Tensor:
    """The start of a block that holds one of the positions, -1 for all other blocks."""
    marks = torch.tensor(sorted(positions))
    low, high = (torch.searchsorted(marks, bound.contiguous()) for bound in (start, start + block))
    return torch.where(low < high, start, -1)


@dataclass(frozen=True, kw_only=True)
class Strided(Pattern):
    """`(query - key) mod stride = 0`: every stride-th key, the query's own among them."""

    stride: int
    shift_invariant = True
    limits: ClassVar[dict[str, int]] = {"stride": 1}

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return (key - query) % self.stride == 0

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor]:
        return [(key - query) % self.stride]

    def meet(self, other: Pattern) -> Pattern | None:
        return Strided(stride=math.lcm(self.stride, other.stride)) if isinstance(other, Strided) else None


@dataclass(frozen=True, kw_only=True)
class Summary(Pattern):
    """`key mod stride ≥ stride - size`: the last `size` keys of every block of `stride` keys."""

    stride: int
    size: int
    limits: ClassVar[dict[str, int]] = {"stride": 1, "size": 1}

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        last = key % self.stride >= self.stride - self.size
        return last.expand(torch.broadcast_shapes(query.shape, key.shape))

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor]:
        return [key % self.stride]

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return self.visible(torch.as_tensor(following, device=key.device), key)


@dataclass(frozen=True, kw_only=True)
class BlockWindow(Pattern):
    """`σ - before ≤ key < σ + block_size + after`, σ the start of the query's block: all its queries see the same keys.

    Blocks follow each other from position `start` on, and in front of it.
    """

    block_size: int
    before: int = 0
    after: int = 0
    start: int = 0
    limits: ClassVar[dict[str, int]] = {"block_size": 1, "before": 0, "after": 0, "start": 0}

    @property
    def reach(self) -> int:
        return self.block_size - 1 + max(self.before, self.after)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        offset = key - self._origin(query)
        return (offset >= -self.before) & (offset < self.block_size + self.after)

    def _origin(self, query: Tensor | int) -> Any:
        """σ"""
        return (query - self.start) // self.block_size * self.block_size + self.start

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        start, end = _row_starts(num_queries, block_q, offset)
        first = (self._origin(start) - self.before).div(block_k, rounding_mode="floor")
        last = (self._origin(end) + self.block_size + self.after - 1).div(block_k, rounding_mode="floor")
        return _ranges(first, last, -(-num_keys // block_k))

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor]:
        beyond = self.before + self.after + self.block_size + block_q + block_k
        return [(query - self.start) % self.block_size, (key - query).clamp(-beyond, beyond)]

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return key >= self._origin(following) - self.before


@dataclass(frozen=True, kw_only=True)
class ShiftedBlock(Pattern):
    """Query block u sees key block `(u + shift) mod count`; without a count block u - shift, or u itself where u < shift."""

    block_size: int
    shift: int
    count: int | None = None
    limits: ClassVar[dict[str, int]] = {"block_size": 1, "shift": 0, "count": 1}

    def target(self, block: Tensor) -> Tensor:
        """The key block of a query block."""
        if self.count is None:
            return torch.where(block >= self.shift, block - self.shift, block)
        return (block + self.shift) % self.count

    @property
    def reach(self) -> int | None:
        # with a count, later queries see the first blocks as well
        return (self.shift + 1) * self.block_size - 1 if self.count is None else None

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return key // self.block_size == self.target(query // self.block_size)

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        start, end = _row_starts(num_queries, block_q, offset)
        size, found = self.block_size, []
        for step in range(-(-block_q // size) + 1):
            low = self.target(torch.minimum(start // size + step, end // size)) * size
            found.append(_ranges(low // block_k, (low + size - 1) // block_k, -(-num_keys // block_k)))
        return torch.cat([row for row, _ in found]), torch.cat([column for _, column in found])

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor] | None:
        if self.block_size % block_q or self.block_size % block_k or bool((query % block_q).any()):
            return None
        # tiles that lie inside blocks are all visible or empty
        return [self.visible(query, key).long()]

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        if self.count is not None:
            return super().needed(key, following)
        block, coming = key // self.block_size, following // self.block_size
        # block b is the target of block b + shift, and of itself while b < shift
        return (block + self.shift >= coming) | ((block < self.shift) & (block >= coming))


@dataclass(frozen=True, kw_only=True)
class BlockList(Pattern):
    """Whole blocks of keys for each block of queries, chosen by a rule that may look at a row's number of real tokens."""

    block_size: int
    depends_on_length = True
    limits: ClassVar[dict[str, int]] = {"block_size": 1}

    def columns(self, num_blocks: int, length: Tensor, is_causal: bool) -> Tensor:
        """(B or 1, H or 1, num_blocks, K) key blocks of every query block, -1 = none, for lengths (B or 1,)."""
        raise NotImplementedError

    def full_rows(self, n: int, length: Tensor, is_causal: bool) -> tuple[Tensor, Tensor] | None:
        """(B or 1, G) positions of queries that see every key, and whether each exists."""
        return None
