"""Performer: softmax attention estimated with positive orthogonal random features (FAVOR+)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_efficient.attention.base import AttentionGeometry, EfficientAttentionConfig, MechanismFacts, register_mechanism
from hf_efficient.attention.base.kernel import KernelAttention
from hf_efficient.ops.affine_features import AffineFeatures
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.random_features import orthogonal_features

KERNELS = ("softmax", "relu")
RELU_EPSILON = 1e-3


@dataclass(frozen=True, kw_only=True)
class PerformerAttentionConfig(EfficientAttentionConfig):
    """Options of Performer attention.

    Args:
        num_features: M, random features per head; `"auto"` = D ln D for head width D, rounded up to a multiple of 16 (272
            for 64); `None` = the power of two at or above that, as checkpoints have it that leave the number open.
        kernel: `"softmax"` estimates the pretrained attention; `"relu"` is another kernel, which must be trained.
        redraw_interval: optimiser steps between new draws of the features, so that no gradient mixes two draws; made by
            `hf_efficient.training.MechanismCallback`; 0 = never.
        seed: of the features, together with the layer and the number of redraws.
    """

    mechanism: ClassVar[str] = "performer"
    shares: ClassVar[Mapping[str, float]] = {"num_features": 1}

    stored_defaults: ClassVar[Mapping[str, Any]] = {"num_features": None}

    num_features: int | str | None = "auto"
    kernel: str = "softmax"
    redraw_interval: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.num_features
        fits = count in ("auto", None) or (type(count) is int and count >= 1)
        self._require("num_features", fits, 'an integer ≥ 1, "auto" or None')
        self._require("kernel", self.kernel in KERNELS, f"one of {', '.join(KERNELS)}")
        self._require_at_least(0, "redraw_interval", "seed")

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        return _num_features(self.num_features, geometry.head_dim)


@register_mechanism
class PerformerAttention(KernelAttention):
    """Kernel attention with random features whose mean is the softmax kernel.

    With `x = √s q`, `z = √s k` and M feature vectors ω_r:

        φ(x)_r = exp(ω_r·x - ‖x‖² / 2)      (kernel "softmax": E φ(x)·φ(z) / M = exp(s · q·k))
        φ(x)_r = max(ω_r·x, 0) + ε          (kernel "relu")
        y_i = Σ_j φ(x_i)·φ(z_j) v_j / Σ_j φ(x_i)·φ(z_j)

    Error law: the relative variance of one kernel value is `(exp(‖x + z‖²) - 1) / M` for independent features, so with
    many features the error falls as M^-½. Where trained queries and keys are long, M has to be far above any that is used
    for that law to hold, and the error falls more slowly; orthogonal blocks lower it.
    O(N M D) time, O(N M) memory, in both directions on the CPU O((N + M) D) with the softmax kernel; causal decoding keeps
    one (M, D + 1) state per head. Features are computed in fp32 at least, in log space, stabilised exactly and without an
    additive ε. Attention dropout drops whole keys.

    Source: Choromanski et al. 2021 (arXiv 2009.14794), §2.3 to 2.4. Deviation from the published code: the sign of each
    orthogonal block is fixed, since Householder QR alone makes the features biased.
    """

    Config = PerformerAttentionConfig
    config: PerformerAttentionConfig
    traceable = True
    facts = MechanismFacts(
        title="Performer (FAVOR+)",
        paper="arXiv 2009.14794",
        kind="kernel",
        time="n·m·d",
        memory="n·m",
        exact_when="never; only in the limit of many features",
        training="needed: without it most of the model is lost",
    )
    features: Tensor
    redraws: Tensor

    def __init__(self, config: PerformerAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        width = geometry.head_dim
        self.register_buffer("features", torch.empty(_num_features(config.num_features, width), width))
        self.register_buffer("redraws", torch.zeros((), dtype=torch.long))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.redraws.zero_()
        self._draw(0)

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        origin = f"orthogonal random features of seed {self.config.seed}, layer {self.geometry.layer}"
        return {"features": origin, "redraws": "zero"}

    def after_optimizer_step(self, step: int) -> None:
        if self.config.redraw_interval and step % self.config.redraw_interval == 0:
            self.redraw()

    def redraw(self) -> None:
        """Replace the features by the next draw; the same on every process, since only seed and count decide."""
        count = int(self.redraws) + 1
        self.redraws.fill_(count)
        self._draw(count)

    @torch.no_grad()
    def _draw(self, redraws: int) -> None:
        generator = self.geometry.generator(self.config.seed, redraws)
        self.features.copy_(orthogonal_features(len(self.features), self.geometry.head_dim, generator))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        self.expect_steps(self.config.redraw_interval)
        return super().forward(query, key, value, context)

    def log_features(self, x: Tensor, name: str) -> Tensor:
        if self.config.kernel == "softmax":
            return super().log_features(x, name)
        return ((x @ self._directions(x).T).relu() + RELU_EPSILON).log()

    def affine_features(self, x: Tensor, name: str) -> AffineFeatures | None:
        if self.config.kernel != "softmax":
            return None
        # -‖x‖² / 2 is the same number for all features of a query, and cancels
        offset = None if name == "query" else x.square().sum(-1) * (-0.5 * x.shape[-1] ** -0.5)
        return AffineFeatures(x, self._directions(x)[None, None], offset)

    def _directions(self, x: Tensor) -> Tensor:
        return self.features.to(x.dtype) * x.shape[-1] ** -0.25


def _num_features(count: int | str | None, width: int) -> int:
    """The number of features that the option stands for, of heads of this width."""
    if isinstance(count, int):
        return count
    enough = width * math.log(width)
    return 2 ** math.ceil(math.log2(max(2.0, enough))) if count is None else 16 * max(1, math.ceil(enough / 16))
