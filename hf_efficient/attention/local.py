"""Sliding-window ("local") attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..base import (
    AttentionContext,
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    MechanismFacts,
    register_mechanism,
)
from ..ops.windows import window_attention, window_sides


@dataclass(frozen=True, kw_only=True)
class LocalAttentionConfig(EfficientAttentionConfig):
    """Options of sliding-window attention.

    Args:
        attention_window: w, in tokens, even. Encoder: w // 2 keys on each side plus the token itself. Causal: the last
            w keys, the token itself included.
        dilation: distance between neighbouring visible keys.
    """

    mechanism: ClassVar[str] = "local"

    attention_window: int = 512
    dilation: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("attention_window", "dilation")
        self._require("attention_window", self.attention_window % 2 == 0, "even: half of it lies on each side")


@register_mechanism
class LocalAttention(EfficientAttention):
    """Each token attends to its neighbours.

    Query i sees key j iff `j - i = δ m` with `|m| ≤ w / 2` (causal: `-w < m ≤ 0`), δ the dilation:

        y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j

    O(N w) time and memory. No new parameters. Window and bias depend on offsets alone, so padding on either side changes
    nothing. Source: Beltagy et al. 2020 (arXiv 2004.05150), §3.1; Parmar et al. 2018 (arXiv 1802.05751), §3.2.
    """

    Config = LocalAttentionConfig
    config: LocalAttentionConfig
    facts = MechanismFacts(
        title="Sliding-window attention",
        paper="arXiv 2004.05150, §3.1",
        time="n·w",
        memory="n·w",
        exact_when="attention_window ≥ 2n",
        training="works untrained; training restores long range",
    )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        left, right = window_sides(self.config.attention_window, context.is_causal)
        return window_attention(
            query,
            key,
            value,
            left=left,
            right=right,
            scaling=context.scaling,
            dilation=self.config.dilation,
            key_padding_mask=context.key_padding_mask,
            relative_bias=context.relative_bias,
            dropout=context.dropout,
            query_offset=context.query_offset,
        )

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(config, attention_window=2 * length, dilation=1)
