"""Full softmax attention, for cross-attention and for layers that no config names."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.ops.block_sparse.attention import block_sparse_attention
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.softmax import masked_attention, with_sinks
from hf_efficient.patterns.kinds import Window


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, window: tuple[int, int] | None = None
) -> Tensor:
    """What the host computes: full softmax attention, or that of its window, with its sinks and capped logits.

    Args:
        window: (left, right) keys beside the token itself; `None` = all. O(N · window) then, and never an N×S tensor.
    """
    if window is None and context.sinks is None and context.softcap is None:
        return dense_attention(query, key, value, context)
    left, right = (key.shape[2], key.shape[2]) if window is None else window
    pattern = Window(left=left, right=right)
    if context.sinks is None:
        return block_sparse_attention(query, key, value, pattern, context)
    return with_sinks(*block_sparse_attention(query, key, value, pattern, context, return_lse=True), context.sinks)


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
