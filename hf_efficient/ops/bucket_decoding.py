"""Attention by content while decoding: the few keys that new queries see, found by the labels of all tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_efficient.ops.softmax import additive_mask, attend

if TYPE_CHECKING:
    from hf_efficient.ops.context import AttentionContext

# new tokens that are computed at once
CHUNK = 32


class BucketRule(NamedTuple):
    """The facts of a call, except for its labels."""

    size: int
    near: int
    own_last: bool
    context: AttentionContext


def decode_buckets(query: Tensor, key: Tensor, value: Tensor, labels: Tensor, rule: BucketRule) -> Tensor:
    """`bucket_attention` of the last N queries: a few at a time; where few of all S keys can be visible, of these alone."""
    s, context, most = key.shape[2], rule.context, labels.shape[2] * rule.size + rule.near
    token = torch.arange(s, device=key.device)
    token_mask = context.key_padding_mask
    exists = token >= 0 if token_mask is None else token_mask[:, None, None]
    outputs, first = [], s - query.shape[2]
    for part in query.split(CHUNK, dim=2):
        own = token[first : first + part.shape[2], None]
        first += part.shape[2]
        past = (token <= own) & exists
        visible = past & (token > own - rule.near)
        for label in labels.unbind(2):
            same = (label[..., own] == label[:, :, None]) & past
            count = same.cumsum(-1, dtype=torch.int32)
            visible = visible | (same & (count > count[..., -1:] - rule.size))
        if rule.own_last:
            others = visible & (token != own)
            visible = torch.where(others.any(-1, keepdim=True), others, visible)
        logits = additive_mask(visible, query.dtype)
        if context.relative_bias is not None:
            logits = logits + context.relative_bias.at(token - own).to(query.dtype)
        facts: dict[str, Any] = dict(scaling=context.scaling, dropout=context.dropout)
        if s <= most:
            outputs.append(attend(part, key, value, logits, **facts)[0])
        else:
            outputs.append(_attend_chosen(part, key, value, visible, logits, most, facts))
    return torch.cat(outputs, dim=2)


def _attend_chosen(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, logits: Tensor, most: int, facts: dict[str, Any]
) -> Tensor:
    """Attention over the visible keys, at most `most` of each query, copied out of all."""
    index = torch.arange(key.shape[2], device=key.device).expand_as(logits)
    slot = torch.where(visible, visible.cumsum(-1) - 1, most).expand_as(logits)
    # entry `most` takes in all hidden keys; empty ones stand for key 0, and are hidden as well
    chosen = torch.zeros(*logits.shape[:3], most + 1, dtype=torch.long, device=key.device)
    chosen = chosen.scatter(-1, slot, index)[..., :most]
    filled = torch.arange(most, device=key.device) < visible.sum(-1, keepdim=True)
    logits = torch.where(filled, logits.gather(-1, chosen), float("-inf"))

    def rows(x: Tensor) -> Tensor:
        picked = x.gather(2, chosen.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1]))
        return picked.unflatten(2, chosen.shape[2:]).flatten(1, 2)

    out, _ = attend(query.flatten(1, 2)[:, :, None], rows(key), rows(value), logits.flatten(1, 2)[:, :, None], **facts)
    return out[:, :, 0].unflatten(1, query.shape[1:3])
