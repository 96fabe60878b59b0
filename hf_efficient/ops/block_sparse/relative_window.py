"""Sliding-window attention whose logits also depend on the query and on the clipped distance (relative position labels)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.ops.context import AttentionCall
from hf_efficient.ops.softmax import additive_mask, attend

MIN_BLOCK = 64


def labelled_window_attention(
    query: Tensor, key: Tensor, value: Tensor, labels: Tensor, call: AttentionCall, *, reach: int
) -> Tensor:
    """Softmax attention over `|j - i| ≤ reach` with logits `s · q_i·k_j + b(j - i) + labels[i, clip(j - i, -m, m) + m]`.

    Args:
        query, key, value: (B, H, N, D).
        labels: (B, H, N, 2m + 1) logits of each query for the clipped distances -m … m.
        call: scaling, `key_padding_mask`, bias (b, added tile by tile), dropout and extra keys; not causal.

    Returns:
        (B, H, N, D); 0 for a query that may see nothing. O(N (reach + G)) time and memory; the largest tensor is one tile's
        logits.

    Source: Ainslie et al. 2020 (arXiv 2004.08483), §3.2, after Shaw et al. 2018 (arXiv 1803.02155).
    """
    n, clip, device = query.shape[2], labels.shape[3] // 2, query.device
    block, extra = max(MIN_BLOCK, reach), call.extra
    front = None
    if extra is not None:
        front = additive_mask(extra.keep, query.dtype)[:, None]
        front = front if extra.bias is None else front + extra.bias.to(query.dtype)
        front = front.expand(-1, -1, n, extra.key.shape[2])
    outputs = []
    for start in range(0, n, block):
        stop = min(n, start + block)
        low, high = max(0, start - reach), min(n, stop + reach)
        offset = torch.arange(low, high, device=device) - torch.arange(start, stop, device=device)[:, None]
        index = offset.clamp(-clip, clip) + clip
        logits = labels[:, :, start:stop].gather(3, index.expand(*query.shape[:2], -1, -1))
        if call.relative_bias is not None:
            logits = logits + call.relative_bias.toeplitz(stop - start, high - low, low - start, device=device)
        visible = (offset.abs() <= reach)[None, None]
        if call.key_padding_mask is not None:
            visible = visible & call.key_padding_mask[:, None, None, low:high]
        logits = logits.to(query.dtype).masked_fill(~visible, float("-inf"))
        keys, values = key[:, :, low:high], value[:, :, low:high]
        if extra is not None and front is not None:
            # labels have a gradient, with which kernels give no log-sum-exp: so the extra keys come in front
            logits = torch.cat([front[:, :, start:stop].expand(*logits.shape[:3], -1), logits], dim=-1)
            keys, values = torch.cat([extra.key, keys], dim=2), torch.cat([extra.value, values], dim=2)
        outputs.append(attend(query[:, :, start:stop], keys, values, logits, **call.options)[0])
    return torch.cat(outputs, dim=2)
