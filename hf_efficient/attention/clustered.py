"""Clustered attention: queries that are alike share one row of attention, corrected at the keys that matter to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
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
from hf_efficient.ops.choice import indices, largest, rounding
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.padding import real_tokens
from hf_efficient.ops.query_clusters import cluster_queries, memberships, rows_at, tile_attention, tiles_of_groups
from hf_efficient.ops.relative_bias import RelativeBias

# queries of one cluster that share a copy of its keys: more of them leave more slots empty
TILE = 16


@dataclass(frozen=True, kw_only=True)
class ClusteredAttentionConfig(EfficientAttentionConfig):
    """Options of clustered attention.

    Args:
        num_clusters: C, groups of queries per row and head.
        top_k: keys of each cluster that its queries attend to by themselves; 0 = none, the plain form of the paper.
        iterations: steps of k-means; `None` = 3, and with one cluster, which takes none, only `None`.
    """

    mechanism: ClassVar[str] = "clustered"
    shares: ClassVar[Mapping[str, float]] = {"num_clusters": 1 / 2, "top_k": 1 / 2}
    sizes: ClassVar[Mapping[str, str]] = {"num_clusters": "", "top_k": ""}

    num_clusters: int = 64
    top_k: int = 32
    iterations: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("num_clusters")
        self._require_at_least(0, "top_k")
        if self.iterations is not None:
            self._require_at_least(0, "iterations")
            self._require("iterations", self.num_clusters > 1, "None with num_clusters=1, which holds all queries")

    @classmethod
    def without_effect(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("iterations",) if options.get("num_clusters") == 1 else ()

    @property
    def steps(self) -> int:
        """Of k-means."""
        return 3 if self.iterations is None else self.iterations

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        return self.num_clusters + min(self.top_k, length)


@register_mechanism
class ClusteredAttention(EfficientAttention):
    """Attention of the mean queries of C clusters, and of each query itself to the keys that its cluster looks at most.

    With c the cluster of query i, |c| its members, and T_c the `top_k` keys of largest l_cj:

        l_cj = s · q̄_c·k_j + mean_{i in c} b(j - i),   q̄_c = mean_{i in c} q_i,   A_c = softmax_j(l_cj)
        y_i = m_c Σ_{j in T_c} softmax_{T_c}(s · q_i·k_j + b(j - i)) v_j + Σ_{j not in T_c} A_cj v_j
        m_c = Σ_{j in T_c} A_cj

    So a cluster's logit is the mean of its members' logits, b included; among T_c all logits are a query's own. Clusters
    come from k-means of the real tokens' queries, see `ops.query_clusters.cluster_queries`; they and T_c are constants: a
    query's gradient comes through its cluster's mean, 1 / |c| of it, and through T_c, that of keys and values is exact.
    `top_k` = 0 leaves A_c v alone; it blurs what single queries look for, and needs training far more.

    O(N C D · iterations + N top_k D) time, O(N (C + top_k)) memory; with a relative bias O(N C · its reach) additions, and
    O(N top_k) memory per head for its values. Attention dropout acts on A_c, which the members of a cluster share, and on
    each query's own weights.

    Source: Vyas et al. 2020 (arXiv 2007.04825), §3.2 and §3.3. Departures: k-means of queries in place of k-means of their
    sign hashes, which comes closer to the pretrained model; the first centres are tokens at equal distances, so that nothing
    is drawn; relative biases.
    """

    Config = ClusteredAttentionConfig
    config: ClusteredAttentionConfig
    facts = MechanismFacts(
        title="Clustered attention",
        paper="arXiv 2007.04825",
        kind="learnable pattern",
        time="n·c·d + n·k·d",
        memory="n·(c + k)",
        exact_when="top_k ≥ n",
        training="works without training with top_k; needed with top_k = 0",
    )
    by_position = False
    causal_refusal = (
        "clusters are made of later queries too, and while decoding there is one query, with nothing to share; use local, "
        "longformer, bigbird or sinkhorn"
    )

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(config, top_k=length)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        count = self.config.num_clusters
        token_mask = real_tokens(context.key_padding_mask, key).expand(key.shape[0], -1)
        labels = cluster_queries(query, token_mask, count, self.config.steps)
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (x.to(wide) for x in (query, key, value))
            logits = self._logits(q, k, token_mask, labels, context)
            top = self._top(logits, q, k, token_mask, context)
            # of a row without any real key all logits are equal; no query reads it
            weights = logits.softmax(-1).masked_fill(~token_mask[:, None, None], 0.0)
            mass = weights.gather(-1, top).sum(-1)
            rest = F.dropout(weights.scatter(-1, top, 0.0), context.dropout) @ v
        rest, mass = rest.to(value.dtype), mass.to(value.dtype)
        if not self.config.top_k:
            return rows_at(F.pad(rest, (0, 0, 0, 1)), labels)
        tiles = tiles_of_groups(labels, count, TILE)
        own = tile_attention(query, key, value, tiles, top, token_mask, context)
        mass, rest = (rows_at(x, tiles.group)[..., None, :] for x in (mass[..., None], rest))
        return rows_at(F.pad((mass * own + rest).flatten(2, 3), (0, 0, 0, 1)), tiles.entry)

    @torch.no_grad()
    def _top(
        self, logits: Tensor, query: Tensor, key: Tensor, token_mask: Tensor, context: AttentionContext
    ) -> Tensor:
        """(B, H, C, K) keys with the largest logits; of equal ones the first."""
        real = token_mask[:, None, None]
        norms = [x.norm(dim=-1)[:, :, None].masked_fill(~real, 0.0).amax(-1, keepdim=True) for x in (query, key)]
        scale = context.scaling * norms[0] * norms[1] + logits.masked_fill(~real, 0.0).abs().amax(-1, keepdim=True)
        count = min(self.config.top_k, key.shape[2])
        return indices(largest(logits, count, rounding(scale)), count)

    def _logits(
        self, query: Tensor, key: Tensor, token_mask: Tensor, labels: Tensor, context: AttentionContext
    ) -> Tensor:
        """(B, H, C, S) means of the members' logits; the lowest number at padding."""
        members = memberships(labels, self.config.num_clusters)
        shares = members.to(query.dtype) / members.sum(-1, keepdim=True).clamp(min=1)
        means = shares @ query
        logits = context.scaling * means @ key.transpose(-1, -2)
        if (bias := context.relative_bias) is not None:
            # what keys see of queries is what queries see of keys, with all offsets the other way round
            mirrored = RelativeBias(bias.table, lambda offsets: bias.bucket(-offsets), bias.saturation)
            logits = logits + mirrored.pooled(shares).transpose(-1, -2)
        return logits.masked_fill(~token_mask[:, None, None], torch.finfo(logits.dtype).min)
