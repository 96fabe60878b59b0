"""A few rows of full attention whose keys and values have projections of their own, without projecting every token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def projected_rows(
    rows: Tensor,
    hidden: Tensor,
    projections: tuple[nn.Linear, nn.Linear, nn.Linear],
    *,
    num_heads: int,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Softmax attention of `rows` over `hidden` through (query, key, value) projections.

    Few rows do not need keys and values of all tokens: `q·(W_k h + c) = (W_kᵀ q)·h + q·c`, and the last term is the same for
    all keys; likewise `Σ p (W_v h + c) = W_v Σ p h + c`. That costs n·C per head and row against n·C² once (C the width of
    `hidden`), so it pays up to head_dim rows.

    Args:
        rows: (B, G, C) states of the queries. hidden: (B, n, C) states of all tokens.
        mask: bool or additive, broadcastable to (B, H, G, n), or `None`.

    Returns:
        (B, H, G, D). O(min(G · H, C) · n · C) time, O(G · H · n) memory.
    """
    query, key, value = projections

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    options: dict[str, Any] = dict(attn_mask=mask, dropout_p=dropout, scale=scaling)
    q = heads(query(rows))  # (B, H, G, D)
    if rows.shape[1] > q.shape[-1]:
        return F.scaled_dot_product_attention(q, heads(key(hidden)), heads(value(hidden)), **options)
    key_weight, value_weight = (p.weight.unflatten(0, (num_heads, -1)).to(q.dtype) for p in (key, value))
    probe = torch.einsum("bhgd,hdc->bhgc", q, key_weight)
    # all heads see the same states: their rows are queries of one head, or gradients of the states would exist once per head
    if mask is not None:
        options["attn_mask"] = mask.expand(rows.shape[0], num_heads, rows.shape[1], -1).flatten(1, 2)[:, None]
    shared = hidden[:, None]
    mixed = F.scaled_dot_product_attention(probe.flatten(1, 2)[:, None], shared, shared, **options)[:, 0]
    mixed = mixed.unflatten(1, (num_heads, -1))
    out = torch.einsum("bhgc,hdc->bhgd", mixed, value_weight.to(mixed.dtype))
    return out if value.bias is None else out + value.bias.view(num_heads, 1, -1).to(out.dtype)
