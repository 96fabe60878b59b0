"""RoBERTa and its relatives: BERT whose first real position is row padding_idx + 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_efficient.families.bert import POSITION_BUFFERS, TABLE, BertFamily, bert_like
from hf_efficient.families.feed_forward import Dense
from hf_efficient.families.positions import TableAfterPadding


class RobertaFamily(BertFamily):
    """Without `position_ids`, positions count tokens that are not padding."""

    positions_skip_padding = True


class XLMRobertaXLFamily(RobertaFamily):
    """A norm in front of each part of a layer, and one behind the last layer."""

    def attention_input(self, part: Any, hidden: Tensor) -> Tensor:
        return part.self_attn_layer_norm(hidden)


class XmodFamily(RobertaFamily):
    """RoBERTa with an adapter for each language behind its layers, whose norms may stand in front of their parts."""

    def attention_input(self, part: Any, hidden: Tensor) -> Tensor:
        return part.output.LayerNorm(hidden) if part.pre_norm else hidden


class RobertaPreLayerNormFamily(RobertaFamily):
    """A norm in front of each part of a layer; that of the feed-forward part is inside its first module."""

    def attention_input(self, part: Any, hidden: Tensor) -> Tensor:
        return part.LayerNorm(hidden)

    def feed_forward_name(self, layer: Any) -> str:
        return "intermediate.dense"

    def clear_feed_forward(self, layer: Any) -> None:
        super().clear_feed_forward(layer)
        layer.intermediate.intermediate_act_fn = nn.Identity()

    def restore_feed_forward(self, layer: Any, dense: Dense, config: Any) -> None:
        norm = layer.intermediate.LayerNorm
        super().restore_feed_forward(layer, dense, config)
        layer.intermediate.LayerNorm = norm


def roberta_like(kind: type[RobertaFamily], model_type: str, prefix: str, **different: Any) -> BertFamily:
    """A family whose classes and modules are called as RoBERTa's are."""
    return bert_like(kind, model_type, prefix, positions=TableAfterPadding(TABLE, POSITION_BUFFERS), **different)


TASKS = "CausalLM MaskedLM MultipleChoice QuestionAnswering SequenceClassification TokenClassification"
FAMILIES = (
    roberta_like(RobertaFamily, "roberta", "Roberta"),
    roberta_like(RobertaFamily, "xlm-roberta", "XLMRoberta"),
    roberta_like(RobertaFamily, "camembert", "Camembert"),
    roberta_like(
        RobertaFamily,
        "data2vec-text",
        "Data2VecText",
        module_name="data2vec.data2vec_text",
        model_classes=("Data2VecTextModel", *(f"Data2VecTextFor{task}" for task in TASKS.split())),
    ),
    roberta_like(XmodFamily, "xmod", "Xmod"),
    roberta_like(XLMRobertaXLFamily, "xlm-roberta-xl", "XLMRobertaXL"),
    roberta_like(RobertaPreLayerNormFamily, "roberta-prelayernorm", "RobertaPreLayerNorm"),
)
