"""Set Transformer: attention through inducing points, which read the keys before queries read them; and its pooling head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    MechanismFacts,
    register_mechanism,
)
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.padding import real_tokens
from hf_efficient.ops.pooled_keys import PooledKeys, groups_of_rows, pooled_attention


@dataclass(frozen=True, kw_only=True)
class SetTransformerAttentionConfig(EfficientAttentionConfig):
    """Options of Set Transformer attention.

    Args:
        num_inducing: m, inducing points per head; a row of fewer tokens has one for each of them.
        segment_bias: start of β - log(m - 1), what a point's own segment of the row has over all others together: large =
            means of segments.
    """

    mechanism: ClassVar[str] = "set_transformer"
    shares: ClassVar[Mapping[str, float]] = {"num_inducing": 1}
    sizes: ClassVar[Mapping[str, str]] = {"num_inducing": ""}

    num_inducing: int = 64
    segment_bias: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("num_inducing")
        value = self.segment_bias
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        self._require("segment_bias", fits and value < float("inf"), "a number ≥ 0")

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        return min(self.num_inducing, length)


@register_mechanism
class SetTransformerAttention(EfficientAttention):
    """An induced set attention block (ISAB) of the host's own projections: points read the keys, queries read the points.

    With segment t of m equal ones of a row's real tokens, k̄_t its mean key, and per head the points x_t, τ and β:

        a_tj = softmax_j(s · (x_t + τ k̄_t)·k_j + β [j in segment t])      over the row's real tokens j
        k̃_t = Σ_j a_tj k_j,   ṽ_t = Σ_j a_tj v_j
        y_i = Σ_t softmax_t(s · q_i·k̃_t + Σ_j a_tj b(j - i) + log |segment t|) ṽ_t

    x = 0 and τ = 0 at the start: for large β pooled keys are means of groups, and with m ≥ n the tokens themselves; outside
    its segment a point has 1 / (1 + e^segment_bias) of its weight. τ lets points follow the data, x lets them look for
    something of their own; both are learned, and so is β.

    O(N m) time and memory, (m D + 2) parameters per head. Source: Lee et al. 2019 (arXiv 1810.00825), §3.2. Departures: the
    inner block has no residual, norm or feed-forward layer of its own, with which it could never start as the pretrained
    attention; groups of tokens give the points an order; log-counts.
    """

    Config = SetTransformerAttentionConfig
    config: SetTransformerAttentionConfig
    traceable = True
    facts = MechanismFacts(
        title="Set Transformer (ISAB)",
        paper="arXiv 1810.00825",
        kind="memory",
        time="n·m",
        memory="n·m",
        exact_when="num_inducing ≥ n and segment_bias → ∞",
        training="needed: without it much of the model is lost",
    )
    causal_refusal = (
        "inducing points read the future; use memory_compressed, whose pooled keys are complete before they are seen, or "
        "local, longformer, bigbird or performer"
    )
    rotary_refusal = "inducing points stand at no position; use linformer, nystromformer or local"
    left_aligned = True
    transfer_learning_rate = 1e-2

    def __init__(self, config: SetTransformerAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        heads = geometry.num_heads
        self.inducing_points = nn.Parameter(torch.empty(heads, config.num_inducing, geometry.head_dim))
        self.key_weight = nn.Parameter(torch.empty(heads))
        self.segment_bias = nn.Parameter(torch.empty(heads))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.inducing_points)
        nn.init.zeros_(self.key_weight)
        others = max(1, self.config.num_inducing - 1)
        nn.init.constant_(self.segment_bias, self.config.segment_bias + math.log(others))

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        start = {"inducing_points": "zero", "key_weight": "zero"}
        return start | {"segment_bias": "close to means of segments"}

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(config, num_inducing=length, segment_bias=40.0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        token_mask = real_tokens(context.key_padding_mask, key)
        own = groups_of_rows(token_mask, self.config.num_inducing)  # (B or 1, m, S)
        size = own.sum(-1)
        wide = torch.promote_types(key.dtype, torch.float32)
        with torch.autocast(key.device.type, enabled=False):
            tokens = key.to(wide).masked_fill(~token_mask[:, None, :, None], 0.0)
            means = (own.to(wide) / size.clamp(min=1)[..., None])[:, None] @ tokens
            points = self.inducing_points.to(wide) + self.key_weight.to(wide)[:, None, None] * means
            logits = context.scaling * points @ tokens.transpose(-1, -2)
            logits = logits + self.segment_bias.to(wide)[:, None, None] * own[:, None]
            weights = logits.masked_fill(~token_mask[:, None, None], torch.finfo(wide).min).softmax(-1)
            # a row without any real token has weights of its padding, which no pooled key shows
            keys = weights @ tokens
            values = weights @ value.to(wide).masked_fill(~token_mask[:, None, :, None], 0.0)
        return pooled_attention(
            query, PooledKeys(keys.to(key.dtype), values.to(value.dtype), size[:, None], weights), context
        )
