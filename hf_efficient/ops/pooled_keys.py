"""Pooled keys and values, which stand for several tokens each, and softmax attention over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.padding import real_length
from hf_efficient.ops.softmax import masked_attention

if TYPE_CHECKING:
    from hf_efficient.ops.context import AttentionContext


class PooledKeys(NamedTuple):
    """Pooled keys and values of one call.

    Attributes:
        keys, values: (B, H, R, D).
        counts: (B or 1, H or 1, R) tokens that each pooled key stands for; 0 = it does not exist.
        pooling_weights: (B or 1, H or 1, R, S) of each token in a pooled key, for T5's bias; `None` = there is no bias.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    pooling_weights: Tensor | None


def log_count(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """`log c` in `dtype`, fp32 at least; -inf where c = 0, without the NaN gradient that the logarithm itself has there."""
    counts = counts.to(torch.promote_types(dtype, torch.float32))
    return torch.where(counts > 0, torch.where(counts > 0, counts, 1.0).log(), float("-inf"))


def pooled_attention(query: Tensor, pooled: PooledKeys, context: AttentionContext) -> Tensor:
    """`y_i = Σ_r softmax_r(s · q_i·k̃_r + Σ_j a_rj b(j - i) + log c_r) ṽ_r`: each pooled key weighs as much as its tokens.

    Where the tokens of each pooled key have equal keys, this is softmax attention over all tokens; without `log c_r` one
    token would weigh as much as the mean of many. c are the counts, a the pooling weights.

    Args:
        query: (B, H, N, D).

    Returns:
        (B, H, N, D). O(N · R) time and memory.
    """
    logits = log_count(pooled.counts, query.dtype).to(query.dtype)[:, :, None]
    if context.relative_bias is not None:
        assert pooled.pooling_weights is not None
        logits = context.relative_bias.pooled(pooled.pooling_weights).to(query.dtype) + logits
    return masked_attention(
        query, pooled.keys, pooled.values, attn_mask=logits, dropout_p=context.dropout, scale=context.scaling
    )


def pooling_mass(weights: Tensor, token_mask: Tensor) -> Tensor:
    """(B or 1, H or 1, R) share of the absolute weights (H or 1, R, M) or (B, H or 1, R, M) that fell on real tokens."""
    size = weights.abs()
    form = "hrn,bn->bhr" if weights.dim() == 3 else "bhrn,bn->bhr"
    real = torch.einsum(form, size[..., : token_mask.shape[-1]], token_mask.to(weights.dtype))
    total = size.sum(-1)
    return real / torch.where(total > 0, total, 1.0)


def projected(weights: Tensor, mass: Tensor, x: Tensor, token_mask: Tensor) -> Tensor:
    """(B, H, R, D) of (B, H, S, D) tokens: weighted sums of the real ones, divided by the mass."""
    pooled = weights[..., : x.shape[2]] @ (x * token_mask[:, None, :, None])
    return pooled / torch.where(mass > 0, mass, 1.0)[..., None]


def max_pooled(x: Tensor, token_mask: Tensor, index: Tensor, count: int) -> Tensor:
    """(B, H, count, D) largest entries of the real tokens of each group, (H or 1, S) `index`; 0 for a group without any."""
    lowest = torch.finfo(x.dtype).min
    x = x.masked_fill(~token_mask[:, None, :, None], lowest)
    start = x.new_full((*x.shape[:2], count, x.shape[3]), lowest)
    best = start.scatter_reduce(2, index[None, :, :, None].expand_as(x), x, "amax")
    return torch.where(best == lowest, 0.0, best)


def group_index(counts: Tensor, length: int) -> Tensor:
    """(H, length) pooling group of each of `length` tokens, which fall into (H, 1) `counts` equal groups."""
    return torch.arange(length, device=counts.device) * counts // length


def group_sizes(counts: Tensor, most: int, length: int) -> Tensor:
    """(H, most) tokens of each segment; 0 = there is no such segment."""
    edges = torch.minimum(torch.arange(most + 1, device=counts.device), counts) * length
    return (-(-edges // counts)).diff()


def group_means(counts: Tensor, most: int, length: int, dtype: torch.dtype) -> Tensor:
    """(H, most, length): row r is 1 / size on segment r."""
    own = group_index(counts, length)[:, None] == torch.arange(most, device=counts.device)[:, None]
    return own.to(dtype) / group_sizes(counts, most, length).clamp(min=1)[..., None]


def groups_of_rows(key_padding_mask: Tensor, count: int) -> Tensor:
    """(B, count, S) bool: the real tokens of each of `count` groups, equal in every row; in shorter rows of one token each.

    Args:
        key_padding_mask: (B, S) bool of rows aligned to the left.
    """
    length = real_length(key_padding_mask)[:, None]
    token = torch.arange(key_padding_mask.shape[1], device=key_padding_mask.device)
    group = torch.where(token < length, token * count // length.clamp(min=count), count)
    return (group[:, None] == torch.arange(count, device=group.device)[:, None]) & key_padding_mask[:, None]


def strided_convolution(x: Tensor, token_mask: Tensor, weight: Tensor) -> Tensor:
    """`x̃_t = c / |real u| · Σ_{u < c, real} W_u x_{tc + u}`: one for c tokens, at a row's end for fewer.

    Args:
        x: (B, H, S, D). token_mask: (B or 1, S) bool.
        weight: (H or 1, c, D) per channel, or (H or 1, c, D, D) with `W_u[d, e]` from channel d to e. `1 / c` (times the
            unit matrix) gives means.

    Returns:
        (B, H, ⌈S / c⌉, D); zeros for a group without tokens. O(S · D) or O(S · D²) time.
    """
    size = weight.shape[1]
    members = in_groups(token_mask, size)
    tokens = F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
    tokens = tokens.masked_fill(~members[:, None, :, :, None], 0.0)
    form = "bhtud,hud->bhtd" if weight.dim() == 3 else "bhtud,hude->bhte"
    scale = size / members.sum(-1).clamp(min=1).to(torch.promote_types(x.dtype, torch.float32))
    return torch.einsum(form, tokens, weight.to(x.dtype)) * scale[:, None, :, None].to(x.dtype)


def in_groups(token_mask: Tensor, size: int) -> Tensor:
    """(B, ⌈S / size⌉, size) of a (B, S) token mask; False behind its end."""
    return F.pad(token_mask, (0, -token_mask.shape[1] % size)).unflatten(1, (-1, size))


def mean_weights(token_mask: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, ⌈S / size⌉, S): the weights of the mean over the real tokens of each group."""
    members = in_groups(token_mask, size)
    group, token = (torch.arange(stop, device=token_mask.device) for stop in (members.shape[1], token_mask.shape[1]))
    own = (token // size == group[:, None]) & token_mask[:, None]
    return own.to(dtype) / members.sum(-1, keepdim=True).clamp(min=1)


def stretched(weights: Tensor, token_mask: Tensor) -> Tensor:
    """Weights over M positions for rows longer than that: (B, H, R, S) of (H, R, M), by linear interpolation.

    A row of L > M tokens takes its weight at position j from `(j + ½) M / L - ½`; shorter rows keep theirs.
    """
    known, device = weights.shape[-1], weights.device
    length = real_length(token_mask).clamp(min=known)[:, None]
    token = torch.arange(token_mask.shape[1], device=device)
    ratio = known / length.to(torch.promote_types(weights.dtype, torch.float32))
    position = ((token + 0.5) * ratio - 0.5).clamp(0, known - 1)
    low = position.floor().long()
    part = (position - low).to(weights.dtype)
    first, second = (weights[..., index].movedim(-2, 0) for index in (low, (low + 1).clamp(max=known - 1)))
    return torch.lerp(first, second, part[:, None, None]) * (token < length)[:, None, None]
