"""Attention of a few new queries over keys of known positions: the decoding form of every pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hf_efficient.ops.context import AttentionCall, AttentionContext
from hf_efficient.ops.padding import first_real_token
from hf_efficient.ops.softmax import Result, additive_mask, attend


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
