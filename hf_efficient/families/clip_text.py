"""The encoder of texts of CLIP: causal, though its attention modules do not say so."""

from __future__ import annotations

from typing import Any

from hf_efficient.families.base import ModelFamily
from hf_efficient.families.bert import IDS
from hf_efficient.families.positions import PositionTable


class CLIPTextFamily(ModelFamily):
    """Every call asks for causal attention by a keyword. There is no cache."""

    def side(self, stack: Any) -> str:
        return "decoder"


FAMILIES = (
    CLIPTextFamily(
        model_type="clip_text_model",
        module_name="clip",
        model_classes=("CLIPTextModel", "CLIPTextModelWithProjection"),
        stack_classes=("CLIPTextModel",),
        attention_classes=("CLIPAttention",),
        projections=("q_proj", "k_proj", "v_proj"),
        positions=PositionTable("embeddings.position_embedding", (IDS,)),
    ),
)
