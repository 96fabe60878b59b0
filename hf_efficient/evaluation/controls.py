"""Controls of a fidelity figure: what a model reaches without attention, or without what a mechanism learns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.mechanism import EfficientAttention, EfficientAttentionConfig
from hf_efficient.attention.base.registry import attention_configs
from hf_efficient.evaluation.fidelity import compare
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.dense import exact_attention
from hf_efficient.ops.grouped_heads import expand_heads
from hf_efficient.patching.temporary import patch_attention


class MeanOfValues(EfficientAttention):
    """Control: every visible value counts the same, `y_i = mean of v_j`; a mechanism must be closer than this.

    What is added to logits or caps them has no effect on equal ones; sinks and dropout are left out of the mean; a window of
    the host's holds. Without one the mean is a sum, O(N), so that its time is what a model takes without attention.
    """

    grouped_heads = True

    @classmethod
    def honours_sliding_window(cls, config: Any, geometry: AttentionGeometry) -> bool:
        return True

    @classmethod
    def honours_softcap(cls, config: Any, geometry: AttentionGeometry) -> bool:
        return True

    @classmethod
    def honours_sinks(cls, config: Any, geometry: AttentionGeometry) -> bool:
        return True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        if self.geometry.sliding_window is not None:
            equal = dataclasses.replace(context, relative_bias=None, softcap=None, sinks=None)
            return exact_attention(torch.zeros_like(query), key, value, equal, self.geometry.sliding_window)
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        keep = torch.ones_like(wide[:1, :1, :, :1])
        if context.key_padding_mask is not None:
            keep = context.key_padding_mask[:, None, :, None].to(wide.dtype)
        if context.is_causal:
            n = query.shape[2]
            total, count = (wide * keep).cumsum(2)[:, :, -n:], keep.cumsum(2)[:, :, -n:]
        else:
            total, count = (wide * keep).sum(2, keepdim=True), keep.sum(2, keepdim=True)
        mean = (total / count.clamp(min=1)).to(value.dtype)
        return expand_heads(query, mean)[0].expand_as(query)


@dataclass(frozen=True, kw_only=True)
class MeanOfValuesConfig(EfficientAttentionConfig):
    """Options of the control: none of its own."""

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        # as of one feature, which is the same for all keys
        return 1.0


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
