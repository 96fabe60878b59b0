"""Performer: softmax attention estimated with positive orthogonal random features (FAVOR+)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import (
    AttentionContext,
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    MechanismFacts,
    register_mechanism,
)
from ..ops.linear_attention import linear_attention

KERNELS = ("softmax", "relu")
RELU_EPSILON = 1e-3


@dataclass(frozen=True, kw_only=True)
class PerformerAttentionConfig(EfficientAttentionConfig):
    """Options of Performer attention.

    Args:
        num_features: M, random features per head; `None` = the power of two at or above D ln D for head width D.
        kernel: `"softmax"` estimates the pretrained attention; `"relu"` is another kernel, which must be trained.
        redraw_interval: optimiser steps between new draws of the features, made by
            `hf_efficient.training.RedrawFeatures`; 0 = never.
        seed: of the features, together with the layer and the number of redraws.
    """

    mechanism: ClassVar[str] = "performer"

    num_features: int | None = None
    kernel: str = "softmax"
    redraw_interval: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_features is not None:
            self._require_positive("num_features")
        self._require("kernel", self.kernel in KERNELS, f"one of {', '.join(KERNELS)}")
        for name in ("redraw_interval", "seed"):
            value = getattr(self, name)
            self._require(name, type(value) is int and value >= 0, "an integer ≥ 0")


@register_mechanism
class PerformerAttention(EfficientAttention):
    """Kernel attention with random features whose mean is the softmax kernel.

    With `x = √s q`, `z = √s k` and M feature vectors ω_r:

        φ(x)_r = exp(ω_r·x - ‖x‖² / 2)      (kernel "softmax": E φ(x)·φ(z) / M = exp(s · q·k))
        φ(x)_r = max(ω_r·x, 0) + ε          (kernel "relu")
        y_i = Σ_j φ(x_i)·φ(z_j) v_j / Σ_j φ(x_i)·φ(z_j)

    Error law: the relative variance of one kernel value is `(exp(‖x + z‖²) - 1) / M` for independent features, so the
    error falls as M^-½, from a height that is large where trained queries and keys are long; orthogonal blocks lower it.
    O(N M D) time, O(N M) memory, state (M, D + 1) per head when causal. Features are computed in fp32 at least, in log
    space, stabilised exactly and without an additive ε. Attention dropout drops whole keys (their values, for all
    queries at once, scaled up by 1 / (1 - p)): single weights do not exist here.

    Source: Choromanski et al. 2021 (arXiv 2009.14794), §2.3 to 2.4. Deviation from the published code: the sign of each
    orthogonal block is fixed, since Householder QR alone makes the features biased.
    """

    Config = PerformerAttentionConfig
    config: PerformerAttentionConfig
    facts = MechanismFacts(
        title="Performer (FAVOR+)",
        paper="arXiv 2009.14794",
        time="n·m·d",
        memory="n·m",
        exact_when="never; error falls as num_features^-½",
        training="needed: untrained it loses most of the model",
    )
    relative_bias_refusal = (
        "random features factorise exp(q·k) alone and an additive bias does not factorise; use local, longformer, "
        "bigbird or linformer on T5"
    )

    features: Tensor
    redraws: Tensor

    def __init__(self, config: PerformerAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        width = geometry.head_dim
        count = config.num_features or 2 ** math.ceil(math.log2(max(2.0, width * math.log(width))))
        self.register_buffer("features", torch.empty(count, width))
        self.register_buffer("redraws", torch.zeros((), dtype=torch.long))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.redraws.zero_()
        self._draw(0)

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        origin = f"orthogonal random features of seed {self.config.seed}, layer {self.geometry.layer}"
        return {"features": origin, "redraws": "zero"}

    def redraw(self) -> None:
        """Replace the features by the next draw; the same on every process, since only seed and count decide."""
        count = int(self.redraws) + 1
        self.redraws.fill_(count)
        self._draw(count)

    @torch.no_grad()
    def _draw(self, redraws: int) -> None:
        count, width = self.features.shape
        sides = {"encoder": 0, "decoder": 1}
        key = (self.config.seed, sides[self.geometry.side], self.geometry.layer, redraws)
        seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")
        generator = torch.Generator().manual_seed(seed)
        self.features.copy_(orthogonal_features(count, width, generator))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        if context.dropout:
            value = value * F.dropout(torch.ones_like(value[..., :1]), context.dropout)
        with torch.autocast(query.device.type, enabled=False):
            root = math.sqrt(context.scaling)
            log_query = self._log_features(query.to(dtype) * root)
            log_key = self._log_features(key.to(dtype) * root)
            if context.key_padding_mask is not None:
                log_key = log_key.masked_fill(~context.key_padding_mask[:, None, :, None], float("-inf"))
            out = linear_attention(log_query, log_key, value, is_causal=context.is_causal)
        return out.to(query.dtype)

    def _log_features(self, x: Tensor) -> Tensor:
        projected = x @ self.features.to(x.dtype).T
        if self.config.kernel == "relu":
            return (projected.relu() + RELU_EPSILON).log()
        return projected - x.square().sum(-1, keepdim=True) / 2


def orthogonal_features(count: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, width) rows ω ~ N(0, I) marginally, orthogonal within blocks of `width` rows.

    QR of Gaussian blocks, each column multiplied by the sign of R's diagonal (without it Q is not Haar distributed and
    single-sign features are biased), rows scaled to the norms of independent Gaussian vectors.
    """
    blocks = []
    for _ in range(-(-count // width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu"))
        blocks.append((q * r.diagonal().sign()).T)
    norms = torch.randn(count, width, generator=generator, dtype=torch.float64, device="cpu").norm(
        dim=-1, keepdim=True
    )
    return torch.cat(blocks)[:count] * norms
