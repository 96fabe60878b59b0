"""Sliding-window ("local") attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_efficient.attention.base import AttentionGeometry, EfficientAttentionConfig, MechanismFacts, register_mechanism
from hf_efficient.attention.base.pattern import PatternAttention, PatternAttentionConfig
from hf_efficient.ops.block_sparse.windows import window_sides
from hf_efficient.patterns.kinds import GlobalColumns, Window
from hf_efficient.patterns.pattern import Pattern


@dataclass(frozen=True, kw_only=True)
class LocalAttentionConfig(PatternAttentionConfig):
    """Options of sliding-window attention.

    Args:
        attention_window: w, in tokens, even. Encoder: w // 2 keys on each side plus the token itself. Causal: the last
            w keys, the token itself included.
        dilation: distance between neighbouring visible keys.
        sink_tokens: so many tokens from each row's first real one on are seen by every query as well.
    """

    mechanism: ClassVar[str] = "local"
    shares: ClassVar[Mapping[str, float]] = {"attention_window": 1}

    attention_window: int = 512
    dilation: int = 1
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("attention_window", "dilation")
        self._require("attention_window", self.attention_window % 2 == 0, "even: half of it lies on each side")
        self._require_at_least(0, "sink_tokens")

    def visible_keys(self, geometry: AttentionGeometry) -> Pattern:
        left, right = window_sides(self.attention_window, geometry.is_causal)
        window = Window(left=left, right=right, dilation=self.dilation)
        return window | GlobalColumns(positions=tuple(range(self.sink_tokens))) if self.sink_tokens else window


@register_mechanism
class LocalAttention(PatternAttention):
    """Each token attends to its neighbours.

    Query i sees key j iff `j - i = δ m` with `|m| ≤ w / 2` (causal: `-w < m ≤ 0`), δ the dilation, or `j < sink_tokens`:

        y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j

    O(N w) time and memory. No new parameters. Window and bias depend on offsets alone, and sinks are counted from a row's
    first real token, so padding on either side changes nothing. Source: Beltagy et al. 2020 (arXiv 2004.05150), §3.1;
    Parmar et al. 2018 (arXiv 1802.05751), §3.2; sinks: Xiao et al. 2024 (arXiv 2309.17453), §3.
    """

    Config = LocalAttentionConfig
    config: LocalAttentionConfig
    facts = MechanismFacts(
        title="Sliding-window attention",
        paper="arXiv 2004.05150, §3.1",
        kind="fixed pattern",
        time="n·w",
        memory="n·w",
        exact_when="attention_window ≥ 2n",
        training="works without training; training restores long range",
    )

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(config, attention_window=2 * length, dilation=1)
