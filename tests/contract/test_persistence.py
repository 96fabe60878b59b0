"""Nothing is lost on the way: save and load, copies, revert and undo, all bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pairs import MAIN, MAX_POSITIONS, VARIANTS, Pair, each, logits

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_configs
from hf_efficient.testing import inputs_for

AUTO = {
    "bert": transformers.AutoModelForMaskedLM,
    "roberta": transformers.AutoModelForMaskedLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
}


def _fingerprint(model: Any) -> dict[str, Any]:
    """Everything that patching touches: classes, children, hooks, configs; weights are compared apart."""
    return {
        name: (
            type(module),
            list(module._modules),
            [len(hooks) for name, hooks in sorted(vars(module).items()) if name.startswith("_forward_")],
            # a lengthened and shortened position table lost transformers' mark, its weights are compared
            sorted(set(vars(module)) - {"_is_hf_initialized"}),
            json.dumps(module.config.to_dict(), default=str) if hasattr(module, "config") else None,
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    }


def _assert_same_weights(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def _snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@each(MAIN + VARIANTS)
def test_reloading_is_bit_equal(pair: Pair, tmp_path: Path):
    model = pair.model()
    result = he.convert(model, pair.config)
    inputs = inputs_for(model)
    expected = logits(result.model, inputs)
    result.save(tmp_path / "checkpoint")
    loaded = AUTO[pair.family].from_pretrained(tmp_path / "checkpoint")
    assert type(loaded) is type(result.model)
    _assert_same_weights(loaded, _snapshot(result.model))
    assert torch.equal(logits(loaded, inputs), expected)
    stored = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert stored["efficient_attention"] == result.model.config.efficient_attention
    assert attention_configs(stored["efficient_attention"]) == attention_configs(
        result.model.config.efficient_attention
    )
    assert not loaded.training


@each(MAIN + VARIANTS)
def test_config_survives_json(pair: Pair):
    text = json.dumps(pair.config.to_dict())
    assert attention_configs(text) == [pair.config]
    assert attention_configs(json.loads(text)) == [pair.config]
    with pytest.raises(ValueError, match="no_such_option"):
        he.attention_config(pair.mechanism, no_such_option=1)


@each(MAIN)
def test_copies_are_equal_and_apart(pair: Pair):
    model = pair.model()
    fingerprint = _fingerprint(model)
    he.convert(model, pair.config)
    inputs = inputs_for(model)
    expected = logits(model, inputs)
    twins = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    for way, twin in twins.items():
        assert torch.equal(logits(twin, inputs), expected), way
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for way, twin in twins.items():
        assert torch.equal(logits(twin, inputs), expected), f"{way} shares state with the original"
        assert _fingerprint(he.revert(twin)) == fingerprint, way


@each(MAIN)
def test_revert_is_exact(pair: Pair):
    """Twice, the second time after more positions."""
    model = pair.model()
    model.config.architectures = ["AsInItsCheckpoint"]
    inputs = inputs_for(model)
    before, fingerprint, expected = _snapshot(model), _fingerprint(model), logits(model, inputs)
    for max_positions in (None, 2 * MAX_POSITIONS):
        he.convert(model, pair.config, max_positions=max_positions)
        assert _fingerprint(model) != fingerprint
        assert he.revert(model) is model
        _assert_same_weights(model, before)
        assert torch.equal(logits(model, inputs), expected)
        after = _fingerprint(model)
        assert {name: f for name, f in after.items() if f != fingerprint[name]} == {}


@each(MAIN)
def test_undoing_a_patch_is_exact(pair: Pair):
    """By its handle, at the end of a block, and by what is raised inside one."""
    model = pair.model()
    inputs = inputs_for(model)
    before, fingerprint, expected = _snapshot(model), _fingerprint(model), logits(model, inputs)

    def by_handle() -> torch.Tensor:
        handle = pair.patch(model)
        patched = logits(model, inputs)
        handle.undo()
        handle.undo()
        return patched

    def by_block() -> torch.Tensor:
        with pair.patch(model) as inside:
            assert inside is model
            return logits(model, inputs)

    def by_exception() -> torch.Tensor:
        with pytest.raises(KeyError, match="on purpose"), pair.patch(model):
            patched = logits(model, inputs)
            raise KeyError("on purpose")
        return patched

    for way in (by_handle, by_block, by_exception):
        assert not torch.equal(way(), expected), way.__name__
        _assert_same_weights(model, before)
        assert _fingerprint(model) == fingerprint, way.__name__
        assert torch.equal(logits(model, inputs), expected), way.__name__
