"""Tiny models with sparse experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_efficient as he
from hf_efficient.experts.layer import expert_layers
from hf_efficient.testing import FAMILIES, tiny_model

KINDS = [(family, {}) for family in FAMILIES] + [("t5", {"feed_forward_proj": "gated-gelu"})]
each_kind = pytest.mark.parametrize(("family", "options"), KINDS, ids=[*FAMILIES, "t5-gated"])


def labels_for(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    ids = inputs["decoder_input_ids"] if model.config.is_encoder_decoder else inputs["input_ids"]
    return ids.masked_fill(inputs["attention_mask"] == 0, -100)


def upcycled(family: str = "bert", experts: int = 4, apart: float = 0.0, **options: Any) -> Any:
    """A tiny model with experts, which differ by noise of size `apart`, in eval mode."""
    sizes = options.pop("sizes", {})
    model = he.upcycle(tiny_model(family, **sizes), experts, **options).model
    with torch.no_grad():
        for part in expert_layers(model).values():
            for parameter in part.parameters(recurse=False):
                parameter.add_(apart * torch.randn_like(parameter))
            if apart:
                part.router.weight.mul_(20)
    return model
