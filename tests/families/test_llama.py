"""Llama's relatives: every row equals its source in the exact limit, and says what its layers are."""

from __future__ import annotations

import pytest
import torch
from decoders import prompts, save_decoder, tiny_decoder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_efficient as he
from hf_efficient.attention.base.geometry import Rotary
from hf_efficient.evaluation.verify import _in_double
from hf_efficient.families import HostModel, families
from hf_efficient.families.llama import LlamaFamily
from hf_efficient.testing import assert_close, inputs_for

RELATIVES = [
    name for name, family in families().items() if isinstance(family, LlamaFamily) and family.side(None) == "decoder"
]
# grouped heads; norms of q and k by head, of all heads, by head and after rotation; a part rotated; pairs; none rotated
KINDS = [
    "gpt_neox",
    "llama",
    "qwen3",
    "olmo2",
    "cohere",
    "hunyuan_v1_dense",
    "phi",
    "stablelm",
    "glm",
    "smollm3",
    "qwen3_moe",
]


@pytest.mark.parametrize("model_type", RELATIVES)
def test_every_relative_is_its_source_in_the_exact_limit(model_type: str):
    model = tiny_decoder(model_type)
    inputs = inputs_for(model, length=30)
    with torch.no_grad():
        expected = model(**inputs).logits
        with he.patch_attention(model, "local", attention_window=60):
            exact = model(**inputs).logits
        with he.patch_attention(model, "local", attention_window=8):
            narrow = model(**inputs).logits
    assert_close(exact, expected, 1e-5, where=inputs["attention_mask"])
    assert (narrow - expected).abs().max() > 1e-2 * expected.abs().max()
    host = HostModel.of(model)
    for layer in host.stacks[0].layers:
        geometry = host.family.geometry(host.stacks[0], layer)
        assert (geometry.num_heads, geometry.head_dim) == (4, 8)
        assert geometry.num_key_value_heads == getattr(model.config, "num_key_value_heads", 4)
        assert geometry.is_causal and geometry.position_scheme == "rotary" and not geometry.has_residual_module


@pytest.mark.parametrize("model_type", RELATIVES)
def test_projected_keys_are_those_of_the_layer_before_their_rotation(model_type: str):
    """At position 0 nothing turns: the first key that the layer caches is the projected one, times YaRN's factor."""
    model = tiny_decoder(model_type)
    host = HostModel.of(model)
    layer = host.stacks[0].layers[0].module
    seen = {}

    def remember(module, args, kwargs):
        seen["hidden_states"] = args[0] if args else kwargs["hidden_states"]

    layer.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        cache = model(torch.tensor([[7, 8]]), use_cache=True).past_key_values.layers[0]
        if model_type in ("hunyuan_v1_dense", "hunyuan_v1_moe", "nanochat"):
            assert "normalises its keys after their rotation" in host.family.projection_refusal(layer)
            return
        key, value = host.family.project(layer, seen["hidden_states"])
    factor = getattr(host.stacks[0].module.rotary_emb, "attention_scaling", 1.0)
    assert_close(factor * key[:, :, :1], cache.keys[:, :, :1], 1e-6)
    assert_close(value, cache.values, 1e-6)


def test_how_layers_rotate():
    def rotary(model_type):
        host = HostModel.of(tiny_decoder(model_type))
        return [host.family.rotary(host.stacks[0], layer) for layer in host.stacks[0].layers]

    assert rotary("llama") == [Rotary(8)] * 2
    assert rotary("phi") == [Rotary(4)] * 2
    assert rotary("cohere") == [Rotary(8, interleaved=True)] * 2
    assert rotary("smollm3") == [Rotary(8), None]


@pytest.mark.parametrize("model_type", KINDS)
def test_a_converted_decoder_generates_is_saved_and_reverted(model_type: str, tmp_path):
    model = tiny_decoder(model_type)
    inputs, options = prompts(model), dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model.generate(**inputs, **options)
    model = he.convert(model, "local", attention_window=80).model
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), expected)
    with torch.no_grad():
        logits = model(**inputs).logits
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is type(model) and torch.equal(loaded(**inputs).logits, logits)
    states = loaded.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    loaded(inputs_embeds=states, attention_mask=inputs["attention_mask"]).logits[:, 9].sum().backward()
    assert (states.grad[:, 10:] == 0).all() and (states.grad[0, :10] != 0).any()
    stock = he.revert(loaded)
    assert type(stock).__name__.removeprefix("Efficient") == type(model).__name__.removeprefix("Efficient")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stock.state_dict().items())
    assert torch.equal(stock.generate(**inputs, **options), expected)


@pytest.mark.parametrize("model_type", ["llama", "arcee", "glm", "phi", "seed_oss", "gpt_neox"])
def test_experts_are_made_of_the_feed_forward_part_and_given_back(model_type: str):
    model = tiny_decoder(model_type)
    inputs = inputs_for(model, length=12)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**inputs).logits
        result = he.upcycle(model, 2)
        assert result.report.tensors and "mlp.up" in str(list(result.model.state_dict()))
        assert_close(result.model(**inputs).logits, expected, 1e-5, where=inputs["attention_mask"])
        stock = he.revert(result.model)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "bitnet", "apertus"])
def test_feed_forward_parts_that_are_no_plain_products_are_refused(model_type: str):
    with pytest.raises(ValueError, match="experts already, or more than two products"):
        he.upcycle(tiny_decoder(model_type), 2)


def test_what_rotary_positions_refuse():
    with pytest.raises(ValueError, match="made for 160 positions, and some of its layers will see keys farther away"):
        he.convert(tiny_decoder("llama"), "local", max_positions=512)
    with pytest.raises(ValueError, match="rotary positions: it weighs keys by their distance"):
        he.convert(tiny_decoder("llama"), "cosformer", max_length=64)


@pytest.mark.parametrize("model_type", ["llama", "phi", "gpt_neox", "smollm3"])
def test_packed_sequences_and_checkpointed_layers(model_type: str):
    """Positions that start again are those of the rotation as well; a layer that is computed again gets the same."""
    model = he.convert(tiny_decoder(model_type), "local", attention_window=8).model
    first, second = torch.arange(10, 23)[None], torch.arange(40, 49)[None]
    positions = torch.cat([torch.arange(13), torch.arange(9)])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat([first, second], 1), position_ids=positions).logits
        expected = torch.cat([model(input_ids=first).logits, model(input_ids=second).logits], 1)
    assert_close(packed, expected, 1e-5)
    gradients = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(input_ids=first, labels=first, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


@pytest.mark.parametrize("model_type", ["qwen3_moe", "ernie4_5_moe"])
def test_files_hold_experts_as_those_of_the_source_do(model_type: str, tmp_path):
    """One by one, where the loaded model has all experts of a layer in one tensor."""
    source = save_decoder(tmp_path / "source", model_type)
    result = he.convert(source, "local", attention_window=8)
    result.save(tmp_path / "out")
    files = [load_file(path / "model.safetensors") for path in (source, tmp_path / "out")]
    assert any(".experts.0.up_proj" in name for name in files[0]) and files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[0][name]) for name, tensor in files[1].items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = result.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    # what verify compares in double precision, which grouped products of experts do not take
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        assert_close(_in_double(loaded)(ids).logits.float(), loaded(ids).logits, 1e-5)
