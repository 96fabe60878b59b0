"""cosFormer: ReLU features, reweighted by the cosine of the distance between query and key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_efficient.attention.base import AttentionGeometry, EfficientAttentionConfig, MechanismFacts, register_mechanism
from hf_efficient.attention.base.kernel import KernelAttention
from hf_efficient.ops.context import AttentionContext

EPSILON = 1e-3


@dataclass(frozen=True, kw_only=True)
class CosformerAttentionConfig(EfficientAttentionConfig):
    """Options of cosFormer attention.

    Args:
        max_length: M, the number of tokens over which a weight falls to 0; `None` = what the model's position table holds.
            Longer inputs are refused.
    """

    mechanism: ClassVar[str] = "cosformer"

    max_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None:
            self._require_positive("max_length")

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        return 2 * geometry.head_dim


@register_mechanism
class CosformerAttention(KernelAttention):
    """Kernel attention with ReLU features whose weights fall with the distance.

    With `x = q √(s √D)` or `k √(s √D)`, f(x) = max(x, 0) + ε, ε = 0.001, and `θ_i = π i / (2 M)`:

        φ(x_i) = [f(x_i) cos θ_i, f(x_i) sin θ_i]
        φ(q_i)·φ(k_j) = f(q_i)·f(k_j) cos(π (i - j) / (2 M))

    No parameters; it does not approximate the softmax, so what surrounds it must be trained. M is fixed: with the length of
    each call instead, features of cached tokens would change as the sequence grows. ε keeps a query whose features are all
    0 from losing its gradient. O(N D²) time, O(N D) memory; causal decoding keeps one (2D, D + 1) state per head. Attention
    dropout drops whole keys.

    Raises:
        ValueError: in a call of more than M tokens, those in the cache included.

    Source: Qin et al. 2022 (arXiv 2202.08791), §3.3.
    """

    Config = CosformerAttentionConfig
    config: CosformerAttentionConfig
    traceable = True
    facts = MechanismFacts(
        title="cosFormer",
        paper="arXiv 2202.08791",
        kind="kernel",
        time="n·d²",
        memory="n·d",
        exact_when="never; another kernel than the softmax",
        training="needed: without it most of the model is lost",
    )

    rotary_refusal = (
        "it weighs keys by their distance itself, and cuts the rotated vectors at 0; use hedgehog, performer or local"
    )
    by_position = True

    def __init__(self, config: CosformerAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        self.max_length = config.max_length or geometry.max_positions or 0

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if config.max_length is None and geometry.max_positions is None:
            reasons.append("cosformer: this model has no position table that bounds its length: give max_length=…")
        if config.max_length and geometry.max_positions and config.max_length < geometry.max_positions:
            reasons.append(
                f"max_length={config.max_length} is below the {geometry.max_positions} positions of the model: give at "
                "least that, or leave it out"
            )
        return reasons

    def log_features(self, x: Tensor, name: str) -> Tensor:
        return (x.relu() + EPSILON).log()

    def log_features_of(self, query: Tensor, key: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        n, s, device = query.shape[2], key.shape[2], key.device
        length = context.query_offset + n
        if length > self.max_length:
            raise ValueError(
                f"cosformer: {length} tokens are more than max_length={self.max_length}, over which weights fall to 0: "
                f"convert with max_length={length} or more."
            )
        log_query, log_key = super().log_features_of(query, key, context)
        positions = context.key_positions
        if positions is None:
            positions = torch.arange(s, device=device)[None]
        return (
            self._reweighted(log_query, torch.arange(length - n, length, device=device)[None]),
            # spare entries of a cache have position -1, and features of -inf
            self._reweighted(log_key, positions.clamp(min=0)),
        )

    def _reweighted(self, log_features: Tensor, positions: Tensor) -> Tensor:
        """(B, H, N, 2D) of (B, H, N, D), for tokens at positions (B or 1, N)."""
        angle = positions.to(log_features.dtype)[:, None, :, None] * (math.pi / (2 * self.max_length))
        return torch.cat([log_features + angle.cos().log(), log_features + angle.sin().log()], dim=-1)
