"""What a pattern is, and unions and intersections of patterns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import reduce
from operator import and_
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

    kind: ClassVar[str]
    """Name in the JSON text: that of the class, unless the class names another."""

    def __init_subclass__(cls, kind: str = "") -> None:
        cls.kind = kind or cls.__name__
        _KINDS[cls.kind] = cls

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

    @property
    def reach(self) -> int | None:
        """Distance from a query of the farthest key that it may see, whatever the length; `None` = there is no bound."""
        return None

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
        from hf_efficient.patterns.pattern import Union

        return Union(parts=parts_of(self) + parts_of(other))

    def __and__(self, other: Pattern) -> Pattern:
        for one, another in ((self, other), (other, self)):
            if (simpler := one.meet(another)) is not None:
                return simpler
        both = (p for one in (self, other) for p in (one.parts if isinstance(one, Intersection) else (one,)))
        return Intersection(parts=tuple(both))

    def meet(self, other: Pattern) -> Pattern | None:
        """What this pattern and `other` both show, in a form of its own that is simpler; `None` where it knows none."""
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind} | {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

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


class _OfParts:
    """What a pattern made of others has from all of them."""

    parts: tuple[Pattern, ...]

    @property
    def shift_invariant(self) -> bool:
        return all(part.shift_invariant for part in self.parts)

    @property
    def depends_on_length(self) -> bool:
        return any(part.depends_on_length for part in self.parts)

    @property
    def num_heads(self) -> int:
        return max(part.num_heads for part in self.parts)

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor] | None:
        keys = [part.tile_key(query, key, block_q, block_k) for part in self.parts]
        return None if any(k is None for k in keys) else [entry for k in keys if k is not None for entry in k]


@dataclass(frozen=True, kw_only=True)
class Union(_OfParts, Pattern):  # type: ignore[override]
    """A key is visible if one of the parts shows it; a pair that several parts show counts once."""

    is_union = True
    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        heads = {part.num_heads for part in self.parts} - {1}
        if not self.parts or len(heads) > 1:
            raise ValueError(f"a union needs parts made for one number of heads, not {sorted(heads)} of {self.parts}.")

    @property
    def reach(self) -> int | None:
        found = [part.reach for part in self.parts]
        return None if None in found else max(reach for reach in found if reach is not None)

    def head(self, index: int) -> Pattern:
        return Union(parts=tuple(p for part in self.parts for p in parts_of(part.head(index))))

    def at_length(self, length: int) -> Pattern:
        return Union(parts=tuple(part.at_length(length) for part in self.parts))

    def meet(self, other: Pattern) -> Pattern:
        # part by part, so that each keeps its fast form
        return Union(parts=tuple(p for part in self.parts for p in parts_of(part & other)))

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        seen = self.parts[0].visible(query, key)
        for part in self.parts[1:]:
            seen = seen | part.visible(query, key)
        return seen

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        found = [part.tiles(num_queries, num_keys, block_q, block_k, offset) for part in self.parts]
        return torch.cat([row for row, _ in found]), torch.cat([column for _, column in found])

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        kept = self.parts[0].needed(key, following)
        for part in self.parts[1:]:
            kept = kept | part.needed(key, following)
        return kept


@dataclass(frozen=True, kw_only=True)
class Intersection(_OfParts, Pattern):  # type: ignore[override]
    """A key is visible if every one of the parts shows it; made by `&` where the parts have no simpler form together."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        heads = {part.num_heads for part in self.parts} - {1}
        if len(self.parts) < 2 or len(heads) > 1:
            raise ValueError(
                f"an intersection needs two parts made for one number of heads, not {sorted(heads)} of {self.parts}."
            )

    @property
    def reach(self) -> int | None:
        return min((part.reach for part in self.parts if part.reach is not None), default=None)

    def head(self, index: int) -> Pattern:
        return reduce(and_, (part.head(index) for part in self.parts))

    def at_length(self, length: int) -> Pattern:
        return reduce(and_, (part.at_length(length) for part in self.parts))

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return reduce(and_, (part.visible(query, key) for part in self.parts))

    def visible_per_head(self, query: Tensor, key: Tensor) -> Tensor:
        return reduce(and_, (part.visible_per_head(query, key) for part in self.parts))

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        columns = -(-num_keys // block_k)
        # parts that touch every tile narrow nothing down
        narrow = [part for part in self.parts if type(part).tiles is not Pattern.tiles] or self.parts[:1]
        found = (part.tiles(num_queries, num_keys, block_q, block_k, offset) for part in narrow)
        flat, *others = (row * columns + column for row, column in found)
        for other in others:
            flat = flat[torch.isin(flat, other)]
        return flat // columns, flat % columns

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return reduce(and_, (part.needed(key, following) for part in self.parts))
