"""Packed rows: every sequence of a row attends to itself alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_efficient.ops.packing import PER_TOKEN, PackedSequences

if TYPE_CHECKING:
    from hf_efficient.ops.context import AttentionContext


def attend_packed_rows(
    mix: Callable[[Tensor, Tensor, Tensor, AttentionContext], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: AttentionContext,
    segments: PackedSequences,
) -> Tensor:
    """Attention of each segment within itself: `mix` on rows that hold one segment each, padded on the right.

    Args:
        mix: (M, H, L, D) queries, keys and values and their context to (M, H, L, D); called once per group.
        query, key, value: (B, H, N, D) packed rows.

    Returns:
        (B, H, N, D); zeros at padding. Less than 2 × the tokens are mixed, in at most 1 + log₂(longest segment) calls.
    """
    outputs = []
    for group in segments.groups:
        q, k, v = (segments.split(x.transpose(1, 2), group).transpose(1, 2) for x in (query, key, value))
        facts: dict[str, Any] = {
            name: segments.split(tensor, group) for name in PER_TOKEN if (tensor := getattr(context, name)) is not None
        }
        token_mask = None if group.token_mask is None else group.token_mask.to(query.device)
        outputs.append(
            mix(q, k, v, dataclasses.replace(context, key_padding_mask=token_mask, **facts)).transpose(1, 2)
        )
    return segments.join(outputs).transpose(1, 2)
