"""Encoders like BERT, and those with rotary positions: what the test that all families share does not say of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import hf_efficient as he
from hf_efficient.families import HostModel, eurobert, families
from hf_efficient.families.bert import BertFamily
from hf_efficient.families.probe import probe_inputs
from hf_efficient.testing import assert_close, check, tiny_model
from hf_efficient.testing.sizes import fields_of

TYPES = [name for name, family in families().items() if isinstance(family, BertFamily) and family.embeddings_module]
DECODERS = [name for name in TYPES if "is_decoder" in fields_of(transformers.CONFIG_MAPPING[name])]
ROTARY = list(eurobert.PREFIXES)


def encoder(model_type: str, **overrides: Any) -> Any:
    """A tiny model without a head; ELECTRA's embeddings are narrower than its layers, and no norm is like another."""
    narrow = {"embedding_size": 16} if model_type == "electra" else {}
    model = tiny_model(model_type, **narrow, **overrides).base_model
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_same(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = tensors(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("model_type", DECODERS)
def test_as_decoder(model_type: str):
    config = tiny_model(model_type).config
    config.is_decoder = True
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    check._exact_and_different(model)
    check._causality(model)
    check._decoding(model)


@pytest.mark.parametrize("model_type", TYPES)
def test_extra_tokens_enter_where_words_do(model_type: str):
    model = encoder(model_type, **{"dropout" if model_type == "distilbert" else "hidden_dropout_prob": 0.5})
    host = HostModel.of(model)
    stack, ids, seen = host.stacks[0], torch.tensor([[7, 8, 9]]), []
    hook = stack.layers[0].module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        words = model.train().get_input_embeddings()(ids[0, :1])
        embedded = host.family.embedded(stack, words)
    hook.remove()
    assert all(module.training for module in model.modules()), "left in another mode"
    model.eval()
    with torch.no_grad():
        entering = host.family.attention_input(stack.residual_module(stack.layers[0]), embedded)
        assert_close(entering[0], seen[0][0, 0], 1e-6, "a word at the first position")
        with he.patch_attention(model, "etc", attention_window=8, num_global_tokens=3):
            assert stack.layers[0].module.efficient.global_tokens.shape == (3, 32)
            assert model(ids).last_hidden_state.shape == (1, 3, 32)


@pytest.mark.parametrize("model_type", TYPES)
def test_more_positions_leave_short_inputs_alone(model_type: str):
    model = encoder(model_type)
    before, inputs = tensors(model), probe_inputs(model, 24)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        result = he.convert(model, "local", attention_window=64, max_positions=512)
        assert_close(result.model(**inputs).last_hidden_state, expected, 1e-5)
        assert result.model(**probe_inputs(model, 512)).last_hidden_state.isfinite().all()
    assert_same(he.revert(result.model), before)


def test_sinusoids_go_on_as_they_began():
    model = transformers.DistilBertModel(tiny_model("distilbert", sinusoidal_pos_embds=True).config)
    longer = transformers.DistilBertConfig(**model.config.to_dict() | {"max_position_embeddings": 300})
    made = transformers.DistilBertModel(longer).embeddings.position_embeddings.weight
    before = tensors(model)
    result = he.convert(model, "local", attention_window=8, max_positions=300)
    assert torch.equal(result.model.embeddings.position_embeddings.weight, made)
    assert_same(he.revert(result.model), before)
    with torch.no_grad():  # trained ones are rows as any others
        model.embeddings.position_embeddings.weight[0] += 1
    rows = model.embeddings.position_embeddings.weight.clone()
    result = he.convert(model, "local", attention_window=8, max_positions=2 * len(rows))
    assert torch.equal(result.model.embeddings.position_embeddings.weight, rows.repeat(2, 1))
    he.revert(result.model)
    result = he.convert(model, "local", attention_window=8, max_positions=2 * len(rows), positions="interpolate")
    assert torch.equal(result.model.embeddings.position_embeddings.weight[::2], rows)


@pytest.mark.parametrize("model_type", [name for name in TYPES if name != "mpnet"] + ROTARY + ["esm"])
def test_experts_of_its_feed_forward_layers(model_type: str):
    model = encoder(model_type)
    before, inputs = tensors(model), probe_inputs(model, 24)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        result = he.upcycle(model, 2)
        assert_close(result.model(**inputs).last_hidden_state, expected, 1e-5, "experts that are equal")
    assert_same(he.revert(result.model), before)


@pytest.mark.parametrize("model_type", ["gte", "distilbert"])
def test_experts_drop_out_what_the_dense_layer_did(model_type: str):
    name = "dropout" if model_type == "distilbert" else "hidden_dropout_prob"
    model = encoder(model_type, **{name: 0.25})
    block = HostModel.of(model).stacks[0].block_around(HostModel.of(model).stacks[0].layers[0])
    dense = families()[model_type].feed_forward(block)
    assert (dense.inner_dropout, dense.dropout) == ((0.25, 0.0) if model_type == "gte" else (0.0, 0.25))


@pytest.mark.parametrize("model_type", ROTARY)
def test_left_padding_is_invisible_under_rotary_positions(model_type: str):
    """Performer maps each rotated key alone, so that it would see what the host counts."""
    model, padding = encoder(model_type), 6
    ids = probe_inputs(model, 24)["input_ids"][:1]
    mask = torch.ones(1, padding + 24, dtype=torch.long)
    mask[:, :padding] = 0
    padded = torch.cat([torch.full((1, padding), 1), ids], 1)
    with he.patch_attention(model, "performer"), torch.no_grad():
        alone = model(ids).last_hidden_state
        assert_close(model(padded, attention_mask=mask).last_hidden_state[:, padding:], alone, 1e-4)


def test_layers_in_chunks_are_refused_wherever_their_host_keeps_the_size():
    model = encoder("distilbert", chunk_size_feed_forward=4)
    with pytest.raises(ValueError, match="chunk_size_feed_forward"):
        he.upcycle(model, 2)
    with pytest.raises(ValueError, match="chunk_size_feed_forward=4"):
        he.convert(model, "etc", attention_window=8)
