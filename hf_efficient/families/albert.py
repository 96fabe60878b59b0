"""ALBERT: BERT whose layers share one module, or a few, and whose embeddings are narrower than its layers."""

from __future__ import annotations

from typing import Any

from hf_efficient.families.base import ModelFamily
from hf_efficient.families.bert import POSITION_BUFFERS, TABLE
from hf_efficient.families.positions import PositionTable
from hf_efficient.families.stack import Stack


class AlbertFamily(ModelFamily):
    """A mechanism in a shared module serves all layers that share it, with the same parameters and random numbers."""

    def num_calls(self, stack: Stack) -> int:
        config: Any = stack.module.config
        return -(-config.num_hidden_layers // config.num_hidden_groups)


FAMILIES = (
    AlbertFamily(
        model_type="albert",
        stack_classes=("AlbertModel",),
        attention_classes=("AlbertAttention",),
        positions=PositionTable(TABLE, POSITION_BUFFERS),
    ),
)
