"""Kernel attention: a positive feature map of queries and keys in place of the softmax, in linear time."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.attention.base.mechanism import EfficientAttention
from hf_efficient.cache.recurrent import RecurrentLayer
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.linear_attention import linear_attention
from hf_efficient.ops.linear_beyond_window import far_past, log_kernel
from hf_efficient.patterns.kinds import Window

RELATIVE_BIAS_REFUSAL = (
    "features factorise functions of q·k alone and an additive bias does not factorise; use hedgehog with a window that "
    "reaches to where the bias is constant, or local, longformer, bigbird or linformer on T5"
)


class KernelAttention(EfficientAttention):
    """`y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)` over the keys that query i sees. A subclass gives log φ.

    Queries and keys enter as `x = q √(s √D)` and `k √(s √D)`, which are q and k themselves where s = 1 / √D. Features are
    computed in fp32 at least, kept as logarithms and stabilised exactly, see `ops.linear_attention`. Causal decoding keeps
    one (M, D + 1) state per head. Attention dropout drops whole keys (their values, for all queries at once, scaled up by
    1 / (1 - p)): single weights do not exist here.
    """

    relative_bias_refusal: ClassVar[str | None] = RELATIVE_BIAS_REFUSAL
    by_position = False

    def log_features(self, x: Tensor, name: str) -> Tensor:
        """(B, H, N, M) logarithms of φ of (B, H, N, D) heads times √(s √D); `name` is "query" or "key"."""
        raise NotImplementedError(f"{type(self).__name__} has no feature map")

    def log_features_of(self, query: Tensor, key: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """(B, H, N, M) and (B, H, S, M) log-features; all of a key that does not exist are -inf."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        unit = math.sqrt(context.scaling * math.sqrt(query.shape[-1]))
        log_query = self.log_features(query.to(dtype) * unit, "query")
        log_key = self.log_features(key.to(dtype) * unit, "key")
        if context.key_padding_mask is not None:
            log_key = log_key.masked_fill(~context.key_padding_mask[:, None, :, None], float("-inf"))
        return log_query, log_key

    def cache_layer(self) -> RecurrentLayer | None:
        return RecurrentLayer(Window(left=0, right=0)) if self.geometry.is_causal else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            log_query, log_key = self.log_features_of(query, key, context)
            dropped = drop_keys(value, context)
            if context.is_causal:
                out, _ = far_past(log_query, log_key, dropped, 0, state_of(context))
            else:
                out = linear_attention(log_query, log_key, dropped, is_causal=False)
            self.fold(log_key, key, value, context)
        return out.to(query.dtype)

    def fold(self, log_key: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> None:
        """Give the cache's state what it forgets after this call."""
        if context.recurrent is not None:
            context.recurrent.fold(log_key, value)

    def attention_weights(self, query: Tensor, key: Tensor, context: AttentionContext) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            log_query, log_key = self.log_features_of(query, key, context)
            # all-(-inf) features have no logarithm of a kernel: such keys are hidden below
            exists = (log_key > float("-inf")).any(-1)
            logits = log_kernel(log_query, torch.where(exists[..., None], log_key, 0.0))
            return normalised(logits, context)


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
