"""Linear attention over what a window does not show: the far parts of a hybrid, each with its log-sum-exp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.linear_attention import FeatureState, linear_attention
from hf_efficient.ops.softmax import Partial


def far_past(
    log_query: Tensor, log_key: Tensor, value: Tensor, beyond: int, state: FeatureState | None = None
) -> Partial:
    """Kernel attention of each query over the keys at least `beyond` tokens before it.

    The queries are the last of the keys' tokens: query n stands at key S - N + n. Keys are shifted by whole tokens, not by
    blocks, so that no query misses a key or sees one twice next to its window, and nothing is subtracted.

    Args:
        log_query: (B, H, N, M); log_key: (B, H, S, M), S ≥ N; value: (B, H, S, D), see `linear_attention`.
        beyond: ≥ 0.
        state: of keys before all of these, far from every query.

    Returns:
        (out (B, H, N, D), lse (B, H, N)); 0 and -inf for a query without such keys.
    """
    n, far = log_query.shape[2], max(0, log_key.shape[2] - beyond)
    seeing = n if state is not None else min(n, far)
    if seeing == 0:
        # empty, but part of the graph: parameters without gradient would stop distributed training
        nothing = (log_query[:, :, :0, :1] + log_key[:, :, :0, :1]) * value[:, :, :0]
        return F.pad(nothing, (0, 0, 0, n)), F.pad(nothing.sum(-1), (0, n), value=float("-inf"))
    out, lse = linear_attention(
        log_query[:, :, n - seeing :],
        log_key[:, :, :far],
        value[:, :, :far],
        is_causal=True,
        state=state,
        return_lse=True,
    )
    return F.pad(out, (0, 0, n - seeing, 0)), F.pad(lse, (n - seeing, 0), value=float("-inf"))


def far_future(log_query: Tensor, log_key: Tensor, value: Tensor, beyond: int) -> Partial:
    """The mirror image of `far_past`: over the keys at least `beyond` tokens behind each query, S = N."""
    out, lse = far_past(log_query.flip(2), log_key.flip(2), value.flip(2), beyond)
    return out.flip(2), lse.flip(2)


def window_means(key: Tensor, token_mask: Tensor | None, left: int, right: int, num_queries: int) -> Tensor:
    """(B, H, N, D) mean of the keys (B, H, S, D) that a window shows each of the last N tokens; 0 where it shows none.

    Args:
        token_mask: (B, S) bool, True = real; `None` = all.

    By prefix sums, of what keys differ from their mean, which would cancel: O(S · D) time and memory.
    """
    if num_queries == 1:
        key = key[:, :, max(0, key.shape[2] - 1 - left) :]
        if token_mask is None:
            return key.mean(2, keepdim=True)
        shown = token_mask[:, None, -key.shape[2] :, None].to(key.dtype)
        return (key * shown).sum(2, keepdim=True) / shown.sum(2, keepdim=True).clamp(min=1)
    real = torch.ones_like(key[:1, :1, :, :1]) if token_mask is None else token_mask[:, None, :, None].to(key.dtype)
    centre = ((key * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)).detach()
    total = F.pad((key - centre) * real, (0, 0, 1, 0)).cumsum(2)
    count = F.pad(real, (0, 0, 1, 0)).cumsum(2)
    s = key.shape[2]
    rows = torch.arange(s - num_queries, s, device=key.device)
    low, high = (rows - left).clamp(min=0), (rows + right + 1).clamp(max=s)
    shown = count[:, :, high] - count[:, :, low]
    return torch.where(shown > 0, (total[:, :, high] - total[:, :, low]) / shown.clamp(min=1) + centre, 0.0)
