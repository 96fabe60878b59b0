"""Attention patterns as data: which keys may a query see, by position alone.

A pattern is a small frozen object. `visible` is its definition; everything else is derived from it in closed form: which
tiles it touches, which tiles look alike, and which keys no later query can see. Patterns unite (`a | b`), exclude
(`Without`) and differ per head (`PerHead`), and travel as JSON text (`spec`, `parse_pattern`).

Positions count from 0 at a row's first token. Causality is not part of a pattern: callers add `key ≤ query`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

_KINDS: dict[str, type[Pattern]] = {}


def parts_of(pattern: Pattern) -> tuple[Pattern, ...]:
    """The parts of a union; any other pattern is its own single part."""
    parts: tuple[Pattern, ...] = getattr(pattern, "parts", (pattern,)) if pattern.is_union else (pattern,)
    return parts


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Which keys a query may see.

    Attributes:
        shift_invariant: visibility depends on `key - query` alone, so that rows need not start at position 0.
        depends_on_length: `at_length` gives different patterns for different numbers of real tokens.
    """

    shift_invariant: ClassVar[bool] = False
    depends_on_length: ClassVar[bool] = False
    is_union: ClassVar[bool] = False

    limits: ClassVar[dict[str, int]] = {}
    """Smallest possible value of each size; `None` is always possible."""

    def __init_subclass__(cls) -> None:
        _KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name, low in self.limits.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{type(self).__name__}: {name}={value} is not possible; it must be at least {low}.")

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool tensor of the broadcast shape of integer positions `query` and `key` (≥ 0)."""
        raise NotImplementedError

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        """(query block, key block) of a superset of all tiles with a visible pair, O(tiles); may repeat tiles.

        Queries stand at positions `offset` to `offset + num_queries - 1`. Here: every tile there is.
        """
        rows, columns = -(-num_queries // block_q), -(-num_keys // block_k)
        row = torch.arange(rows).repeat_interleave(columns)
        return row, torch.arange(columns).repeat(rows)

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor] | None:
        """Integers per tile that starts at positions (query, key): tiles with equal integers have equal element masks.

        `None` = not known, each tile is evaluated.
        """
        return None

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        """May some causal query at position ≥ `following` see `key` (< following)? Here: always."""
        return torch.ones_like(key + following, dtype=torch.bool)

    @property
    def is_bounded(self) -> bool:
        """Causal queries need a bounded number of keys at any length: those in the middle are all forgotten in the end."""
        # models are also built on the meta device
        return not bool(self.needed(torch.arange(2**16, 2**17, device="cpu"), 2**20).any())

    def at_length(self, length: int) -> Pattern:
        """The pattern of a row with this number of real tokens."""
        return self

    def head(self, index: int) -> Pattern:
        """The pattern of one head."""
        return self

    @property
    def num_heads(self) -> int:
        """1 = the same for all heads, else the number of heads that it is made for."""
        return 1

    def visible_per_head(self, query: Tensor, key: Tensor) -> Tensor:
        """(…, H or 1, N, S) visibility for positions (…, N, 1) and (…, 1, S)."""
        return torch.stack([self.head(h).visible(query, key) for h in range(self.num_heads)], dim=-3)

    def __or__(self, other: Pattern) -> Pattern:
        from .pattern_sets import Union

        return Union(parts=parts_of(self) + parts_of(other))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": type(self).__name__} | {
            f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)
        }

    def spec(self) -> str:
        """JSON text; `parse_pattern` reads it back."""
        return _text(self.to_dict())


def _text(value: Any) -> str:
    """JSON of a pattern's fields, by means that `torch.compile` can trace."""
    if isinstance(value, dict):
        return "{" + ",".join([f'"{name}":{_text(entry)}' for name, entry in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ",".join([_text(entry) for entry in value]) + "]"
    if isinstance(value, str):
        return f'"{value}"'
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    # the length of a range is a plain number also where the compiler made the field a symbol
    return ("-" if value < 0 else "") + str(len(range(abs(value))))


def _plain(value: Any) -> Any:
    if isinstance(value, Pattern):
        return value.to_dict()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        if (kind := value["kind"]) not in _KINDS:
            raise ValueError(
                f"no pattern of kind {kind!r} is known; import the module that defines it (mechanisms: "
                f"hf_efficient.list_mechanisms()). Known are {', '.join(sorted(_KINDS))}."
            )
        return _KINDS[kind](**{k: _read(v) for k, v in value.items() if k != "kind"})
    return tuple(_read(v) for v in value) if isinstance(value, list) else value


@lru_cache(maxsize=1024)
def parse_pattern(spec: str) -> Pattern:
    """The pattern that `Pattern.spec` wrote.

    Raises:
        ValueError: a kind of pattern that no imported module defines.
    """
    from . import pattern_sets, random_blocks  # noqa: F401  so that their kinds are known

    pattern: Pattern = _read(json.loads(spec))
    return pattern


def _ranges(first: Tensor, last: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Tiles of rows whose key blocks are `first[r]` to `last[r]`, clipped to 0 … limit - 1."""
    first, last = first.clamp(min=0), last.clamp(max=limit - 1)
    count = (last - first + 1).clamp(min=0)
    row = torch.arange(len(first)).repeat_interleave(count)
    start = (count.cumsum(0) - count).repeat_interleave(count)
    return row, first.repeat_interleave(count) + torch.arange(len(row)) - start


def _row_starts(num_queries: int, block_q: int, offset: int) -> tuple[Tensor, Tensor]:
    """First and last query position of every query block."""
    start = torch.arange(0, num_queries, block_q)
    return start + offset, (start + block_q).clamp(max=num_queries) - 1 + offset


# ---- single patterns ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Full(Pattern):
    """Every key."""

    shift_invariant = True

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.ones_like(query + key, dtype=torch.bool)

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor]:
        return []


@dataclass(frozen=True, kw_only=True)
class Window(Pattern):
    """`key - query = dilation · m` with `-left ≤ m ≤ right`."""

    left: int
    right: int
    dilation: int = 1
    shift_invariant = True
    limits: ClassVar[dict[str, int]] = {"left": 0, "right": 0, "dilation": 1}

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

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return key >= following - self.left * self.dilation


@dataclass(frozen=True, kw_only=True)
class Columns(Pattern):
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
class Rows(Pattern):
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
    """`σ - before ≤ key < σ + block_size + after`, σ the start of the query's block: all its queries see the same keys."""

    block_size: int
    before: int = 0
    after: int = 0
    limits: ClassVar[dict[str, int]] = {"block_size": 1, "before": 0, "after": 0}

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        offset = key - query // self.block_size * self.block_size
        return (offset >= -self.before) & (offset < self.block_size + self.after)

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        start, end = _row_starts(num_queries, block_q, offset)
        size = self.block_size
        first = (start // size * size - self.before).div(block_k, rounding_mode="floor")
        last = (end // size * size + size + self.after - 1).div(block_k, rounding_mode="floor")
        return _ranges(first, last, -(-num_keys // block_k))

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor]:
        beyond = self.before + self.after + self.block_size + block_q + block_k
        return [query % self.block_size, (key - query).clamp(-beyond, beyond)]

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return key >= following // self.block_size * self.block_size - self.before


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
