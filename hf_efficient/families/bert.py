"""BERT and its relatives whose positions count from row 0: separate q, k, v projections, post-norm layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_efficient.families.base import ModelFamily, fill_linear
from hf_efficient.families.feed_forward import Dense
from hf_efficient.families.initialised import mark_initialised
from hf_efficient.families.positions import PositionTable
from hf_efficient.families.stack import Stack

TABLE = "embeddings.position_embeddings"
IDS = ("position_ids", "arange")
POSITION_BUFFERS = (IDS, ("token_type_ids", "zeros"))


class BertFamily(ModelFamily):
    """One module makes the embeddings; attention and feed-forward part have a module each for their residual and norm."""

    def embedded(self, stack: Stack, words: Tensor) -> Tensor:
        parts: Any = stack.module.get_submodule(self.embeddings_module or "")
        with evaluating(parts):
            # hooks of others are for calls of the model
            embedded: Tensor = parts.forward(input_ids=None, inputs_embeds=words[:, None])[:, 0]
        return embedded

    # two modules, the second one with the residual and its norm

    def feed_forward_name(self, layer: Any) -> str:
        return "intermediate"

    def feed_forward_products(self, layer: Any) -> list[str]:
        return ["intermediate.dense", "output.dense"]

    def feed_forward(self, layer: Any) -> Dense:
        up, down = layer.intermediate.dense, layer.output.dense
        return Dense(up.weight.T, down.weight.T, up.bias, down.bias, layer.intermediate.intermediate_act_fn)

    def clear_feed_forward(self, layer: Any) -> None:
        layer.output.dense = nn.Identity()

    def restore_feed_forward(self, layer: Any, dense: Dense, config: Any) -> None:
        first = getattr(self.modeling, self.attention_classes[0].removesuffix("SelfAttention") + "Intermediate")
        layer.intermediate = first(config)
        layer.output.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        fill_linear(layer.intermediate.dense, dense.up.T, dense.up_bias)
        fill_linear(layer.output.dense, dense.down.T, dense.down_bias)
        mark_initialised(layer.intermediate, layer.output.dense)


class ElectraFamily(BertFamily):
    """Embeddings may be narrower than layers; a projection behind them widens them."""

    def embeddings_name(self, stack: Stack) -> str | None:
        return "embeddings_project" if hasattr(stack.module, "embeddings_project") else self.embeddings_module

    def embedded(self, stack: Stack, words: Tensor) -> Tensor:
        embedded = super().embedded(stack, words)
        project: Any = getattr(stack.module, "embeddings_project", None)
        return embedded if project is None else project.forward(embedded)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Nothing inside `module` draws random numbers; afterwards each of its parts is in the mode in which it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def bert_like(kind: type[BertFamily], model_type: str, prefix: str, **different: Any) -> BertFamily:
    """A family whose classes and modules are called as BERT's are."""
    usual: dict[str, Any] = dict(
        stack_classes=(f"{prefix}Model",),
        attention_classes=(f"{prefix}SelfAttention",),
        positions=PositionTable(TABLE, POSITION_BUFFERS),
        embeddings_module="embeddings",
        layers_module="encoder",
    )
    return kind(model_type=model_type, **usual | different)


FAMILIES = (
    bert_like(BertFamily, "bert", "Bert"),
    bert_like(
        BertFamily,
        "bert-generation",
        "BertGeneration",
        stack_classes=("BertGenerationEncoder",),
        model_classes=("BertGenerationEncoder", "BertGenerationDecoder"),
        positions=PositionTable(TABLE, (IDS,)),
    ),
    bert_like(BertFamily, "ernie", "Ernie"),
    bert_like(BertFamily, "roc_bert", "RoCBert"),
    bert_like(BertFamily, "splinter", "Splinter", positions=PositionTable(TABLE, (IDS,))),
    bert_like(ElectraFamily, "electra", "Electra"),
)
