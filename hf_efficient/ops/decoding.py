"""Attention of a few new queries over keys of known positions: the decoding form of every pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from hf_efficient.ops.context import AttentionCall, AttentionContext
from hf_efficient.ops.graph import is_captured
from hf_efficient.ops.padding import first_real_token
from hf_efficient.ops.softmax import Result, additive_mask, attend
from hf_efficient.patterns.kinds import GlobalColumns, Window
from hf_efficient.patterns.pattern import Pattern, parts_of
from hf_efficient.patterns.random_blocks import BigBirdBlocks


def pattern_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    call: AttentionCall,
    *,
    columns: Tensor | None = None,
    reach: int | None = None,
) -> Result:
    """Causal attention of new queries over the keys of `pattern` and `columns` in a cache: see `rows_attention`."""
    if query.shape[2] == 1 and columns is None and call.key_padding_mask is None:
        parts = parts_of(pattern)
        windows = [part for part in parts if isinstance(part, Window)]
        front = {p for part in parts if isinstance(part, GlobalColumns) for p in part.positions}
        kinds = sum(isinstance(part, (Window, GlobalColumns)) for part in parts)
        is_one_slice = len(windows) == 1 and windows[0].dilation == 1 and kinds == len(parts)
        if is_one_slice and front == set(range(len(front))):
            return last_token_attention(query, key, value, windows[0], call, front=len(front))
        is_plain = call.key_positions is None and call.relative_bias is None and not is_captured()
        if isinstance(pattern, BigBirdBlocks) and is_plain:
            return _listed_blocks(query, key, value, pattern, call)
    return rows_attention(query, key, value, pattern.visible_per_head, call, columns=columns, reach=reach)


def last_token_attention(
    query: Tensor, key: Tensor, value: Tensor, window: Window, call: AttentionCall, *, front: int = 0
) -> Result:
    """Attention of the newest token alone: what a window shows it is a slice of the keys, of gapless tokens.

    Where the window does not reach back to the first `front` tokens, these are in front of the keys and seen as well.

    Args:
        query: (B, H, 1, D). key, value: (B, HK, S, D), in order, the query's own last.

    Returns:
        (B, H, 1, D), and the log-sum-exp (B, H, 1) or `None`. O(left) time and memory; keys are not copied.
    """
    last, step = key.shape[2] - 1, window.dilation
    first, logits = max(last - window.left * step, last % step), None
    if min(front, call.query_offset - window.left) > 0 and first > 0:
        return _with_front(query, key, value, first, call, min(front, call.query_offset - window.left))
    seen = slice(first, None, step)
    if call.key_padding_mask is not None:
        logits = additive_mask(call.key_padding_mask[:, None, None, seen], query.dtype)
    if call.relative_bias is not None:
        offset = torch.arange(first - last, 1, step, device=query.device)
        bias = call.relative_bias.at(offset[None])[None].to(query.dtype)
        logits = bias if logits is None else logits + bias
    return attend(query, key[:, :, seen], value[:, :, seen], logits, return_lse=call.return_lse, **call.options)


def _with_front(query: Tensor, key: Tensor, value: Tensor, first: int, call: AttentionCall, front: int) -> Result:
    """Attention of the newest token over the keys from `first` on and the first `front`, which are those of tokens 0, …"""
    logits = query.new_zeros(1, 1, 1, key.shape[2])
    logits[..., front:first] = float("-inf")
    if call.relative_bias is not None:
        offset = torch.arange(1 - key.shape[2], 1, device=query.device)
        offset[:front] = torch.arange(front, device=query.device) - call.query_offset
        logits = logits + call.relative_bias.at(offset[None])[None].to(query.dtype)
    return attend(query, key, value, logits, return_lse=call.return_lse, **call.options)


@lru_cache(maxsize=256)
def _keys_of_block(pattern: BigBirdBlocks, block: int, device: torch.device) -> Tensor:
    """(H or 1, K · β) keys that causal queries of a block see, and numbers beyond them where there are fewer."""
    with torch.inference_mode(False):  # what is kept must serve every mode
        blocks = pattern.blocks_of(torch.tensor([[block]], device=device), None, block + 1)[0, :, 0]
        first = torch.where(blocks < 0, block + 1, blocks) * pattern.block_size
        return (first[..., None] + torch.arange(pattern.block_size, device=device)).flatten(1)


def _listed_blocks(query: Tensor, key: Tensor, value: Tensor, pattern: BigBirdBlocks, call: AttentionCall) -> Result:
    """Attention of the newest token over the blocks that its own block lists, which are drawn once per block: O(K · β)."""
    last, heads, shared = key.shape[2] - 1, query.shape[1], key.shape[1]
    index = _keys_of_block(pattern, last // pattern.block_size, key.device)
    logits = additive_mask(index <= last, query.dtype)[None, :, None]
    index = index.clamp(max=last)
    if len(index) == 1:
        keys, values = (x.index_select(2, index[0]) for x in (key, value))
    else:  # every head sees others
        own = torch.arange(heads, device=key.device)[:, None] * shared // heads
        keys, values = (x[:, own, index] for x in (key, value))
    return attend(query, keys, values, logits, return_lse=call.return_lse, **call.options)


def rows_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Callable[[Tensor, Tensor], Tensor],
    call: AttentionCall,
    *,
    columns: Tensor | None = None,
    reach: int | None = None,
    chunk: int = 32,
) -> Result:
    """Causal softmax attention: query i sees key j ≤ i iff `visible(i - s, j - s)` or `columns[j]`, s the row's start.

    Query n stands at position `query_offset + n`. A query that may see nothing returns 0.

    Args:
        query: (B, H, N, D). key, value: (B, H, S, D), in any order.
        visible: takes integer query positions (B or 1, N, 1) and key positions (B or 1, 1, S), negative before a row's
            start, and gives (B or 1, H or 1, N, S) bool, e.g. `Pattern.visible_per_head`.
        call: always taken as causal; the bias goes by the true offsets j - i.
        columns: (B, S) bool, keys that every query from their position on sees, up to `reach` tokens later.
        chunk: queries handled at once, which bounds memory.

    Returns:
        (B, H, N, D), and the log-sum-exp (B, H, N) or `None`. O(N · S) time, O(chunk · S) memory per head and row.
    """
    device, query_offset, key_positions = query.device, call.query_offset, call.key_positions
    positions = torch.arange(key.shape[2], device=device)[None] if key_positions is None else key_positions
    start = torch.zeros(1, dtype=torch.long, device=device) if call.row_start is None else call.row_start.to(device)
    exists = positions >= 0
    if call.key_padding_mask is not None:
        exists = exists & call.key_padding_mask
    outputs, sums = [], []
    for part in query.split(chunk, dim=2):
        rows = torch.arange(query_offset, query_offset + part.shape[2], device=device)
        query_offset += part.shape[2]
        seen = visible(rows[None, :, None] - start[:, None, None], (positions - start[:, None])[:, None])
        offset = positions[:, None] - rows[:, None]  # (B or 1, n, S)
        if columns is not None:
            near = columns[:, None] if reach is None else columns[:, None] & (offset >= -reach)
            seen = seen | near[:, None]
        mask = seen & ((offset <= 0) & exists[:, None])[:, None]
        logits = additive_mask(mask, query.dtype)
        if call.relative_bias is not None:
            logits = logits + call.relative_bias.at(offset).transpose(0, 1).to(query.dtype)
        out, lse = attend(part, key, value, logits, return_lse=call.return_lse, **call.options)
        outputs.append(out)
        sums += [] if lse is None else [lse]
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2) if sums else None


def with_key_positions(context: AttentionContext, key: Tensor) -> AttentionContext:
    """The context that says where the keys and rows start also where a cache has forgotten none."""
    if context.key_positions is not None:
        return context
    positions, mask = torch.arange(key.shape[2], device=key.device), context.key_padding_mask
    start = None if mask is None else first_real_token(mask)
    return replace(context, key_positions=positions.expand(key.shape[0], -1), row_start=start)


def entries_at(positions: Tensor, mask: Tensor) -> Tensor:
    """(B, R) bool: the entries of a (B, M) mask at `positions` (B, R); False where they are negative or ≥ M."""
    within = (positions >= 0) & (positions < mask.shape[1])
    return within & mask.bool().gather(1, positions.clamp(0, mask.shape[1] - 1))
