"""EuroBERT: an encoder built of Llama's layers, with rotary positions and grouped heads."""

from __future__ import annotations

from typing import Any

from hf_efficient.families.llama import LlamaFamily
from hf_efficient.families.rotary import RotaryPositions


class EuroBertFamily(LlamaFamily):
    def side(self, stack: Any) -> str:
        return "encoder"


FAMILIES = (
    EuroBertFamily(
        model_type="eurobert",
        stack_classes=("EuroBertModel",),
        attention_classes=("EuroBertAttention",),
        projections=("q_proj", "k_proj", "v_proj"),
        positions=RotaryPositions(),
        embeddings_module="",
    ),
)
