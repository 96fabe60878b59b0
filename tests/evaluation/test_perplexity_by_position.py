"""Perplexity by position for each way to longer inputs, against models that were built so."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoders import tiny_decoder
from transformers import LlamaForCausalLM

import hf_efficient as he
from hf_efficient.testing import tiny_model

OLD, LENGTH = 32, 100
RANGES = [(0, 15), (16, 31), (32, 63), (64, 98)]
IDS = torch.randint(5, 99, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def tiny_llama(**overrides: Any) -> Any:
    return tiny_decoder("llama", max_position_embeddings=OLD, **overrides)


def perplexities(model: Any) -> list[float]:
    with torch.no_grad():
        logits = model(IDS).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none")
    return [float(losses[:, first : last + 1].mean().exp()) for first, last in RANGES]


def test_figures_are_those_of_models_that_were_built_so():
    model = tiny_llama()
    state, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    before = perplexities(model)
    found = he.perplexity_by_position(model, IDS)
    assert (found.made_for, found.ranges, list(found.perplexity)) == (
        OLD,
        RANGES,
        ["unchanged", "linear", "ntk", "yarn"],
    )
    assert found.short_inputs == {"unchanged": "unchanged"} | dict.fromkeys(("linear", "ntk", "yarn"), "changed")
    built_so = {"unchanged": {}, "linear": {"rope_type": "linear", "factor": LENGTH / OLD}}
    for method, different in built_so.items():
        parameters = config["rope_parameters"] | different
        built = LlamaForCausalLM(type(model.config)(**config | {"rope_parameters": parameters})).eval()
        built.load_state_dict(state)
        assert found.perplexity[method] == pytest.approx(perplexities(built), rel=1e-4)
    assert len({tuple(values) for values in found.perplexity.values()}) == 4
    assert perplexities(model) == before and model.config.to_dict() == config


def test_with_a_mechanism_and_a_table():
    model = tiny_model("gpt2", positions=40).eval()
    rows = model.transformer.wpe.weight
    found = he.perplexity_by_position(model, IDS, attention="local", attention_window=8)
    assert list(found.perplexity) == ["tile"] and "interpolating 40 positions to 100" in found.refused["interpolate"]
    assert model.transformer.wpe.weight is rows and model.config.n_positions == 40
    full = he.perplexity_by_position(model, IDS, ["tile"])
    assert full.perplexity["tile"][0] != found.perplexity["tile"][0]
    wide = he.perplexity_by_position(model, IDS, ["tile"], attention="local", attention_window=2 * LENGTH)
    assert wide.perplexity["tile"] == pytest.approx(full.perplexity["tile"], rel=1e-4)


def test_the_table_fits_a_terminal_and_names_what_is_refused():
    parameters = dict(
        rope_type="llama3",
        rope_theta=1e4,
        factor=8.0,
        original_max_position_embeddings=16,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    found = he.perplexity_by_position(tiny_llama(rope_parameters=parameters), IDS, ["unchanged", "llama3", "yarn"])
    assert list(found.perplexity) == ["unchanged", "llama3"] and "rope_type='llama3' already" in found.refused["yarn"]
    found.perplexity = dict.fromkeys(("unchanged", "linear", "ntk", "yarn", "llama3", "longrope"), [123456.7] * 4)
    found.short_inputs = dict.fromkeys(found.perplexity, "unchanged")
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80 and any(line.split() == ["64-98", *["1.235e+05"] * 6] for line in lines)
    assert any("yarn: not possible" in line for line in lines) and json.dumps(found.to_dict())


def test_what_has_no_such_figures_is_refused():
    with pytest.raises(ValueError, match="no causal language model"):
        he.perplexity_by_position(tiny_model("bert"), IDS)
    with pytest.raises(ValueError, match=r"N above 32, the length that LlamaForCausalLM"):
        he.perplexity_by_position(tiny_llama(), IDS[:, :OLD])
    with pytest.raises(ValueError, match="is converted: give the original"):
        he.perplexity_by_position(he.convert(tiny_llama(), "local", attention_window=8).model, IDS)
    model = tiny_llama()
    with pytest.raises(ValueError, match="attention_window"):  # what the mechanism refuses is no fault of the method
        he.perplexity_by_position(model, IDS, attention="local", attention_window=-2)
    assert model.config.max_position_embeddings == OLD
