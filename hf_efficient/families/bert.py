"""BERT: separate q, k, v projections, absolute positions from row 0."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import ModelFamily, Stack

POSITION_BUFFERS = (("position_ids", "arange"), ("token_type_ids", "zeros"))


class BertFamily(ModelFamily):
    """Word, position and token-type vectors are added and normalised by one module."""

    def embedded(self, stack: Stack, words: Tensor) -> Tensor:
        parts: Any = stack.module.get_submodule(self.embeddings_module or "")
        first = self.position_offset(stack.module.config)
        position, kind = parts.position_embeddings.weight[first], parts.token_type_embeddings.weight[0]
        return parts.LayerNorm(words + position + kind)


FAMILIES = (
    BertFamily(
        model_type="bert",
        stack_class="BertModel",
        attention_class="BertSelfAttention",
        position_table="embeddings.position_embeddings",
        position_buffers=POSITION_BUFFERS,
        embeddings_module="embeddings",
        layers_module="encoder",
    ),
)
