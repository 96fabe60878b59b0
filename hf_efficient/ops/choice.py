"""Choices by content that rounding does not make: what is as good is chosen by position.

Equal tokens have equal scores up to the rounding of a product, which differs with the batch and the processor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(scale: Tensor) -> Tensor:
    """How far scores in fp32 at least may lie apart by rounding alone, of products of norms that multiply to `scale`."""
    return 2.0**10 * torch.finfo(torch.promote_types(scale.dtype, torch.float32)).eps * scale


def first_largest(score: Tensor, close: Tensor | float) -> Tensor:
    """(…) index of the first of (…, N) scores that lies within `close` of the largest. No gradient."""
    score = score.detach()
    # of equal integers argmax gives the first
    return (score >= score.amax(-1, keepdim=True) - close).int().argmax(-1)


def largest(score: Tensor, count: int, close: Tensor | float) -> Tensor:
    """(…, N) bool: the `count` ≤ N largest scores; of those within `close` of the least of them the first. No gradient."""
    score = score.detach()
    # a sort of whole rows would take several times as long
    least = score.topk(count, dim=-1).values[..., -1:] if count else torch.full_like(score[..., :1], float("inf"))
    above = score > least + close
    level = (score >= least - close) & ~above
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def indices(chosen: Tensor, count: int) -> Tensor:
    """(…, count) where (…, N) bool `chosen`, True for `count` entries, is True, in order."""
    token = torch.arange(chosen.shape[-1], device=chosen.device).expand(chosen.shape)
    # entry `count` takes in all others
    entry = torch.where(chosen, chosen.cumsum(-1) - 1, count)
    return entry.new_zeros(*entry.shape[:-1], count + 1).scatter(-1, entry, token)[..., :count]
