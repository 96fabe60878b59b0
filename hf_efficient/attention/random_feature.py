"""Random feature attention (RFA): softmax attention of unit-length queries and keys, with an optional recency gate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttentionConfig,
    MechanismFacts,
    SourceAttention,
    register_mechanism,
)
from hf_efficient.attention.base.kernel import KernelAttention
from hf_efficient.ops.affine_features import AffineFeatures
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.random_features import orthogonal_features

# at a gate of 1 - e^-10 the oldest of 1000 tokens keeps 0.96 of its weight
OPEN_GATE = 10.0


@dataclass(frozen=True, kw_only=True)
class RandomFeatureAttentionConfig(EfficientAttentionConfig):
    """Options of random feature attention.

    Args:
        num_features: M, random features per head; `None` = twice the head's width.
        gate: learn per head how fast older keys are forgotten; causal layers only.
        seed: of the features, together with the layer.
    """

    mechanism: ClassVar[str] = "random_feature"
    shares: ClassVar[Mapping[str, float]] = {"num_features": 1}

    num_features: int | None = None
    gate: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_features is not None:
            self._require_positive("num_features")
        self._require("gate", isinstance(self.gate, bool), "true or false")
        self._require_at_least(0, "seed")

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        return self.num_features or 2 * geometry.head_dim


@register_mechanism
class RandomFeatureAttention(KernelAttention):
    """Kernel attention with positive random features of normalised queries and keys.

    With `q̂ = q / ‖q‖`, `k̂ = k / ‖k‖`, learned σ of (D,) per head, and M feature vectors ω_r:

        φ(x)_r = exp(ω_r·(σ ∘ x) - ‖σ ∘ x‖² / 2),   E φ(q̂)·φ(k̂) = M exp(Σ_d σ_d² q̂_d k̂_d)
        y_i = Σ_j w_ij φ(q̂_i)·φ(k̂_j) v_j / Σ_j w_ij φ(q̂_i)·φ(k̂_j)

    where w_ij = 1, or with a gate `g_t = sigmoid(a·k_t + b)`, a and b per head, `w_ij = (1 - g_j) Π_{j<t≤i} g_t`. σ² starts
    at the product of the lengths that weights and biases of the query and key projections give inputs of unit variance,
    over √D; a = 0 and b = 10 at the start, a gate that is open. Lengths of single queries and keys are lost, so it must be
    trained. O(N M D) time, O(N M) memory, in both directions on the CPU O((N + M) D); causal decoding keeps one (M, D + 1)
    state per head. Attention dropout drops whole keys.

    Source: Peng et al. 2021 (arXiv 2103.02143), §3. Departures: exponential in place of trigonometric features, whose
    signed sums make the normaliser cross 0; features are orthogonal in blocks and never drawn again; the gate reads the
    head's key in place of the layer's input, of which it is a linear map, so that the cache holds what it needs.
    """

    Config = RandomFeatureAttentionConfig
    config: RandomFeatureAttentionConfig
    transfer_learning_rate: ClassVar[float] = 1e-2
    traceable = True
    facts = MechanismFacts(
        title="Random feature attention (RFA)",
        paper="arXiv 2103.02143",
        kind="kernel",
        time="n·m·d",
        memory="n·m",
        exact_when="never; lengths of queries and keys are lost",
        training="needed: without it most of the model is lost",
    )

    features: Tensor

    def __init__(self, config: RandomFeatureAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        heads, width = geometry.num_heads, geometry.head_dim
        self.register_buffer("features", torch.empty(config.num_features or 2 * width, width))
        self.log_sigma = nn.Parameter(torch.empty(heads, width))
        if config.gate:
            self.gate_weight, self.gate_bias = (
                nn.Parameter(torch.empty(heads, width)),
                nn.Parameter(torch.empty(heads)),
            )

    def reset_parameters(self) -> None:
        with torch.no_grad():
            generator = self.geometry.generator(self.config.seed)
            self.features.copy_(orthogonal_features(len(self.features), self.geometry.head_dim, generator))
        nn.init.zeros_(self.log_sigma)
        if self.config.gate:
            nn.init.zeros_(self.gate_weight)
            nn.init.constant_(self.gate_bias, OPEN_GATE)

    @torch.no_grad()
    def initialise_from(self, source: SourceAttention) -> dict[str, str]:
        lengths = [self._length(weights) for weights in (source.query, source.key)]
        # with s = 1 / √D
        self.log_sigma.copy_((lengths[0] * lengths[1] / math.sqrt(self.geometry.head_dim)).log()[:, None] / 2)
        origin = {
            "features": f"orthogonal random features of seed {self.config.seed}, layer {self.geometry.layer}",
            "log_sigma": "lengths of the query and key projections",
        }
        return origin | ({"gate_weight": "zero", "gate_bias": f"{OPEN_GATE}"} if self.config.gate else {})

    def _length(self, weights: Any) -> Tensor:
        """(H,) root mean square length of a head's projection of inputs of zero mean and unit variance."""
        squares = weights.weight.float().square().sum(1)
        if weights.bias is not None:
            squares = squares + weights.bias.float().square()
        # of a head without any weights, whose attention is uniform, the logarithm must stay finite
        return squares.unflatten(0, (self.geometry.num_heads, -1)).sum(-1).sqrt().clamp(min=1e-6)

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if config.gate and not geometry.is_causal:
            reasons.append(
                "random_feature: a gate forgets the past and has no meaning where tokens see both sides: gate=False"
            )
        return reasons

    def affine_features(self, x: Tensor, name: str) -> AffineFeatures:
        x = F.normalize(x, dim=-1) * self.log_sigma.to(x.dtype).exp()[:, None]
        # -‖x‖² / 2 is the same number for all features of a query, and cancels
        offset = None if name == "query" else x.square().sum(-1) / -2
        return AffineFeatures(x, self.features.to(x.dtype)[None, None], offset)

    def log_features_of(self, query: Tensor, key: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        log_query, log_key = super().log_features_of(query, key, context)
        if self.config.gate:
            log_gate, log_rest = self._gate(key, context, log_key.dtype)
            # Π_{j<t≤i} g_t = e^(G_i - G_j), of which G_i cancels in the ratio
            log_key = log_key + (log_rest - log_gate.cumsum(-1))[..., None]
        return log_query, log_key

    def log_decay(self, key: Tensor, context: AttentionContext) -> Tensor | None:
        return self._gate(key, context, torch.promote_types(key.dtype, torch.float32))[0] if self.config.gate else None

    def _gate(self, key: Tensor, context: AttentionContext, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, H, S) logarithms of g and 1 - g; padding forgets nothing."""
        logit = (key.to(dtype) * self.gate_weight.to(dtype)[:, None]).sum(-1) + self.gate_bias.to(dtype)[:, None]
        log_gate = F.logsigmoid(logit)
        if context.key_padding_mask is not None:
            log_gate = log_gate.masked_fill(~context.key_padding_mask[:, None], 0.0)
        return log_gate, F.logsigmoid(-logit)
