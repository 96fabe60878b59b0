"""Linformer: keys and values projected along the sequence to a fixed number of slots."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import (
    AttentionContext,
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    MechanismFacts,
    register_mechanism,
)

PROJECTIONS = ("linear", "mean", "max")
SHARING = ("none", "headwise", "kv", "layerwise")


@dataclass(frozen=True, kw_only=True)
class LinformerAttentionConfig(EfficientAttentionConfig):
    """Options of Linformer attention.

    Args:
        rank: R, slots that stand for all keys.
        max_length: longest input, in tokens; `None` = the model's position table (required where there is none: T5).
        projection: `"linear"` learns the projections; `"mean"` and `"max"` pool fixed segments without parameters.
        sharing: of learned projections: `"none"` (E and F per head), `"headwise"` (E and F per layer), `"kv"` (E = F per
            layer), `"layerwise"` (one E = F for the whole stack).
    """

    mechanism: ClassVar[str] = "linformer"

    rank: int = 256
    max_length: int | None = None
    projection: str = "linear"
    sharing: str = "headwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("rank", *(() if self.max_length is None else ("max_length",)))
        self._require("projection", self.projection in PROJECTIONS, f"one of {', '.join(PROJECTIONS)}")
        self._require("sharing", self.sharing in SHARING, f"one of {', '.join(SHARING)}")


@register_mechanism
class LinformerAttention(EfficientAttention):
    """Attention over R slots, each a weighted mean of keys and of values.

    With E, F (R, n) and keep-mask p; a slot's mass is the share of its weights that fell on real tokens:

        k̃_r = Σ_j E_rj p_j k_j / m_r,   ṽ_r = Σ_j F_rj p_j v_j / m'_r,   m_r = Σ_j |E_rj| p_j / Σ_j |E_rj|
        y_i = Σ_r softmax_r(s · q_i·k̃_r + Σ_j E_rj p_j b(j - i) / m_r + log(m_r c_r)) ṽ_r

    c_r is the length of slot r's segment, so that m_r c_r counts the tokens a slot stands for; without that logarithm
    short and padded segments would weigh as much as full ones. A slot of mass 0 does not exist. E = F = means of equal
    segments at the start: of all starts tried the closest to the pretrained model, and exact at R = n.

    O(N R) time and memory; R · max_length parameters per matrix. Source: Wang et al. 2020 (arXiv 2006.04768), §4.
    Deviations: padding is honoured by the masses, and slots carry their log-count.
    """

    Config = LinformerAttentionConfig
    config: LinformerAttentionConfig
    facts = MechanismFacts(
        title="Linformer",
        paper="arXiv 2006.04768",
        time="n·r",
        memory="n·r",
        exact_when="rank = max_length",
        training="needed: untrained it loses much of the model",
    )
    causal_refusal = (
        "a projection along the sequence puts future keys into every slot; use local, longformer, bigbird or performer"
    )
    left_aligned = True

    def __init__(self, config: LinformerAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        max_length = config.max_length or geometry.max_positions
        assert max_length is not None  # unsupported() refuses
        self.max_length = max_length
        if config.projection == "linear":
            heads = geometry.num_heads if config.sharing == "none" else 1
            shape = (heads, config.rank, self.max_length)
            self.key_projection = nn.Parameter(torch.empty(shape))
            if config.sharing in ("none", "headwise"):
                self.value_projection = nn.Parameter(torch.empty(shape))

    def shared_parameters(self) -> tuple[str, ...]:
        layerwise = self.config.projection == "linear" and self.config.sharing == "layerwise"
        return ("key_projection",) if layerwise else ()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters(recurse=False):
                parameter.copy_(self._segment_means(parameter.device))

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        return {name: f"means of {self.config.rank} equal segments" for name, _ in self.named_parameters()}

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        max_length = config.max_length or geometry.max_positions
        if max_length is None:
            reasons.append("this model has no position table to take a length from: give max_length, e.g. 4096")
        elif config.rank > max_length:
            reasons.append(f"rank={config.rank} exceeds max_length={max_length}: give a rank of at most {max_length}")
        if config.max_length and geometry.max_positions and config.max_length < geometry.max_positions:
            reasons.append(
                f"max_length={config.max_length} is below the {geometry.max_positions} positions of the model: give at "
                "least that, or leave it out"
            )
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        length = max(length, geometry.max_positions or 0)
        return dataclasses.replace(config, rank=length, max_length=length, projection="linear")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        n = key.shape[2]
        if n > self.max_length:
            raise ValueError(
                f"linformer: input of {n} tokens, but its projections were made for max_length={self.max_length}; "
                f"shorten the input or convert with a larger max_length."
            )
        keep = context.key_padding_mask
        if keep is None:
            keep = torch.ones(1, n, dtype=torch.bool, device=key.device)
        if self.config.projection == "max":
            keys, values = self._max_pool(key, value, keep)
            weights, mass = self._segment_means(key.device).to(key.dtype), None
        else:
            weights = self._weights("key_projection", key)
            keys, mass = _project(weights, key, keep)
            values, _ = _project(self._weights("value_projection", value), value, keep)
        if mass is None:
            mass = _mass(weights, keep)
        counts = mass.to(torch.promote_types(mass.dtype, torch.float32)) * self._segment_sizes(key.device)
        # the logarithm of an empty slot's 0 would be -inf as well, but with a NaN gradient
        log_counts = torch.where(counts > 0, torch.where(counts > 0, counts, 1.0).log(), float("-inf"))
        logits = log_counts.to(query.dtype)[:, :, None]  # (B or 1, H or 1, 1, R)
        if context.relative_bias is not None:
            share = weights[..., :n] * keep[:, None, None] / mass.clamp(min=1e-9)[..., None]
            logits = context.relative_bias.pooled(share).to(query.dtype) + logits
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=logits, dropout_p=context.dropout, scale=context.scaling
        )

    def _weights(self, name: str, like: Tensor) -> Tensor:
        """(H or 1, R, max_length) projection; E serves for F where they are shared."""
        if self.config.projection == "mean":
            return self._segment_means(like.device).to(like.dtype)
        return getattr(self, name, self.key_projection).to(like.dtype)

    def _segments(self, device: torch.device) -> Tensor:
        return torch.arange(self.max_length, device=device) * self.config.rank // self.max_length

    def _segment_sizes(self, device: torch.device) -> Tensor:
        edges = torch.arange(self.config.rank + 1, device=device) * self.max_length
        return (-(-edges // self.config.rank)).diff()

    def _segment_means(self, device: torch.device) -> Tensor:
        """(1, R, max_length): row r is 1 / size on segment r."""
        slots = torch.arange(self.config.rank, device=device)[:, None]
        return ((self._segments(device) == slots) / self._segment_sizes(device)[:, None])[None]

    def _max_pool(self, key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        index = self._segments(key.device)[: key.shape[2]]
        pooled = []
        for x in (key, value):
            x = x.masked_fill(~keep[:, None, :, None], torch.finfo(x.dtype).min)
            start = x.new_full((*x.shape[:2], self.config.rank, x.shape[3]), torch.finfo(x.dtype).min)
            best = start.scatter_reduce(2, index[None, None, :, None].expand_as(x), x, "amax")
            # an empty slot is masked out by its mass, but its value must stay finite
            pooled.append(torch.where(best == torch.finfo(x.dtype).min, 0.0, best))
        return pooled[0], pooled[1]


def _mass(weights: Tensor, keep: Tensor) -> Tensor:
    """(B or 1, H or 1, R) share of each slot's absolute weights that fell on real tokens."""
    size = weights.abs()
    real = torch.einsum("hrn,bn->bhr", size[..., : keep.shape[-1]], keep.to(weights.dtype))
    return real / size.sum(-1).clamp(min=1e-9)


def _project(weights: Tensor, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, R, D) slots of (B, H, n, D) tokens and their masses (B or 1, H or 1, R)."""
    mass = _mass(weights, keep)
    slots = weights[..., : x.shape[2]] @ (x * keep[:, None, :, None])
    return slots / torch.where(mass > 0, mass, 1.0)[..., None], mass
