"""ETC: a sliding window for the input, and global tokens of its own that see everything and are seen by everyone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    LinearWeights,
    MechanismFacts,
    SourceAttention,
    register_mechanism,
)
from hf_efficient.attention.base.keys_shown import window_keys
from hf_efficient.attention.base.mechanism import GATE, prepend
from hf_efficient.ops.block_sparse.attention import block_sparse_attention
from hf_efficient.ops.block_sparse.relative_window import labelled_window_attention
from hf_efficient.ops.block_sparse.windows import extra_attention
from hf_efficient.ops.context import AttentionContext, ExtraKeys
from hf_efficient.ops.padding import real_tokens
from hf_efficient.ops.softmax import merge_attention
from hf_efficient.patterns.kinds import Window

# new projections by `sharing`: name → the pretrained one that it is copied from
GLOBAL_QUERY = {"query_global": "query", "key_global": "key", "value_global": "value"}
SHARING: dict[str, dict[str, str]] = {
    "qkv": {},
    "kv": GLOBAL_QUERY,
    "none": GLOBAL_QUERY
    | {"key_global_to_long": "key", "value_global_to_long": "value"}
    | {"key_long_to_global": "key", "value_long_to_global": "value"},
}
LONG_TO_GLOBAL, GLOBAL_TO_LONG, GLOBAL_TO_GLOBAL = range(3)


@dataclass(frozen=True, kw_only=True)
class EtcAttentionConfig(EfficientAttentionConfig):
    """Options of ETC's global-local attention.

    Args:
        attention_window: w, in tokens, even: w // 2 keys on each side plus the token itself.
        num_global_tokens: g learned tokens in front of the input, for the whole stack; 0 = a window only.
        sharing: which projections the four pieces of attention share: `"qkv"`: all of them, the host's; `"kv"`: queries of
            global tokens, and all keys and values they look at, have their own; `"none"`: keys and values differ by who
            looks and who is looked at. `None` = `"qkv"`; without global tokens only `None`.
        relative_labels: m, clip distance of learned relative position labels, at most w // 2; 0 = none.
    """

    mechanism: ClassVar[str] = "etc"
    shares: ClassVar[Mapping[str, float]] = {"attention_window": 3 / 4, "num_global_tokens": 1 / 8}

    attention_window: int = 512
    num_global_tokens: int = 64
    sharing: str | None = None
    relative_labels: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("attention_window")
        self._require("attention_window", self.attention_window % 2 == 0, "even (half of it lies on each side)")
        self._require_at_least(0, "num_global_tokens")
        fits = self.sharing is None or (self.num_global_tokens > 0 and self.sharing in SHARING)
        self._require("sharing", fits, f"one of {', '.join(SHARING)}; None with num_global_tokens=0")
        clip, most = self.relative_labels, self.attention_window // 2
        self._require("relative_labels", type(clip) is int and 0 <= clip <= most, f"an integer from 0 to {most}")

    @classmethod
    def without_effect(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return () if options.get("num_global_tokens", cls.num_global_tokens) else ("sharing",)

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        return window_keys(self.attention_window, geometry, length, self.num_global_tokens)


@register_mechanism
class EtcAttention(EfficientAttention):
    """Global-local attention over [g; x]: g learned global tokens before the n tokens of the input.

    Each pair has a label t: global-long, long-global, global-global, or between tokens the distance clipped to ±m. With a_t
    a vector and β_t a logit per head and label, and W(i) the window of `local`:

        logit_ij = s · q_i·(k_j + a_t(i,j)) + b(j - i) + β_t(i,j)
        long i:    y_i = Σ softmax_j(logit_ij) v_j     over j ∈ W(i) ∪ all global tokens
        global i:  y_i = Σ softmax_j(logit_ij) v_j     over all global tokens and all real tokens

    b is the host's relative bias, between tokens only and at their true offsets. q, k, v come from the host's projections,
    or by `sharing` from copies of them. The host's own window narrows W alone. The last layer has no global queries.

    Start: β of long-global = -5 - log g; other β, and all a, 0. Relative biases add their value at the far left to β of
    long-global, at the far right to global-long, their mean to global-global. Exact: w ≥ 2n and num_global_tokens = 0.

    O(N (w + g) + g²) time and memory; other sharings project N tokens once or twice more. Source: Ainslie et al. 2020 (arXiv
    2004.08483), §3; google-research `etcmodel/layers/attention.py`. Deviations: global tokens are learned, not made from the
    input's structure; β is not divided by √D; no contrastive loss; one output projection.
    """

    Config = EtcAttentionConfig
    config: EtcAttentionConfig
    facts = MechanismFacts(
        title="ETC (Extended Transformer Construction)",
        paper="arXiv 2004.08483",
        kind="memory",
        time="n·(w + g) + g²",
        memory="n·(w + g) + g²",
        exact_when="attention_window ≥ 2n and num_global_tokens = 0",
        training="starts as a window; global tokens are learned",
    )
    causal_refusal = "global tokens see the whole input and tell it to every token; use local, longformer or bigbird"

    def __init__(self, config: EtcAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        heads, width, clip = geometry.num_heads, geometry.head_dim, config.relative_labels
        side = config.attention_window // 2
        left, right = (min(side, reach) for reach in geometry.sliding_window or (side, side))
        self.window = Window(left=left, right=right)
        self.has_global_rows = geometry.layer < geometry.num_layers - 1
        kinds = 0 if config.num_global_tokens == 0 else 3 if self.has_global_rows else 1
        if kinds:
            self.global_logits = nn.Parameter(torch.empty(kinds, heads))
        if clip:
            self.label_logits = nn.Parameter(torch.empty(2 * clip + 1, heads))
            self.label_vectors = nn.Parameter(torch.empty(2 * clip + 1 + kinds, heads, width))
        self.copies = {
            name: source
            for name, source in SHARING[config.sharing or "qkv"].items()
            if kinds == 3 or (kinds and name.endswith("long_to_global"))
        }
        self.needs_hidden_states = bool(self.copies)
        for name in self.copies:
            self.add_module(name, nn.Linear(geometry.hidden_size, heads * width, bias=geometry.projection_bias))

    @classmethod
    def honours_sliding_window(cls, config: Any, geometry: AttentionGeometry) -> bool:
        return not config.relative_labels

    @classmethod
    def num_extra_tokens(cls, config: EtcAttentionConfig) -> int:
        return config.num_global_tokens

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if geometry.rotary is not None and (config.sharing in ("kv", "none") or config.relative_labels):
            lacks = "projections and relative_labels of its own don't follow rotary positions"
            reasons.append(f"etc: {lacks}: use sharing='qkv' and relative_labels=0")
        return reasons

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.normal_(std=0.02) if name.endswith(".weight") else parameter.zero_()
            if self.config.num_global_tokens:
                self.global_logits[LONG_TO_GLOBAL] = GATE - math.log(self.config.num_global_tokens)

    @torch.no_grad()
    def initialise_from(self, source: SourceAttention) -> dict[str, str]:
        origins = {name: "zeros" for name, _ in self.named_parameters(recurse=False) if name != "global_logits"}
        if self.config.num_global_tokens:
            origins["global_logits"] = f"{GATE:g} - log g from tokens to global tokens, 0 elsewhere"
            if source.relative_bias is not None:
                far = source.relative_bias.saturation
                left, right = source.relative_bias.at(torch.tensor([-far, far], device=self.global_logits.device)).T
                self.global_logits.add_(torch.stack([left, right, (left + right) / 2])[: len(self.global_logits)])
                origins["global_logits"] += ", plus the relative bias far away"
        for name, copied in self.copies.items():
            weights: LinearWeights = source.as_attention_gets(copied)
            target: Any = getattr(self, name)
            target.weight.copy_(weights.weight)
            origins[f"{name}.weight"] = f"copy of the {copied} weight"
            if weights.bias is not None:
                target.bias.copy_(weights.bias)
                origins[f"{name}.bias"] = f"copy of the {copied} bias"
        return origins

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return replace(config, attention_window=2 * length, num_global_tokens=0, sharing=None, relative_labels=0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext | None) -> Tensor:
        if context is None:
            return prepend(self.global_tokens, query)
        g, clip, token_mask = self.config.num_global_tokens, self.config.relative_labels, context.key_padding_mask
        q, k, v = (x[:, :, g:] for x in (query, key, value))
        extra = self._global_columns(q, key, value, context) if g else None
        call = replace(context, key_padding_mask=None if token_mask is None else token_mask[:, g:], extra=extra)
        if clip:
            logits = self._vector_logits(q, slice(0, 2 * clip + 1), context) + self.label_logits.T[:, None]
            out = labelled_window_attention(q, k, v, logits, call, reach=self.window.left)
        else:
            out = block_sparse_attention(q, k, v, self.window, call)
        if not g:
            return out
        first = query[:, :, :g]
        rows = self._global_rows(first, key, value, context) if self.has_global_rows else torch.zeros_like(first)
        return torch.cat([rows.to(out.dtype), out], dim=2)

    def _vector_logits(self, query: Tensor, labels: slice, context: AttentionContext) -> Tensor:
        """(B, H, N, labels): `s · q·a_t` for some labels t."""
        return context.scaling * torch.einsum("bhnd,thd->bhnt", query, self.label_vectors[labels].to(query.dtype))

    def _kind_logits(self, kind: int, query: Tensor, context: AttentionContext) -> Tensor:
        """(B or 1, H, N or 1, 1): what the logits of a kind of pair with a global token get in addition to `s · q·k`."""
        logits = self.global_logits[kind][None, :, None, None]
        if not self.config.relative_labels:
            return logits
        label = 2 * self.config.relative_labels + 1 + kind
        return logits + self._vector_logits(query, slice(label, label + 1), context)

    def _heads(self, name: str, hidden: Tensor) -> Tensor:
        return getattr(self, name)(hidden).unflatten(-1, (self.geometry.num_heads, -1)).transpose(1, 2)

    def _global_columns(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> ExtraKeys:
        """The global tokens as keys of every token."""
        g = self.config.num_global_tokens
        key, value = key[:, :, :g], value[:, :, :g]
        if self.config.sharing == "none":
            assert context.hidden_states is not None
            key, value = (self._heads(f"{x}_long_to_global", context.hidden_states[:, :g]) for x in ("key", "value"))
        logits = self._kind_logits(LONG_TO_GLOBAL, query, context)
        return ExtraKeys(key, value, real_tokens(context.key_padding_mask, key)[:, None, :g], logits)

    def _global_rows(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """(B, H, g, D): what the global tokens see."""
        g, n, hidden = query.shape[2], key.shape[2], context.hidden_states
        if self.copies:
            assert hidden is not None
            query = self._heads("query_global", hidden[:, :g])
            to_tokens = "global_to_long" if self.config.sharing == "none" else "global"
            key, value = (
                torch.cat(
                    [self._heads(f"{x}_global", hidden[:, :g]), self._heads(f"{x}_{to_tokens}", hidden[:, g:])], 2
                )
                for x in ("key", "value")
            )
        # apart from what is added to both alike, logits of global tokens differ by one number per query
        to_global, to_long = (self._kind_logits(k, query, context) for k in (GLOBAL_TO_GLOBAL, GLOBAL_TO_LONG))
        visible = real_tokens(context.key_padding_mask, key)
        parts = (
            ExtraKeys(key[:, :, here], value[:, :, here], visible[:, None, here], bias)
            for here, bias in ((slice(g), to_global - to_long), (slice(g, n), None))
        )
        return merge_attention(*(extra_attention(query, part, **context.options) for part in parts))[0]
