"""Reformer: attention among tokens whose queries and keys hash alike, and a local window."""

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
from hf_efficient.attention.base.keys_shown import all_keys, newest_keys, window_keys
from hf_efficient.attention.base.registry import window_only
from hf_efficient.cache.buckets import BucketLayer, labels_of_all
from hf_efficient.ops.bucket_attention import bucket_attention, paired_attention
from hf_efficient.ops.choice import first_largest, rounding
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.random_features import orthogonal_features


@dataclass(frozen=True, kw_only=True)
class ReformerAttentionConfig(EfficientAttentionConfig):
    """Options of Reformer attention.

    Args:
        num_buckets: b, values that a hash can take; even, or 1. The more, the more alike are the tokens of a bucket.
        bucket_size: w, in tokens. Encoder: a chunk of w sorted queries, or keys. Causal: see below.
        num_chunks_before: p, look-back. Encoder: a chunk of queries sees its own chunk of keys and the p before it, in a
            circle. Causal: a query sees the last (p + 1) w tokens of its bucket, itself included. 1 as published.
        num_hashes: R, independent hashes; a query sees what any of them shows. `None` = 4, and with one bucket only `None`.
        attention_window: in tokens, even; 0 = no window. Encoder: half of them on each side plus the token itself are seen
            as well. Causal: the last ones, the token itself included.
        shared_qk: the published form, in which keys are also the queries; without a window. It must be trained.
        seed: of the hashes, together with the layer; `None` = 0. `None` with one bucket, which needs no hash.
    """

    mechanism: ClassVar[str] = "reformer"
    stored_defaults: ClassVar[Mapping[str, Any]] = {"num_chunks_before": 0}

    num_buckets: int = 16
    bucket_size: int = 64
    num_chunks_before: int = 1
    num_hashes: int | None = None
    attention_window: int = 128
    shared_qk: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("num_buckets", "bucket_size")
        self._require("num_buckets", self.num_buckets == 1 or self.num_buckets % 2 == 0, "even, or 1")
        self._require_even("attention_window")
        self._require("shared_qk", type(self.shared_qk) is bool, "true or false")
        fits = self.attention_window == 0 or not self.shared_qk
        self._require("attention_window", fits, "0 with shared_qk, where a query sees its own key last")
        self._require_at_least(0, "num_chunks_before")
        for name, least in (("num_hashes", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                self._require_at_least(least, name)
                self._require(name, self.num_buckets > 1, "None with num_buckets=1, where nothing is hashed")

    @classmethod
    def without_effect(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("num_hashes", "seed") if options.get("num_buckets") == 1 else ()

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        seen = newest_keys(self.bucket_size * (self.num_chunks_before + 1), geometry, length)
        rounds = self.num_hashes or (4 if self.num_buckets > 1 else 1)
        near = window_keys(self.attention_window, geometry, length)
        return min(rounds * seen + near, all_keys(geometry, length))

    @classmethod
    def of_size(cls, size: int, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        width = max(1, size // 8)
        # a bucket holds about as many tokens as a query sees of it
        buckets = max(2, length // (2 * width) // 2 * 2)
        return cls(num_buckets=buckets, bucket_size=width, num_hashes=2, attention_window=4 * width)


@register_mechanism
class ReformerAttention(EfficientAttention):
    """A query sees keys that hash like itself, and its neighbours, in one softmax; each of them once.

    Round r has b / 2 random directions Ω_r, and sends a vector to that of them, or of their opposites, nearest to it:

        h_r(x) = argmax [Ω_r x, -Ω_r x]

    Encoder: queries are sorted by `h_r(q_i - mean q)`, keys by `h_r(k_j - mean k)`, both then by position, and cut into
    chunks of w. The queries of chunk c see the keys of the chunks c - p … c, where the last chunk comes before the first.
    Means are over the real tokens of a row; subtracting that of the keys changes no attention weight. Causal: query i sees
    the last (p + 1) w tokens up to itself that have its own `h_r(q_i / ‖q_i‖ + k_i / ‖k_i‖)`, which no later token can
    change. Then

        y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j    over all keys that a round or the window shows i

    No parameters. Hashes are constants of the gradient. With v = (p + 1) w: O(R N (v D + log N) + N R b D) time, O(N v)
    memory per round. While decoding, all keys and the hashes of their tokens are kept, and a step compares N R hashes and
    copies R v keys.

    With `shared_qk` there are no queries but the keys: logits are `k_i·k_j / ‖k_j‖ + b(j - i)`, hashes h_r(k_i), and a
    token sees itself only where it sees nothing else. This loses pretrained attention: for training alone.

    Source: Kitaev et al. 2020 (arXiv 2001.04451), §2; chunks of queries and keys that differ: Daras et al. 2020 (arXiv
    2010.05315), §3. Departures: causal choices look at no later token (the borders of published chunks depend on them), and
    there is a window.
    """

    Config = ReformerAttentionConfig
    config: ReformerAttentionConfig
    facts = MechanismFacts(
        title="Reformer (LSH attention)",
        paper="arXiv 2001.04451",
        kind="learnable pattern",
        time="n·r·((p + 1)·w + log n)",
        memory="n·(p + 1)·w",
        exact_when="num_buckets = 1 and bucket_size ≥ 2n",
        training="works without training beside a window; training restores what no hash finds",
    )
    rotations: Tensor

    def __init__(self, config: ReformerAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        self.by_position = config.attention_window > 0
        hashed = config.num_buckets > 1
        rounds = config.num_hashes or (4 if hashed else 1)
        rotations = torch.empty(rounds, config.num_buckets // 2, geometry.head_dim)
        self.register_buffer("rotations", rotations, persistent=hashed)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # one bucket needs none
        if count := self.rotations[..., 0].numel():
            generator = self.geometry.generator(self.config.seed or 0)
            self.rotations.copy_(orthogonal_features(count, self.geometry.head_dim, generator).view_as(self.rotations))

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        if self.config.num_buckets == 1:
            return {}
        return {"rotations": f"random directions of seed {self.config.seed or 0}, layer {self.geometry.layer}"}

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(
            config, num_buckets=1, bucket_size=2 * length, shared_qk=False, num_hashes=None, seed=None
        )

    @classmethod
    def control_config(cls, config: Any) -> EfficientAttentionConfig | None:
        return window_only(config)

    def cache_layer(self) -> BucketLayer | None:
        return BucketLayer() if self.geometry.is_causal else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        size, before = self.config.bucket_size, self.config.num_chunks_before
        options: dict[str, Any] = dict(
            near=self.config.attention_window, own_last=self.config.shared_qk, context=context
        )
        own = key[:, :, key.shape[2] - query.shape[2] :]
        if self.config.shared_qk:
            # the model's queries keep a gradient, of 0
            query, key = own + query[..., :0].sum(), _unit(key).to(key.dtype)
            options["context"] = context = dataclasses.replace(context, scaling=1.0)
        labels = [self.hashes(x) for x in self._hashed(query, own, context)]
        if not context.is_causal:
            return paired_attention(query, key, value, *labels, size=size, chunks_before=before, **options)
        all_labels = labels_of_all(labels[0], key.shape[2], context)
        return bucket_attention(query, key, value, all_labels, size=size * (before + 1), **options)

    @torch.no_grad()
    def _hashed(self, query: Tensor, key: Tensor, context: AttentionContext) -> list[Tensor]:
        """What is hashed, in fp32 at least: for queries and for keys, causal: for both in one."""
        both = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key)]
        if context.is_causal:
            return both[1:] if self.config.shared_qk else [_unit(both[0]) + _unit(both[1])]
        return both if self.config.shared_qk else [_centred(x, context.key_padding_mask) for x in both]

    @torch.no_grad()
    def hashes(self, x: Tensor) -> Tensor:
        """(B, H, R, N) bucket of each of (B, H, N, D) vectors in each round."""
        if self.config.num_buckets == 1:
            return x.new_zeros(*x.shape[:2], len(self.rotations), x.shape[2], dtype=torch.long)
        with torch.autocast(x.device.type, enabled=False):
            turned = torch.einsum("bhnd,rcd->bhrnc", x, self.rotations.to(x.dtype))
            both = torch.cat([turned, -turned], dim=-1)
            return first_largest(both, rounding(turned.abs().amax(-1, keepdim=True)))


def _unit(x: Tensor) -> Tensor:
    """x / ‖x‖ in fp32 at least: in half precision 0 would become NaN."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _centred(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """What (B, H, N, D) differ by from their mean; 0 where that is rounding alone, as in a row of equal tokens."""
    mean = _mean(x, token_mask)
    apart = x - mean
    is_apart = apart.norm(dim=-1, keepdim=True) > rounding(mean.norm(dim=-1, keepdim=True))
    return torch.where(is_apart, apart, 0.0)


def _mean(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """(B, H, 1, D) mean of the real tokens of (B, H, N, D)."""
    if token_mask is None:
        return x.mean(2, keepdim=True)
    real = token_mask[:, None, :, None]
    return torch.where(real, x, 0.0).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
