"""The least work of a mechanism at a point, and what the hardware reaches at best."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hf_efficient.attention.base.pattern import PatternAttentionConfig
from hf_efficient.attention.base.registry import get_mechanism
from hf_efficient.benchmarks.baselines import SLOT, TILE, Point, geometry_of, settings_of
from hf_efficient.ops.block_sparse.decompose import stride_of
from hf_efficient.patterns.kinds import GlobalColumns, GlobalRows, Window
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.tile_table import tile_table
from hf_efficient.profiling.timing import timed


class Work(NamedTuple):
    """Visible pairs over all heads and batch entries; pairs of the 64×64 tiles that hold them, `None` where tiles are not
    what is computed (strides are regrouped); bytes of query, key, value and output, each once; head width."""

    pairs: int
    tile_pairs: int | None
    bytes: int
    width: int

    def flops(self, products: int) -> float:
        """Operations of so many matrix products over the visible pairs: 2 forward, 5 backward."""
        return 2.0 * self.width * products * self.pairs

    def tile_flops(self, products: int) -> float | None:
        return None if self.tile_pairs is None else 2.0 * self.width * products * self.tile_pairs


def count_pairs(pattern: Pattern, length: int, heads: int) -> tuple[int, int]:
    """(visible pairs, pairs of the tiles that hold any) of all heads, O(tiles)."""
    table = tile_table(pattern.at_length(length), length, length, TILE, TILE)
    area, shared = TILE * TILE, heads if table.heads == 1 else 1
    partial = table.class_mask[table.class_mask >= 0].long()
    pairs = int(table.masks.flatten(1).sum(1, dtype=torch.long)[partial].sum())
    pairs += area * int((table.class_mask < 0).sum())
    return pairs * shared, table.num_tiles * area * shared


def pattern_of(name: str, point: Point) -> Pattern:
    """The keys that one of our mechanisms shows every query, global rows included."""
    config: Any = get_mechanism(name).Config.from_dict(settings_of(name))
    if isinstance(config, PatternAttentionConfig):
        return config.visible_keys(geometry_of(point))
    window = Window(left=config.attention_window // 2, right=config.attention_window // 2)
    if name == "longt5":
        return window
    first = tuple(range(config.num_global_tokens))
    return window | GlobalColumns(positions=first) | GlobalRows(positions=first)


def work_of(name: str, point: Point) -> Work:
    """The least work of one of our mechanisms at a point."""
    pattern, n = pattern_of(name, point), point.length
    pairs, tiles = count_pairs(pattern, n, point.heads)
    regrouped = any(stride_of(pattern.head(h)) is not None for h in range(pattern.num_heads))
    if name == "longt5":
        # slots are no tokens, hence in no tile
        pairs, regrouped = pairs + point.heads * n * (n // SLOT), True
    moved = 4 * point.batch * point.heads * n * point.width * torch.finfo(point.kind).bits // 8
    return Work(pairs * point.batch, None if regrouped else tiles * point.batch, moved, point.width)


def ceilings(point: Point) -> dict[str, float]:
    """What the hardware reaches at best: operations per second of a matrix product, bytes per second of a copy."""
    on_gpu = point.device.startswith("cuda")
    size = 8192 if on_gpu else 1024
    a, b = (torch.randn(size, size, device=point.device, dtype=point.kind) for _ in range(2))
    source = torch.empty(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=point.device)
    target = torch.empty_like(source)
    calls = {"product": lambda mark: torch.mm(a, b), "copy": lambda mark: target.copy_(source)}
    best = {name: min(t.total for t in times) for name, times in timed(calls, 5, 10, point.device).items()}  # type: ignore[arg-type]
    return {"flops": 2 * size**3 / best["product"], "bytes": 2 * len(source) / best["copy"]}
