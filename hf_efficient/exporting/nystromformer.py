"""transformers' Nyströmformer classes from BERT with `nystromformer`, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import NystromformerConfig, PreTrainedConfig, PreTrainedModel

from hf_efficient.attention.base.registry import attention_config
from hf_efficient.exporting.names import Names
from hf_efficient.exporting.target import ClassTarget, Converted, Shapes, TensorReport, shared_values
from hf_efficient.patching.names import MODULE_NAME

HEADS = ("Model", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")
ITERATIONS = 6
LAYER = "encoder.layer.*.attention.self."
OURS, THEIRS = f"{LAYER}{MODULE_NAME}.convolution", f"{LAYER}conv.weight"
NAMES = Names(((f"bert.{OURS}", f"nystromformer.{THEIRS}"), ("bert.*", "nystromformer.*"), (OURS, THEIRS)))
POSITIONS = "position_embeddings.weight"
FRONT = 2
"""Rows of their position table in front of that of the first token."""
LENGTH = "segment_means_seq_len"


class NystromformerTarget(ClassTarget):
    """`Nystromformer…` of the same head, for texts of one length; it equals the source with `pinv_init="batch"`."""

    name = "nystromformer"
    prefix = "Nystromformer"
    stocks: ClassVar[Mapping[str, str]] = {"bert": "Bert"}
    has_distance = True

    def names(self, stock_name: str, mechanism: str) -> Names:
        return NAMES

    def keywords(self, source: Any) -> dict[str, bool]:
        return {}

    def imported_keywords(self, theirs: Any) -> dict[str, bool]:
        return {"add_pooling_layer": False} if self.head(type(theirs).__name__) == "Model" else {}

    # ---- what can't be said there --------------------------------------------------------------------------------

    def refusals(self, source: Converted) -> list[str]:
        if source.stock_type not in self.stocks:
            return [f"{source.stock_type} has no Nystromformer class, which bert has: to='stock' takes any model"]
        reasons, head = [], self.head(source.stock.__name__)
        if head not in HEADS:
            reasons.append(
                f"no Nystromformer class has the head of Bert{head}: load the checkpoint as one of {', '.join(HEADS)}"
            )
        if head == "Model" and source.model.pooler is not None:
            reasons.append(
                "NystromformerModel has no pooler: convert BertModel.from_pretrained(…, add_pooling_layer=False)"
            )
        if getattr(source.config, "is_decoder", False):
            return [*reasons, "is_decoder=True: a Nystromformer looks both ways; convert with is_decoder=False"]
        found: list[Any] = source.mechanisms("encoder")
        exact = [i for i, one in enumerate(found) if one is None]
        if exact:
            return [*reasons, f"layers {exact} keep full attention, as no layer there does: convert all layers"]
        if any(replace(one, layers=None) != replace(found[0], layers=None) for one in found):
            return [
                *reasons,
                "layers differ, and all layers there have the same options: convert all with nystromformer",
            ]
        return reasons + _refused_options(found[0])

    # ---- config and tensors --------------------------------------------------------------------------------------

    def config_for(self, source: Converted) -> PreTrainedConfig:
        config = NystromformerConfig(**shared_values(source.config, NystromformerConfig))
        config.segment_means_seq_len = _length(source)
        config.num_landmarks = _length(source) if _is_full(source) else source.first.num_landmarks
        config.conv_kernel_size = source.first.conv_kernel_size
        return config

    def tensors(self, source: Converted) -> tuple[dict[str, Tensor], TensorReport]:
        found, report = super().tensors(source)
        for name, tensor in list(found.items()):
            if name.endswith(POSITIONS):
                found[name] = torch.cat([tensor[:1].expand(FRONT, -1), tensor])
                report[name] |= {"status": "extended", "shape": list(found[name].shape)}
                report[name]["from"] += f", after {FRONT} rows that no token has"
            elif name.endswith(".conv.weight"):
                found[name] = tensor[:, None, :, None]
                report[name]["shape"] = list(found[name].shape)
        return found, report

    def options_of(self, model: Any) -> dict[str, Any]:
        config = model.config
        count, length, size = config.num_landmarks, config.segment_means_seq_len, config.conv_kernel_size
        if length % count:
            raise ValueError(f"{LENGTH}={length} is no multiple of num_landmarks={count}, which their class needs.")
        # num_landmarks = segment_means_seq_len means full attention there, at every length
        count = config.max_position_embeddings if count == length else count
        found = attention_config("nystromformer", num_landmarks=count, conv_kernel_size=size, pinv_init="batch")
        return found.to_dict()

    def keeps(self, attention: list[dict[str, Any]], theirs: Any) -> bool:
        return False  # `pinv_init` says which class it came from

    def complete(self, config: PreTrainedConfig, tensors: dict[str, Tensor], theirs: Any) -> None:
        if "import" in getattr(config, "efficient_source", {}):
            config.efficient_source |= {LENGTH: theirs.config.segment_means_seq_len}
        for name, tensor in list(tensors.items()):
            if name.endswith(POSITIONS):
                tensors[name] = tensor[FRONT:]
            elif name.endswith(".convolution"):
                tensors[name] = tensor[:, 0, :, 0]

    # ---- calls ---------------------------------------------------------------------------------------------------

    def shapes(self, source: Converted) -> Shapes:
        return Shapes(length=None if _is_full(source) else _length(source), padding=False)

    def expected(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return _scaled_by_the_batch(model)

    def conditions(self, source: Converted) -> list[str]:
        if _is_full(source):
            return ["Equal to the converted model, which has full attention at all its lengths, without padding."]
        return [
            f"Equal to the converted model with pinv_init='batch' for texts of exactly {_length(source)} tokens, without "
            "padding. This class scales the start of its pseudo-inverse by all rows and heads of a batch; the table has the "
            "distance to the converted model, in which rows do not depend on others."
        ]

    def cautions(self, source: Converted) -> list[str]:
        if _is_full(source):
            return ["Give texts without padding: the convolution of this class reads padding as well."]
        return [
            f"Give texts of exactly {_length(source)} tokens without padding: this class takes no other length, and fails "
            "with padding."
        ]


def _is_full(source: Converted) -> bool:
    most = source.host.max_positions
    return most is not None and bool(source.first.num_landmarks >= most)


def _length(source: Converted) -> int:
    """Tokens of the texts of the result: as in the checkpoint that was imported, else the most."""
    stored: int | None = getattr(source.config, "efficient_source", {}).get(LENGTH)
    count, most = source.first.num_landmarks, source.host.max_positions
    return stored or (count if _is_full(source) else most // count * count)


def _refused_options(options: Any) -> list[str]:
    if options.mechanism != "nystromformer":
        return [f"{options.mechanism} has no Nystromformer class: convert with nystromformer, or use to='stock'"]
    reasons = []
    if options.conv_kernel_size is None:
        reasons.append("conv_kernel_size=None: there is always a convolution; convert with an odd conv_kernel_size")
    if options.pinv_iterations not in (None, ITERATIONS):
        reasons.append(
            f"pinv_iterations={options.pinv_iterations}: this class takes {ITERATIONS}, so convert with None or that"
        )
    return reasons


@contextmanager
def _scaled_by_the_batch(model: nn.Module) -> Iterator[None]:
    mechanisms: list[Any] = [module for name, module in model.named_modules() if name.split(".")[-1] == MODULE_NAME]
    before = [mechanism.config for mechanism in mechanisms]
    for mechanism, config in zip(mechanisms, before, strict=True):
        mechanism.config = replace(config, pinv_init="batch")
    try:
        yield
    finally:
        for mechanism, config in zip(mechanisms, before, strict=True):
            mechanism.config = config
