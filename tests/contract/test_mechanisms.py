"""Every mechanism on a host with a position table, on a rotary encoder and on a rotary decoder, both with grouped heads."""

from __future__ import annotations

import dataclasses
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CASES

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_config, get_mechanism
from hf_efficient.families import HostModel
from hf_efficient.patching.call_checks import PART
from hf_efficient.patching.hooks import state_of
from hf_efficient.testing import assert_close, inputs_for, tiny_model

LENGTH = 24


@cache
def host(model_type: str) -> SimpleNamespace:
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    inputs = inputs_for(model, length=LENGTH)
    with torch.no_grad():
        expected = model(**inputs).logits
    found = HostModel.of(model)
    geometry = found.family.geometry(found.stacks[0], found.stacks[0].layers[0])
    return SimpleNamespace(model=model, inputs=inputs, expected=expected, geometry=geometry)


@pytest.mark.parametrize("model_type", ["bert", "eurobert", "llama"])
@pytest.mark.parametrize("name", he.list_mechanisms())
def test_exact_limit_or_a_reason(name: str, model_type: str):
    made, mechanism = host(model_type), get_mechanism(name)
    default = attention_config(name).for_length(LENGTH)
    if any(field.name == "max_length" for field in dataclasses.fields(default)):
        default = dataclasses.replace(default, max_length=None if model_type == "bert" else LENGTH)
    exact = mechanism.exact_config(default, made.geometry, LENGTH)
    config = default if exact is None else exact
    if reasons := mechanism.unsupported(config, made.geometry):
        with pytest.raises(ValueError) as refused, he.patch_attention(made.model, config):
            pass
        assert all(": " in reason and reason in str(refused.value) for reason in reasons)
        return
    with he.patch_attention(made.model, config), torch.no_grad():
        actual = made.model(**made.inputs).logits
    keep = made.inputs["attention_mask"]
    if exact is None:
        assert actual.isfinite().all() and not torch.allclose(actual, made.expected)
    else:
        assert_close(actual, made.expected, 1e-5, where=keep)


# mechanisms that can't be there, with any options of their cases
EVERYWHERE = {"cosformer", "funnel", "set_transformer"}
REFUSED = {
    "eurobert": EVERYWHERE | {"compressive", "transformer_xl"},
    "llama": EVERYWHERE | {"clustered", "etc", "linformer", "longt5", "nystromformer"},
}


@pytest.mark.parametrize("model_type", REFUSED)
@pytest.mark.parametrize("name", CASES)
def test_left_padding_is_invisible_under_rotary_positions(name: str, model_type: str):
    """A row padded on the left gives what it gives alone: its rotations count from its first real token."""
    made, padding, case = host(model_type), 6, CASES[name]
    ids = made.inputs["input_ids"][:1]
    mask = torch.ones(1, padding + LENGTH, dtype=torch.long)
    mask[:, :padding] = 0
    padded = torch.cat([torch.full((1, padding), 1), ids], 1)
    ran = 0
    for options in (case.small, *case.variants):
        known = {field.name for field in dataclasses.fields(attention_config(name))}
        options = options | ({"max_length": 64} if "max_length" in known else {})
        try:
            handle = he.patch_attention(made.model, name, **options)
        except ValueError as error:
            assert "these settings are not possible" in str(error)
            continue
        with handle, torch.no_grad():
            alone = made.model(input_ids=ids).logits
            actual = made.model(input_ids=padded, attention_mask=mask).logits[:, padding:]
        assert_close(actual, alone, 1e-4, str(options))
        ran += 1
    assert (ran == 0) == (name in REFUSED[model_type])


def test_left_padding_is_refused_where_a_model_takes_no_positions():
    made = host("eurobert")
    right = torch.ones(1, LENGTH, dtype=torch.long)
    right[:, -5:] = 0
    ids = made.inputs["input_ids"][:1]
    for name, is_refused in (("performer", True), ("local", False)):
        with he.patch_attention(made.model, name), torch.no_grad():
            for module in made.model.modules():
                if (info := state_of(module, PART)) is not None:
                    info.parameters = [p if p != "position_ids" else "none" for p in info.parameters]
            made.model(input_ids=ids, attention_mask=right)
            if is_refused:
                with pytest.raises(ValueError, match=r"pads rows on the left, .* pad on the right"):
                    made.model(input_ids=ids, attention_mask=right.flip(1))
            else:
                made.model(input_ids=ids, attention_mask=right.flip(1))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("set_transformer", {}, "set_transformer can't carry rotary positions: .* use linformer"),
        ("cosformer", {"max_length": LENGTH}, "cosformer can't carry rotary positions: .* use hedgehog"),
        ("funnel", {"blocks": (1, 1)}, "funnel can't carry rotary positions: .* use linformer"),
        ("etc", {"num_global_tokens": 2, "sharing": "kv"}, "don't follow rotary positions: use sharing='qkv'"),
        ("etc", {"num_global_tokens": 2, "relative_labels": 2}, "use sharing='qkv' and relative_labels=0"),
    ],
)
def test_what_rotary_encoders_refuse(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message), he.patch_attention(host("eurobert").model, name, **options):
        pass


def test_a_mask_of_global_tokens_is_refused_in_rotary_encoders():
    made = host("eurobert")
    with (
        he.patch_attention(made.model, "longformer", attention_window=8),
        pytest.raises(ValueError, match="rotary positions"),
    ):
        made.model(**made.inputs, global_attention_mask=torch.ones_like(made.inputs["input_ids"]))


def test_pretrained_heads_of_a_group_are_repeated():
    made = host("llama")
    found = HostModel.of(made.model)
    stack = found.stacks[0]
    weights = found.family.pretrained(stack, stack.layers[0])
    groups = made.geometry.num_heads // made.geometry.num_key_value_heads
    width = made.geometry.head_dim
    for narrow, wide in ((stack.layers[0].module.k_proj, weights.key), (stack.layers[0].module.v_proj, weights.value)):
        rows: Any = narrow.weight.unflatten(0, (-1, width))
        actual = wide.weight.unflatten(0, (-1, width))
        assert len(actual) == made.geometry.num_heads > len(rows)
        assert all(torch.equal(actual[h], rows[h // groups]) for h in range(len(actual)))
