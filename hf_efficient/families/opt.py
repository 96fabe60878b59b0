"""OPT and BioGPT: learned positions that count tokens without padding, in a table with two rows in front."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_efficient.families.base import ModelFamily
from hf_efficient.families.stack import Stack

ROWS_IN_FRONT = 2


class OPTFamily(ModelFamily):
    """The table's own class adds the two rows: `position_ids` and the config count from 0 without them."""

    positions_skip_padding = True

    def side(self, stack: Any) -> str:
        return "decoder"

    def max_positions(self, config: PreTrainedConfig) -> int | None:
        length: int = config.max_position_embeddings
        return length

    def positions(self, stack: Stack) -> int | None:
        return int(self._table(stack)[2].num_embeddings) - ROWS_IN_FRONT

    def resize_positions(
        self, model: PreTrainedModel, stacks: list[Stack], max_positions: int, method: str = "tile"
    ) -> list[str]:
        raise ValueError(
            f"max_positions={max_positions}: the position table of {self.model_type} has a class of its own, which can't be "
            f"lengthened here. Leave max_positions out: the model keeps its {self.positions(stacks[0])} positions."
        )


FAMILIES = tuple(
    OPTFamily(
        model_type=model_type,
        stack_classes=(stack_class,),
        attention_classes=(attention_class,),
        projections=("q_proj", "k_proj", "v_proj"),
        position_table="embed_positions",
    )
    for model_type, stack_class, attention_class in (
        ("opt", "OPTDecoder", "OPTAttention"),
        ("biogpt", "BioGptModel", "BioGptAttention"),
    )
)
