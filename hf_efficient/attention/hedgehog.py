"""Hedgehog: a learned feature map with softmax-normalised features of both signs, with a window of exact attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_efficient.attention.base import MechanismFacts, register_mechanism
from hf_efficient.attention.base.hybrid import HybridAttention, HybridAttentionConfig


@dataclass(frozen=True, kw_only=True)
class HedgehogAttentionConfig(HybridAttentionConfig):
    """Options of Hedgehog attention.

    Args:
        attention_window: w, in tokens, even; 0 = no window. Encoder: w // 2 keys on each side plus the token itself are
            exact. Causal: the last w keys, the token itself included.
        sink_tokens: so many tokens from each row's first real one on are exact for every query, in addition to a window.
        feature_dim: rows of the map of each head, which gives twice as many features; `None` = the head's width D.
    """

    mechanism: ClassVar[str] = "hedgehog"
    shares: ClassVar[Mapping[str, float]] = {"attention_window": 1 / 2, "feature_dim": 1 / 4}

    features_per_row: ClassVar[int] = 2

    attention_window: int = 64


@register_mechanism
class HedgehogAttention(HybridAttention):
    """Exact attention in a window, and a learned map with spiky positive features for all keys outside it.

    With `x = q √(s √D)` or `k √(s √D)` (q and k themselves where s = 1 / √D) and a map W of (feature_dim, D) per head,
    one for queries and one for keys:

        φ(x) = [softmax(W x), softmax(-W x)]
        p_ij = exp(s · q_i·k_j + b(j - i))                                    in the window, and at sinks
        p_ij = exp(g + a (L_i - m_i) + s · q_i·k̄_i + b_far) φ(q_i)·φ(k_j)     elsewhere
        y_i = Σ_j p_ij v_j / Σ_j p_ij

    L_i is the log-sum-exp and m_i the mean of the window's logits, k̄_i the mean of its keys, b_far the bias of all
    far keys of that direction; g and a are learned per head. Without a window `p_ij = φ(q_i)·φ(k_j)` for all keys. W =
    I at the start; it is trained layer by layer against the pretrained attention. O(N (w + M) D) time, O(N (w + M))
    memory with M = 2 feature_dim; causal decoding keeps w keys, the sinks and one (M, D + 1) state per head. Attention
    dropout drops single weights in the window and whole keys outside it.

    Source: Zhang et al. 2024 (arXiv 2402.04347), §4; the hybrid: Zhang et al. 2024 (arXiv 2410.10254, LoLCATs), §3.3.
    Departure: the far part is measured against the mean and the log-sum-exp of the window's logits, not against their
    maximum. Sinks: Xiao et al. 2024 (arXiv 2309.17453), §3.
    """

    Config = HedgehogAttentionConfig
    config: HedgehogAttentionConfig
    facts = MechanismFacts(
        title="Hedgehog (LoLCATs)",
        paper="arXiv 2402.04347",
        kind="kernel",
        time="n·(w + m)·d",
        memory="n·(w + m)",
        exact_when="attention_window ≥ 2n",
        training="needed: a short transfer of the feature maps",
    )

    def log_features(self, x: Tensor, name: str) -> Tensor:
        weight = self.query_map if name == "query" else self.key_map
        projected = x @ weight.to(x.dtype).transpose(-1, -2)
        return torch.cat([projected.log_softmax(-1), (-projected).log_softmax(-1)], dim=-1)
