"""OPT, BioGPT and GPTBigCode: their fused projections and position tables."""

from __future__ import annotations

import pytest
import torch
from decoders import prompts, tiny_decoder
from transformers import AutoModelForCausalLM

import hf_efficient as he
from hf_efficient.families import HostModel
from hf_efficient.testing import assert_close, inputs_for

# model_type: (sizes under their own names, heads of keys and values)
HOSTS = {
    "opt": (dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0), 4),
    "biogpt": (dict(hidden_dropout_prob=0.0), 4),
    "gpt_bigcode": (dict(n_embd=32, n_head=4, n_layer=2, n_positions=160), 1),
    "gpt_bigcode by head": (dict(n_embd=32, n_head=4, n_layer=2, n_positions=160, multi_query=False), 4),
}


@pytest.mark.parametrize("host", HOSTS)
def test_a_decoder_converts_generates_is_saved_and_reverted(host: str, tmp_path):
    sizes, key_value_heads = HOSTS[host]
    model = tiny_decoder(host.split()[0], **sizes)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = inputs_for(model, length=30)
    prompt, options = prompts(model), dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with torch.no_grad():
        expected, tokens = model(**inputs).logits, model.generate(**prompt, **options)
        with he.patch_attention(model, "local", attention_window=8):
            assert (model(**inputs).logits - expected).abs().max() > 1e-2 * expected.abs().max()
        model = he.convert(model, "local", attention_window=80).model
        assert_close(model(**inputs).logits, expected, 1e-5, where=inputs["attention_mask"])
        for use_cache in (True, False):
            assert torch.equal(model.generate(**prompt, **options, use_cache=use_cache), tokens)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    host_model = HostModel.of(loaded)
    geometry = host_model.family.geometry(host_model.stacks[0], host_model.stacks[0].layers[0])
    assert (geometry.num_heads, geometry.num_key_value_heads, geometry.max_positions) == (4, key_value_heads, 160)
    stock = he.revert(loaded)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize("host", HOSTS)
def test_projections_are_those_of_the_layer(host: str):
    model = tiny_decoder(host.split()[0], **HOSTS[host][0])
    family, stack = HostModel.of(model).family, HostModel.of(model).stacks[0]
    layer, seen = stack.layers[0], {}

    def remember(module, args, kwargs):
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]

    layer.module.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        cache = model(torch.tensor([[7, 8]]), use_cache=True).past_key_values.layers[0]
        key, value = family.project(layer.module, seen["hidden"])
        source = family.source_attention(layer.module)
        again = torch.nn.functional.linear(seen["hidden"], *source.key)
    assert_close(key, cache.keys, 1e-6)
    assert_close(value, cache.values, 1e-6)
    assert_close(again, cache.keys.transpose(1, 2).flatten(2), 1e-6)


def test_positions_of_opt():
    model = tiny_decoder("opt", **HOSTS["opt"][0])
    converted = he.convert(model, "local", attention_window=8).model
    with torch.no_grad(), pytest.raises(ValueError, match="input of 161 tokens, but the model has 160 positions"):
        converted(torch.ones(1, 161, dtype=torch.long))
    with pytest.raises(ValueError, match="feed-forward parts of opt are not known"):
        he.upcycle(tiny_decoder("opt", **HOSTS["opt"][0]), 2)


def test_experts_of_gpt_bigcode_are_given_back():
    model = tiny_decoder("gpt_bigcode", **HOSTS["gpt_bigcode"][0])
    tensors, inputs = {n: t.clone() for n, t in model.state_dict().items()}, inputs_for(model, length=12)
    with torch.no_grad():
        expected = model(**inputs).logits
        upcycled = he.upcycle(model, 2).model
        assert_close(upcycled(**inputs).logits, expected, 1e-5, where=inputs["attention_mask"])
        stock = he.revert(upcycled)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stock.state_dict().items())
