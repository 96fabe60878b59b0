"""Encoders of sound, behind convolutions: Whisper, with a decoder, and wav2vec 2.0 and its relatives.

A call brings samples or spectra, which are not tokens: attention runs on the frames that convolutions make of them, and a
mask of samples is one of frames by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hf_efficient.families.bart import BartFamily
from hf_efficient.families.base import ModelFamily, fill_linear
from hf_efficient.families.feed_forward import Dense
from hf_efficient.families.initialised import mark_initialised
from hf_efficient.families.positions import LongerInputs, NoPositions
from hf_efficient.families.sinusoids import SinusoidTable
from hf_efficient.families.stack import Stack

SOUND = ("input_features", "input_values")
"""What a call of such an encoder brings in place of tokens."""


@dataclass(frozen=True)
class WhisperPositions(SinusoidTable):
    """A table of sines and cosines in the encoder, a learned one in the decoder, which keeps its length.

    The encoder takes inputs of `max_source_positions` frames alone, padded with silence: one that was made to take longer
    sound wants all sound padded to that length, by a feature extractor with another `chunk_length`. So what it gives for
    short sound changes.
    """

    # the checkpoint holds it, so that what is missing there is missed
    kind: ClassVar[str] = "table"
    methods: ClassVar[dict[str, bool]] = dict.fromkeys(SinusoidTable.methods, False)
    fields: ClassVar[tuple[str, ...]] = ("max_source_positions",)

    def formula(self, stack: Stack, count: int, width: int) -> Tensor:
        # the modeling file takes long to import
        from transformers.models.whisper.modeling_whisper import sinusoids

        return sinusoids(count, width)

    def check(self, stack: Stack, wanted: LongerInputs) -> None:
        super().check(stack, wanted)
        if wanted.max_positions is not None and stack.side == "decoder":
            raise ValueError(
                f"max_positions={wanted.max_positions}: the decoder of {stack.module.config.model_type} keeps its "
                f"{self.length(stack)} positions, and only its encoder can be lengthened: convert with side='encoder'."
            )


class Wav2Vec2Family(ModelFamily):
    """The order of frames enters by a convolution, so that inputs of any length need nothing new."""

    def side(self, stack: Any) -> str:
        return "encoder"

    def feed_forward_name(self, layer: Any) -> str:
        return "feed_forward"

    def feed_forward_products(self, layer: Any) -> list[str]:
        return ["feed_forward.intermediate_dense", "feed_forward.output_dense"]

    def feed_forward(self, layer: Any) -> Dense:
        part = layer.feed_forward
        up, down = part.intermediate_dense, part.output_dense
        dropouts = dict(inner_dropout=part.intermediate_dropout.p, dropout=part.output_dropout.p)
        return Dense(up.weight.T, down.weight.T, up.bias, down.bias, part.intermediate_act_fn, **dropouts)

    def restore_feed_forward(self, layer: Any, dense: Dense, config: Any) -> None:
        kind = self.attention_classes[0].removesuffix("Attention") + "FeedForward"
        layer.feed_forward = part = getattr(self.modeling, kind)(config)
        fill_linear(part.intermediate_dense, dense.up.T, dense.up_bias)
        fill_linear(part.output_dense, dense.down.T, dense.down_bias)
        mark_initialised(part)


PREFIXES = {
    "hubert": "Hubert",
    "sew": "SEW",
    "unispeech": "UniSpeech",
    "unispeech-sat": "UniSpeechSat",
    "wav2vec2": "Wav2Vec2",
}
FAMILIES = (
    BartFamily(
        model_type="whisper",
        stack_classes=("WhisperEncoder", "WhisperDecoder"),
        attention_classes=("WhisperAttention",),
        projections=("q_proj", "k_proj", "v_proj"),
        positions=WhisperPositions("embed_positions"),
        scales_queries=True,
    ),
    *(
        Wav2Vec2Family(
            model_type=model_type,
            stack_classes=(f"{prefix}Model",),
            attention_classes=(f"{prefix}Attention",),
            projections=("q_proj", "k_proj", "v_proj"),
            positions=NoPositions(),
        )
        for model_type, prefix in PREFIXES.items()
    ),
    Wav2Vec2Family(
        model_type="data2vec-audio",
        module_name="data2vec.data2vec_audio",
        stack_classes=("Data2VecAudioModel",),
        attention_classes=("Data2VecAudioAttention",),
        model_classes=(
            "Data2VecAudioModel",
            *(
                f"Data2VecAudioFor{task}"
                for task in ("CTC", "SequenceClassification", "AudioFrameClassification", "XVector")
            ),
        ),
        projections=("q_proj", "k_proj", "v_proj"),
        positions=NoPositions(),
    ),
)
