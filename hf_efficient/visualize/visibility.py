"""Which keys the queries of a layer see: the distinct head patterns and their figures, from the tiles of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.attention.base.pattern import PatternAttentionConfig
from hf_efficient.attention.base.registry import get_mechanism, list_mechanisms
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.sets import PerHead
from hf_efficient.patterns.tile_table import TileTable, tile_table

# the tiles that are counted, those of the kernels
BLOCK = 64


def drawable_mechanisms() -> list[str]:
    """Names of the mechanisms whose visible keys follow from positions alone."""
    return [name for name in list_mechanisms() if issubclass(get_mechanism(name).Config, PatternAttentionConfig)]


def require_drawable(mechanism: str) -> None:
    """Refuse an unknown mechanism, or one without a pattern (ValueError)."""
    config = get_mechanism(mechanism).Config
    if issubclass(config, PatternAttentionConfig):
        return
    has_window = "attention_window" in {field.name for field in dataclasses.fields(config)}
    window = " Its window between tokens is the one that local draws." if has_window else ""
    raise ValueError(
        f"{mechanism} has no picture: what it shows a query depends on more than positions.{window} The mechanisms that "
        f"have one: {', '.join(drawable_mechanisms())}."
    )


@dataclass(frozen=True)
class Panel:
    """The heads that see the same pairs, with figures of one such head.

    Attributes:
        heads: their indices.
        pattern: what they see at the picture's length; causality comes on top of it.
        pairs: visible (query, key) pairs.
        tiles, masked_tiles: tiles of 64 × 64 with a visible pair, and those of them where not every pair is visible.
    """

    heads: tuple[int, ...]
    pattern: Pattern
    pairs: int
    tiles: int
    masked_tiles: int


@dataclass(frozen=True)
class Visibility:
    """What every query of one layer sees.

    Attributes:
        config: the mechanism's options.
        geometry: the layer.
        length: n, tokens of the row; all of them real.
        panels: the distinct head patterns, in the order of their first heads.
        distinct_masks: different element masks among the masked tiles of all heads.
        kept_keys: keys that a causal layer's cache keeps of these n tokens, but for its slack; `None` = not causal.
    """

    config: EfficientAttentionConfig
    geometry: AttentionGeometry
    length: int
    panels: tuple[Panel, ...]
    distinct_masks: int
    kept_keys: int | None

    @classmethod
    def of(cls, config: PatternAttentionConfig, geometry: AttentionGeometry, length: int) -> Self:
        """What a layer with this mechanism shows each of n = `length` queries; O(tiles of 64 × 64) time and memory."""
        pattern = config.visible_keys(geometry)
        pattern = pattern.at_length(length) if pattern.depends_on_length else pattern
        kept = int(pattern.needed(torch.arange(length), length).sum()) if pattern.is_bounded else length
        panels, masks = _panels(pattern, geometry, length)
        return cls(config, geometry, length, panels, masks, kept if geometry.is_causal else None)

    @property
    def facts(self) -> dict[str, Any]:
        """The figures as a JSON document: pairs and tiles over all heads, and of one head of each distinct pattern."""
        heads, names = self.geometry.num_heads, ("pairs", "tiles", "masked_tiles")
        sums = {name: sum(getattr(panel, name) * len(panel.heads) for panel in self.panels) for name in names}
        return {
            "config": self.config.to_dict(),
            "length": self.length,
            "is_causal": self.geometry.is_causal,
            "num_heads": heads,
            "layer": self.geometry.layer,
            "num_layers": self.geometry.num_layers,
            "extra_tokens": self.extra_tokens,
            **sums,
            "full_tiles": sums["tiles"] - sums["masked_tiles"],
            "share": sums["pairs"] / (heads * self.length**2),
            "block": BLOCK,
            "possible_tiles": (-(-self.length // BLOCK)) ** 2,
            "distinct_masks": self.distinct_masks,
            "kept_keys": self.kept_keys,
            "panels": [
                {"heads": list(panel.heads)} | {name: getattr(panel, name) for name in names} for panel in self.panels
            ],
        }

    @property
    def extra_tokens(self) -> int:
        """Learned tokens in front of the input, which the picture leaves out."""
        return self.config.attention_class.num_extra_tokens(self.config)

    def shares(self, pattern: Pattern, cell_q: int, cell_k: int) -> Tensor:
        """(⌈n / cell_q⌉, ⌈n / cell_k⌉) float64: the exact share of visible pairs in each cell of cell_q × cell_k pairs.

        Cells are powers of two, cell_q ≥ cell_k; the last ones may be smaller. O(tiles) of side min(64, cell_k).
        """
        block = min(BLOCK, cell_k)
        table = _table(pattern, self.length, block, self.geometry.is_causal)
        rows, columns = -(-self.length // cell_q), -(-self.length // cell_k)
        cell = table.class_row.long() * block // cell_q * columns + table.class_column.long() * block // cell_k
        visible = torch.zeros(rows * columns, dtype=torch.long).index_add(0, cell, _pairs(table))
        height, width = (
            (self.length - torch.arange(0, self.length, size)).clamp(max=size) for size in (cell_q, cell_k)
        )
        return visible.view(rows, columns).double() / (height[:, None] * width)


def _panels(pattern: Pattern, geometry: AttentionGeometry, length: int) -> tuple[tuple[Panel, ...], int]:
    """The distinct patterns of the heads, and the number of distinct masks of all their tiles."""
    rules: dict[Pattern, list[int]] = {}
    for head in range(geometry.num_heads):
        rules.setdefault(pattern.head(head if pattern.num_heads > 1 else 0), []).append(head)
    # heads may have different rules and yet see the same
    same: dict[tuple[bytes, ...], tuple[Pattern, list[int]]] = {}
    masks: set[bytes] = set()
    for rule, heads in rules.items():
        table = _table(rule, length, BLOCK, geometry.is_causal)
        content = (table.class_row, table.class_column, table.class_mask, table.masks)
        same.setdefault(tuple(part.numpy().tobytes() for part in content), (rule, []))[1].extend(heads)
        masks |= {mask.numpy().tobytes() for mask in table.masks}
    panels = []
    for rule, heads in same.values():
        table = _table(rule, length, BLOCK, geometry.is_causal)
        masked = int((table.class_mask >= 0).sum())
        panels.append(Panel(tuple(heads), rule, int(_pairs(table).sum()), table.num_tiles, masked))
    return tuple(panels), len(masks)


def _table(single: Pattern, length: int, block: int, is_causal: bool) -> TileTable:
    # wrapped, so that the table asks this one head for no other
    return tile_table(PerHead(parts=(single,)), length, length, block, block, is_causal=is_causal)


def _pairs(table: TileTable) -> Tensor:
    """(T,) visible pairs of every tile."""
    count = torch.cat([table.masks.sum((1, 2)), torch.tensor([table.block_q * table.block_k])])
    return count[table.class_mask.long()]
