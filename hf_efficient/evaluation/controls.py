"""Controls of a fidelity figure: what a model reaches without attention, or without what a mechanism learns."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient.attention.base.mechanism import EfficientAttention, EfficientAttentionConfig
from hf_efficient.attention.base.registry import attention_configs
from hf_efficient.evaluation.fidelity import compare
from hf_efficient.ops.context import AttentionContext
from hf_efficient.patching.temporary import patch_attention


class MeanOfValues(EfficientAttention):
    """Control: every visible value counts the same, `y_i = mean of v_j`; a mechanism must be closer than this."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        keep = torch.ones_like(value[..., :1])
        if context.key_padding_mask is not None:
            keep = keep * context.key_padding_mask[:, None, :, None]
        n = query.shape[2]
        if context.is_causal:
            total, count = (value * keep).cumsum(2)[:, :, -n:], keep.cumsum(2)[:, :, -n:]
        else:
            total, count = (value * keep).sum(2, keepdim=True), keep.sum(2, keepdim=True)
        return (total / count.clamp(min=1)).expand_as(query)


@dataclass(frozen=True, kw_only=True)
class MeanOfValuesConfig(EfficientAttentionConfig):
    """Options of the control: none of its own."""


MeanOfValues.Config = MeanOfValuesConfig
MeanOfValuesConfig.attention_class = MeanOfValues


def controls(model: Any) -> dict[str, list[EfficientAttentionConfig]]:
    """{name: settings} of what a converted model must be better than: `"mean of values"`, and `"window only"` where every
    mechanism of it has a `control_config`."""
    converted = attention_configs(model.config.efficient_attention)
    found: dict[str, list[EfficientAttentionConfig]] = {
        "mean of values": [MeanOfValuesConfig(layers=c.layers, side=c.side) for c in converted]
    }
    unlearned = [c.attention_class.control_config(c) for c in converted]
    if all(unlearned):
        found["window only"] = [c for c in unlearned if c is not None]
    return found


def control_figures(
    model: Any, source: PreTrainedModel, batches: Iterable[dict[str, Tensor]], control: str = "mean of values"
) -> dict[str, Any]:
    """`compare` for the source with one of the `controls` of `model` in the layers that `model` converted."""
    plain = copy.deepcopy(source)
    with patch_attention(plain, controls(model)[control]):
        return compare(plain, source, batches)
