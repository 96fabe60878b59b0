"""MPNet's attention through transformers' AttentionInterface, with a table of biases over offsets, not a dense one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

from hf_efficient.ops.relative_bias import RelativeBias

MAX_DISTANCE = 128
"""From here on all offsets share a bucket: the host's own default, which its config does not change."""


def table(encoder: Any) -> Tensor:
    """(buckets, H) biases, from a call of the embedding that holds them."""
    embedding = encoder.relative_attention_bias
    # a hook that brings the table in also moves the ids there
    device = "cpu" if hasattr(embedding, "_hf_hook") else next(embedding.parameters()).device
    values: Tensor = embedding(torch.arange(embedding.num_embeddings, device=device))
    return values


class LazyBiasMPNetEncoder(MPNetEncoder):
    def compute_position_bias(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> RelativeBias:
        return RelativeBias(partial(table, self), self.relative_position_bucket, MAX_DISTANCE)


class DispatchedMPNetSelfAttention(MPNetSelfAttention):
    """Scores as the host's: `q · k / √D` and the bias, before padding is hidden."""

    is_causal = False
    config: Any

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: RelativeBias | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor]:
        heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (part(hidden_states).view(heads).transpose(1, 2) for part in (self.q, self.k, self.v))
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.attention_head_size**-0.5,
            position_bias=position_bias,
            **kwargs,
        )
        return (self.o(mixed.flatten(-2)),)
