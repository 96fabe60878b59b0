"""EuroBERT and other encoders with rotary positions and projections that are called as Llama's are."""

from __future__ import annotations

from typing import Any

from hf_efficient.families.llama import LlamaFamily
from hf_efficient.families.rotary import RotaryPositions


class RotaryEncoderFamily(LlamaFamily):
    """Flat layers with a feed-forward part `mlp`, whether norms stand in front of the parts or behind them."""

    def side(self, stack: Any) -> str:
        return "encoder"


# model_type: prefix of the class names
PREFIXES = {
    "eurobert": "EuroBert",
    "gte": "Gte",
    "jina_embeddings_v3": "JinaEmbeddingsV3",
    "nomic_bert": "NomicBert",
}
FAMILIES = tuple(
    RotaryEncoderFamily(
        model_type=model_type,
        stack_classes=(f"{prefix}Model",),
        attention_classes=(f"{prefix}Attention",),
        projections=("q_proj", "k_proj", "v_proj"),
        positions=RotaryPositions(),
        embeddings_module="" if model_type == "eurobert" else None,
    )
    for model_type, prefix in PREFIXES.items()
)
