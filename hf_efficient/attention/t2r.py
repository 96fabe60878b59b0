"""T2R: a learned ReLU feature map ("Transformer to RNN"), alone or with a window of exact attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.attention.base import AttentionGeometry, MechanismFacts, register_mechanism
from hf_efficient.attention.base.hybrid import HybridAttention, HybridAttentionConfig

EPSILON = 1e-3


@dataclass(frozen=True, kw_only=True)
class T2RAttentionConfig(HybridAttentionConfig):
    """Options of T2R attention.

    Args:
        attention_window: w, in tokens, even; 0 = no window. Encoder: w // 2 keys on each side plus the token itself are
            exact. Causal: the last w keys, the token itself included.
        sink_tokens: so many tokens from each row's first real one on are exact for every query, in addition to a window.
        feature_dim: features of each head; `None` = the head's width D.
    """

    mechanism: ClassVar[str] = "t2r"
    shares: ClassVar[Mapping[str, float]] = {"feature_dim": 1}


@register_mechanism
class T2RAttention(HybridAttention):
    """A learned ReLU map for all keys, or for those outside a window of exact attention.

    With `x = q √(s √D)` or `k √(s √D)` (q and k themselves where s = 1 / √D), and W of (feature_dim, D) and c of
    (feature_dim,) per head, one pair for queries and one for keys:

        φ(x) = max(W x + c, 0) + ε,   ε = 0.001
        y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)

    With a window, near keys keep their softmax weights, and far ones join them as in Hedgehog. W = I and c = 0 at the
    start; both must be trained. ε keeps a query or key whose features are all 0 from losing its gradient; such a query
    (one of 2^M with random signs) divides by ε alone, and its output is steep. O(N (w + M) D) time, O(N (w + M)) memory
    with M = feature_dim; causal decoding keeps w keys, the sinks and one (M, D + 1) state per head. Attention dropout
    drops single weights in the window and whole keys outside it.

    Source: Kasai et al. 2021 (arXiv 2103.13076), §3.
    """

    Config = T2RAttentionConfig
    config: T2RAttentionConfig
    facts = MechanismFacts(
        title="T2R",
        paper="arXiv 2103.13076",
        kind="kernel",
        time="n·(w + m)·d",
        memory="n·(w + m)",
        exact_when="attention_window ≥ 2n",
        training="needed: transfer of the feature maps, then finetuning",
    )

    def __init__(self, config: T2RAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        shape = self.query_map.shape[:2]
        self.query_bias, self.key_bias = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.query_bias)
        nn.init.zeros_(self.key_bias)

    @torch.no_grad()
    def initialise_from(self, source: Any) -> dict[str, str]:
        return super().initialise_from(source) | {"query_bias": "zero", "key_bias": "zero"}

    def log_features(self, x: Tensor, name: str) -> Tensor:
        weight, bias = getattr(self, f"{name}_map"), getattr(self, f"{name}_bias")
        projected = x @ weight.to(x.dtype).transpose(-1, -2) + bias.to(x.dtype)[:, None]
        return (projected.relu() + EPSILON).log()
