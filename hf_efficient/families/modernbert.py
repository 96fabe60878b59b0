"""ModernBERT: rotary positions, and a window in all layers but every third, to both sides; and its causal form."""

from __future__ import annotations

from typing import Any

from hf_efficient.families.llama import FusedFamily, LlamaFamily
from hf_efficient.families.rotary import RotaryPositions


class ModernBertFamily(FusedFamily):
    """An encoder; its window is `config.sliding_window` to each side."""

    def side(self, stack: Any) -> str:
        return "encoder"


FAMILIES = (
    ModernBertFamily(
        model_type="modernbert",
        stack_classes=("ModernBertModel",),
        attention_classes=("ModernBertAttention",),
        projections=("Wqkv",),
        positions=RotaryPositions(),
        embeddings_module="",
    ),
    LlamaFamily(
        model_type="modernbert-decoder",
        stack_classes=("ModernBertDecoderModel",),
        attention_classes=("ModernBertDecoderAttention",),
        projections=("q_proj", "k_proj", "v_proj"),
        positions=RotaryPositions(),
    ),
)
