"""Blocks of queries that choose blocks of keys: scores of blocks, their balancing, the choice, and attention to it."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.block_sparse.gather import BlockPlan, block_list_attention
from hf_efficient.ops.choice import indices, largest, rounding
from hf_efficient.ops.context import AttentionCall
from hf_efficient.ops.pooled_keys import in_groups
from hf_efficient.ops.softmax import Result, merge_attention


def block_means(x: Tensor, token_mask: Tensor, size: int) -> Tensor:
    """(B, H, U, D) means of the real tokens of blocks of `size`, in fp32 at least, of (B, H, N, D) and a (B, N) mask; 0
    for a block without any."""
    members = in_groups(token_mask, size)
    x = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~token_mask[:, None, :, None], 0.0)
    total = F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).sum(3)
    return total / members.sum(-1).clamp(min=1)[:, None, :, None]


def first_tokens(token_mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(B, U) index of the first real token of each block of `size` of a (B, N) mask, and which blocks have one."""
    members = in_groups(token_mask, size)
    blocks = torch.arange(members.shape[1], device=token_mask.device)
    return blocks * size + members.int().argmax(-1), members.any(-1)


def tokens_at(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, T, D) tokens of (B, H, N, D) at `index` (B, T)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def other_blocks(target: Tensor, count: int, is_causal: bool) -> Tensor:
    """(…, count) bool: blocks that the blocks `target` (…) may choose: not themselves, nor the one before; causal: earlier
    ones only."""
    block, target = torch.arange(count, device=target.device), target[..., None]
    return block < target - 1 if is_causal else (block != target) & (block != target - 1)


def log_shares(scores: Tensor, eligible: Tensor, iterations: int) -> Tensor:
    """(…, T, U) logarithms of what each of U blocks has of target T, from scores of the same shape; -inf if not eligible.

    `iterations` = 0: `log softmax_u`. Otherwise Sinkhorn's algorithm: so many times over, columns and then rows are divided
    by their sums, which makes a doubly stochastic matrix of e^scores in the end. In logarithms; fp32 at least is needed.

    Args:
        eligible: (B or 1, 1, T, U) bool; targets that don't exist may choose nothing, or they would count in the columns.
    """
    out = scores.masked_fill(~eligible, float("-inf"))
    for _ in range(iterations):
        out = _divided(_divided(out, -2), -1)
    return out if iterations else _divided(out, -1)


def _divided(logs: Tensor, dim: int) -> Tensor:
    # sums over nothing would be NaN in backward
    empty = (logs == float("-inf")).all(dim, keepdim=True)
    return logs - logs.masked_fill(empty, 0.0).logsumexp(dim, keepdim=True)


def best_blocks(shares: Tensor, count: int) -> Tensor:
    """(…, T, c) indices, in order, of the `count` largest of (…, T, U), of equal ones the first; -1 = none. A constant."""
    shares, count = shares.detach(), min(count, shares.shape[-1])
    scale = 1 + shares.masked_fill(shares == float("-inf"), 0.0).abs().amax(-1, keepdim=True)
    index = indices(largest(shares, count, rounding(scale)), count)
    return torch.where(shares.gather(-1, index) == float("-inf"), -1, index)


def near_and_sorted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    shares: Tensor | None,
    call: AttentionCall,
    *,
    block_size: int,
) -> Tensor:
    """Softmax attention of each block to itself, the block before and the `chosen` ones, in one softmax.

    Args:
        query, key, value: (B, H, N, D). chosen: (B, H, U, c), -1 = none, all different and none of the former two.
        shares: (B, H, U, c) logarithms of shares S of the chosen blocks: their keys' weights are multiplied by S divided by
            its own value, which is 1, so that S gets the gradient of a factor on what is chosen (straight through). `None`
            = no gradient.
        call: as for `block_list_attention`.

    O(N · (c + 2) · block_size · D) time.
    """
    rows = torch.arange(chosen.shape[2], device=query.device)
    # the first block has none before it: 0 - 1 says so
    near = torch.stack([rows, rows - 1], dim=-1)[None, None]
    none = torch.zeros(0, block_size, block_size, dtype=torch.bool, device=query.device)

    def attention(columns: Tensor, call: AttentionCall) -> Result:
        plan = BlockPlan([(rows, columns, None)], none, None)
        return block_list_attention(query, key, value, plan, call, block_size=block_size)

    if shares is None:
        return attention(torch.cat([near.expand(*chosen.shape[:2], -1, -1), chosen], dim=-1), call)[0]
    call = dataclasses.replace(call, return_lse=True)
    parts = [attention(near, call)]
    for columns, log_share in zip(chosen.split(1, -1), shares.unbind(-1), strict=True):
        log_share = torch.where(columns[..., 0] < 0, 0.0, log_share)
        factor = (log_share - log_share.detach()).repeat_interleave(block_size, -1)[..., : query.shape[2]]
        out, lse = attention(columns, call)
        assert lse is not None
        parts.append((out, lse + factor))
    return merge_attention(*parts)[0]  # type: ignore[arg-type]
