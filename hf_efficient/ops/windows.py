"""Sliding-window attention in blocks: query blocks against overlapping spans of keys, plus keys that everyone sees."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attend import additive_mask, attend
from .relative_bias import RelativeBias

# elements of one call's mask and of one call's copied keys: bounds working memory, not results
MASK_BUDGET = 2**23
COPY_BUDGET = 2**24
# elements up to which the mask of a single tile is kept from call to call
KEPT_MASK = 2**20


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


def window_sides(attention_window: int, is_causal: bool) -> tuple[int, int]:
    """Visible keys on the left and on the right, the token itself not counted."""
    return (attention_window - 1, 0) if is_causal else (attention_window // 2, attention_window // 2)


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
    skip: int | None = None,
    return_lse: bool = False,
) -> Any:
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
        skip: offsets that are multiples of this number are not visible (another pattern has them).

    Returns:
        (B, H, N, D); with `return_lse` also the log-sum-exp (B, H, N). O(N · (left + right + block)) time and memory; the
        largest tensor is one span per query block.

    Source: Beltagy et al. 2020 (arXiv 2004.05150), §3.1.
    """
    n = query.shape[2]
    block = _block_size(left + right)
    # up to this length a single tile computes no more scores than the blocks would
    if n <= dilation * (block + left + right):
        out, lse = _one_tile(
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
            skip=skip,
            return_lse=return_lse,
        )
        return (out, lse) if return_lse else out
    blocked = partial(
        _blocked,
        relative_bias=relative_bias,
        left=left,
        right=right,
        block=block,
        step=dilation,
        scaling=scaling,
        dropout=dropout,
        skip=skip,
        return_lse=return_lse,
    )
    if dilation == 1:
        out, lse = blocked(query, key, value, key_padding_mask, extra=extra, query_offset=query_offset)
        return (out, lse) if return_lse else out
    # tokens of one residue class are neighbours at this dilation: fold the classes into the batch
    past = query_offset
    query = F.pad(query, (0, 0, past, 0))
    if extra is not None and past:
        extra = _extend_queries(extra, past)
    keep = key_padding_mask if key_padding_mask is not None else _all_true(key)
    out, lse = blocked(
        fold(query, dilation, 2),
        fold(key, dilation, 2),
        fold(value, dilation, 2),
        fold(keep.expand(key.shape[0], -1), dilation, 1),
        extra=None if extra is None else _fold_extra(extra, dilation, key.shape[0]),
        query_offset=0,
    )
    out = unfold(out, dilation)[:, :, past : past + n]
    return out if lse is None else (out, unfold(lse[..., None], dilation)[:, :, past : past + n, 0])


def _block_size(reach: int) -> int:
    """Query rows per block: half the window within bounds. Larger blocks compute more scores outside the window, smaller
    ones have more overlapping spans, whose gradients must be added up.
    """
    return min(256, max(16, -(-reach // 32) * 16))


def _all_true(key: Tensor) -> Tensor:
    return torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)


def extra_logits(extra: ExtraKeys, dtype: torch.dtype) -> Tensor:
    """(B or 1, H or 1, N or 1, G) what is added to the logits of extra keys."""
    logits = additive_mask(extra.keep, dtype)[:, None]
    return logits if extra.bias is None else logits + extra.bias.to(dtype)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor | None,
    extra: tuple[Tensor, Tensor, Tensor] | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attend` with additive `logits` (B or 1, H or 1, N, K), after the extra keys, values and logits were put in front."""
    if extra is not None:
        extra_key, extra_value, extra_logits = extra
        assert logits is not None
        shape = torch.broadcast_shapes(logits.shape[:-1], extra_logits.shape[:-1])
        logits = torch.cat([extra_logits.expand(*shape, -1), logits.expand(*shape, -1)], dim=-1)
        key, value = torch.cat([extra_key, key], dim=2), torch.cat([extra_value, value], dim=2)
    return attend(query, key, value, logits, **options)


def _tile_mask(
    first: int,
    n: int,
    low: int,
    high: int,
    left: int,
    right: int,
    dilation: int,
    skip: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """(1, 1, n, high - low) additive window of queries from `first` on over keys from `low` on."""
    with torch.inference_mode(False):  # a kept mask must serve training also
        offset = torch.arange(low, high, device=device)[None] - torch.arange(first, first + n, device=device)[:, None]
        mask = (offset >= -left) & (offset <= right) & (offset % dilation == 0)
        return additive_mask((mask if skip is None else mask & (offset % skip != 0))[None, None], dtype)


_kept_tile_mask = lru_cache(maxsize=16)(_tile_mask)


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
    skip: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """All queries against the one span of keys that any of them may see."""
    n, s = query.shape[2], key.shape[2]
    low, high = max(0, query_offset - left), min(s, query_offset + n + right)
    key, value = key[:, :, low:high], value[:, :, low:high]
    device, dtype = query.device, query.dtype
    logits = None
    everything = (
        dilation == 1 and skip is None and left >= query_offset + n - 1 - low and right >= high - 1 - query_offset
    )
    if not everything or keep is not None or extra is not None:
        is_kept = n * (high - low) <= KEPT_MASK and not torch.compiler.is_compiling()
        mask_of = _kept_tile_mask if is_kept else _tile_mask
        logits = mask_of(query_offset, n, low, high, left, right, dilation, skip, device, dtype)
        if keep is not None:
            logits = torch.where(keep[:, None, None, low:high], logits, float("-inf"))
    if relative_bias is not None:
        bias = relative_bias.toeplitz(n, high - low, low - query_offset, device=device)[None].to(dtype)
        logits = bias if logits is None else logits + bias
    first = None if extra is None else (extra.key, extra.value, extra_logits(extra, dtype))
    return _attend(query, key, value, logits, first, scaling=scaling, dropout=dropout, return_lse=return_lse)


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
    skip: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Blocks of queries, folded into the batch, against overlapping views of the padded keys."""
    batch, heads, n, width = query.shape
    rows, span = -(-n // block), left + block + right
    start = query_offset - left  # key position at which the first block's span starts
    after = (rows - 1) * block + span + start - key.shape[2]

    def spans(x: Tensor, dim: int) -> Tensor:
        return _fit(x, dim, -start, after).unfold(dim, span, block)

    keys = spans(key, 2).permute(0, 2, 1, 4, 3)  # (B, rows, H, span, D), a view
    values = spans(value, 2).permute(0, 2, 1, 4, 3)
    queries = _split_rows(query, 2, rows, block).transpose(1, 2)  # (B, rows, H, block, D)
    seen = additive_mask(spans(keep if keep is not None else _all_true(key), 1), query.dtype)  # (B or 1, rows, span)
    tile = _window_tile(query, left, right, block, step, relative_bias, skip)
    num_extra, front_logits = 0, None
    if extra is not None:
        num_extra = extra.key.shape[2]
        front_logits = extra_logits(extra, query.dtype)
        front_logits = front_logits.expand(-1, -1, n, -1) if front_logits.shape[2] == 1 else front_logits
        front_logits = _split_rows(front_logits, 2, rows, block).transpose(1, 2)  # (B or 1, rows, H or 1, block, G)

    per_row = batch * block * (span + num_extra) * tile.shape[0]
    copied = batch * heads * (span + num_extra) * width if extra is not None or batch > 1 else 1
    group = max(1, min(MASK_BUDGET // per_row, COPY_BUDGET // copied))
    outputs, sums = [], []
    for first in range(0, rows, group):
        part = slice(first, min(first + group, rows))
        rows_of = partial(_fold_rows, batch=batch, rows=part.stop - part.start)
        logits = rows_of(seen[:, part, None, None, :] + tile)
        front = None
        if extra is not None and front_logits is not None:
            front = rows_of(extra.key[:, None]), rows_of(extra.value[:, None]), rows_of(front_logits[:, part])
        q, k, v = (rows_of(x[:, part]) for x in (queries, keys, values))
        out, lse = _attend(q, k, v, logits, front, scaling=scaling, dropout=dropout, return_lse=return_lse)
        # attention kernels lay their result out as (·, block, H, D), so this order needs no copy
        outputs.append(out.transpose(1, 2).unflatten(0, (batch, -1)))
        sums += [] if lse is None else [lse.transpose(1, 2).unflatten(0, (batch, -1))]
    out, *sum_of_rows = (
        (x[0] if len(x) == 1 else torch.cat(x, dim=1)).flatten(1, 2)[:, :n].transpose(1, 2)
        for x in (outputs, sums)
        if x
    )
    return out, sum_of_rows[0] if sum_of_rows else None


def _window_tile(
    query: Tensor,
    left: int,
    right: int,
    block: int,
    step: int,
    relative_bias: RelativeBias | None,
    skip: int | None,
) -> Tensor:
    """(H or 1, block, span) additive logits of the window's shape, the same for every block."""
    span = left + block + right
    reach = torch.arange(span, device=query.device)[None] - torch.arange(block, device=query.device)[:, None]
    mask = (reach >= 0) & (reach <= left + right)
    mask = mask if skip is None else mask & (step * (reach - left) % skip != 0)
    tile = additive_mask(mask, query.dtype)[None]
    if relative_bias is None:
        return tile
    return tile + relative_bias.toeplitz(block, span, -left, step, device=query.device).to(query.dtype)


def _fold_rows(x: Tensor, batch: int, rows: int) -> Tensor:
    """(B or 1, rows or 1, …) to (B · rows, …); a view where nothing is repeated."""
    return x.expand(batch, rows, *x.shape[2:]).flatten(0, 1)


def _fit(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Zeros before and after along axis `dim`; a negative number cuts off instead."""
    low, high = max(0, -before), x.shape[dim] - max(0, -after)
    parts = [x.narrow(dim, low, high - low)]
    for count, place in ((before, 0), (after, len(parts) + (before > 0))):
        if count > 0:
            shape = list(x.shape)
            shape[dim] = count
            parts.insert(place, x.new_zeros(shape))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _split_rows(x: Tensor, dim: int, rows: int, block: int) -> Tensor:
    """Pad axis `dim` to rows · block and split it into two axes."""
    return _fit(x, dim, 0, rows * block - x.shape[dim]).unflatten(dim, (rows, block))


def fold(x: Tensor, dilation: int, dim: int) -> Tensor:
    """Split axis `dim` (padded) into residue classes and put these into the batch: (B · dilation, …, n / dilation)."""
    length = -(-x.shape[dim] // dilation)
    x = _split_rows(x, dim, length, dilation)  # position = row · dilation + class
    return x.movedim(dim + 1, 1).flatten(0, 1)


def unfold(x: Tensor, dilation: int) -> Tensor:
    """Undo `fold` for (B · dilation, H, n / dilation, D)."""
    return x.unflatten(0, (-1, dilation)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _fold_extra(extra: ExtraKeys, dilation: int, batch: int) -> ExtraKeys:
    key, value = (x.repeat_interleave(dilation, dim=0) for x in (extra.key, extra.value))
    keep = extra.keep.expand(batch, -1, -1)
    keep = keep.repeat_interleave(dilation, dim=0) if keep.shape[1] == 1 else fold(keep, dilation, 1)
    bias = None if extra.bias is None else fold(extra.bias.expand(batch, -1, -1, -1), dilation, 2)
    return ExtraKeys(key, value, keep, bias)


def _extend_queries(extra: ExtraKeys, past: int) -> ExtraKeys:
    keep = extra.keep if extra.keep.shape[1] == 1 else F.pad(extra.keep, (0, 0, past, 0))
    bias = None if extra.bias is None else F.pad(extra.bias, (0, 0, past, 0))
    return extra._replace(keep=keep, bias=bias)
