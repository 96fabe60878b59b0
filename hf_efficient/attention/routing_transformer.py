"""Routing attention: tokens see those of their own clusters, around centroids that calibration finds in the model itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    MechanismFacts,
    register_mechanism,
)
from hf_efficient.attention.base.keys_shown import all_keys, newest_keys, window_keys
from hf_efficient.attention.base.registry import window_only
from hf_efficient.cache.buckets import BucketLayer, labels_of_all
from hf_efficient.ops.bucket_attention import bucket_attention
from hf_efficient.ops.cluster_attention import (
    best_members,
    cluster_attention,
    cluster_sums,
    coverage,
    moved_centroids,
    nearest,
    spherical_kmeans,
    wide,
)
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.random_features import orthogonal_features


@dataclass(frozen=True, kw_only=True)
class RoutingTransformerAttentionConfig(EfficientAttentionConfig):
    """Options of routing attention.

    Args:
        num_clusters: k, per head; `None` = half the square root of the longest input's length.
        cluster_size: w; `None` = 1.5 times that length / k, which lets most tokens into some cluster. Encoder: queries, and
            keys, that each cluster takes. Causal: of a query's cluster the last w tokens are seen, itself included.
        attention_window: even; encoder: half of it on each side is seen as well as the clusters; causal: the last so many
            keys; 0 = none, and then a token that no cluster takes gets 0.
        ema_decay: λ of the centroids' moving average while training, below 1; 0 = they stay. Moved by
            `hf_efficient.training.MechanismCallback`.
        seed: of the centroids' start.
    """

    mechanism: ClassVar[str] = "routing_transformer"
    shares: ClassVar[Mapping[str, float]] = {"cluster_size": 1 / 2, "attention_window": 1 / 2}

    num_clusters: int | None = None
    cluster_size: int | None = None
    attention_window: int = 64
    ema_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive(*(n for n in ("num_clusters", "cluster_size") if getattr(self, n) is not None))
        self._require_even("attention_window")
        fits = isinstance(self.ema_decay, (int, float)) and 0 <= self.ema_decay < 1
        self._require("ema_decay", fits, "a number from 0 to below 1")
        self._require_at_least(0, "seed")

    def for_length(self, length: int | None) -> RoutingTransformerAttentionConfig:
        if length is None:
            return self
        count = self.num_clusters or math.ceil(math.sqrt(length) / 2)
        size = self.cluster_size or math.ceil(1.5 * length / count)
        return replace(self, num_clusters=count, cluster_size=size)

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        sized, near = self.for_length(geometry.max_positions), window_keys(self.attention_window, geometry, length)
        count, size = sized.num_clusters or 1, sized.cluster_size or length
        is_whole = geometry.is_causal or size >= length
        seen = newest_keys(size, geometry, length) if is_whole else count * size**2 / length
        return min(seen + near, all_keys(geometry, length))


@register_mechanism
class RoutingTransformerAttention(EfficientAttention):
    """With unit centroids μ_c (k of them per head) and x̂ = x / ‖x‖:

        encoder: i sees j iff, for some c, q_i is among the w queries of the largest <q̂_i, μ_c>
                 and k_j among the w keys of the largest <k̂_j, μ_c>
        causal:  i sees j iff argmax_c <q̂_i + k̂_i, μ_c> = argmax_c <q̂_j + k̂_j, μ_c>, j ≤ i,
                 and j is among the last w tokens up to i of which that holds

    or j is in the window. All pairs count once, in one softmax over `s · q_i·k_j + b(j - i)`. The causal form depends on no
    later token, as the choice of a cluster's best tokens would.

    Centroids are random directions until `calibration.calibrate`, or `convert(…, calibration=texts)`, puts them where the
    model's own queries (causal: the sums above) crowd: spherical k-means, per head. With `ema_decay` λ > 0 they follow the
    training: at every optimiser step `μ_c ← (λ μ_c + (1 - λ) x̄_c) / ‖…‖`, x̄_c the mean of the x̂ nearest to μ_c in all that a
    backward pass went through since the last.

    O(N k D + k w² (D + k) + N · window · D) time, O(N k + k w² + N · window) memory. Causal: O(N k D + N (w + window) D);
    while decoding all keys and one label of each are kept. Source: Roy et al. 2021 (arXiv 2003.05997), §4. Departures: heads
    enter the softmax as they are and are normalised for routing alone; a token of several clusters has one softmax over
    them, not a mean; centroids of the queries alone, as those of both tell queries from keys; a mean, not a sum, moves them.
    """

    Config = RoutingTransformerAttentionConfig
    config: RoutingTransformerAttentionConfig
    facts = MechanismFacts(
        title="Routing Transformer",
        paper="arXiv 2003.05997",
        kind="learnable pattern",
        time="n·k·d + n·w·d",
        memory="n·(w + k)",
        exact_when="num_clusters = 1 and cluster_size ≥ 2n",
        training="needs calibration; training restores long range",
    )

    centroids: Tensor

    def __init__(self, config: RoutingTransformerAttentionConfig, geometry: AttentionGeometry):
        config = config.for_length(geometry.max_positions)
        super().__init__(config, geometry)
        assert config.num_clusters and config.cluster_size  # unsupported() refuses
        self.size, self.by_position = config.cluster_size, config.attention_window > 0
        shape = (geometry.num_heads, config.num_clusters, geometry.head_dim)
        self.register_buffer("centroids", torch.empty(shape, dtype=torch.float32))
        # not a buffer: data-parallel training would overwrite it with that of the first process
        self.pending: Tensor | None = None

    def reset_parameters(self) -> None:
        with torch.no_grad():
            count, generator = self.centroids.shape[:2].numel(), self.geometry.generator(self.config.seed)
            drawn = orthogonal_features(count, self.geometry.head_dim, generator)
            self.centroids.copy_(F.normalize(drawn, dim=-1).view_as(self.centroids))

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        start = f"random directions of seed {self.config.seed}, layer {self.geometry.layer}"
        return {"centroids": f"{start}: needs calibration, give texts"}

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        lacks = geometry.max_positions is None and not (config.num_clusters and config.cluster_size)
        what = "num_clusters and cluster_size follow max_positions, of which this model has none: give it, or both of them"
        return super().unsupported(config, geometry) + [what] * lacks

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return replace(config, num_clusters=1, cluster_size=2 * length)

    @classmethod
    def control_config(cls, config: Any) -> EfficientAttentionConfig | None:
        return window_only(config)

    def cache_layer(self) -> BucketLayer | None:
        return BucketLayer() if self.geometry.is_causal else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        size, near, token_mask = self.size, self.config.attention_window, context.key_padding_mask
        if self.geometry.is_causal:
            routed = self._routed(query, key[:, :, key.shape[2] - query.shape[2] :])
            labels = labels_of_all(nearest(routed, self.centroids)[:, :, None], key.shape[2], context)
            out = bucket_attention(query, key, value, labels, size=size, near=near, context=context)
        else:
            centroids = self.centroids
            if size >= query.shape[2]:
                centroids, near = centroids[:, :1], 0  # one cluster takes everything
            members = (best_members(x, centroids, size, token_mask) for x in (query, key))
            out = cluster_attention(query, key, value, *members, near=near, context=context)
        if self.config.ema_decay and self.training and out.requires_grad:
            self.expect_steps(1)
            self._count(query, key, token_mask, out)
        return out

    def _routed(self, query: Tensor, key: Tensor) -> Tensor:
        """(…, N, D) what the centroids lie among. No gradient."""
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            routed = F.normalize(wide(query), dim=-1)
            return routed + F.normalize(wide(key), dim=-1) if self.geometry.is_causal else routed

    @torch.no_grad()
    def calibrate(self, query: Tensor, key: Tensor) -> dict[str, str]:
        """Put the centroids where the (H, T, D) heads of T tokens crowd. Returns {buffer: where its values came from}."""
        routed = self._routed(query, key)
        self.centroids.copy_(spherical_kmeans(routed, self.centroids.shape[1], seed=self.config.seed))
        what = "query-key sums" if self.geometry.is_causal else "queries"
        return {"centroids": f"spherical k-means of the {what} of {routed.shape[1]} tokens"}

    def coverage(self, query: Tensor, length: int) -> tuple[float, int] | None:
        """Of (H, T, D) queries in texts of `length`: see `ops`; `None` where every query is in a cluster."""
        return None if self.geometry.is_causal else coverage(query, self.centroids, self.size, length)

    @torch.no_grad()
    def occupancy(self, query: Tensor, key: Tensor) -> Tensor:
        """(H, k) share of T tokens, given as (H, T, D) heads, that are nearest to each centroid; 0 = it serves nobody."""
        return cluster_sums(self._routed(query, key)[None], self.centroids, None)[..., -1] / query.shape[1]

    def _count(self, query: Tensor, key: Tensor, token_mask: Tensor | None, out: Tensor) -> None:
        """Count the call when its gradient comes: once, although checkpointing may compute it twice."""
        if torch.compiler.is_compiling():
            raise ValueError(
                "routing_transformer: ema_decay counts tokens during the backward pass, which can't be compiled: leave "
                "compilation off, or set ema_decay=0."
            )
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "routing_transformer: ema_decay counts tokens in the module, and copies that torch.nn.DataParallel makes "
                "of it for a call forget them: start one process per device (torchrun), or set ema_decay=0."
            )
        new = slice(key.shape[2] - query.shape[2], None)
        routed = F.normalize(self._routed(query, key[:, :, new]), dim=-1)
        sums = cluster_sums(routed, self.centroids, None if token_mask is None else token_mask[:, new])

        def add(gradient: Tensor) -> None:
            self.pending = sums if self.pending is None else self.pending + sums

        out.register_hook(add)

    def after_optimizer_step(self, step: int) -> None:
        """Move the centroids by all that went through a backward pass since the last step, as one large batch would."""
        if self.config.ema_decay:
            sums = self.take_pending()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
            self.move_centroids(sums)

    def take_pending(self) -> Tensor:
        """(H, k, D + 1) sums and counts, see `cluster_sums`, of this process since the last time this was called."""
        sums, self.pending = self.pending, None
        if sums is None:
            sums = wide(self.centroids.new_zeros(*self.centroids.shape[:2], self.centroids.shape[2] + 1))
        return sums

    @torch.no_grad()
    def move_centroids(self, sums: Tensor) -> None:
        """One step of the moving average towards (H, k, D + 1) sums of all processes; centroids of no token stay.

        Raises:
            ValueError: centroids in half precision, which could not move by so little.
        """
        if self.centroids.dtype != wide(self.centroids).dtype:
            raise ValueError(
                f"routing_transformer: centroids in {self.centroids.dtype} can't follow ema_decay={self.config.ema_decay}: "
                "train in float32, with autocast where half precision is wanted."
            )
        self.centroids.copy_(moved_centroids(self.centroids, sums, self.config.ema_decay))
