"""Block-sparse attention from lists of key blocks: each block of queries gathers the key blocks it sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .relative_bias import RelativeBias

# elements of the keys that one call gathers: bounds working memory, not results
GATHER_BUDGET = 2**23


def block_list_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    *,
    block_size: int,
    scaling: float,
    is_causal: bool,
    key_padding_mask: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention in which query block u sees exactly the key blocks `columns[b, h, u]`.

    Args:
        query, key, value: (B, H, N, D); the last block may be short.
        columns: (B or 1, H or 1, ⌈N / block_size⌉, K) key block numbers, each at most once per row; -1 = none.
        is_causal: additionally key position ≤ query position.
        key_padding_mask: (B, N) bool, True = may be seen.
        relative_bias: added to the logits, tile by tile.

    Returns:
        (B, H, N, D); 0 for a query that may see nothing. O(N · K · block_size) time; the gathered keys of one call are
        bounded, so memory beyond the result is O(1) in N without gradients.

    Source: Zaheer et al. 2020 (arXiv 2007.14062), App. D.
    """
    batch, heads, n, width = query.shape
    rows, count = columns.shape[-2:]
    padding = rows * block_size - n
    query, key, value = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (rows, block_size)) for x in (query, key, value))
    device = query.device
    keep = torch.ones(1, n, dtype=torch.bool, device=device) if key_padding_mask is None else key_padding_mask
    keep = F.pad(keep, (0, padding)).unflatten(1, (rows, block_size))
    within = torch.arange(block_size, device=device)
    # whole blocks as rows of a matrix: gathering them is a plain copy of memory
    key, value = (x.contiguous().view(batch * heads * rows, block_size * width) for x in (key, value))
    first_row = rows * torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    keep_index = torch.arange(keep.shape[0], device=device)[:, None, None, None]

    group = max(1, GATHER_BUDGET // (batch * heads * count * block_size * max(width, block_size)))
    outputs = []
    for first in range(0, rows, group):
        part = columns[:, :, first : first + group]
        index = part.clamp(min=0)
        flat = (first_row + index).flatten()
        k = key.index_select(0, flat).view(batch * heads, -1, count * block_size, width)
        v = value.index_select(0, flat).view(batch * heads, -1, count * block_size, width)
        mask = (keep[keep_index, index] & (part >= 0)[..., None]).flatten(3, 4)[..., None, :]
        bias = None
        if is_causal or relative_bias is not None:
            key_position = (index[..., None] * block_size + within).flatten(3, 4)
            row = torch.arange(first, first + part.shape[2], device=device)
            query_position = row[:, None] * block_size + within
            offset = key_position[..., None, :] - query_position[..., None]  # (·, ·, rows, block, K · block)
            if is_causal:
                mask = mask & (offset <= 0)
            if relative_bias is not None:
                bias = _per_head(relative_bias, offset, heads)
                mask = torch.where(mask, bias.to(query.dtype), float("-inf"))
        q = query[:, :, first : first + group].flatten(0, 1)
        mask = mask.expand(batch, heads, -1, -1, -1).flatten(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        outputs.append(out.unflatten(0, (batch, heads)))
    return torch.cat(outputs, dim=2).flatten(2, 3)[:, :, :n]


def _per_head(relative_bias: RelativeBias, offset: Tensor, heads: int) -> Tensor:
    """(B or 1, H, …) bias of (B or 1, H or 1, …) offsets, each head with its own offsets where they differ."""
    if offset.shape[1] == 1:
        return relative_bias.at(offset[:, 0]).transpose(0, 1)
    # (H, B, …) per head h: all heads' values at head h's offsets would be H times too many
    ids = relative_bias.bucket(offset).to(relative_bias.table.device)
    head = torch.arange(heads, device=ids.device)[None, :, None, None, None]
    return relative_bias.table[ids, head].to(offset.device)
