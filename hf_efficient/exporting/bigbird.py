"""transformers' BigBird classes from BERT with `bigbird`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from transformers import BigBirdConfig, PreTrainedConfig

from hf_efficient.attention.base.registry import attention_config
from hf_efficient.exporting.names import Names
from hf_efficient.exporting.target import ClassTarget, Converted, Shapes, TensorReport, shared_values

# sequence classification and question answering have other heads there
HEADS = ("Model", "ForMaskedLM", "ForPreTraining", "ForTokenClassification", "ForMultipleChoice")
# of BERT; the BigBird has a pooler that nothing reads
WITHOUT_POOLER = ("ForMaskedLM", "ForTokenClassification")
NAMES = Names((("bert.pooler.dense.*", "bert.pooler.*"), ("pooler.dense.*", "pooler.*")))


class BigBirdTarget(ClassTarget):
    """`BigBird…` of the same head, as it is outside training, where all its random blocks are the first block."""

    name = "bigbird"
    prefix = "BigBird"
    stocks: ClassVar[Mapping[str, str]] = {"bert": "Bert"}

    def names(self, stock_name: str, mechanism: str) -> Names:
        return NAMES

    def refusals(self, source: Converted) -> list[str]:
        if source.stock_type not in self.stocks:
            return [f"{source.stock_type} has no BigBird class, which bert has: to='stock' takes any model"]
        reasons, head = [], self.head(source.stock.__name__)
        if head not in HEADS:
            reasons.append(f"no BigBird class has the head of Bert{head}: {', '.join(HEADS)} have one")
        if getattr(source.config, "is_decoder", False):
            return [*reasons, "is_decoder=True: a BigBird that looks back alone has full attention; use to='stock'"]
        found: list[Any] = source.mechanisms("encoder")
        exact = [i for i, one in enumerate(found) if one is None]
        if exact:
            return [
                *reasons,
                f"layers {exact} keep full attention, which no layer of a BigBird has: convert all layers",
            ]
        if any(replace(one, layers=None) != replace(found[0], layers=None) for one in found):
            return [*reasons, "layers differ: all layers of a BigBird have the same options; convert all with bigbird"]
        return reasons + _refused_options(found[0])

    def config_for(self, source: Converted) -> PreTrainedConfig:
        config = BigBirdConfig(**shared_values(source.config, BigBirdConfig))
        config.block_size, config.num_random_blocks = source.first.block_size, _random_blocks(source.first)
        of_text, stored = (getattr(one, "sep_token_id", None) for one in (source.tokenizer, source.config))
        config.sep_token_id = stored if of_text is None else of_text
        return config

    def shapes(self, source: Converted) -> Shapes:
        size = source.first.block_size
        return Shapes(beyond=(5 + 2 * _random_blocks(source.first)) * size, multiple=size, padding=False)

    def conditions(self, source: Converted) -> list[str]:
        shapes = self.shapes(source)
        return [
            f"Equal to the converted model for texts of a multiple of {shapes.multiple} tokens above {shapes.beyond}, "
            "without padding, outside training."
        ]

    def cautions(self, source: Converted) -> list[str]:
        return [
            f"At {self.shapes(source).beyond} tokens or fewer this class turns to full attention, and stays there for all "
            "later texts.",
            "In a padded text the last block of all is global in this class, even if it is padding, and in the converted "
            "model the last block that holds a token.",
        ]

    def imported_name(self, name: str, original: str | None = None) -> str:
        if self.head(name) not in HEADS:
            raise ValueError(
                f"{name} has a head that BERT has not: load the checkpoint as BigBirdModel, and import that."
            )
        return super().imported_name(name, original)

    def options_of(self, model: Any) -> dict[str, Any]:
        config = model.config
        for name, needed in (("attention_type", "block_sparse"), ("use_bias", True), ("rescale_embeddings", False)):
            if getattr(config, name) != needed:
                raise ValueError(f"{name}={getattr(config, name)!r}: BERT with bigbird can be {needed!r} alone.")
        if config.num_random_blocks < 1:
            raise ValueError(
                "num_random_blocks=0: BigBird's class can't run without any, so there is nothing to compare."
            )
        weight = 1.0 + config.num_random_blocks
        found = attention_config(
            "bigbird", block_size=config.block_size, num_random_blocks=0, first_block_weight=weight
        )
        return found.to_dict()

    def tensors(self, source: Converted) -> tuple[dict[str, Tensor], TensorReport]:
        found, report = super().tensors(source)
        if self.head(source.stock.__name__) in WITHOUT_POOLER:
            like, size = found["bert.embeddings.word_embeddings.weight"], source.config.hidden_size
            for name, shape in (("weight", (size, size)), ("bias", (size,))):
                found[f"bert.pooler.{name}"] = like.new_zeros(shape)
                origin = {"status": "initialised", "from": "zeros, which nothing reads", "shape": list(shape)}
                report[f"bert.pooler.{name}"] = origin
        return found, report

    def complete(self, config: PreTrainedConfig, tensors: dict[str, Tensor], theirs: Any) -> None:
        config.sep_token_id = theirs.config.sep_token_id
        if self.head(type(theirs).__name__) in WITHOUT_POOLER:
            for name in ("weight", "bias"):
                tensors.pop(f"bert.pooler.dense.{name}", None)


def _random_blocks(options: Any) -> int:
    return int(options.first_block_weight) - 1


def _refused_options(options: Any) -> list[str]:
    if options.mechanism != "bigbird":
        return [f"{options.mechanism} has no BigBird class: convert with bigbird, or use to='stock'"]
    if options.form != "itc":
        return [f"form={options.form!r}: a BigBird has no extra tokens, so convert with form='itc'"]
    weight = options.first_block_weight
    if options.num_random_blocks or weight != int(weight) or weight < 2:
        return [
            f"num_random_blocks={options.num_random_blocks} and first_block_weight={weight:g}: outside training a BigBird "
            "with r random blocks takes its first block for each of them, so convert with num_random_blocks=0 and "
            "first_block_weight=1 + r, with r ≥ 1"
        ]
    return []
