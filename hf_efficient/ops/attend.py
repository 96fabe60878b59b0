"""Softmax attention of one dense tile, with its log-sum-exp where asked for, and the exact merge of partial results."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

Partial = tuple[Tensor, Tensor]

# elements of the scores that are held at once, where no gradient needs them later: bounds working memory, not results
SCORE_BUDGET = 2**25


def additive_mask(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where kept, -inf elsewhere: attention kernels take this form without another pass over it."""
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, float("-inf"))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`out_i = Σ_j softmax_j(s · q_i·k_j + logits_ij) v_j`, and `lse_i = log Σ_j exp(s · q_i·k_j + logits_ij)`.

    Args:
        query: (…, N, D); key, value: (…, K, D); logits: additive, broadcastable to (…, N, K), -inf = not visible.
        return_lse: also return the log-sum-exp (…, N), in fp32 at least, with its gradient.

    Returns:
        (out, lse or `None`); a row that sees nothing gives out 0, lse -inf and gradient 0.
    """
    if not return_lse:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=logits, dropout_p=dropout, scale=scaling
        ), None
    batch = query.shape[0]
    if batch > 1 and query[..., 0].numel() * key.shape[-2] > SCORE_BUDGET:
        cut = (batch // 2, batch - batch // 2)
        masks = [logits, logits]
        if logits is not None and logits.dim() == query.dim() and logits.shape[0] > 1:
            masks = list(logits.split(cut))
        tiles = zip(query.split(cut), key.split(cut), value.split(cut), masks, strict=True)
        done = [attend(q, k, v, m, scaling=scaling, dropout=dropout, return_lse=True) for q, k, v, m in tiles]
        return torch.cat([out for out, _ in done]), torch.cat([lse for _, lse in done if lse is not None])
    wide = torch.promote_types(query.dtype, torch.float32)
    # half precision would round the logits before the softmax, which attention kernels never do; so would autocast
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * scaling
    if logits is not None:
        scores = scores + logits.to(scores.dtype)
    # a row without any visible key must give 0 and gradient 0, not NaN
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), 0.0, top)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    visible = total > 0
    total = torch.where(visible, total, 1.0)
    # shares before the product: sums of many values would leave the range of float16
    shares = weights / total
    out = (F.dropout(shares, dropout) if dropout else shares).to(value.dtype) @ value
    lse = torch.where(visible, total.log() + top, float("-inf"))
    return out, lse.squeeze(-1)


def merge_attention(*parts: Partial) -> Partial:
    """Exact attention over disjoint sets of keys from the partial results over each.

    With `(o_r, L_r)` the output and the log-sum-exp over the r-th set: `L = log Σ_r exp L_r`, `o = Σ_r exp(L_r - L) o_r`.

    Args:
        parts: (out (…, N, D), lse (…, N)) of each set; sets that show a query nothing have out 0 and lse -inf.

    Returns:
        (out, lse) over the union. Gradients reach the log-sum-exps, without which those of queries and keys are wrong.
    """
    top = reduce(torch.maximum, (lse.detach() for _, lse in parts))
    top = torch.where(top == float("-inf"), 0.0, top)
    weights = [(lse - top).exp() for _, lse in parts]
    total = torch.stack(weights).sum(0)
    visible = total > 0
    safe = torch.where(visible, total, 1.0)
    shares = [(weight / safe)[..., None].to(out.dtype) for weight, (out, _) in zip(weights, parts, strict=True)]
    out = torch.stack([share * o for share, (o, _) in zip(shares, parts, strict=True)]).sum(0)
    return out, torch.where(visible, safe.log() + top, float("-inf"))
