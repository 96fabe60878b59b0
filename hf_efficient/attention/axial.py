"""Axial attention: the tokens as a grid, attention along its rows and columns."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_efficient.attention.base import AttentionGeometry, EfficientAttentionConfig, MechanismFacts, register_mechanism
from hf_efficient.attention.base.pattern import (
    PatternAttention,
    PatternAttentionConfig,
    picture_refusals,
    two_part_pattern,
    two_part_refusals,
    with_prefix,
)
from hf_efficient.patterns.kinds import BlockWindow, Strided
from hf_efficient.patterns.pattern import Pattern

ROW_LENGTH = 64
FORMS = ("union", "split", "interleaved")


@dataclass(frozen=True, kw_only=True)
class AxialAttentionConfig(PatternAttentionConfig):
    """Options of axial attention.

    Args:
        row_length: C, tokens per row of the grid; `None` = the columns of the host's pictures, else 64. For text about √n
            makes cost lowest. It stays the same at every length, but follows the size of pictures.
        form: `"union"` (every head sees row and column), `"split"` (the first half of the heads sees rows, the others
            columns), or `"interleaved"` (even layers see rows, odd layers columns).
    """

    mechanism: ClassVar[str] = "axial"

    row_length: int | None = None
    form: str = "union"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_length is not None:
            self._require_positive("row_length")
        self._require("form", self.form in FORMS, f"one of {', '.join(FORMS)}")

    def visible_keys(self, geometry: AttentionGeometry) -> Pattern:
        length, prefix = (self.row_length or ROW_LENGTH, 0)
        if geometry.grid is not None:
            length, prefix = geometry.grid[1], geometry.prefix_tokens
        row, column = BlockWindow(block_size=length, start=prefix), Strided(stride=length)
        return with_prefix(two_part_pattern(self.form, row, column, geometry), prefix)

    @classmethod
    def of_size(cls, size: int, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        # below √n the far part would outgrow the near one
        return cls(row_length=max(math.isqrt(length), size))


@register_mechanism
class AxialAttention(PatternAttention):
    """Token i stands at row y = ⌊i / C⌋ and column x = i mod C of a grid, and attends along both.

        y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j

    Query i sees key j iff `⌊i / C⌋ = ⌊j / C⌋` (row) or `i mod C = j mod C` (column); causal: additionally j ≤ i. A token
    counts itself once. The last row may be short. In pictures i counts patches; class and register tokens in front of them
    see all tokens, and all see them. Positions count from a row's first real token; T5's bias is taken at the
    true offsets j - i.

    O(N (C + N / C)) time and memory. No new parameters. While decoding, columns need every past key, though a step looks at
    C + N / C of them. Source: Ho et al. 2019 (arXiv 1912.12180), §3. Deviations: one softmax over row and column, or
    one of the two per head or layer, in place of separate layers for each, which would double the number of layers; j ≤ i
    in place of shifted rows and columns, since the models' labels are shifted already.
    """

    Config = AxialAttentionConfig
    config: AxialAttentionConfig
    facts = MechanismFacts(
        title="Axial attention",
        paper="arXiv 1912.12180, §3",
        kind="fixed pattern",
        time="n·(C + n/C)",
        memory="n·(C + n/C)",
        exact_when="form = union and row_length ≥ n; in pictures of one row or column alone",
        training="works without training; training restores long range",
    )

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry) + picture_refusals(geometry, config.row_length is None)
        if geometry.grid is not None and config.row_length not in (None, geometry.grid[1]):
            reasons.append(
                f"row_length={config.row_length}: this host has {geometry.grid[1]} patches per row: leave it out"
            )
        return reasons + two_part_refusals("form", config.form, "union", geometry)

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig | None:
        if geometry.grid is not None:
            return dataclasses.replace(config, form="union") if 1 in geometry.grid else None
        return dataclasses.replace(config, row_length=length, form="union")
