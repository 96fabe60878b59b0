"""Linformer: keys and values projected along the sequence to a fixed number of pooled keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from hf_efficient.ops.padding import real_length, real_tokens
from hf_efficient.ops.pooled_keys import (
    PooledKeys,
    group_index,
    group_means,
    group_sizes,
    in_groups,
    max_pooled,
    mean_weights,
    pooled_attention,
    pooling_mass,
    projected,
    stretched,
    strided_convolution,
)

PROJECTIONS = ("linear", "mean", "max", "conv")
LEARNED, SHARING = ("linear", "conv"), ("none", "headwise", "kv", "layerwise")


@dataclass(frozen=True, kw_only=True)
class LinformerAttentionConfig(EfficientAttentionConfig):
    """Options of Linformer attention.

    Args:
        rank: R, pooled keys that stand for all keys; one number, or one per layer of the stack.
        head_ranks: pooled keys of each head, at most `rank`; `None` = `rank` for all.
        max_length: longest input, in tokens; `None` = the model's position table (required where there is none: T5).
        interpolate: stretch the projections over inputs longer than `max_length` instead of refusing them; `max_length` may
            then be less than the model's positions.
        projection: `"linear"` learns the projections, `"conv"` one kernel per channel, shared by all groups of tokens
            and as long as a group; `"mean"` and `"max"` pool equal groups of tokens without parameters.
        sharing: of what is learned: `"none"` (E and F per head), `"headwise"` (E and F per layer), `"kv"` (E = F per
            layer), `"layerwise"` (one E = F for the whole stack); `None` = `"headwise"`. `None` with `"mean"` and `"max"`.
    """

    mechanism: ClassVar[str] = "linformer"
    shares: ClassVar[Mapping[str, float]] = {"rank": 1}
    sizes: ClassVar[Mapping[str, str]] = {"rank": ""}
    rank: int | tuple[int, ...] = 256
    head_ranks: tuple[int, ...] | None = None
    max_length: int | None = None
    interpolate: bool = False
    projection: str = "linear"
    sharing: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._as_tuples("rank", "head_ranks")
        self._require("rank", _are_counts(self.rank), "integers ≥ 1, one for all layers or one per layer")
        self._require_positive(*(() if self.max_length is None else ("max_length",)))
        self._require("projection", self.projection in PROJECTIONS, f"one of {', '.join(PROJECTIONS)}")
        fits = self.sharing is None or (self.projection in LEARNED and self.sharing in SHARING)
        self._require("sharing", fits, f"one of {', '.join(SHARING)}; None with projection 'mean' or 'max'")
        fits = not self.interpolate or self.projection in ("linear", "mean")
        self._require("interpolate", type(self.interpolate) is bool and fits, "False with projection='max' or 'conv'")
        if (ranks := self.head_ranks) is not None:
            fits = self.sharing == "none" if self.projection == "linear" else self.projection != "conv"
            rule = "integers ≥ 1, one per head, with sharing='none' or projection 'mean' or 'max'; or None"
            self._require("head_ranks", fits and isinstance(ranks, tuple) and _are_counts(ranks), rule)
        if isinstance(self.rank, tuple) and self.sharing == "layerwise":
            self._require("rank", len(set(self.rank)) == 1, "one number with sharing='layerwise'")

    def rank_of(self, layer: int) -> int:
        """R of a layer."""
        return self.rank[layer] if isinstance(self.rank, tuple) else self.rank

    @classmethod
    def without_effect(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return () if options.get("projection", cls.projection) in LEARNED else ("sharing",)

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        ranks = self.head_ranks or (self.rank_of(geometry.layer),)
        return sum(ranks) / len(ranks)


@register_mechanism
class LinformerAttention(EfficientAttention):
    """Attention over R pooled keys and values, each a weighted mean.

    With E, F (R, n) and token mask p; the mass m_r is the share of the weights of r that fell on real tokens:

        k̃_r = Σ_j E_rj p_j k_j / m_r,   ṽ_r = Σ_j F_rj p_j v_j / m'_r,   m_r = Σ_j |E_rj| p_j / Σ_j |E_rj|
        y_i = Σ_r softmax_r(s · q_i·k̃_r + Σ_j E_rj p_j b(j - i) / m_r + log(m_r c_r)) ṽ_r

    c_r is the length of pooling group r, so that m_r c_r counts the tokens that k̃_r stands for; without that logarithm
    short and padded groups would weigh as much as full ones. A key of mass 0 does not exist. E = F = means of equal
    groups at the start: of all starts tried the closest to the pretrained model, and exact at R = n.

    `"conv"`: `k̃_r = c / |real u| Σ_u W_u ∘ k_{rc + u}` over the c = max_length / R tokens of group r, at first W = 1 / c.
    With `interpolate` a row of L > max_length tokens has E_rj = E_r at `(j + ½) max_length / L - ½`, between columns linear.

    O(N R) time and memory, and the R · max_length weights of a matrix, or the D · max_length / R of a kernel. Source: Wang
    et al. 2020 (arXiv 2006.04768), §4. Deviations: masses honour padding, log-counts, interpolation.
    """

    Config = LinformerAttentionConfig
    config: LinformerAttentionConfig
    facts = MechanismFacts(
        title="Linformer",
        paper="arXiv 2006.04768",
        kind="low rank",
        time="n·r",
        memory="n·r",
        exact_when="rank = max_length",
        training="needed: without it much of the model is lost",
    )
    causal_refusal = "every pooled key has later tokens in it; use local, longformer, bigbird or performer"
    left_aligned = traceable = True

    def __init__(self, config: LinformerAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        self.max_length = max_length = config.max_length or geometry.max_positions or 0
        self.rank = config.rank_of(geometry.layer)
        if config.projection in LEARNED:
            heads, is_matrix = geometry.num_heads if config.sharing == "none" else 1, config.projection == "linear"
            shape = (self.rank, max_length) if is_matrix else (max_length // self.rank, geometry.head_dim)
            self.key_projection = nn.Parameter(torch.empty(heads, *shape))
            if config.sharing not in ("kv", "layerwise"):
                self.value_projection = nn.Parameter(torch.empty(heads, *shape))

    def shared_parameters(self) -> tuple[str, ...]:
        return ("key_projection",) if self.config.sharing == "layerwise" else ()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters(recurse=False):
                if self.config.projection == "conv":
                    parameter.fill_(1 / parameter.shape[1])
                else:
                    parameter.copy_(self._group_means(parameter))

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        return {name: f"means of {self.rank} equal segments" for name, _ in self.named_parameters()}

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if isinstance(config.rank, tuple) and len(config.rank) != geometry.num_layers:
            layers = f"{len(config.rank)} layers, but the {geometry.side} has {geometry.num_layers}"
            return [*reasons, f"rank names {layers}: give one number, or one per layer"]
        rank, ranks = config.rank_of(geometry.layer), config.head_ranks
        if ranks is not None and (len(ranks) != geometry.num_heads or max(ranks) > rank):
            reasons.append(
                f"head_ranks={list(ranks)} must be {geometry.num_heads} numbers, one per head, each at most rank={rank}"
            )
        max_length = config.max_length or geometry.max_positions
        if max_length is None:
            reasons.append("this model has no position table to take a length from: give max_length, e.g. 4096")
        elif rank > max_length:
            reasons.append(f"rank={rank} exceeds max_length={max_length}: give a rank of at most {max_length}")
        elif config.projection == "conv" and max_length % rank:
            reasons.append(
                f"projection='conv' needs pooled keys of one size: rank={rank} must divide max_length={max_length}"
            )
        if not config.interpolate and max_length is not None and max_length < (geometry.max_positions or 0):
            table = f"the {geometry.max_positions} positions of the model"
            reasons.append(
                f"max_length={max_length} is below {table}: give at least that, leave it out, or set interpolate"
            )
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        length = max(length, geometry.max_positions or 0)
        projection = "conv" if config.projection == "conv" else "linear"
        return replace(config, rank=length, head_ranks=None, max_length=length, projection=projection)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        n, token_mask = key.shape[2], real_tokens(context.key_padding_mask, key)
        if n > self.max_length and not self.config.interpolate:
            raise ValueError(
                f"linformer: input of {n} tokens, but its projections were made for max_length={self.max_length}; shorten "
                "the input, or convert with a larger max_length or with interpolate=True."
            )
        pool = self._convolved if self.config.projection == "conv" else self._projected
        return pooled_attention(query, pool(key, value, token_mask, context.relative_bias is not None), context)

    def _projected(self, key: Tensor, value: Tensor, token_mask: Tensor, with_weights: bool) -> PooledKeys:
        n, device = key.shape[2], key.device
        weights = self._weights("key_projection", key, token_mask)
        mass = pooling_mass(weights, token_mask)
        if self.config.projection == "max":
            index = group_index(self._ranks(device), self.max_length)[:, :n]
            keys, values = (max_pooled(x, token_mask, index, self.rank) for x in (key, value))
        else:
            keys = projected(weights, mass, key, token_mask)
            other = self._weights("value_projection", value, token_mask)
            values = projected(other, pooling_mass(other, token_mask), value, token_mask)
        counts = mass.to(torch.promote_types(mass.dtype, torch.float32)) * self._group_sizes(device)
        if n > self.max_length:
            length = real_length(token_mask).clamp(min=self.max_length).to(counts.dtype)
            counts = counts * (length / self.max_length)[:, None, None]
        real = weights[..., :n] * token_mask[:, None, None] if with_weights else None
        return PooledKeys(
            keys, values, counts, None if real is None else real / torch.where(mass > 0, mass, 1.0)[..., None]
        )

    def _convolved(self, key: Tensor, value: Tensor, token_mask: Tensor, with_weights: bool) -> PooledKeys:
        kernels = self.key_projection, getattr(self, "value_projection", self.key_projection)
        keys, values = (strided_convolution(x, token_mask, w) for x, w in zip((key, value), kernels, strict=True))
        size = self.key_projection.shape[1]
        pooling_weights = mean_weights(token_mask, size, key.dtype)[:, None] if with_weights else None
        return PooledKeys(keys, values, in_groups(token_mask, size).sum(-1)[:, None], pooling_weights)

    def _weights(self, name: str, like: Tensor, token_mask: Tensor) -> Tensor:
        """(H or 1, R, max_length) projection, of longer inputs (B, H or 1, R, n); E serves for F where they are shared."""
        if self.config.projection != "linear":
            weights = self._group_means(like)
        else:
            weights = getattr(self, name, self.key_projection).to(like.dtype)
            if self.config.head_ranks is not None:
                weights = weights * (self._group_sizes(like.device) > 0)[..., None]
        return stretched(weights, token_mask) if like.shape[2] > self.max_length else weights

    def _ranks(self, device: torch.device) -> Tensor:
        """(H or 1, 1) pooled keys of each head."""
        return torch.tensor(self.config.head_ranks or (self.rank,), device=device)[:, None]

    def _group_sizes(self, device: torch.device) -> Tensor:
        return group_sizes(self._ranks(device), self.rank, self.max_length)

    def _group_means(self, like: Tensor) -> Tensor:
        return group_means(self._ranks(like.device), self.rank, self.max_length, like.dtype)


def _are_counts(value: Any) -> bool:
    """One integer ≥ 1, or a tuple of them."""
    values = value if isinstance(value, tuple) else (value,)
    return bool(values) and all(type(x) is int and x > 0 for x in values)
