"""The cache of attention by content: all keys, and the labels of their tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_efficient.cache.recurrent import RecurrentLayer
from hf_efficient.ops.context import AttentionContext
from hf_efficient.patterns.kinds import Window


class BucketMemory(NamedTuple):
    """`labels` (B, H, R, S) of all tokens seen."""

    labels: Tensor


class BucketLayer(RecurrentLayer):
    """Cache layer that keeps all keys, and the labels of their tokens.

    A label depends on the query and the key of its token, of which a cache has the key alone. Every old token can be among
    the last ones of its label, so nothing is forgotten, and `crop` can go back to any token. O(S · (D + R)) per head.
    """

    state: BucketMemory | None

    def __init__(self) -> None:
        super().__init__(Window(left=0, right=0))

    def _prune(self) -> None:
        """Nothing."""

    def append(self, labels: Tensor) -> Tensor:
        """Keep the labels (B, H, R, N) of new tokens; returns those of all tokens."""
        labels = labels.detach()
        if self.state is not None:
            labels = torch.cat([self.state.labels, labels], dim=-1)
        self.state = BucketMemory(labels)
        return labels

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._change_state(lambda labels: labels[..., : self.seen])


def labels_of_all(labels: Tensor, length: int, context: AttentionContext) -> Tensor:
    """(B, H, R, S) labels of all `length` keys of a call, from the labels (B, H, R, N) of its queries' tokens.

    Raises:
        ValueError: there are older tokens, whose labels no cache layer of this kind kept.
    """
    layer = context.recurrent
    if isinstance(layer, BucketLayer):
        labels = layer.append(labels)
    if labels.shape[-1] != length:
        raise ValueError(
            f"{length} keys, but labels of {labels.shape[-1]} tokens: attention by content decodes with the cache that the "
            "model makes itself, outside torch.compile: give past_key_values=None with the first call, or use_cache=False; "
            "prefix tuning fills a cache by itself: use LoRA or prompt tuning instead."
        )
    return labels
