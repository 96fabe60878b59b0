"""Sliding-window attention in blocks: query blocks against overlapping spans of keys, plus keys that everyone sees."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.context import AttentionCall, ExtraKeys
from hf_efficient.ops.graph import is_captured
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.ops.softmax import Partial, Result, additive_mask, attend, bool_all, merge_attention
from hf_efficient.patterns.kinds import Window

# elements of one call's mask and of one call's copied keys: bounds working memory, not results
MASK_BUDGET = 2**23
COPY_BUDGET = 2**24
# elements up to which the mask of a single tile is kept from call to call
KEPT_MASK = 2**20


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
    left, right, dilation = window.left, 0 if call.is_causal else window.right, window.dilation
    sight = _Sight(left, right, dilation, skip, call.relative_bias)
    options = call.options | {"return_lse": call.return_lse or call.extra is not None}
    facts = (query, key, value, call.key_padding_mask, sight, call.query_offset)
    if is_one_tile(query.shape[2], left, right, dilation):
        part = _one_tile(*facts, **options)
    else:
        part = (_blocked if dilation == 1 else _dilated)(*facts, **options)
    if call.extra is not None:
        far = extra_attention(query, call.extra, **call.options)
        part = merge_attention(part, far)  # type: ignore[arg-type]
    return part if call.return_lse else (part[0], None)


class _Sight(NamedTuple):
    """Which offsets a window shows and what they add to the logits; see `window_attention`."""

    left: int
    right: int
    dilation: int
    skip: int | None
    bias: RelativeBias | None


def is_one_tile(n: int, left: int, right: int, dilation: int = 1) -> bool:
    """Up to this length a single tile computes no more scores than the blocks would."""
    return n <= dilation * (_block_size(left + right) + left + right)


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


def _all_true(key: Tensor) -> Tensor:
    return torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)


def _tile_mask(
    first: int, n: int, low: int, high: int, sight: _Sight, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(1, 1, n, high - low) additive window of queries from `first` on over keys from `low` on."""
    left, right, dilation, skip, _ = sight
    with torch.inference_mode(False):  # a kept mask must serve training also
        offset = torch.arange(low, high, device=device)[None] - torch.arange(first, first + n, device=device)[:, None]
        mask = (offset >= -left * dilation) & (offset <= right * dilation) & (offset % dilation == 0)
        return additive_mask((mask if skip is None else mask & (offset % skip != 0))[None, None], dtype)


_kept_tile_mask = lru_cache(maxsize=16)(_tile_mask)


def _one_tile(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, sight: _Sight, query_offset: int, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """All queries against the one span of keys that any of them may see."""
    left, right, dilation, skip, bias = sight
    n, before, after = query.shape[2], left * dilation, right * dilation
    low, high = max(0, query_offset - before), min(key.shape[2], query_offset + n + after)
    device, dtype = query.device, query.dtype
    logits = None
    everything = before >= query_offset + n - 1 - low and after >= high - 1 - query_offset
    if not (everything and dilation == 1 and skip is None and keep is None):
        is_kept = n * (high - low) <= KEPT_MASK and not is_captured()
        mask_of = _kept_tile_mask if is_kept else _tile_mask
        logits = mask_of(query_offset, n, low, high, sight._replace(bias=None), device, dtype)
        if keep is not None:
            logits = torch.where(keep[:, None, None, low:high], logits, float("-inf"))
    if bias is not None:
        tile = bias.toeplitz(n, high - low, low - query_offset, device=device)[None].to(dtype)
        logits = tile if logits is None else logits + tile
    return attend(query, key[:, :, low:high], value[:, :, low:high], logits, **options)


def _dilated(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, sight: _Sight, query_offset: int, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Tokens of one residue class are neighbours at this dilation: fold the classes into the batch."""
    n, step = query.shape[2], sight.dilation
    keep = (_all_true(key) if keep is None else keep).expand(key.shape[0], -1)
    query = F.pad(query, (0, 0, query_offset, 0))
    q, k, v, seen = (fold(x, step, dim) for x, dim in ((query, 2), (key, 2), (value, 2), (keep, 1)))
    out, lse = _blocked(q, k, v, seen, sight, 0, **options)
    here = slice(query_offset, query_offset + n)
    return unfold(out, step)[:, :, here], None if lse is None else unfold(lse[..., None], step)[:, :, here, 0]


def _blocked(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, sight: _Sight, query_offset: int, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Blocks of queries, folded into the batch, against overlapping views of the padded keys."""
    batch, _, n, width = query.shape
    block = _block_size(sight.left + sight.right)
    rows, span = -(-n // block), sight.left + block + sight.right
    start = query_offset - sight.left  # key position at which the first block's span starts
    after = (rows - 1) * block + span + start - key.shape[2]
    query = _split_rows(query, 2, rows, block).transpose(1, 2)  # (B, rows, H, block, D)
    seen = _fit(_all_true(key) if keep is None else keep, 1, -start, after)
    key, value = (_fit(x, 2, -start, after) for x in (key, value))
    seen = additive_mask(seen.unfold(1, span, block), query.dtype)  # (B or 1, rows, span)
    tile = _window_tile(query, sight, block)
    per_row = batch * block * span * tile.shape[0]
    copied = batch * key.shape[1] * span * width if batch > 1 else 1
    group = max(1, min(MASK_BUDGET // per_row, COPY_BUDGET // copied))
    outputs, sums = [], []
    for first in range(0, rows, group):
        last = min(first + group, rows)
        # cut before the overlapping view is made: its gradient has the size of the cut
        here = slice(first * block, (last - 1) * block + span)
        k, v = (x[:, :, here].unfold(2, span, block).permute(0, 2, 1, 4, 3) for x in (key, value))
        parts = (query[:, first:last], k, v, seen[:, first:last, None, None, :] + tile)
        out, lse = attend(*(x.expand(batch, *x.shape[1:]).flatten(0, 1) for x in parts), **options)
        # attention kernels lay their result out as (·, block, H, D), so this order needs no copy
        outputs.append(out.transpose(1, 2).unflatten(0, (batch, -1)))
        sums += [] if lse is None else [lse.transpose(1, 2).unflatten(0, (batch, -1))]
    out, *sum_of_rows = (
        (x[0] if len(x) == 1 else torch.cat(x, dim=1)).flatten(1, 2)[:, :n].transpose(1, 2)
        for x in (outputs, sums)
        if x
    )
    return out, sum_of_rows[0] if sum_of_rows else None


def _window_tile(query: Tensor, sight: _Sight, block: int) -> Tensor:
    """(H or 1, block, span) additive logits of the window's shape, the same for every block."""
    left, right, step, skip, bias = sight
    span = left + block + right
    reach = torch.arange(span, device=query.device)[None] - torch.arange(block, device=query.device)[:, None]
    mask = (reach >= 0) & (reach <= left + right)
    mask = mask if skip is None else mask & (step * (reach - left) % skip != 0)
    tile = additive_mask(mask, query.dtype)[None]
    return tile if bias is None else tile + bias.toeplitz(block, span, -left, step, query.device).to(query.dtype)


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
