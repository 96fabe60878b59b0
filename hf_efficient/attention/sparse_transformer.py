"""Sparse Transformer: neighbours, and one key in every stride."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_efficient.attention.base import AttentionGeometry, EfficientAttentionConfig, MechanismFacts, register_mechanism
from hf_efficient.attention.base.pattern import (
    PatternAttention,
    PatternAttentionConfig,
    two_part_pattern,
    two_part_refusals,
)
from hf_efficient.patterns.kinds import BlockWindow, Strided, Summary, Window
from hf_efficient.patterns.pattern import Pattern

PATTERNS = ("strided", "fixed")
SUMMARY = 8
HEAD_POLICIES = ("merged", "split", "interleaved")


@dataclass(frozen=True, kw_only=True)
class SparseTransformerAttentionConfig(PatternAttentionConfig):
    """Options of Sparse Transformer attention.

    Args:
        pattern: `"strided"` (for data with rows, whose length is the stride) or `"fixed"` (for text).
        stride: l, in tokens; about √n makes cost lowest.
        summary_size: c, tokens at the end of every block of l that all later blocks see, with `"fixed"`; `None` = 8 there,
            or l where that is less. With `"strided"` there is none.
        head_policy: `"merged"` (every head sees both parts), `"split"` (the first half of the heads sees the near part, the
            others the far one), or `"interleaved"` (even layers the near part, odd layers the far one).
    """

    mechanism: ClassVar[str] = "sparse_transformer"

    pattern: str = "strided"
    stride: int = 128
    summary_size: int | None = None
    head_policy: str = "merged"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("pattern", self.pattern in PATTERNS, f"one of {', '.join(PATTERNS)}")
        self._require("head_policy", self.head_policy in HEAD_POLICIES, f"one of {', '.join(HEAD_POLICIES)}")
        self._require_positive("stride")
        if self.summary_size is not None:
            self._require("summary_size", self.pattern == "fixed", "None with pattern='strided', which has no summary")
            self._require_positive("summary_size")
            self._require("summary_size", self.summary_size <= self.stride, f"at most stride={self.stride}")

    @classmethod
    def without_effect(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("summary_size",) if options.get("pattern", cls.pattern) == "strided" else ()

    def visible_keys(self, geometry: AttentionGeometry) -> Pattern:
        size, itself = self.stride, Window(left=0, right=0)
        if self.pattern == "strided":
            near = Window(left=size - 1, right=0 if geometry.is_causal else size - 1)
            return two_part_pattern(self.head_policy, near, Strided(stride=size), geometry)
        far: Pattern = Summary(stride=size, size=self.summary_size or min(SUMMARY, size))
        if self.head_policy != "merged":
            far = far | itself  # nobody may be left without a key
        return two_part_pattern(self.head_policy, BlockWindow(block_size=size), far, geometry)

    @classmethod
    def of_size(cls, size: int, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        # below √n the far part would outgrow the near one
        return cls(stride=max(math.isqrt(length), size))


@register_mechanism
class SparseTransformerAttention(PatternAttention):
    """Each token attends to its surroundings and to one key, or a few, in every stride.

        y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j

    Query i sees key j iff, with stride l and summary size c (causal: additionally j ≤ i),

        strided:  |i - j| < l  (near)  or  (i - j) mod l = 0  (far)
        fixed:    ⌊i / l⌋ = ⌊j / l⌋  (near)  or  j mod l ≥ l - c  (far)

    Positions count from a row's first real token. Two layers connect every pair of tokens of a strided model.

    O(N (l + N / l)) time and memory, fixed: O(N (l + c N / l)); the strided part is computed as l dense sequences of N / l
    tokens, as in §4.3 of the paper. No new parameters. While decoding, the strided part needs every past key, since each
    residue class returns. Source: Child et al. 2019 (arXiv 1904.10509), §4.2, §4.3. Deviations: an encoder form; a token of
    the fixed far part alone (`"split"`, `"interleaved"`) also sees itself, without which the first l - c rows are empty;
    the same columns for all heads of the fixed pattern, where the official code gives heads different ones.
    """

    Config = SparseTransformerAttentionConfig
    config: SparseTransformerAttentionConfig
    facts = MechanismFacts(
        title="Sparse Transformer",
        paper="arXiv 1904.10509, §4",
        kind="fixed pattern",
        time="n·(l + n/l); fixed: n·(l + c·n/l)",
        memory="n·(l + n/l)",
        exact_when="head_policy = merged and stride ≥ n",
        training="works without training; training restores long range",
    )

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        refusals = two_part_refusals("head_policy", config.head_policy, "merged", geometry)
        return super().unsupported(config, geometry) + refusals

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        summary_size = config.summary_size and min(config.summary_size, length)
        return dataclasses.replace(config, stride=length, summary_size=summary_size, head_policy="merged")
