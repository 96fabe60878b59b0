"""BERT: separate q, k, v projections, absolute positions from row 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.families.base import ModelFamily, fill_linear
from hf_efficient.families.feed_forward import Dense
from hf_efficient.families.initialised import mark_initialised
from hf_efficient.families.positions import PositionTable
from hf_efficient.families.stack import Stack

TABLE = "embeddings.position_embeddings"
POSITION_BUFFERS = (("position_ids", "arange"), ("token_type_ids", "zeros"))


class BertFamily(ModelFamily):
    """Word, position and token-type vectors are added and normalised by one module."""

    def embedded(self, stack: Stack, words: Tensor) -> Tensor:
        parts: Any = stack.module.get_submodule(self.embeddings_module or "")
        first = self.positions.first(stack)
        position, kind = torch.tensor([[first], [0]], device=words.device)
        return parts.LayerNorm(words + parts.position_embeddings(position) + parts.token_type_embeddings(kind))

    # two modules, the second one with the residual and its norm

    def feed_forward_name(self, layer: Any) -> str:
        return "intermediate"

    def feed_forward_products(self, layer: Any) -> list[str]:
        return ["intermediate.dense", "output.dense"]

    def feed_forward(self, layer: Any) -> Dense:
        up, down = layer.intermediate.dense, layer.output.dense
        return Dense(up.weight.T, down.weight.T, up.bias, down.bias, layer.intermediate.intermediate_act_fn)

    def clear_feed_forward(self, layer: Any) -> None:
        layer.output.dense = nn.Identity()

    def restore_feed_forward(self, layer: Any, dense: Dense, config: Any) -> None:
        first = getattr(self.modeling, self.stack_classes[0].removesuffix("Model") + "Intermediate")
        layer.intermediate = first(config)
        layer.output.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        fill_linear(layer.intermediate.dense, dense.up.T, dense.up_bias)
        fill_linear(layer.output.dense, dense.down.T, dense.down_bias)
        mark_initialised(layer.intermediate, layer.output.dense)


FAMILIES = (
    BertFamily(
        model_type="bert",
        stack_classes=("BertModel",),
        attention_classes=("BertSelfAttention",),
        positions=PositionTable(TABLE, POSITION_BUFFERS),
        embeddings_module="embeddings",
        layers_module="encoder",
    ),
)
