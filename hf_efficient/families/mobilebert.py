"""MobileBERT: layers with a bottleneck, inside which attention is narrower than the states between layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_efficient.attention.base.geometry import AttentionGeometry, SourceAttention
from hf_efficient.families.base import ModelFamily
from hf_efficient.families.bert import IDS, TABLE
from hf_efficient.families.positions import PositionTable
from hf_efficient.families.stack import AttentionLayer, Stack


class MobileBertFamily(ModelFamily):
    """Attention is called with states for queries, keys and values apart, and with those of the residual."""

    def geometry(self, stack: Stack, layer: AttentionLayer, max_positions: int | None = None) -> AttentionGeometry:
        # what adds the residual gets it as states of its own, so it can't run on fewer tokens alone
        return replace(super().geometry(stack, layer, max_positions), has_residual_module=False)

    def hidden_size(self, stack: Stack) -> int:
        config: Any = stack.module.config
        width: int = config.true_hidden_size
        return width

    def projection_refusal(self, module: Any) -> str | None:
        config = module.config
        if not config.use_bottleneck or config.use_bottleneck_attention:
            return None
        return (
            f"{self.model_type} projects values from other states than queries and keys, of which a mechanism gets one "
            "kind: use one that mixes projected heads, such as local"
        )

    def source_attention(self, module: Any) -> SourceAttention:
        if (reason := self.projection_refusal(module)) is not None:
            raise ValueError(f"this mechanism starts from the projections of a layer, but {reason}.")
        return super().source_attention(module)


FAMILIES = (
    MobileBertFamily(
        model_type="mobilebert",
        stack_classes=("MobileBertModel",),
        attention_classes=("MobileBertSelfAttention",),
        positions=PositionTable(TABLE, (IDS,)),
    ),
)
