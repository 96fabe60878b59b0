"""Grouped heads: several heads of queries that share one head of keys and values."""

from __future__ import annotations

from torch import Tensor


def expand_heads(query: Tensor, *tensors: Tensor) -> list[Tensor]:
    """(B, H, …) of (B, H or fewer, …) keys and values: each head repeated for the query heads that share it.

    Args:
        query: (B, H, …), H a multiple of the heads of each of `tensors`.
    """
    return [
        x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)
        for x in tensors
    ]
