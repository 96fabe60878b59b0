"""Blocked local attention (Image Transformer): a block of queries shares one neighbourhood, in a line or in a grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_efficient.attention.base import AttentionGeometry, EfficientAttentionConfig, MechanismFacts, register_mechanism
from hf_efficient.attention.base.pattern import (
    PatternAttention,
    PatternAttentionConfig,
    picture_refusals,
    with_prefix,
)
from hf_efficient.patterns.kinds import BlockWindow
from hf_efficient.patterns.pattern import Pattern, _ranges, _row_starts


@dataclass(frozen=True, kw_only=True)
class GridBlocks(Pattern):
    """Position start + p stands at row y = ⌊p / columns⌋ and column x = p mod columns; a block of height × width queries at
    (y0, x0) sees rows `[y0 - above, y0 + height + below)` and columns `[x0 - beside, x0 + width + beside)`.

    Attributes:
        start: position of the first patch; tokens in front of it see nothing here, and are not seen.
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
    start: int = 0

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        i, j = query - self.start, key - self.start
        y, x, v, u = i // self.columns, i % self.columns, j // self.columns, j % self.columns
        top, left = y - y % self.height, x - x % self.width
        seen = (v >= top - self.above) & (v < top + self.height + self.below)
        seen = seen & (u >= left - self.beside) & (u < left + self.width + self.beside)
        seen = seen & (i >= 0) & (j >= 0) if self.start else seen
        return seen & (self._rank(v, u) <= self._rank(y, x)) if self.by_block else seen

    def _rank(self, y: Tensor, x: Tensor) -> Tensor:
        """Order of generation block by block."""
        block = y // self.height * -(-self.columns // self.width) + x // self.width
        return (block * self.height + y % self.height) * self.width + x % self.width

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        # the grid rows that a tile of queries needs are one range of keys
        top, bottom = (self._top(position) for position in _row_starts(num_queries, block_q, offset))
        first = self.start + (top - self.above) * self.columns
        last = self.start + (bottom + self.height + self.below) * self.columns - 1
        first, last = (bound.div(block_k, rounding_mode="floor") for bound in (first, last))
        return _ranges(first, last, -(-num_keys // block_k))

    def _top(self, query: Tensor | int) -> Any:
        """Row of the grid where the query's block begins."""
        return (query - self.start) // self.columns // self.height * self.height

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor]:
        # everything repeats from one row of blocks to the next
        period = self.height * self.columns
        beyond = period + max(self.above, self.below) * self.columns + block_q + block_k
        offset = (key - query).clamp(-beyond, beyond)
        if not self.start:
            return [query % period, offset]
        # tiles that begin in front of the picture are alike only where they are the same
        own = [torch.where(start < self.start, start, -1) for start in (query, key)]
        return [(query - self.start) % period, offset, *own]

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        return (key - self.start) // self.columns >= self._top(following) - self.above


@dataclass(frozen=True, kw_only=True)
class ImageLocalAttentionConfig(PatternAttentionConfig):
    """Options of blocked local attention.

    Args:
        block_size: lq, queries that share their keys. With a grid: (height, width) of a block, or one number for both.
        memory_size: lm, keys beside the block: before it, and in encoders also after it. With a grid: (rows, columns); rows
            above, in encoders also below, columns on both sides.
        grid: (rows, columns) of a picture whose tokens come row by row, or `None` for a line of text. Longer inputs continue
            with further rows. `"auto"` = the grid of the host's pictures, of whatever size they are, and a line where it has
            none.
    """

    mechanism: ClassVar[str] = "image_local"
    shares: ClassVar[Mapping[str, float]] = {"block_size": 1 / 2, "memory_size": 1 / 4}
    stored_defaults: ClassVar[Mapping[str, Any]] = {"grid": None}

    block_size: int | tuple[int, ...] = 256
    memory_size: int | tuple[int, ...] = 256
    grid: tuple[int, ...] | str | None = "auto"

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
                fits = value in (None, "auto") or (fits and len(sizes) == 2)
                self._require(name, fits, "(rows, columns), both ≥ 1, 'auto', or None")
                continue
            pair = isinstance(value, tuple)
            rule = f"an integer ≥ {least}" + (
                ", or with a grid (rows, columns)" if self.grid is None else " or a pair"
            )
            self._require(name, fits and len(sizes) == 1 + pair and not (pair and self.grid is None), rule)
        if isinstance(self.grid, tuple):
            self._require("block_size", self.fits(self.grid), f"at most grid={self.grid}")

    def fits(self, grid: tuple[int, ...]) -> bool:
        """Whether a block is no larger than a picture."""
        return all(size <= limit for size, limit in zip(self.pair("block_size"), grid, strict=True))

    def grid_of(self, geometry: AttentionGeometry) -> tuple[int, ...] | None:
        """(rows, columns) of a layer's tokens; `None` = they are a line."""
        return None if self.grid is None else geometry.grid or (None if self.grid == "auto" else self.grid)  # type: ignore[return-value]

    def pair(self, name: str) -> tuple[int, int]:
        """(rows, columns) of an option in a grid."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value, value)

    def visible_keys(self, geometry: AttentionGeometry) -> Pattern:
        grid = self.grid_of(geometry)
        if grid is None:
            assert isinstance(self.block_size, int) and isinstance(self.memory_size, int)
            after = 0 if geometry.is_causal else self.memory_size
            return BlockWindow(block_size=self.block_size, before=self.memory_size, after=after)
        (height, width), (rows, columns) = self.pair("block_size"), self.pair("memory_size")
        blocks = GridBlocks(
            columns=grid[1],
            height=height,
            width=width,
            above=rows,
            below=0 if geometry.is_causal else rows,
            beside=columns,
            by_block=geometry.is_causal,
            start=geometry.prefix_tokens,
        )
        return with_prefix(blocks, geometry.prefix_tokens)


@register_mechanism
class ImageLocalAttention(PatternAttention):
    """All queries of a block see the block and its surroundings.

        y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j

    In a line, with σ the first position of the query's block, i sees j iff `σ - lm ≤ j < σ + lq + lm`; causal:
    `σ - lm ≤ j ≤ i`.

    In a grid, with (y0, x0) the origin of the query's block of hq × wq and (hm, wm) the memory, i sees j = (y, x) iff
    `y0 - hm ≤ y < y0 + hq + hm` and `x0 - wm ≤ x < x0 + wq + wm`; causal: `y < y0 + hq`, `j ≤ i`, and j does not come after
    i when blocks are generated one by one. Class and register tokens in front of a picture see all tokens, and all see them.

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
        kind="fixed pattern",
        time="n·(lq + lm)",
        memory="n·(lq + lm)",
        exact_when="block_size ≥ n (in a grid: one block covers it)",
        training="works without training; training restores long range",
    )

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry) + picture_refusals(geometry, config.grid == "auto")
        grid = config.grid_of(geometry)
        pairs = [name for name in ("block_size", "memory_size") if isinstance(getattr(config, name), tuple)]
        if grid is None and not reasons:
            reasons += [
                f"{name}={getattr(config, name)} is possible with a grid alone: give one number" for name in pairs
            ]
        elif isinstance(config.grid, tuple) and grid != config.grid:
            reasons.append(
                f"grid={config.grid}: pictures of this host have {grid[0]} × {grid[1]} patches: leave it out"
            )
        elif grid is not None and not config.fits(grid):
            reasons.append(
                f"block_size={config.block_size} does not fit into {grid[0]} × {grid[1]} patches: give less"
            )
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        grid = config.grid_of(geometry)
        if grid is None:
            return dataclasses.replace(config, block_size=length)
        if geometry.grid is not None:  # also of larger pictures
            return dataclasses.replace(config, block_size=grid, memory_size=length)
        rows, columns = max(grid[0], -(-length // grid[1])), grid[1]
        return dataclasses.replace(config, grid=(rows, columns), block_size=(rows, columns))
