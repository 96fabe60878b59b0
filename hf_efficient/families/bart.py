"""BART and its relatives: two stacks that share a config, each with positions of its own."""

from __future__ import annotations

from typing import Any

from hf_efficient.families.base import ModelFamily
from hf_efficient.families.positions import PositionScheme, TableWithOffset
from hf_efficient.families.sinusoids import EndlessSinusoids, SinusoidTable
from hf_efficient.families.stack import Stack


class BartFamily(ModelFamily):
    """Both stacks have attention layers of the same class, and the decoder's have one for each input."""

    def side(self, stack: Any) -> str:
        return "decoder" if type(stack).__name__.endswith("Decoder") else "encoder"

    def is_cross_attention(self, name: str, module: Any) -> bool:
        return name.endswith(("encoder_attn", "cross_attention"))

    def hidden_size(self, stack: Stack) -> int:
        size: int = stack.module.config.d_model
        return size


class M2M100Family(BartFamily):
    """Positions count tokens that are not padding."""

    positions_skip_padding = True


TABLE = TableWithOffset("embed_positions")
SINUSOIDS, ENDLESS = SinusoidTable("embed_positions"), EndlessSinusoids("embed_positions")
ROWS: tuple[tuple[type[BartFamily], str, str, PositionScheme], ...] = (
    (BartFamily, "bart", "Bart", TABLE),
    (BartFamily, "mbart", "MBart", TABLE),
    (BartFamily, "plbart", "PLBart", TABLE),
    (BartFamily, "blenderbot", "Blenderbot", TABLE),
    (BartFamily, "blenderbot-small", "BlenderbotSmall", TABLE),
    (BartFamily, "pegasus", "Pegasus", SINUSOIDS),
    (BartFamily, "marian", "Marian", SINUSOIDS),
    (M2M100Family, "m2m_100", "M2M100", ENDLESS),
    (M2M100Family, "nllb-moe", "NllbMoe", ENDLESS),
)

FAMILIES = tuple(
    kind(
        model_type=model_type,
        stack_classes=(f"{prefix}Encoder", f"{prefix}Decoder"),
        attention_classes=(f"{prefix}Attention",),
        projections=("q_proj", "k_proj", "v_proj"),
        positions=positions,
    )
    for kind, model_type, prefix, positions in ROWS
)
