"""Decoders through the whole pipeline: hybrids, attention transfer, pretraining with adapters, generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoders import prompts, save_decoder, tiny_decoder
from pretraining import arguments, dataset, recipe, result

import hf_efficient as he
from hf_efficient.conversion import load_converted, load_stock
from hf_efficient.patching.exact import converted_layers, exact_attention
from hf_efficient.testing import assert_close, inputs_for
from hf_efficient.training import AttentionTransfer, trainable

HYBRID = '{"mechanism": "local", "attention_window": 8, "layers": [1]}'
# what the config brings: windows, in every other layer or in all, and capped logits
HOSTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": dict(sliding_window=10, layer_types=["sliding_attention", "full_attention"], attn_logit_softcapping=2.0),
    "mistral": dict(sliding_window=10),
}
PROJECTIONS = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")


@pytest.mark.parametrize("model_type", HOSTS)
def test_recovery_with_adapters(model_type: str, tmp_path):
    """The recipe's model is a plain converted one, in which nothing but the projections of attention has changed."""
    source = save_decoder(tmp_path / "source", model_type, **HOSTS[model_type])
    given = arguments(source, dataset(tmp_path / "data"), tmp_path / "out", attention=HYBRID, lora_rank=2, pack=True)
    recipe("clm").main([*given, "--use_cpu", "--block_length=40"])
    metrics = result(tmp_path / "out")["metrics"]
    assert metrics["trained"]["loss"] < metrics["converted"]["loss"] != metrics["exact"]["loss"]
    model, before = load_converted(str(tmp_path / "out/model")), load_stock(str(source))[0].state_dict()
    assert list(converted_layers(model)) == ["model.layers.1.self_attn"]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_transfer_trains_the_mechanism_against_the_same_layer(model_type: str):
    model = he.convert(tiny_decoder(model_type), "hedgehog", attention_window=4).model
    inputs = inputs_for(model, length=24)
    with torch.no_grad(), exact_attention(model):
        expected = model(**inputs).logits
    with AttentionTransfer(model):
        own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(12):
            loss = model(**inputs).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert own and all(".efficient." in name for name in own)
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad(), exact_attention(model):
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("model_type", ["gemma2", "mistral"])
def test_transfer_where_the_config_brings_windows(model_type: str):
    """Full attention, the teacher, is that of the host: with its own windows and capped logits."""
    source = tiny_decoder(model_type, **HOSTS[model_type])
    inputs = inputs_for(source, length=24)
    with torch.no_grad():
        expected = source(**inputs, output_hidden_states=True)
        model = he.convert(copy.deepcopy(source), "local", attention_window=4).model
        with exact_attention(model):
            assert_close(model(**inputs).logits, expected.logits, 1e-5, where=inputs["attention_mask"])
    trainable(model, "attention")
    with AttentionTransfer(model, {"hidden_states": 1.0}):
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(12):
            loss = model(**inputs).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("model_type", HOSTS)
def test_a_bounded_cache_generates_what_the_whole_past_does(model_type: str, monkeypatch):
    monkeypatch.setattr("hf_efficient.cache.bounded.SLACK", 4)
    layers = [1] if HOSTS[model_type] else None  # the first keeps its own window
    source = tiny_decoder(model_type, **HOSTS[model_type])
    model = he.convert(source, "local", attention_window=6, sink_tokens=1, layers=layers).model
    inputs, options = prompts(model), dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    out = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert max(layer.keys.shape[2] for layer in out.past_key_values.layers) < 24
    assert torch.equal(out.sequences, model.generate(**inputs, **options, use_cache=False))


def test_every_kth_layer_stays_exact():
    def layers(**options):
        model = he.convert(tiny_decoder("llama", num_hidden_layers=6), "local", attention_window=8, **options).model
        return [name.split(".")[2] for name in converted_layers(model)]

    assert layers(exact_every=3) == ["0", "1", "3", "4"]
    assert layers(exact_every=7) == layers() == ["0", "1", "2", "3", "4", "5"]
    for wrong in (1, 0, 2.0, True):
        with pytest.raises(ValueError, match=f"exact_every={wrong} is not possible; it must be an integer ≥ 2"):
            layers(exact_every=wrong)
    with pytest.raises(ValueError, match="exact_every=2 and layers both say which layers"):
        layers(exact_every=2, layers=[0])
