"""Kernel attention: a positive feature map of queries and keys in place of the softmax, in linear time."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.attention.base.mechanism import EfficientAttention
from hf_efficient.cache.recurrent import RecurrentLayer
from hf_efficient.ops.affine_features import AffineFeatures, affine_attention, has_fused_form
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.linear_attention import linear_attention, log_kernel
from hf_efficient.ops.linear_beyond_window import far_past
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

    def cache_layer(self) -> RecurrentLayer | None:
        return RecurrentLayer(Window(left=0, right=0)) if self.geometry.is_causal else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            dropped = drop_keys(value, context)
            if not context.is_causal:
                return self._both_directions(query, key, dropped, context).to(query.dtype)
            log_query, log_key = self.log_features_of(query, key, context)
            out, _ = far_past(log_query, log_key, dropped, 0, state_of(context))
            self.fold(log_key, key, value, context)
        return out.to(query.dtype)

    def _both_directions(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        if has_fused_form(query):
            of_query = self.affine_features(scaled(query, context), "query")
            of_key = self.affine_features(scaled(key, context), "key")
            if of_query is not None and of_key is not None:
                return affine_attention(of_query, of_key, value, context.key_padding_mask)
        out: Tensor = linear_attention(*self.log_features_of(query, key, context), value, is_causal=False)
        return out

    def fold(self, log_key: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> None:
        """Give the cache's state what it forgets after this call."""
        if context.recurrent is not None:
            context.recurrent.fold(log_key, value)

    def attention_weights(self, query: Tensor, key: Tensor, context: AttentionContext) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            log_query, log_key = self.log_features_of(query, key, context)
            return normalised(log_kernel(log_query, log_key), context)


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


def state_of(context: AttentionContext) -> Any:
    """What the cache's recurrent layer holds of forgotten keys, or `None`."""
    return None if context.recurrent is None else context.recurrent.state
