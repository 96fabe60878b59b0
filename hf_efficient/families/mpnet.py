"""MPNet: BERT with positions twice, in a table and as a learned bias over offsets, and attention code of its own."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hf_efficient.families.bert import IDS, TABLE, BertFamily, bert_like
from hf_efficient.families.positions import TableAfterPadding
from hf_efficient.families.stack import AttentionLayer, Stack
from hf_efficient.ops.relative_bias import RelativeBias


def _swaps() -> Any:
    """The classes that attention is swapped to; importing them imports the modeling file."""
    return importlib.import_module("hf_efficient.families.swaps.mpnet")


@dataclass(frozen=True)
class MPNetPositions(TableAfterPadding):
    """The host counts from row 2, whatever its config says of padding."""

    def offset(self, config: Any) -> int:
        return 2


class MPNetFamily(BertFamily):
    """The host computes attention itself and hands its layers no keywords, so classes are swapped as T5's are."""

    has_relative_bias = True
    positions_skip_padding = True
    hands_on_keywords = False

    def relative_bias(self, stack: Stack, layer: AttentionLayer) -> RelativeBias | None:
        encoder: Any = stack.module.get_submodule("encoder")
        swaps = _swaps()
        with torch.no_grad():
            return RelativeBias(partial(swaps.table, encoder), encoder.relative_position_bucket, swaps.MAX_DISTANCE)

    def swap_in(self, stack: Stack) -> None:
        swaps: Any = _swaps()
        encoder: Any = stack.module.get_submodule("encoder")
        encoder.__class__ = swaps.LazyBiasMPNetEncoder
        for layer in stack.layers:
            module: Any = layer.module
            module.__class__, module.config = swaps.DispatchedMPNetSelfAttention, stack.module.config

    def swap_out(self, stack: Stack) -> None:
        encoder: Any = stack.module.get_submodule("encoder")
        encoder.__class__ = self.modeling.MPNetEncoder
        for layer in stack.layers:
            layer.module.__class__ = self.modeling.MPNetSelfAttention
            layer.module.__dict__.pop("config", None)


FAMILIES = (
    bert_like(MPNetFamily, "mpnet", "MPNet", projections=("q", "k", "v"), positions=MPNetPositions(TABLE, (IDS,))),
)
