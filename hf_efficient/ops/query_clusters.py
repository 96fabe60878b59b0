"""Queries in groups of their like: k-means per row and head, and tiles that hold queries of one group each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_efficient.ops.choice import first_largest, rounding
from hf_efficient.ops.softmax import additive_mask, masked_attention

if TYPE_CHECKING:
    from hf_efficient.ops.context import AttentionContext


@torch.no_grad()
def cluster_queries(query: Tensor, token_mask: Tensor, count: int, iterations: int) -> Tensor:
    """(B, H, N) group of each query by k-means of every row and head alone; `count` for padding.

    Of a row's L real tokens those of rank `⌊c L / count⌋` are the first centres; then `iterations` times

        label_i = argmin_c ‖q_i - μ_c‖², of equal ones the first,   μ_c = mean of its queries,   where it has none: as before

    and the labels of the last centres. So neither padding nor the rest of the batch matters, and nothing is drawn. In fp32
    at least. Rows of at most `count` tokens get a group for every token, unless tokens are equal.

    Args:
        query: (B, H, N, D). token_mask: (B, N) bool, True = real token.

    O(iterations · N · count · D) time, O(N · count) memory.
    """
    n, device = query.shape[2], query.device
    wide = torch.promote_types(query.dtype, torch.float32)
    rank = token_mask.sum(-1, keepdim=True) * torch.arange(count, device=device) // count
    # real tokens in front, both kinds in order
    order = torch.where(token_mask, 0, n).add(torch.arange(n, device=device)).argsort(-1)
    first = order.gather(1, rank)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    with torch.autocast(device.type, enabled=False):
        x = query.to(wide)
        centres = x.gather(2, first)
        labels = _nearest(x, centres, token_mask)
        for _ in range(iterations):
            members = memberships(labels, count)
            size = members.sum(-1, keepdim=True)
            # as a product: scattered sums would be added in another order each time on some devices
            means = members.to(wide) @ x / size.clamp(min=1)
            centres = torch.where(size > 0, means, centres)
            labels = _nearest(x, centres, token_mask)
    return labels


def _nearest(x: Tensor, centres: Tensor, token_mask: Tensor) -> Tensor:
    square = centres.square().sum(-1)
    closeness = x @ centres.transpose(-1, -2) - square[:, :, None] / 2
    longest = square.amax(-1).sqrt()[:, :, None, None]
    close = rounding(longest * (x.norm(dim=-1, keepdim=True) + longest))
    return torch.where(token_mask[:, None], first_largest(closeness, close), centres.shape[2])


def memberships(labels: Tensor, count: int) -> Tensor:
    """(B, H, count, N) bool: who is in which group, of (B, H, N) labels."""
    return labels[:, :, None] == torch.arange(count, device=labels.device)[:, None]


class Tiles(NamedTuple):
    """T tiles of m entries; a group fills as many whole tiles as it needs.

    Attributes:
        member: (B, H, T, m) index of the query in each entry; 0 in empty ones, whose result no query reads.
        group: (B, H, T) whose queries a tile holds.
        entry: (B, H, N) entry of each query, counted over all tiles; T · m for padding.
    """

    member: Tensor
    group: Tensor
    entry: Tensor


@torch.no_grad()
def tiles_of_groups(labels: Tensor, count: int, size: int) -> Tiles:
    """Tiles of `size` entries for (B, H, N) labels in 0 … count - 1, `count` = padding.

    The number of tiles, `⌊N / size⌋ + min(count, N)`, depends on shapes alone: it serves however uneven the groups are.
    """
    n, device = labels.shape[-1], labels.device
    token = torch.arange(n, device=device).expand_as(labels)
    sizes = torch.zeros(*labels.shape[:2], count + 1, dtype=torch.long, device=device)
    sizes = sizes.scatter_add(-1, labels, torch.ones_like(labels))
    tiles = -(-sizes[..., :count] // size)
    ends = tiles.cumsum(-1)
    total = n // size + min(count, n)
    # the sort key tells all tokens apart, so that the sort needs not be a stable one
    order = (labels * n + token).argsort(-1)
    label = labels.gather(-1, order)
    rank = token - (sizes.cumsum(-1) - sizes).gather(-1, label)
    start = (ends - tiles).gather(-1, label.clamp(max=count - 1)) * size
    entry_of = torch.where(label < count, start + rank, total * size)
    entry = torch.empty_like(labels).scatter(-1, order, entry_of)
    member = torch.zeros(*labels.shape[:2], total * size + 1, dtype=torch.long, device=device)
    member = member.scatter(-1, entry, token)[..., :-1].unflatten(-1, (total, size))
    index = torch.arange(total, device=device).expand(*labels.shape[:2], -1).contiguous()
    group = torch.searchsorted(ends, index, right=True).clamp(max=count - 1)
    return Tiles(member, group, entry)


def tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Tiles,
    chosen: Tensor,
    token_mask: Tensor,
    context: AttentionContext,
) -> Tensor:
    """(B, H, T, m, D) softmax attention of the queries in tiles to the keys `chosen` (B, H, C, K) by their groups.

    Args:
        query, key, value: (B, H, N, D). token_mask: (B, N) bool, True = may be seen.

    O((N + C m) K D) time, and copies of (N / m + C) K keys and values.
    """
    batch, heads = chosen.shape[:2]
    index = rows_at(chosen, tiles.group)  # (B, H, T, K)
    visible = token_mask[:, None].expand(-1, heads, -1).gather(2, index.flatten(2)).unflatten(2, index.shape[2:])
    logits = additive_mask(visible, query.dtype)[..., None, :]
    if context.relative_bias is not None:
        offset = index[..., None, :] - tiles.member[..., None]
        logits = logits + context.relative_bias.per_head(offset, 1).to(query.dtype)
    q, k, v = (rows_at(x, at).flatten(0, 1) for x, at in ((query, tiles.member), (key, index), (value, index)))
    out = masked_attention(q, k, v, attn_mask=logits.flatten(0, 1), dropout_p=context.dropout, scale=context.scaling)
    return out.unflatten(0, (batch, heads))


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, …, D) rows of (B, H, S, D) at `index` (B, H, …)."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, index.shape[2:])
