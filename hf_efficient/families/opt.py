"""OPT and BioGPT: learned positions that count tokens without padding, in a table with two rows in front."""

from __future__ import annotations

from typing import Any

from hf_efficient.families.base import ModelFamily
from hf_efficient.families.positions import TableWithOffset


class OPTFamily(ModelFamily):
    """Without `position_ids`, positions count tokens that are not padding."""

    positions_skip_padding = True

    def side(self, stack: Any) -> str:
        return "decoder"


FAMILIES = tuple(
    OPTFamily(
        model_type=model_type,
        stack_classes=(stack_class,),
        attention_classes=(attention_class,),
        projections=("q_proj", "k_proj", "v_proj"),
        positions=TableWithOffset("embed_positions"),
        scales_queries=model_type == "opt",
    )
    for model_type, stack_class, attention_class in (
        ("opt", "OPTDecoder", "OPTAttention"),
        ("biogpt", "BioGptModel", "BioGptAttention"),
    )
)
