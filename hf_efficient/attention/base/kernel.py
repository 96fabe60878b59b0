"""Kernel attention: a positive feature map of queries and keys in place of the softmax, in linear time."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.attention.base.mechanism import EfficientAttention
from hf_efficient.cache.features import FeatureLayer
from hf_efficient.ops.affine_features import AffineFeatures, affine_attention, has_fused_form
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.graph import is_captured
from hf_efficient.ops.linear_attention import linear_attention, log_kernel, read, read_mean
from hf_efficient.ops.linear_beyond_window import far_past
from hf_efficient.ops.softmax import Partial
from hf_efficient.patterns.kinds import Window

RELATIVE_BIAS_REFUSAL = (
    "features factorise functions of q·k alone and an additive bias does not factorise; use hedgehog with a window that "
    "reaches to where the bias is constant, or local, longformer, bigbird or linformer on T5"
)


class KernelAttention(EfficientAttention):
    """`y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)` over the keys that query i sees. A subclass gives log φ: by
    `affine_features` where that is affine in a vector of each token, else by `log_features`.

    Queries and keys enter as `x = q √(s √D)` and `k √(s √D)`, which are q and k themselves where s = 1 / √D. Features are
    computed in fp32 at least, kept as logarithms and stabilised exactly, see `ops.linear_attention`; affine ones of both
    directions are never held on the CPU, see `ops.affine_features`. Causal decoding keeps one (M, D + 1) state per head.
    Attention dropout drops whole keys (their values, for all queries at once, scaled up by 1 / (1 - p)): single weights do
    not exist here.
    """

    relative_bias_refusal: ClassVar[str | None] = RELATIVE_BIAS_REFUSAL
    by_position = False

    def affine_features(self, x: Tensor, name: str) -> AffineFeatures | None:
        """log φ of (B, H, N, D) heads times √(s √D), `None` = it is not affine; `name` is "query" or "key"."""
        return None

    def log_features(self, x: Tensor, name: str) -> Tensor:
        """The same as (B, H, N, M) numbers."""
        features = self.affine_features(x, name)
        if features is None:
            raise NotImplementedError(f"{type(self).__name__} has no feature map")
        return features.dense()

    def log_features_of(self, query: Tensor, key: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """(B, H, N, M) and (B, H, S, M) log-features; all of a key that does not exist are -inf."""
        log_query = self.log_features(scaled(query, context), "query")
        log_key = self.log_features(scaled(key, context), "key")
        if context.key_padding_mask is not None:
            log_key = log_key.masked_fill(~context.key_padding_mask[:, None, :, None], float("-inf"))
        return log_query, log_key

    def log_decay(self, key: Tensor, context: AttentionContext) -> Tensor | None:
        """(B, H, S) logarithms of what each token leaves of all that came before it; `None` = everything."""
        return None

    def cache_layer(self) -> FeatureLayer | None:
        return FeatureLayer(Window(left=0, right=0)) if self.geometry.is_causal else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        with without_autocast(query):
            dropped = drop_keys(value, context)
            layer = context.recurrent
            if query.shape[2] == 1 and isinstance(layer, FeatureLayer):
                out = self._newest(query, key, dropped, context, layer)
            elif context.is_causal:
                out, _ = self._past(query, key, dropped, context, 0)
            else:
                out = self._both_directions(query, key, dropped, context)
        return out.to(query.dtype)

    def _newest(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, layer: FeatureLayer
    ) -> Tensor:
        """Attention of one new token, which sees itself as all others: its key joins the state first."""
        if first := key.shape[2] - layer.pending:
            key, value, context = key[:, :, first:], value[:, :, first:], of_keys(context, first, key.shape[2])
        log_query, log_key = self.log_features_of(query, key, context)
        layer.fold(log_key, value, self.log_decay(key, context))
        assert layer.state is not None
        return read_mean(log_query, layer.state)

    def _past(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, beyond: int) -> Partial:
        """Attention of each query through features over the keys at least `beyond` tokens before it.

        The cache's state stands for keys that are no longer there, and is given those that the next query sees so.
        """
        n, exact = query.shape[2], max(0, beyond - 1)
        layer = context.recurrent if isinstance(context.recurrent, FeatureLayer) else None
        first = 0 if layer is None else key.shape[2] - layer.pending
        last = max(first, key.shape[2] - exact)
        key, value, context = key[:, :, first:last], value[:, :, first:last], of_keys(context, first, last)
        log_query, log_key = self.log_features_of(query, key, context)
        if layer is None:
            return far_past(log_query, log_key, value, beyond - exact)
        state, log_decay = layer.state, self.log_decay(key, context)
        if n == 1 and last - first == 1 and state is not None:
            result = read(log_query, state)
        else:
            result = far_past(log_query, log_key, value, beyond - exact, state)
        layer.fold(log_key, value, log_decay)
        return result

    def _both_directions(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        if has_fused_form(query):
            of_query = self.affine_features(scaled(query, context), "query")
            of_key = self.affine_features(scaled(key, context), "key")
            if of_query is not None and of_key is not None:
                return affine_attention(of_query, of_key, value, context.key_padding_mask)
        out: Tensor = linear_attention(*self.log_features_of(query, key, context), value, is_causal=False)
        return out

    def attention_weights(self, query: Tensor, key: Tensor, context: AttentionContext) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            log_query, log_key = self.log_features_of(query, key, context)
            return normalised(log_kernel(log_query, log_key), context)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, nothing on the device of `x` is cast."""
    device = x.device.type
    if is_captured() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def scaled(x: Tensor, context: AttentionContext) -> Tensor:
    """(B, H, N, D) heads times √(s √D), in fp32 at least."""
    x, unit = x.to(torch.promote_types(x.dtype, torch.float32)), math.sqrt(context.scaling * math.sqrt(x.shape[-1]))
    return x if unit == 1.0 else x * unit


def normalised(logits: Tensor, context: AttentionContext) -> Tensor:
    """(B, H, N, S) softmax over the keys that exist and, causally, are no later; a row that sees nothing is 0."""
    n, s = logits.shape[-2:]
    hidden = torch.zeros(1, 1, n, s, dtype=torch.bool, device=logits.device)
    if context.is_causal:
        hidden = torch.ones_like(hidden).triu(s - n + 1)
    if context.key_padding_mask is not None:
        hidden = hidden | ~context.key_padding_mask[:, None, None]
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(hidden, 0.0)


def drop_keys(value: Tensor, context: AttentionContext) -> Tensor:
    """Values (B, H, S, D) of which attention dropout sets whole keys to 0."""
    if not context.dropout:
        return value
    return value * F.dropout(torch.ones_like(value[..., :1]), context.dropout)


def of_keys(context: AttentionContext, first: int, last: int) -> AttentionContext:
    """The context of the keys from `first` to before `last` alone; without positions they are the first ones."""
    names = {name: getattr(context, name) for name in ("key_positions", "key_padding_mask")}
    return replace(context, **{name: x[:, first:last] for name, x in names.items() if x is not None})
