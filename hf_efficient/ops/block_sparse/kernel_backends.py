"""The pieces of a pattern on fused kernels: strides and dilation by regrouping tokens, the rest as one table of tiles."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hf_efficient.kernels.block_sparse_op import block_sparse
from hf_efficient.kernels.flex import flex
from hf_efficient.ops.block_sparse.decompose import (
    by_head,
    by_length,
    extra_only,
    fold_call,
    stride_of,
    summaries_of,
    with_stride,
    with_summaries,
    without,
)
from hf_efficient.ops.block_sparse.windows import fold, unfold
from hf_efficient.ops.context import AttentionCall
from hf_efficient.ops.softmax import Result, merge_attention
from hf_efficient.patterns.kinds import Summary, Window
from hf_efficient.patterns.pattern import Pattern


def triton_attention(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall) -> Result:
    """`block_sparse_attention` on the Triton kernels; the arguments have passed `block_sparse_op.unsupported`."""
    if pattern.depends_on_length:
        return by_length(query, key, value, pattern, call, triton_attention)
    heads = [pattern.head(h) for h in range(pattern.num_heads)]
    if len(heads) > 1 and any(_folds(single) for single in heads):
        return by_head(query, key, value, pattern, call, triton_attention)
    if not call.by_vectors:
        if summaries := summaries_of(pattern, query.shape[2]):
            return with_summaries(query, key, value, without(pattern, Summary), summaries, call, triton_attention)
        if stride := stride_of(pattern):
            return with_stride(query, key, value, pattern, stride, call, triton_attention)
    if call.extra is not None:
        part = triton_attention(query, key, value, pattern, dataclasses.replace(call, extra=None, return_lse=True))
        other = extra_only(query, call)
        merged = merge_attention(part, other)  # type: ignore[arg-type]
        return merged if call.return_lse else (merged[0], None)
    if isinstance(pattern, Window) and pattern.dilation > 1 and not call.by_vectors:
        return _dilated(query, key, value, pattern, call)
    bias = None
    if call.relative_bias is not None:
        reach = call.relative_bias.saturation
        bias = call.relative_bias.at(torch.arange(-reach, reach + 1, device=query.device)).float()
    out, lse = block_sparse(
        query,
        key,
        value,
        pattern=pattern,
        scaling=call.scaling,
        is_causal=call.is_causal,
        keep=call.key_padding_mask,
        bias=bias,
        positions=call.positions,
        segments=call.segments,
        softcap=call.softcap,
    )
    return out, lse if call.return_lse else None


def _folds(pattern: Pattern) -> bool:
    is_dilated = isinstance(pattern, Window) and pattern.dilation > 1
    return is_dilated or stride_of(pattern) is not None or without(pattern, Summary) != pattern


def _dilated(query: Tensor, key: Tensor, value: Tensor, pattern: Window, call: AttentionCall) -> Result:
    """Tokens of one residue class are neighbours at this dilation: fold the classes into the batch."""
    step, n = pattern.dilation, query.shape[2]
    q, k, v = (fold(x, step, 2) for x in (query, key, value))
    out, lse = triton_attention(q, k, v, dataclasses.replace(pattern, dilation=1), fold_call(call, key, step))
    return unfold(out, step)[:, :, :n], None if lse is None else unfold(lse[..., None], step)[:, :, :n, 0]


def flex_attention(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall) -> Result:
    """`block_sparse_attention` on PyTorch's FlexAttention.

    Raises:
        ValueError: the call needs what FlexAttention, or its use here, can't give.
    """
    if call.return_lse or call.extra is not None or call.by_vectors or call.dropout:
        raise ValueError(
            "implementation='flex' takes no dropout, extra keys, segments or positions, and gives no log-sum-exp; use "
            "'torch' or 'triton'."
        )
    if pattern.depends_on_length:
        return by_length(query, key, value, pattern, call, flex_attention)
    bias = None
    if call.relative_bias is not None:
        reach = call.relative_bias.saturation
        bias = call.relative_bias.at(torch.arange(-reach, reach + 1, device=query.device)).float()
    out = flex(
        query,
        key,
        value,
        pattern=pattern,
        scaling=call.scaling,
        is_causal=call.is_causal,
        keep=call.key_padding_mask,
        bias=bias,
        softcap=call.softcap,
    )
    return out, None
