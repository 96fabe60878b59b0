"""Blocked local attention (Image Transformer): a block of queries shares one neighbourhood, in a line or in a grid."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_efficient.attention.base import AttentionGeometry, EfficientAttentionConfig, MechanismFacts, register_mechanism
from hf_efficient.attention.base.pattern import PatternAttention, PatternAttentionConfig
from hf_efficient.patterns.kinds import BlockWindow
from hf_efficient.patterns.pattern import Pattern


@dataclass(frozen=True, kw_only=True)
class GridBlocks(Pattern):
    """Position p stands at row y = ⌊p / columns⌋ and column x = p mod columns; a block of height × width queries at (y0, x0)
    sees rows `[y0 - above, y0 + height + below)` and columns `[x0 - beside, x0 + width + beside)`.

    Attributes:
        by_block: keys whose block comes later than the query's, or that come later within it, are not seen: blocks are
            ordered by rows of blocks, tokens of a block by its rows.
    """

    columns: int
    height: int
    width: int
    above: int
    below: int
    beside: int
    by_block: bool = False

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        y, x, v, u = query // self.columns, query % self.columns, key // self.columns, key % self.columns
        top, left = y - y % self.height, x - x % self.width
        seen = (v >= top - self.above) & (v < top + self.height + self.below)
        seen = seen & (u >= left - self.beside) & (u < left + self.width + self.beside)
        return seen & (self._rank(v, u) <= self._rank(y, x)) if self.by_block else seen

    def _rank(self, y: Tensor, x: Tensor) -> Tensor:
        """Order of generation block by block."""
        block = y // self.height * -(-self.columns // self.width) + x // self.width
        return (block * self.height + y % self.height) * self.width + x % self.width

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        start = torch.arange(0, num_queries, block_q)
        end = (start + block_q).clamp(max=num_queries) - 1
        # the grid rows that a tile of queries needs are one range of keys
        top, bottom = ((position + offset) // self.columns // self.height * self.height for position in (start, end))
        first = ((top - self.above) * self.columns).clamp(min=0) // block_k
        last = ((bottom + self.height + self.below) * self.columns - 1).clamp(max=num_keys - 1) // block_k
        count = (last - first + 1).clamp(min=0)
        row = torch.arange(len(start)).repeat_interleave(count)
        return row, first[row] + torch.arange(len(row)) - (count.cumsum(0) - count)[row]

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor]:
        # everything repeats from one row of blocks to the next
        period = self.height * self.columns
        beyond = period + max(self.above, self.below) * self.columns + block_q + block_k
        return [query % period, (key - query).clamp(-beyond, beyond)]

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return key // self.columns >= following // self.columns // self.height * self.height - self.above


@dataclass(frozen=True, kw_only=True)
class ImageLocalAttentionConfig(PatternAttentionConfig):
    """Options of blocked local attention.

    Args:
        block_size: lq, queries that share their keys. With a grid: (height, width) of a block, or one number for both.
        memory_size: lm, keys beside the block: before it, and in encoders also after it. With a grid: (rows, columns); rows
            above, in encoders also below, columns on both sides.
        grid: (rows, columns) of a picture whose tokens come row by row, or `None` for a line of text. Longer inputs continue
            with further rows.
    """

    mechanism: ClassVar[str] = "image_local"

    block_size: int | tuple[int, ...] = 256
    memory_size: int | tuple[int, ...] = 256
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("block_size", 1), ("memory_size", 0), ("grid", 1)):
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            sizes = value if isinstance(value, tuple) else () if value is None else (value,)
            fits = all(type(size) is int and size >= least for size in sizes)
            if name == "grid":
                self._require(name, fits and (value is None or len(sizes) == 2), "(rows, columns), both ≥ 1, or None")
                continue
            pair = isinstance(value, tuple)
            rule = f"an integer ≥ {least}" + (
                ", or with a grid (rows, columns)" if self.grid is None else " or a pair"
            )
            self._require(name, fits and len(sizes) == 1 + pair and not (pair and self.grid is None), rule)
        if self.grid is not None:
            fits = all(size <= limit for size, limit in zip(self.pair("block_size"), self.grid, strict=True))
            self._require("block_size", fits, f"at most grid={self.grid}")

    def pair(self, name: str) -> tuple[int, int]:
        """(rows, columns) of an option in a grid."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value, value)

    def visible_keys(self, geometry: AttentionGeometry) -> Pattern:
        if self.grid is None:
            assert isinstance(self.block_size, int) and isinstance(self.memory_size, int)
            after = 0 if geometry.is_causal else self.memory_size
            return BlockWindow(block_size=self.block_size, before=self.memory_size, after=after)
        (height, width), (rows, columns) = self.pair("block_size"), self.pair("memory_size")
        return GridBlocks(
            columns=self.grid[1],
            height=height,
            width=width,
            above=rows,
            below=0 if geometry.is_causal else rows,
            beside=columns,
            by_block=geometry.is_causal,
        )


@register_mechanism
class ImageLocalAttention(PatternAttention):
    """All queries of a block see the block and its surroundings.

        y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j

    In a line, with σ the first position of the query's block, i sees j iff `σ - lm ≤ j < σ + lq + lm`; causal:
    `σ - lm ≤ j ≤ i`.

    In a grid, with (y0, x0) the origin of the query's block of hq × wq and (hm, wm) the memory, i sees j = (y, x) iff
    `y0 - hm ≤ y < y0 + hq + hm` and `x0 - wm ≤ x < x0 + wq + wm`; causal: `y < y0 + hq`, `j ≤ i`, and j does not come after
    i when blocks are generated one by one.

    Positions count from a row's first real token; the neighbourhood ends where the text ends. T5's bias is taken at the
    true offsets j - i. O(N (lq + lm)) time and memory, in a grid O(N (hq + hm) (wq + 2 wm)). No new parameters. While
    decoding, lq + lm past keys are needed, in a grid hq + hm rows. Source: Parmar et al. 2018 (arXiv 1802.05751), §3.2 and
    §3.3. Deviations: an encoder form; a grid is generated token by token in rows, so that causal means j ≤ i *and* the
    paper's order of blocks.
    """

    Config = ImageLocalAttentionConfig
    config: ImageLocalAttentionConfig
    facts = MechanismFacts(
        title="Blocked local attention (Image Transformer)",
        paper="arXiv 1802.05751, §3",
        time="n·(lq + lm)",
        memory="n·(lq + lm)",
        exact_when="block_size ≥ n (in a grid: one block covers it)",
        training="works without training; training restores long range",
    )

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        if config.grid is None:
            return dataclasses.replace(config, block_size=length)
        rows, columns = max(config.grid[0], -(-length // config.grid[1])), config.grid[1]
        return dataclasses.replace(config, grid=(rows, columns), block_size=(rows, columns))
