"""ESM: encoders of proteins, with rotary positions, or the learned ones of ESM-1b."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_efficient.families.base import ModelFamily
from hf_efficient.families.bert import IDS, TABLE, BertFamily
from hf_efficient.families.feed_forward import Dense
from hf_efficient.families.positions import LongerInputs, TableAfterPadding
from hf_efficient.families.rotary import RotaryPositions
from hf_efficient.families.stack import Stack


@dataclass(frozen=True)
class EsmRotaryPositions(RotaryPositions):
    """Angles that nothing in the config scales: inputs may be as long as one likes, but nothing helps longer ones."""

    def check(self, stack: Stack, wanted: LongerInputs) -> None:
        super(RotaryPositions, self).check(stack, wanted)
        if wanted.max_positions is not None:
            raise ValueError(
                f"max_positions={wanted.max_positions}: rotary positions of {stack.module.config.model_type} take inputs of "
                "any length as they are, and its config has no rope_parameters to scale them: leave it out."
            )

    def record(self, stack: Stack) -> dict[str, Any]:
        return {}


class EsmFamily(BertFamily):
    """Norms stand in front of both parts of a layer."""

    def of(self, config: Any) -> ModelFamily:
        if config.position_embedding_type == "rotary":
            return self
        return EsmTableFamily(**vars(self) | {"positions": TableAfterPadding(TABLE, (IDS,))})

    def is_cross_attention(self, name: str, module: Any) -> bool:
        return ".crossattention." in f".{name}." and hasattr(module, "key")

    def attention_input(self, part: Any, hidden: Any) -> Any:
        return part.LayerNorm(hidden)

    def feed_forward(self, layer: Any) -> Dense:
        up, down = layer.intermediate.dense, layer.output.dense
        return Dense(up.weight.T, down.weight.T, up.bias, down.bias, self.modeling.gelu)


class EsmTableFamily(EsmFamily):
    """Learned positions, which count tokens that are not padding."""

    positions_skip_padding = True


FAMILIES = (
    EsmFamily(
        model_type="esm",
        stack_classes=("EsmModel",),
        attention_classes=("EsmSelfAttention",),
        positions=EsmRotaryPositions("rotary_embeddings"),
        scales_queries=True,
    ),
)
