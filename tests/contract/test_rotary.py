"""Rotary positions of what mechanisms project themselves: global rows, pooled keys, extra tokens."""

from __future__ import annotations

import dataclasses
import importlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import hf_efficient as he
from hf_efficient.attention.base.geometry import Rotary
from hf_efficient.attention.base.registry import attention_config, get_mechanism
from hf_efficient.families import HostModel
from hf_efficient.families.probe import probe_inputs, token_outputs
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.rotary import Rotation, side_by_side
from hf_efficient.testing import assert_close, tiny_model

LENGTH = 24
ALL_GLOBAL: dict[str, Any] = dict(attention_window=4, global_tokens=tuple(range(100)))
BESIDE_EXTRA_TOKENS: list[tuple[str, dict[str, Any]]] = [
    ("etc", dict(attention_window=100, num_global_tokens=2, sharing="qkv")),
    ("bigbird", dict(block_size=20, num_random_blocks=1, form="etc", num_global_tokens=2)),
]
FULL: list[tuple[str, dict[str, Any]]] = [
    ("longformer", ALL_GLOBAL),
    ("longformer", dict(attention_window=400, global_tokens="first")),
    ("longt5", dict(attention_window=4, global_block_size=1)),
]


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    for name, parameter in model.named_parameters():
        if name.endswith("global_logits"):
            parameter.fill_(-1e9)  # nothing looks at the extra tokens
    return token_outputs(model(**inputs))


@pytest.mark.parametrize("model_type", ["eurobert", "modernbert", "dinov3_vit"])
def test_full_attention_through_rotated_projections(model_type: str):
    """Rows of global tokens, blocks of one token and closed extra tokens are the source, wherever its positions start."""
    model, is_text = tiny_model(model_type), model_type != "dinov3_vit"
    inputs, layers = probe_inputs(model, LENGTH), [0] if model_type == "modernbert" else None
    cases = [(name, options | {"layers": layers}) for name, options in FULL if is_text or name == "longformer"]
    for side in ("right", "left") if is_text else ("none",):
        if side == "left":
            inputs["attention_mask"] = inputs["attention_mask"].flip(1)
        keep = inputs["attention_mask"] if is_text else None
        model.set_attn_implementation("eager")
        source = outputs(model, inputs)
        for name, options in cases + (BESIDE_EXTRA_TOKENS if is_text else []):
            with he.patch_attention(model, name, **options):
                actual = outputs(model, inputs)
                assert_close(actual, source, 1e-5, f"{name}, padding on the {side}", where=keep)
                if is_text and side == "left":
                    positions = torch.arange(7, 7 + LENGTH).expand(len(source), -1)
                    shifted = outputs(model, inputs | {"position_ids": positions})
                    assert_close(shifted, source, 1e-5, f"{name}, other positions", where=keep)


def test_adapters_reach_the_rotated_rows():
    model = tiny_model("eurobert")
    inputs = probe_inputs(model, LENGTH)
    he.convert(model, "longformer", attention_window=4, global_tokens="first")
    before = outputs(model, inputs)
    for name in ("query", "key", "value"):
        adapted: Any = get_peft_model(model, LoraConfig(target_modules=[f"{name}_global"], r=2))
        assert_close(outputs(adapted, inputs), before, 1e-5, where=inputs["attention_mask"])
        for part, parameter in adapted.named_parameters():
            if "lora_B" in part:
                torch.nn.init.normal_(parameter)
        changed = outputs(adapted, inputs)
        assert (changed - before).abs().max() > 1e-3, name
        model = adapted.merge_and_unload()
        assert_close(outputs(model, inputs), changed, 1e-5, where=inputs["attention_mask"])
        before = changed


def test_rows_with_norms_or_capped_logits_of_the_host_are_refused():
    host = HostModel.of(tiny_model("modernbert"))
    full, windowed = (host.family.geometry(host.stacks[0], layer) for layer in host.stacks[0].layers[:2])
    config = attention_config("longformer", attention_window=4, global_tokens="first")
    for geometry in (full, windowed):
        assert not config.attention_class.unsupported(config, geometry)
    for geometry, reason in (
        (dataclasses.replace(full, has_key_norm=True), "don't have the host's norms of queries and keys: use bigbird"),
        (dataclasses.replace(full, softcap=2.0), "longformer can't compute softcap=2.0"),
    ):
        assert reason in "".join(config.attention_class.unsupported(config, geometry))


def angles(positions: Tensor, dim: int) -> Tensor:
    return positions[..., None] * 100.0 ** (-torch.arange(dim // 2) * 2 / dim)


@pytest.mark.parametrize(
    "model_type, dim, interleaved", [("eurobert", 8, False), ("gpt_neox", 4, False), ("cohere", 8, True)]
)
def test_the_rotation_is_that_of_the_host(model_type: str, dim: int, interleaved: bool):
    theirs = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}").apply_rotary_pos_emb
    query, key = torch.randn(2, 2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    half = angles(torch.arange(9.0)[None], dim)
    whole = half.repeat_interleave(2, dim=-1) if interleaved else torch.cat([half, half], dim=-1)
    options: Any = dict(dim=dim, interleaved=interleaved)
    made = side_by_side(whole.cos(), whole.sin(), rows=2, **options)
    assert torch.equal(made, side_by_side(half.cos()[0], half.sin()[0], rows=2, **options))
    for x, expected in zip((query, key), theirs(query, key, whole.cos(), whole.sin()), strict=True):
        assert_close(Rotation(made, interleaved)(x), expected, 1e-6)
    with pytest.raises(ValueError, match=rf"are not \(batch, tokens, {dim}\)"):
        side_by_side(whole.cos()[..., :1], whole.sin()[..., :1], rows=2, **options)


def test_pooled_keys_stand_at_the_mean_position_of_their_tokens():
    """A padded row, and blocks of an even and an odd number of tokens."""
    model = tiny_model("eurobert")
    host = HostModel.of(model)
    geometry = host.family.geometry(host.stacks[0], host.stacks[0].layers[0])
    dim = geometry.head_dim
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 14, geometry.hidden_size, generator=generator)
    key = torch.randn(geometry.hidden_size, geometry.num_heads * dim, generator=generator)
    keep = torch.ones(2, 14, dtype=torch.bool)
    keep[1, 9:] = False  # blocks of 4 and 5

    def project(x: Tensor) -> tuple[Tensor, Tensor]:
        return (made := (x @ key).unflatten(-1, (-1, dim)).transpose(1, 2)), made

    config = attention_config("longt5", attention_window=2, global_block_size=4)
    mechanism: Any = get_mechanism("longt5")(config, dataclasses.replace(geometry, rotary=Rotary(dim)))
    whole = angles(torch.arange(14.0)[None], dim).repeat(1, 1, 2)
    cos_sin = side_by_side(1.5 * whole.cos(), 1.5 * whole.sin(), dim=dim, interleaved=False, rows=2)
    context = AttentionContext(
        is_causal=False, scaling=1.0, key_padding_mask=keep, hidden_states=hidden, cos_sin=cos_sin, project=project
    )
    query = torch.zeros(2, geometry.num_heads, 14, dim)
    found = mechanism._global_keys(query, context)
    for row, ends in enumerate(([0, 4, 8, 14], [0, 4, 9])):
        for slot, (start, end) in enumerate(pairwise(ends)):
            content, _ = project(hidden[row : row + 1, start:end].mean(1, keepdim=True))
            turned = angles(torch.tensor([[(start + end - 1) / 2]]), dim).repeat(1, 1, 2)
            at = Rotation(torch.cat([1.5 * turned.cos(), 1.5 * turned.sin()], dim=-1))
            assert_close(found.key[row : row + 1, :, slot : slot + 1], at(content), 1e-5, f"row {row}, slot {slot}")
