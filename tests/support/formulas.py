"""Kernel mechanisms by their own quadratic formula, in fp64: the truth where softmax attention is not the limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.mechanism import EfficientAttention
from hf_efficient.attention.base.registry import attention_config

HEADS, WIDTH = 4, 8


def geometry(**facts: Any) -> AttentionGeometry:
    defaults: dict[str, Any] = dict(
        num_heads=HEADS,
        head_dim=WIDTH,
        hidden_size=HEADS * WIDTH,
        layer=0,
        num_layers=2,
        side="encoder",
        is_causal=False,
        has_relative_bias=False,
        projection_bias=True,
        max_positions=128,
    )
    return AttentionGeometry(**defaults | facts)


def heads(*shape: int, seed: int = 0, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def mechanism_of(name: str, is_causal: bool = False, max_positions: int | None = 256, **options: Any) -> Any:
    """In fp64, its parameters moved from their start, so that each of them matters."""
    config = attention_config(name, **options)
    place = geometry(is_causal=is_causal, max_positions=max_positions)
    mechanism: EfficientAttention = config.attention_class(config, place).double()
    mechanism.reset_parameters()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in mechanism.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return mechanism


def performer(mechanism: Any, q: Tensor, k: Tensor, scaling: float) -> Tensor:
    def features(y: Tensor) -> Tensor:
        projected = torch.einsum("bhnd,md->bhnm", y * math.sqrt(scaling), mechanism.features)
        if mechanism.config.kernel == "relu":
            return projected.clamp(min=0) + 0.001
        return (projected - scaling * (y * y).sum(-1, keepdim=True) / 2).exp()

    return features(q) @ features(k).transpose(-1, -2)


def linear_transformer(mechanism: Any, q: Tensor, k: Tensor, scaling: float) -> Tensor:
    unit = math.sqrt(scaling * math.sqrt(WIDTH))
    scales = [log.exp()[:, None, None] for log in (mechanism.query_log_scale, mechanism.key_log_scale)]
    phi_q, phi_k = (torch.nn.functional.elu(a * unit * x) + 1 for a, x in zip(scales, (q, k), strict=True))
    return phi_q @ phi_k.transpose(-1, -2)


def cosformer(mechanism: Any, q: Tensor, k: Tensor, scaling: float) -> Tensor:
    unit = math.sqrt(scaling * math.sqrt(WIDTH))
    phi_q, phi_k = ((unit * x).clamp(min=0) + 0.001 for x in (q, k))
    n, s = q.shape[2], k.shape[2]
    length = mechanism.config.max_length or mechanism.geometry.max_positions
    distance = (torch.arange(s - n, s)[:, None] - torch.arange(s)).double()
    return phi_q @ phi_k.transpose(-1, -2) * torch.cos(math.pi * distance / (2 * length))


def random_feature(mechanism: Any, q: Tensor, k: Tensor, scaling: float) -> Tensor:
    sigma = mechanism.log_sigma.exp()[:, None]
    x, z = (x / x.norm(dim=-1, keepdim=True) * sigma for x in (q, k))
    phi_q, phi_k = ((y @ mechanism.features.T - y.square().sum(-1, keepdim=True) / 2).exp() for y in (x, z))
    weights = phi_q @ phi_k.transpose(-1, -2)
    if not mechanism.config.gate:
        return weights
    gate = ((k * mechanism.gate_weight[:, None]).sum(-1) + mechanism.gate_bias[:, None]).sigmoid()
    n, s = q.shape[2], k.shape[2]
    kept = torch.zeros(*gate.shape[:2], n, s, dtype=q.dtype)
    for i in range(n):
        for j in range(s - n + i + 1):
            kept[:, :, i, j] = (1 - gate[:, :, j]) * gate[:, :, j + 1 : s - n + i + 1].prod(-1)
    return weights * kept


# {mechanism: (mechanism, q (B, H, N, D), k (B, H, S, D), scaling) → (B, H, N, S) weights before normalisation}
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "performer": performer,
    "linear_transformer": linear_transformer,
    "cosformer": cosformer,
    "random_feature": random_feature,
}
