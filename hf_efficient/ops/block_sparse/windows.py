"""Sliding-window attention: blocks of queries against overlapping views of the keys, and keys beside the window."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.kernels.cpu_band import strips, window_tile
from hf_efficient.ops.context import AttentionCall, ExtraKeys
from hf_efficient.ops.graph import is_tracing
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.ops.softmax import Partial, Result, additive_mask, attend, bool_all, merge_attention
from hf_efficient.patterns.kinds import Window


def window_sides(attention_window: int, is_causal: bool) -> tuple[int, int]:
    """Visible keys on the left and on the right, the token itself not counted."""
    return (attention_window - 1, 0) if is_causal else (attention_window // 2, attention_window // 2)


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window: Window, call: AttentionCall, *, skip: int | None = None
) -> Result:
    """Softmax attention in which query i sees key j iff `j - i = dilation · m` with `-left ≤ m ≤ right`.

    Query n stands at position `query_offset + n` among the keys. A causal call sees nothing on the right. A query that may
    see nothing returns 0.

    Args:
        query: (B, H, N, D).
        key, value: (B, HK, S, D), H a multiple of HK, S ≥ N.
        call: all of it but `segments` and `positions`.
        skip: offsets that are multiples of this number are not visible (another pattern has them).

    Returns:
        (B, H, N, D), and the log-sum-exp (B, H, N) or `None`. O(N · (left + right + block)) time and memory; the
        largest tensor is one span per query block.

    Source: Beltagy et al. 2020 (arXiv 2004.05150), §3.1.
    """
    # no farther than keys stand: windows that show everything are given with any numbers
    left = min(window.left, (key.shape[2] - 1) // window.dilation)
    right = 0 if call.is_causal else min(window.right, (query.shape[2] - 1) // window.dilation)
    extra = call.extra
    if window.dilation > 1:
        part = _dilated(query, key, value, Window(left=left, right=right, dilation=window.dilation), call, skip)
    else:
        shown = _shown(left, right, 1, skip, call.relative_bias, query)
        if _is_fused(query, call):
            return _fused(query, key, value, left, right, shown, call)
        part = _by_strips(query, key, value, left, right, shown, call)
    if extra is not None:
        part = merge_attention(part, extra_attention(query, extra, **call.options))  # type: ignore[arg-type]
    return part if call.return_lse else (part[0], None)


def _shown(
    left: int, right: int, dilation: int, skip: int | None, bias: RelativeBias | None, query: Tensor
) -> Tensor | None:
    """(1 or H, left + 1 + right) logits of the offsets `dilation · (-left … right)`, -inf = left out; `None` = all 0."""
    if skip is None and bias is None:
        return None
    offset = dilation * torch.arange(-left, right + 1, device=query.device)
    shown = query.new_zeros(1, len(offset)) if bias is None else bias.at(offset).to(query.dtype)
    return shown if skip is None else shown.masked_fill(offset % skip == 0, float("-inf"))


def _is_fused(query: Tensor, call: AttentionCall) -> bool:
    """PyTorch's kernel for the CPU can take the call."""
    return query.device.type == "cpu" and not call.dropout and call.softcap is None and not is_tracing()


def _fused(
    query: Tensor, key: Tensor, value: Tensor, left: int, right: int, shown: Tensor | None, call: AttentionCall
) -> Result:
    dtype, extra, logits = query.dtype, call.extra, None
    merged = extra is not None and extra.bias is not None and extra.bias.requires_grad and torch.is_grad_enabled()
    if call.return_lse or merged:
        # half precision would round the log-sum-exp's gradient
        query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    if extra is not None and not merged:
        logits = additive_mask(extra.keep, query.dtype)[:, None]
        logits = logits if extra.bias is None else logits + extra.bias.to(query.dtype)
    front = (None, None) if extra is None or merged else (x.to(query.dtype) for x in (extra.key, extra.value))
    shown = None if shown is None else shown.to(query.dtype)
    out, lse = torch.ops.hf_efficient.band_attention(
        query, key, value, call.key_padding_mask, shown, *front, logits, left, right, call.query_offset, call.scaling
    )
    if extra is not None and merged:
        out, lse = merge_attention((out, lse), extra_attention(query, extra, **call.options))
    return out.to(dtype), lse if call.return_lse else None


def extra_attention(query: Tensor, extra: ExtraKeys, **options: Any) -> Partial:
    """Attention over the extra keys alone, to be merged with that over the others: (out, lse); `options` are `attend`'s."""
    logits = None if bool_all(extra.keep) else additive_mask(extra.keep, query.dtype)[:, None]
    # what is added to all logits alike only moves the log-sum-exp: a logit with a gradient would need the slow softmax
    is_shift = extra.bias is not None and extra.bias.shape[-1] == 1
    if extra.bias is not None and not is_shift:
        logits = extra.bias.to(query.dtype) if logits is None else logits + extra.bias.to(query.dtype)
    out, lse = attend(query, extra.key, extra.value, logits, return_lse=True, **options)
    assert lse is not None
    return out, lse + extra.bias[..., 0] if is_shift and extra.bias is not None else lse


def _block_size(reach: int) -> int:
    """Query rows per block: half the window within bounds. Larger blocks compute more scores outside the window, smaller
    ones have more overlapping spans, whose gradients must be added up.
    """
    return min(256, max(16, -(-reach // 32) * 16))


def _by_strips(
    query: Tensor, key: Tensor, value: Tensor, left: int, right: int, shown: Tensor | None, call: AttentionCall
) -> Result:
    """What `kernels.cpu_band` computes, in operations of any device."""
    batch, _, n, _ = query.shape
    block, span = min(n, _block_size(left + right)), left + 1 + right
    tile = window_tile(block, span, query.new_zeros(1, span) if shown is None else shown)
    options = call.options | {"return_lse": call.return_lse or call.extra is not None}
    outputs, sums = [], []
    for strip in strips(range(n), key.shape[2], block, left, right, call.query_offset):
        low, size = strip.start + strip.cut, strip.stop - strip.cut
        q = query[:, :, strip.first : strip.end].unflatten(2, (strip.blocks, strip.rows)).transpose(1, 2)
        # cut before the overlapping view is made: its gradient has the size of the cut
        here = slice(low, low + (strip.blocks - 1) * strip.rows + size)
        k, v = (x[:, :, here].unfold(2, size, strip.rows).permute(0, 2, 1, 4, 3) for x in (key, value))
        logits = tile[:, :, : strip.rows, strip.cut : strip.stop]
        if call.key_padding_mask is not None:
            seen = additive_mask(call.key_padding_mask[:, here].unfold(1, size, strip.rows), query.dtype)
            logits = (seen[:, :, None, None] + logits).expand(batch, *[-1] * 4).flatten(0, 1)
        out, lse = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), logits, **options)
        # attention kernels lay their result out as (·, block, H, D), so this order needs no copy
        outputs.append(out.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2))
        sums += [] if lse is None else [lse.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)]
    out, *rest = (torch.cat(x, dim=1).transpose(1, 2) for x in (outputs, sums) if x)
    return out, rest[0] if rest else None


def _dilated(
    query: Tensor, key: Tensor, value: Tensor, window: Window, call: AttentionCall, skip: int | None
) -> Result:
    """Tokens of one residue class are neighbours at this dilation: fold the classes into the batch."""
    n, step, offset = query.shape[2], window.dilation, call.query_offset
    keep = call.key_padding_mask
    keep = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device) if keep is None else keep
    query = F.pad(query, (0, 0, offset, 0))
    q, k, v = (fold(x, step, 2) for x in (query, key, value))
    shown = _shown(window.left, window.right, step, skip, call.relative_bias, query)
    folded = dataclasses.replace(
        call,
        key_padding_mask=fold(keep.expand(key.shape[0], -1), step, 1),
        query_offset=0,
        extra=None,
        return_lse=call.return_lse or call.extra is not None,
    )
    run = _fused if _is_fused(query, call) else _by_strips
    out, lse = run(q, k, v, window.left, window.right, shown, folded)
    here = slice(offset, offset + n)
    return unfold(out, step)[:, :, here], None if lse is None else unfold(lse[..., None], step)[:, :, here, 0]


def fold(x: Tensor, dilation: int, dim: int) -> Tensor:
    """Split axis `dim` (padded) into residue classes and put these into the batch: (B · dilation, …, n / dilation)."""
    length = -(-x.shape[dim] // dilation)
    padding = length * dilation - x.shape[dim]
    if padding:
        x = torch.cat([x, x.new_zeros(*x.shape[:dim], padding, *x.shape[dim + 1 :])], dim)
    x = x.unflatten(dim, (length, dilation))  # position = row · dilation + class
    return x.movedim(dim + 1, 1).flatten(0, 1)


def unfold(x: Tensor, dilation: int) -> Tensor:
    """Undo `fold` for (B · dilation, H, n / dilation, D)."""
    return x.unflatten(0, (-1, dilation)).permute(0, 2, 3, 1, 4).flatten(2, 3)
