"""transformers' LED classes from BART with `longformer` or `local` in the encoder, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BartConfig, LEDConfig, PreTrainedConfig

from hf_efficient.exporting.longformer import LongformerTarget
from hf_efficient.exporting.names import Names
from hf_efficient.exporting.target import Converted, Shapes, TensorReport, shared_values

INSIDE = (
    *(
        (f"{ours}_proj.*", f"longformer_self_attn.{theirs}.*")
        for ours, theirs in zip("qkv", ("query", "key", "value"), strict=True)
    ),
    ("out_proj.*", "output.*"),
    ("efficient.*", "longformer_self_attn.*"),
)
LAYER = "{}encoder.layers.*.self_attn.{}"
POSITIONS = "embed_positions.weight"
OFFSET = 2
"""Rows of BART's position tables in front of that of the first token."""


class LEDTarget(LongformerTarget):
    """`LED…` of the same head: a Longformer in the encoder, full attention in the decoder."""

    name = "led"
    prefix = "LED"
    stocks: ClassVar[Mapping[str, str]] = {"bart": "Bart"}
    heads: ClassVar[tuple[str, ...]] = ("Model", "ForConditionalGeneration", "ForQuestionAnswering")
    marking: ClassVar[tuple[str, ...]] = ()
    rules: ClassVar[Mapping[str, str]] = {}

    def names(self, stock_name: str, mechanism: str) -> Names:
        pairs = [
            (LAYER.format(ours, inside), LAYER.format(theirs, their_inside))
            for ours, theirs in (("model.", "led."), ("", ""))
            for inside, their_inside in INSIDE
        ]
        return Names((*pairs, ("model.*", "led.*")))

    def refusals(self, source: Converted) -> list[str]:
        reasons = self._refused_class(source)
        if reasons or source.host.stacks[0].side != "encoder":
            return reasons
        if any(source.mechanisms("decoder")):
            reasons.append(
                "the decoder is converted, and that of an LED has full attention: convert with side='encoder'"
            )
        if source.config.scale_embedding:
            reasons.append("scale_embedding=True: an LED does not scale its embeddings; use to='stock'")
        reasons += self._refused_attention(source)
        return reasons or self._refused_window(source)

    def _refused_window(self, source: Converted) -> list[str]:
        window, positions = self._room(source)
        if window <= positions:
            return []
        return [
            f"attention_window={window}: an LED pads every text to whole windows, and its encoder has {positions} "
            f"positions; convert with an attention_window of at most {positions}, or with max_positions={window} or more"
        ]

    def _room(self, source: Converted) -> tuple[int, int]:
        """Tokens of the largest window, and positions of the encoder."""
        lengths: Any = source.host.lengths
        return max(self._windows(source)), lengths["encoder"]

    def config_for(self, source: Converted) -> PreTrainedConfig:
        config = LEDConfig(**shared_values(source.config, LEDConfig))
        if config.id2label == BartConfig().id2label:  # nobody's choice: BART has three classes unasked
            config.id2label, config.label2id = LEDConfig().id2label, LEDConfig().label2id
        config.attention_window = self._windows(source)
        lengths: Any = source.host.lengths
        config.max_encoder_position_embeddings = lengths["encoder"]
        config.max_decoder_position_embeddings = lengths["decoder"]
        return config

    def tensors(self, source: Converted) -> tuple[dict[str, Tensor], TensorReport]:
        found, report = super().tensors(source)
        for name in [name for name in found if name.endswith(POSITIONS)]:
            found[name] = found[name][OFFSET:]
            report[name] |= {"shape": list(found[name].shape)}
            report[name]["from"] += f", without its first {OFFSET} rows, which no token has"
        return found, report

    def options_of(self, model: Any) -> dict[str, Any]:
        return super().options_of(model) | {"side": "encoder"}

    def complete(self, config: PreTrainedConfig, tensors: dict[str, Tensor], theirs: Any) -> None:
        self._drop_copies(config, tensors)
        for name in [name for name in tensors if name.endswith(POSITIONS)]:
            tensors[name] = torch.cat([tensors[name][:1].expand(OFFSET, -1), tensors[name]])
        lengths = {side: getattr(theirs.config, f"max_{side}_position_embeddings") for side in ("encoder", "decoder")}
        config.max_position_embeddings = lengths["encoder"]
        if lengths["encoder"] != lengths["decoder"]:
            config.efficient_positions = lengths

    # ---- calls ---------------------------------------------------------------------------------------------------

    def shapes(self, source: Converted) -> Shapes:
        window, positions = self._room(source)
        return Shapes(most=positions // window * window)

    def cautions(self, source: Converted) -> list[str]:
        found, (window, positions) = self._must_mark(source), self._room(source)
        if positions % window:
            found.append(
                f"Give texts of at most {positions // window * window} tokens: this class pads every text to whole windows "
                f"of {window}, and its encoder has {positions} positions."
            )
        return found
