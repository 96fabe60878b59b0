"""Schemes of positions: what longer inputs get, what short ones keep, what is refused, and the way back."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from decoders import save_decoder, tiny_decoder
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_efficient as he
from hf_efficient.families import HostModel
from hf_efficient.testing import assert_close, inputs_for, tiny_model
from hf_efficient.training.loading import load_model

OLD, NEW = 128, 512
WIDE, NARROW = dict(attention_window=2 * NEW), dict(attention_window=16)


def tiny_llama(**overrides: Any) -> Any:
    return tiny_decoder("llama", max_position_embeddings=OLD, **overrides)


def logits(model: Any, length: int) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_for(model, length=length)).logits


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- rotary ------------------------------------------------------------------------------------------------------

# positions: (numbers of one's own, rope_parameters)
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
METHODS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "unchanged": (None, DEFAULT),
    "linear": (None, DEFAULT | {"rope_type": "linear", "factor": 4.0}),
    "ntk": (None, DEFAULT | {"rope_theta": 10000.0 * 4 ** (8 / 6)}),
    "yarn": (
        {"beta_fast": 64},
        DEFAULT | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": OLD, "beta_fast": 64},
    ),
    "llama3": (
        {"factor": 8},
        DEFAULT
        | {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": OLD}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "longrope": (
        {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]},
        DEFAULT
        | {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": OLD}
        | {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]},
    ),
}


@pytest.mark.parametrize("positions", METHODS)
def test_rotary_positions_are_those_of_a_model_built_so(positions: str, tmp_path):
    """The model is rebuilt, saved and reloaded as its config says, and given back bit for bit."""
    rope, parameters = METHODS[positions]
    model = tiny_llama()
    short, settings, state = logits(model, 96), copy.deepcopy(model.config.to_dict()), state_of(model)
    result = he.convert(model, "local", **WIDE, max_positions=NEW, positions=positions, rope=rope)
    config = result.model.config
    assert (config.max_position_embeddings, config.rope_parameters) == (NEW, parameters)
    built = LlamaForCausalLM(LlamaConfig(**settings | _longer(parameters))).eval()
    built.load_state_dict(state)
    long = logits(result.model, 300)
    assert_close(long, logits(built, 300), 1e-5, where=inputs_for(model, length=300)["attention_mask"])
    for name, buffer in built.model.rotary_emb.named_buffers():
        assert torch.equal(buffer, result.model.model.rotary_emb.get_buffer(name))
    report = result.report
    assert (report.positions, report.rope, report.max_positions) == (positions, rope, NEW)
    # 1e-5: the window and full attention sum in another order
    there = inputs_for(model, length=96)["attention_mask"].bool()
    same = (logits(result.model, 96) - short)[there].abs().max() < 1e-5 * short.abs().max()
    assert report.short_inputs == ("unchanged" if same else "changed") and same == (positions == "unchanged")
    loaded = type(result.model).from_pretrained(result.save(tmp_path / "saved"))
    assert torch.equal(logits(loaded, 300), long)
    for reverted in (he.revert(result.model), he.revert(loaded)):
        assert torch.equal(logits(reverted, 96), short)
        for name in ("max_position_embeddings", "rope_parameters"):
            assert getattr(reverted.config, name) == settings[name]


def test_a_stock_export_keeps_the_longer_positions(tmp_path):
    model = he.convert(tiny_llama(), "local", **WIDE, max_positions=NEW, positions="yarn").model
    parameters, long = model.config.rope_parameters, logits(model, 300)
    loaded = LlamaForCausalLM.from_pretrained(he.export(model, "stock").save(tmp_path / "stock"))
    assert (loaded.config.max_position_embeddings, loaded.config.rope_parameters) == (NEW, parameters)
    assert_close(logits(loaded, 300), long, 1e-5, where=inputs_for(model, length=300)["attention_mask"])


def test_recipes_lengthen_as_they_are_told(tmp_path):
    save_decoder(tmp_path, "llama")
    settings = SimpleNamespace(model=str(tmp_path), attention="local", max_positions=NEW, positions="linear")
    model, tokenizer = load_model(settings, AutoModelForCausalLM)
    assert model.config.rope_parameters["rope_type"] == "linear" and tokenizer.model_max_length == NEW
    settings.positions = None
    with pytest.raises(ValueError, match="positions='yarn': slow angles"):
        load_model(settings, AutoModelForCausalLM)


def _longer(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"max_position_embeddings": NEW, "rope_parameters": copy.deepcopy(parameters)}


# no query sees a distance beyond the old length: what is usual needs no choice
@pytest.mark.parametrize(
    "mechanism, options, chosen",
    [
        ("local", dict(attention_window=OLD), True),
        ("local", dict(attention_window=OLD + 2), False),
        ("local", NARROW | dict(sink_tokens=1), False),
        ("local", NARROW | dict(layers=[0]), False),
        ("local", NARROW | dict(dilation=10), False),
        ("axial", dict(row_length=16), False),
        ("performer", {}, False),
    ],
)
def test_what_sees_farther_needs_a_choice(mechanism: str, options: dict[str, Any], chosen: bool):
    model = tiny_llama()
    if chosen:
        report = he.convert(model, mechanism, **options, max_positions=NEW).report
        assert (report.positions, report.short_inputs) == ("unchanged", "unchanged")
        return
    state, settings = state_of(model), copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=r"made for 128 positions(?s:.)*positions='yarn': slow angles"):
        he.convert(model, mechanism, **options, max_positions=NEW)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == settings and type(model) is LlamaForCausalLM
    he.convert(model, mechanism, **options, max_positions=NEW, positions="unchanged")


LLAMA3 = DEFAULT | dict(
    rope_type="llama3", factor=8.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0
)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dynamic": ({}, dict(positions="dynamic"), "longest row of a batch would change"),
    "a method of tables": (
        {},
        dict(positions="tile"),
        "positions='tile' is not possible; it must be one of unchanged, ",
    ),
    "fewer": ({}, dict(max_positions=64, positions="yarn"), "would drop positions; the source has 128"),
    "no length": ({}, dict(max_positions=None, positions="yarn"), "give max_positions too"),
    "numbers without a method": ({}, dict(rope={"factor": 4}), "numbers of a method, but positions=None"),
    "numbers of another": ({}, dict(positions="linear", rope={"beta_fast": 4}), "positions='linear' takes factor"),
    "factor": ({}, dict(positions="linear", rope={"factor": 0.5}), "must be a number ≥ 1"),
    "no number": ({}, dict(positions="yarn", rope={"beta_fast": "4"}), "must be a positive number"),
    "no lists": ({}, dict(positions="longrope"), "short_factor is missing.*with 4 numbers"),
    "order": ({}, dict(positions="llama3", rope={"low_freq_factor": 9.0}), "low_freq_factor must be below"),
    "another type": (dict(rope_parameters=LLAMA3), dict(positions="yarn"), "rope_type='llama3' already"),
    "dynamic source": (
        dict(rope_parameters=DEFAULT | dict(rope_type="dynamic", factor=2.0)),
        {},
        "rope_type='dynamic'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_rotary_positions_can_not_be(case: str):
    overrides, asked, message = REFUSED[case]
    model = tiny_llama(**copy.deepcopy(overrides))
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=message):
        he.convert(model, "local", **NARROW, **{"max_positions": NEW} | asked)
    assert model.config.to_dict() == before and type(model) is LlamaForCausalLM


def test_a_method_that_is_there_already_grows():
    result = he.convert(
        tiny_llama(rope_parameters=copy.deepcopy(LLAMA3)), "local", **WIDE, max_positions=NEW, positions="llama3"
    )
    assert result.model.config.rope_parameters == LLAMA3 | {"factor": 32.0}


def test_hosts_that_know_few_methods_refuse_the_others():
    for model_type, positions in (("phi3", "yarn"), ("phimoe", "linear")):
        model = tiny_model(model_type)
        with pytest.raises(ValueError, match="does not take rope_parameters"):
            he.convert(model, "local", **WIDE, max_positions=8 * OLD, positions=positions)
        assert logits(model, 8).isfinite().all()


@pytest.mark.parametrize("model_type", ["gemma3_text", "modernbert"])
def test_kinds_of_layers_have_angles_of_their_own(model_type: str):
    """A layer whose own window is shorter than the old length keeps its angles."""
    model = tiny_model(model_type, layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=6)
    before, old, short = (
        copy.deepcopy(model.config.rope_parameters),
        model.config.max_position_embeddings,
        logits(model, 90),
    )
    model = he.convert(model, "local", **WIDE, max_positions=2 * old, positions="linear").model
    assert model.config.rope_parameters == before | {
        "full_attention": before["full_attention"] | {"rope_type": "linear", "factor": 2.0}
    }
    assert logits(model, 2 * old).isfinite().all() and (logits(model, 90) - short).abs().max() > 1e-2
    model = he.revert(model)
    assert model.config.rope_parameters == before and torch.equal(logits(model, 90), short)


def test_a_model_is_given_back_in_its_precision():
    model = tiny_llama().to(torch.bfloat16)
    before = logits(model, 40)
    assert torch.equal(logits(he.revert(he.convert(model, "local", **NARROW, max_positions=NEW).model), 40), before)


@pytest.mark.parametrize(
    "model_type, name", [("bert", "bert.embeddings.position_embeddings"), ("llama", "model.rotary_emb")]
)
def test_hooks_of_what_is_lengthened_stay(model_type: str, name: str):
    """accelerate's hooks are bound to the module that they stand in."""
    model = tiny_model(model_type)
    module = model.get_submodule(name)
    add_hook_to_module(module, AlignDevicesHook("cpu"))
    model = he.convert(model, "local", **NARROW, max_positions=NEW).model
    assert model.get_submodule(name) is module and "forward" in vars(module)
    assert logits(model, NEW).isfinite().all()


# ---- tables ------------------------------------------------------------------------------------------------------

SIZES = {
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, max_position_embeddings=OLD),
    "biogpt": dict(hidden_dropout_prob=0.0, max_position_embeddings=OLD),
}


@pytest.mark.parametrize("positions", ["tile", "interpolate"])
@pytest.mark.parametrize("model_type", SIZES)
def test_a_table_with_rows_in_front_keeps_its_class(model_type: str, positions: str, tmp_path):
    model = tiny_decoder(model_type, **SIZES[model_type])
    state, short = state_of(model), logits(model, 96)
    (name,) = [name for name in state if "embed_positions" in name]
    kind = type(model.get_submodule(name.removesuffix(".weight")))
    result = he.convert(model, "local", **WIDE, max_positions=2 * OLD, positions=positions)
    table = result.model.get_submodule(name.removesuffix(".weight"))
    old, new = state[name], table.weight.detach()
    assert type(table) is kind and len(new) == table.num_embeddings == 2 * OLD + 2
    assert result.model.config.max_position_embeddings == result.report.max_positions == 2 * OLD
    assert torch.equal(new[:2], old[:2]) and result.report.tensors[name]["status"] == "extended"
    if positions == "tile":
        assert torch.equal(new[2:], torch.cat([old[2:]] * 2))
        assert_close(logits(result.model, 96), short, 1e-5, where=inputs_for(model, length=96)["attention_mask"])
    else:
        assert torch.equal(new[2::2], old[2:])
    long = logits(result.model, 2 * OLD)
    with pytest.raises(ValueError, match="input of 257 tokens, but the model has 256 positions"):
        logits(result.model, 2 * OLD + 1)
    loaded = type(result.model).from_pretrained(result.save(tmp_path / "saved"))
    assert torch.equal(logits(loaded, 2 * OLD), long)
    for reverted in (he.revert(result.model), he.revert(loaded)):
        assert all(torch.equal(tensor, state[name]) for name, tensor in reverted.state_dict().items())
        assert torch.equal(logits(reverted, 96), short) and reverted.config.max_position_embeddings == OLD


def test_methods_without_a_use_are_refused():
    with pytest.raises(ValueError, match="positions='tile' is not possible; it must be one of unchanged"):
        he.convert(tiny_model("t5"), "local", **NARROW, max_positions=NEW, positions="tile")
    with pytest.raises(ValueError, match="has no rotary positions"):
        he.convert(tiny_model("bert"), "local", **NARROW, max_positions=NEW, rope={"factor": 4})


def test_the_scheme_tells_where_texts_begin_and_end():
    for model_type, first, rows in (("bert", 0, OLD), ("roberta", 2, OLD), ("gpt2", 0, OLD), ("t5", 0, None)):
        host = HostModel.of(tiny_model(model_type))
        scheme, config = host.family.positions, host.model.config
        assert scheme.offset(config) == host.first_position == first
        assert scheme.limit(config) == host.max_positions == rows
