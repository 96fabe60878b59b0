"""Full softmax attention, for cross-attention and for layers that no config names."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.softmax import masked_attention


def dense_attention(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
    """Full softmax attention, for cross-attention and for layers that no config names."""
    n, s = query.shape[2], key.shape[2]
    mask = None if context.key_padding_mask is None else context.key_padding_mask[:, None, None, :]
    is_causal = context.is_causal and n > 1
    if is_causal and (mask is not None or context.relative_bias is not None or n != s):
        past = torch.ones(n, s, dtype=torch.bool, device=query.device).tril(s - n)
        mask, is_causal = past if mask is None else mask & past, False
    if context.relative_bias is not None:
        bias = context.relative_bias.dense(n, s, context.query_offset, query.device).to(query.dtype)
        mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
    return masked_attention(
        query, key, value, attn_mask=mask, dropout_p=context.dropout, is_causal=is_causal, scale=context.scaling
    )
