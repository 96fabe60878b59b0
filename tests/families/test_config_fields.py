"""Fields of a config that change attention are read by the family and by the host, or refused before weights are touched."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hf_efficient as he
from hf_efficient.families import families
from hf_efficient.families.config_fields import unread_fields
from hf_efficient.testing import tiny_model


@pytest.mark.parametrize(
    "model_type, field, value, remedy",
    [
        ("bert", "alibi", True, "grow with the distance"),
        ("bert", "attention_chunk_size", 16, "attention in chunks"),
        ("bert", "logits_soft_cap", 30.0, "attn_logit_softcapping alone"),
        ("bert", "position_embedding_type", "relative_key", "convert a checkpoint without them"),
        ("bert", "rope_parameters", {"rope_type": "yarn"}, "positions are not rotary; remove the field"),
        ("llama", "layer_types", ["full_attention", "chunked_attention"], "of its kinds only"),
        ("llama", "attn_logit_softcapping", 2.0, "the code of llama, .*: set it to None"),
        ("bert", "sliding_window", 8, "the code of bert, .*: set it to None"),
    ],
)
def test_a_field_that_nobody_reads_is_an_error_before_anything_changes(
    model_type: str, field: str, value: Any, remedy: str
):
    model = tiny_model(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    setattr(model.config, field, value)
    named = "chunked_attention" if field == "layer_types" else str(value)
    with pytest.raises(ValueError, match=rf"config\.{field}=.*{named}.* is not read by .*{remedy}"):
        he.convert(model, "local", attention_window=8, max_positions=256 if model_type == "bert" else None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    setattr(model.config, field, None)
    he.convert(model, "local", attention_window=8)


def test_what_a_family_says_it_reads_is_its_own_affair():
    config = tiny_model("bert").config
    config.alibi = True
    family = families()["bert"]
    assert unread_fields(family, config) and not unread_fields(dataclasses.replace(family, reads=("alibi",)), config)
