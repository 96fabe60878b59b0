"""Sliding-window attention in blocks: query blocks against overlapping spans of keys, plus keys that everyone sees."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .relative_bias import RelativeBias

# elements of one call's mask and of one call's copied keys: bounds working memory, not results
MASK_BUDGET = 2**23
COPY_BUDGET = 2**24


class ExtraKeys(NamedTuple):
    """Keys that every query may see beside its window, in the same softmax (Longformer's global columns).

    Attributes:
        key, value: (B, H, G, D).
        keep: (B or 1, N or 1, G) bool, True where query n may see extra key g.
        bias: (B or 1, H, N, G) additive, or `None`.
    """

    key: Tensor
    value: Tensor
    keep: Tensor
    bias: Tensor | None


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    left: int,
    right: int,
    scaling: float,
    dilation: int = 1,
    key_padding_mask: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    dropout: float = 0.0,
    query_offset: int = 0,
    extra: ExtraKeys | None = None,
) -> Tensor:
    """Softmax attention in which query i sees key j iff `j - i = dilation · m` with `-left ≤ m ≤ right`.

    Query n stands at position `query_offset + n` among the keys. A query that may see nothing returns 0.

    Args:
        query: (B, H, N, D).
        key, value: (B, H, S, D), S ≥ N.
        left, right: visible keys on each side, the token itself not counted; 0 on the right = causal.
        scaling: factor on q·k.
        key_padding_mask: (B, S) bool, True = may be seen.
        relative_bias: added to the logits, tile by tile.
        extra: further keys in the same softmax; clear their bits of `key_padding_mask` if they are also in windows.

    Returns:
        (B, H, N, D). O(N · (left + right + block)) time and memory; the largest tensor is one span per query block.

    Source: Beltagy et al. 2020 (arXiv 2004.05150), §3.1.
    """
    n = query.shape[2]
    block = _block_size(left + right)
    # up to this length a single tile computes no more scores than the blocks would
    if n <= dilation * (block + left + right):
        return _one_tile(
            query,
            key,
            value,
            key_padding_mask,
            relative_bias,
            extra,
            scaling,
            dropout,
            left=left * dilation,
            right=right * dilation,
            dilation=dilation,
            query_offset=query_offset,
        )
    blocked = partial(
        _blocked,
        relative_bias=relative_bias,
        left=left,
        right=right,
        block=block,
        step=dilation,
        scaling=scaling,
        dropout=dropout,
    )
    if dilation == 1:
        return blocked(query, key, value, key_padding_mask, extra=extra, query_offset=query_offset)
    # tokens of one residue class are neighbours at this dilation: fold the classes into the batch
    past = query_offset
    query = F.pad(query, (0, 0, past, 0))
    if extra is not None and past:
        extra = _extend_queries(extra, past)
    keep = key_padding_mask if key_padding_mask is not None else _all_true(key)
    out = blocked(
        _fold(query, dilation, 2),
        _fold(key, dilation, 2),
        _fold(value, dilation, 2),
        _fold(keep.expand(key.shape[0], -1), dilation, 1),
        extra=None if extra is None else _fold_extra(extra, dilation, key.shape[0]),
        query_offset=0,
    )
    return _unfold(out, dilation)[:, :, past : past + n]


def _block_size(reach: int) -> int:
    """Query rows per block: half the window, between 16 and 256, where measured cost is flat."""
    return min(256, max(16, -(-reach // 32) * 16))


def _all_true(key: Tensor) -> Tensor:
    return torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    if bias is not None:
        bias = bias.to(query.dtype)
        mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)


def _join(
    key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None, extra: ExtraKeys
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Put the extra keys before the window's: (B, H, K, D) keys, (B, 1, N, K) mask, (B or 1, H, N, K) bias."""
    keep = extra.keep[:, None].expand(mask.shape[0], 1, mask.shape[2], -1)
    mask = torch.cat([keep, mask], dim=-1)
    if bias is not None and extra.bias is not None:
        batch = max(bias.shape[0], extra.bias.shape[0])
        bias = torch.cat([extra.bias.expand(batch, -1, -1, -1), bias.expand(batch, -1, -1, -1)], dim=-1)
    return torch.cat([extra.key, key], dim=2), torch.cat([extra.value, value], dim=2), mask, bias


def _one_tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    relative_bias: RelativeBias | None,
    extra: ExtraKeys | None,
    scaling: float,
    dropout: float,
    *,
    left: int,
    right: int,
    dilation: int,
    query_offset: int,
) -> Tensor:
    """All queries against the one span of keys that any of them may see."""
    n, s = query.shape[2], key.shape[2]
    low, high = max(0, query_offset - left), min(s, query_offset + n + right)
    key, value = key[:, :, low:high], value[:, :, low:high]
    device = query.device
    mask = None
    everything = dilation == 1 and left >= query_offset + n - 1 - low and right >= high - 1 - query_offset
    if not everything or extra is not None:
        rows = torch.arange(query_offset, query_offset + n, device=device)[:, None]
        offset = torch.arange(low, high, device=device)[None] - rows
        mask = ((offset >= -left) & (offset <= right) & (offset % dilation == 0))[None, None]
    if keep is not None:
        seen = keep[:, None, None, low:high]
        mask = seen if mask is None else mask & seen
    bias = None
    if relative_bias is not None:
        bias = relative_bias.toeplitz(n, high - low, low - query_offset, device=device)[None]
    if extra is not None:
        assert mask is not None
        mask = mask.expand(max(mask.shape[0], extra.keep.shape[0]), -1, -1, -1)
        key, value, mask, bias = _join(key, value, mask, bias, extra)
    return _attend(query, key, value, mask, bias, scaling, dropout)


def _blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    *,
    relative_bias: RelativeBias | None,
    extra: ExtraKeys | None,
    left: int,
    right: int,
    block: int,
    step: int,
    query_offset: int,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Blocks of queries, folded into the batch, against overlapping views of the padded keys."""
    batch, heads, n, width = query.shape
    s = key.shape[2]
    rows, span = -(-n // block), left + block + right
    start = query_offset - left  # key position at which the first block's span starts
    total = (rows - 1) * block + span
    before, after = -start, total + start - s  # negative padding trims

    def spans(x: Tensor, dim: int) -> Tensor:
        padding = [0, 0] * (x.dim() - 1 - dim) + [before, after]
        return F.pad(x, padding).unfold(dim, span, block)

    keys = spans(key, 2).permute(0, 2, 1, 4, 3)  # (B, rows, H, span, D), a view
    values = spans(value, 2).permute(0, 2, 1, 4, 3)
    queries = _split_rows(query, 2, rows, block).transpose(1, 2)  # (B, rows, H, block, D)
    seen = spans(keep if keep is not None else _all_true(key), 1)  # (B or 1, rows, span)
    device = query.device
    reach = torch.arange(span, device=device)[None] - torch.arange(block, device=device)[:, None]
    band = (reach >= 0) & (reach <= left + right)
    bias = None
    if relative_bias is not None:
        bias = relative_bias.toeplitz(block, span, -left, step, device=device)[None]
    num_extra = 0
    if extra is not None:
        num_extra = extra.key.shape[2]
        extra_keep = extra.keep if extra.keep.shape[1] == 1 else _split_rows(extra.keep, 1, rows, block)
        extra_bias = None if extra.bias is None else _split_rows(extra.bias, 2, rows, block).transpose(1, 2)

    per_row = batch * block * (span + num_extra) * (1 if bias is None else heads)
    copied = batch * heads * (span + num_extra) * width if extra is not None or batch > 1 else 1
    group = max(1, min(MASK_BUDGET // per_row, COPY_BUDGET // copied))
    outputs = []
    for first in range(0, rows, group):
        part = slice(first, min(first + group, rows))
        mask = (band & seen[:, part, None, :])[:, :, None].expand(batch, -1, -1, -1, -1).flatten(0, 1)
        k, v = keys[:, part].flatten(0, 1), values[:, part].flatten(0, 1)
        tile = bias
        if extra is not None:
            count = part.stop - part.start
            tile_extra = ExtraKeys(
                extra.key[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1),
                extra.value[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1),
                _rows_of(extra_keep, part, batch, count),
                None if extra_bias is None else extra_bias[:, part].expand(batch, -1, -1, -1, -1).flatten(0, 1),
            )
            k, v, mask, tile = _join(k, v, mask, tile, tile_extra)
        out = _attend(queries[:, part].flatten(0, 1), k, v, mask, tile, scaling, dropout)
        outputs.append(out.unflatten(0, (batch, -1)))
    out = torch.cat(outputs, dim=1).transpose(1, 2)  # (B, H, rows, block, D)
    return out.reshape(batch, heads, rows * block, width)[:, :, :n]


def _split_rows(x: Tensor, dim: int, rows: int, block: int) -> Tensor:
    """Pad axis `dim` to rows · block and split it into two axes."""
    padding = [0, 0] * (x.dim() - 1 - dim) + [0, rows * block - x.shape[dim]]
    return F.pad(x, padding).unflatten(dim, (rows, block))


def _rows_of(keep: Tensor, part: slice, batch: int, count: int) -> Tensor:
    """(B · count, block or 1, G) of a (B or 1, 1, G) or (B or 1, rows, block, G) keep-mask."""
    keep = keep[:, None].expand(-1, count, -1, -1) if keep.dim() == 3 else keep[:, part]
    return keep.expand(batch, -1, -1, -1).flatten(0, 1)


def _fold(x: Tensor, dilation: int, dim: int) -> Tensor:
    """Split axis `dim` (padded) into residue classes and put these into the batch: (B · dilation, …, n / dilation)."""
    length = -(-x.shape[dim] // dilation)
    x = _split_rows(x, dim, length, dilation)  # position = row · dilation + class
    return x.movedim(dim + 1, 1).flatten(0, 1)


def _unfold(x: Tensor, dilation: int) -> Tensor:
    """Undo `_fold` for (B · dilation, H, n / dilation, D)."""
    return x.unflatten(0, (-1, dilation)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _fold_extra(extra: ExtraKeys, dilation: int, batch: int) -> ExtraKeys:
    key, value = (x.repeat_interleave(dilation, dim=0) for x in (extra.key, extra.value))
    keep = extra.keep.expand(batch, -1, -1)
    keep = keep.repeat_interleave(dilation, dim=0) if keep.shape[1] == 1 else _fold(keep, dilation, 1)
    bias = None if extra.bias is None else _fold(extra.bias.expand(batch, -1, -1, -1), dilation, 2)
    return ExtraKeys(key, value, keep, bias)


def _extend_queries(extra: ExtraKeys, past: int) -> ExtraKeys:
    keep = extra.keep if extra.keep.shape[1] == 1 else F.pad(extra.keep, (0, 0, past, 0))
    bias = None if extra.bias is None else F.pad(extra.bias, (0, 0, past, 0))
    return extra._replace(keep=keep, bias=bias)
