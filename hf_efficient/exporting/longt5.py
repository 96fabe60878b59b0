"""transformers' LongT5 classes from T5 and mT5 with `local` or `longt5` in the encoder, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from transformers import LongT5Config, PreTrainedConfig

from hf_efficient.attention.base.registry import attention_config
from hf_efficient.exporting.names import Names
from hf_efficient.exporting.target import ClassTarget, Converted, TensorReport, shared_values
from hf_efficient.families import efficient_type

HEADS = ("Model", "ForConditionalGeneration", "EncoderModel")
LAYER = "encoder.block.*.layer.0."
LOCAL, GLOBAL = "LocalSelfAttention", "TransientGlobalSelfAttention"
PAIRS = (
    (f"{LAYER}SelfAttention.efficient.slot_weight", f"{LAYER}{GLOBAL}.global_input_layer_norm.weight"),
    (f"{LAYER}SelfAttention.efficient.slot_bias", f"{LAYER}{GLOBAL}.global_relative_attention_bias.weight"),
)
SLOT_BIAS = "encoder.block.{}.layer.0.SelfAttention.efficient.slot_bias"
BIAS = re.compile(r"encoder\.block\.(\d+)\..*\.slot_bias")


class LongT5Target(ClassTarget):
    """`LongT5…` of the same head; the decoder stays as it is."""

    name = "longt5"
    tolerance = 1e-4  # logits are not scaled
    prefix = "LongT5"
    stocks: ClassVar[Mapping[str, str]] = {"t5": "T5", "mt5": "MT5"}

    def names(self, stock_name: str, mechanism: str) -> Names:
        kind = LOCAL if mechanism == "local" else GLOBAL
        return Names((*PAIRS, (f"{LAYER}SelfAttention.*", f"{LAYER}{kind}.*")))

    def refusals(self, source: Converted) -> list[str]:
        kind, head = source.stock_type, self.head(source.stock.__name__)
        if kind not in self.stocks:
            why = (
                "has a relative bias of its own in every layer, and LongT5 one for all"
                if kind == "umt5"
                else "is no T5"
            )
            return [f"{kind} {why}; {' and '.join(self.stocks)} have this class: to='stock' takes any model"]
        reasons = self._refused_attention(source)
        if head not in HEADS:
            reasons.append(f"there is no LongT5{head}: load the checkpoint as one of {', '.join(HEADS)} and save it")
        return reasons

    def _refused_attention(self, source: Converted) -> list[str]:
        reasons = []
        if any(source.mechanisms("decoder")):
            reasons.append(
                "the decoder is converted, and that of a LongT5 has full attention: convert with side='encoder'"
            )
        found = source.mechanisms("encoder")
        exact = [i for i, one in enumerate(found) if one is None]
        if exact:
            everywhere = "convert all layers" if len(exact) < len(found) else "convert with side='encoder'"
            return [
                *reasons,
                f"encoder layers {exact} keep full attention, which no layer of a LongT5 has: {everywhere}",
            ]
        options: Any = found[0]
        if any(one is None or replace(one, layers=None) != replace(options, layers=None) for one in found):
            kinds = dict.fromkeys(one.mechanism for one in found if one is not None)
            return [
                *reasons,
                f"layers differ ({', '.join(kinds)}): all layers of a LongT5 have the same options; convert the whole "
                "encoder with local or with longt5",
            ]
        if options.mechanism not in ("local", "longt5"):
            return [
                *reasons,
                f"{options.mechanism} has no LongT5 class: convert with longt5 or local, or use to='stock'",
            ]
        return reasons + _refused_options(options)

    def config_for(self, source: Converted) -> PreTrainedConfig:
        options = source.first
        config = LongT5Config(**shared_values(source.config, LongT5Config))
        config.local_radius = options.attention_window // 2
        config.encoder_attention_type = "local"
        if options.mechanism == "longt5":
            config.encoder_attention_type = "transient-global"
            config.global_block_size = options.global_block_size
        # mT5 never scales
        config.scale_decoder_outputs = source.stock_type == "t5" and source.config.scale_decoder_outputs
        return config

    def tensors(self, source: Converted) -> tuple[dict[str, Tensor], TensorReport]:
        found, report = super().tensors(source)
        # one table serves all layers, and their class has it in the first
        for name in [name for name, origin in report.items() if _is_copy(origin["from"])]:
            del found[name], report[name]
        return found, report

    def options_of(self, model: Any) -> dict[str, Any]:
        config, window = model.config, 2 * model.config.local_radius
        if config.encoder_attention_type == "local":
            return attention_config("local", attention_window=window, side="encoder").to_dict()
        size = config.global_block_size
        found = attention_config(
            "longt5", attention_window=window, global_block_size=size, pooling="rms", log_count=False, side="encoder"
        )
        return found.to_dict()

    def complete(self, config: PreTrainedConfig, tensors: dict[str, Tensor], theirs: Any) -> None:
        if config.model_type == efficient_type("t5"):
            config.scale_decoder_outputs = theirs.config.scale_decoder_outputs
        first = SLOT_BIAS.format(0)
        if first in tensors:
            tensors |= {SLOT_BIAS.format(layer): tensors[first] for layer in range(config.num_layers)}

    def conditions(self, source: Converted) -> list[str]:
        return ["Equal to the converted model for texts of any length."]

    def cautions(self, source: Converted) -> list[str]:
        if source.first.mechanism == "local":
            return []
        return [
            "Pad on the right: a LongT5 counts its blocks from the left edge, and the converted model from each row's first "
            "token."
        ]


def _refused_options(options: Any) -> list[str]:
    reasons = []
    if getattr(options, "dilation", 1) != 1:
        reasons.append(f"dilation={options.dilation}: a LongT5 has none, so convert with dilation=1")
    if getattr(options, "sink_tokens", 0):
        reasons.append(f"sink_tokens={options.sink_tokens}: a LongT5 has none, so convert with sink_tokens=0")
    if options.mechanism == "longt5" and (options.pooling != "rms" or options.log_count):
        reasons.append(
            f"pooling={options.pooling!r} and log_count={options.log_count} are not those of LongT5's class: convert with "
            "pooling='rms', log_count=False"
        )
    return reasons


def _is_copy(name: str) -> bool:
    found = BIAS.fullmatch(name)
    return found is not None and found.group(1) != "0"
