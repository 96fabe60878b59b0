"""verify: every check passes where it should, and fails when what it proves is broken."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import fresh
import pytest
import torch
from tiny import tiny_tokenizer, words

import hf_efficient as he
from hf_efficient.attention.local import LocalAttention
from hf_efficient.corpus import ragged, text_batches
from hf_efficient.evaluation import verify as verification
from hf_efficient.evaluation.tensors import copied_tensors
from hf_efficient.evaluation.verify import verify
from hf_efficient.experts.layer import expert_layers
from hf_efficient.families import family_of
from hf_efficient.profiling import timing
from hf_efficient.testing import tiny_model

TEXTS = [words(90), words(60, start=30), words(40, start=11)]


def pair(model_type: str = "bert", mechanism: str = "local", **options):
    source = tiny_model(model_type)
    return he.convert(copy.deepcopy(source), mechanism, tokenizer=tiny_tokenizer(model_type), **options).model, source


@pytest.fixture(autouse=True)
def quick_process(monkeypatch):
    """Of the check that needs a fresh one; tests/test_scripts.py waits for a new Python instead."""
    monkeypatch.setattr(verification, "fresh_python", fresh.python)


def check(model, source, **options):
    return verify(model, source, TEXTS, tokenizer=tiny_tokenizer(source.config.model_type), **options)


@pytest.mark.parametrize(
    ("model_type", "mechanism", "options"),
    [
        ("bert", "longformer", dict(attention_window=8, global_tokens="first")),
        ("roberta", "performer", dict(num_features=16)),
        ("gpt2", "bigbird", dict(block_size=4)),
        ("t5", "linformer", dict(rank=16, max_length=128)),
        ("gpt2", "hedgehog", dict(attention_window=8)),
    ],
)
def test_a_right_conversion_passes(model_type, mechanism, options):
    report = check(*pair(model_type, mechanism, **options))
    assert report.passed, [check for check in report.checks if check.status == "failed"]
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True
    shown = str(report).splitlines()
    assert max(map(len, shown)) <= 80 and any(line.startswith("passed          padding and batch:") for line in shown)
    assert report["padding and batch"].detail["padded_tokens"] > 0
    assert report["exact limit"].status == ("not applicable" if mechanism == "performer" else "passed")
    assert report["prefill = decode"].status == ("passed" if model_type in ("gpt2", "t5") else "not applicable")
    assert len(report["fidelity"].detail["hidden_error_by_layer"]) == 3
    # T5's own error is nearly the control's on random weights; both must be there to be compared
    assert report["control: mean of values"].detail["hidden_error"] > 0
    # only what a mechanism learns can be left out
    assert ("control: window only" in [check.name for check in report.checks]) == (mechanism == "hedgehog")


def failed(report) -> list[str]:
    return [check.name for check in report.checks if check.status == "failed"]


def test_a_changed_weight_fails_the_first_check():
    model, source = pair(attention_window=8)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] += 1e-6
    report = check(model, source)
    assert failed(report) == ["copied tensors"]
    assert report["copied tensors"].detail["different"] == ["bert.encoder.layer.1.output.dense.weight"]


def test_a_wrong_mechanism_fails_the_exact_limit(monkeypatch):
    forward = LocalAttention.forward
    monkeypatch.setattr(LocalAttention, "forward", lambda self, q, k, v, c: forward(self, q, k, v, c) * 1.0001)
    assert "exact limit" in failed(check(*pair(attention_window=8)))


def test_a_mechanism_that_sees_padding_fails(monkeypatch):
    def leaky(self, query, key, value, context):
        return value.mean(2, keepdim=True).expand_as(query)

    monkeypatch.setattr(LocalAttention, "forward", leaky)
    assert "padding and batch" in failed(check(*pair(attention_window=8)))


def test_a_mechanism_that_sees_the_future_fails_decoding(monkeypatch):
    monkeypatch.setattr(LocalAttention, "forward", lambda self, q, k, v, c: v.mean(2, keepdim=True).expand_as(q))
    assert "prefill = decode" in failed(check(*pair("gpt2", attention_window=8)))


NAN: dict[str, tuple[Callable[[Any, Any], Any], set[str]]] = {
    "everywhere": (
        lambda mixed, context: mixed * torch.nan,
        {"exact limit", "fidelity", "padding and batch", "fresh process", "prefill = decode"},
    ),
    "padding only": (
        lambda mixed, context: (
            mixed
            if context.key_padding_mask is None
            else mixed.masked_fill(~context.key_padding_mask[:, None, -mixed.shape[2] :, None], torch.nan)
        ),
        {"exact limit", "fidelity", "padding and batch", "fresh process"},
    ),
    "row alone only": (
        lambda mixed, context: mixed * torch.nan if len(mixed) == 1 else mixed,
        {"padding and batch", "prefill = decode"},
    ),
}


@pytest.mark.parametrize("where", NAN)
def test_nan_fails_every_check_that_meets_it(where, monkeypatch):
    spoil, expected = NAN[where]
    model, source = pair("gpt2", attention_window=8)
    forward = LocalAttention.forward
    monkeypatch.setattr(LocalAttention, "forward", lambda self, q, k, v, c: spoil(forward(self, q, k, v, c), c))
    report = check(model, source)
    assert set(failed(report)) == expected
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_weight_that_is_no_number_fails_the_first_check():
    model, source = pair(attention_window=8)
    for one in (model, source):
        one.bert.encoder.layer[0].output.dense.bias.data[0] = torch.nan
    assert outcomes(model, source) == ["failed", "failed"]


def test_what_is_not_saved_fails_the_fresh_process(monkeypatch):
    forward = LocalAttention.forward
    monkeypatch.setattr(LocalAttention, "forward", lambda self, q, k, v, c: forward(self, q, k, v, c) * 1.0001)
    report = check(*pair(attention_window=8))
    assert "fresh process" in failed(report)
    assert report["fresh process"].detail["largest_difference"] > 0


def test_a_checkpoint_that_does_not_load_fails_the_fresh_process(tmp_path, monkeypatch):
    model, source = pair(attention_window=8)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(verification, "load_converted", lambda path: model)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    report = check(tmp_path, source)
    assert failed(report) == ["fresh process"]
    assert "can't be read" in report["fresh process"].detail["error"]


def test_what_can_not_be_verified_is_refused():
    model, source = pair(attention_window=8)
    with pytest.raises(ValueError, match="not a converted model"):
        check(source, source)
    with pytest.raises(ValueError, match="no texts"):
        verify(model, source, [], tokenizer=tiny_tokenizer("bert"))
    with pytest.raises(ValueError, match="tokenizer"):
        verify(model, source, TEXTS)


def test_speed_check_measures_both_models():
    model, source = pair(attention_window=8)
    detail = check(model, source, speed_lengths=(64, 256))["speed and memory"].detail
    assert [row["length"] for row in detail["rows"]] == [64], "256 tokens exceed the model's positions"
    assert all(row["full_seconds"] > 0 and row["efficient_seconds"] > 0 for row in detail["rows"])
    assert detail["hardware"]["threads"] == torch.get_num_threads()


def test_ratios_are_taken_round_by_round():
    times = {"a": [2.0, 4.0, 8.0], "b": [1.0, 4.0, 2.0]}
    row = timing.table_of({name: [timing.Times(t, t, None) for t in taken] for name, taken in times.items()}, "b")["a"]
    assert row == {"seconds": 4.0, "ratio": 2.0, "ratio_min": 1.0, "ratio_max": 4.0}


# ---- sparse experts ----------------------------------------------------------------------------------------------


def apart(model):
    with torch.no_grad():
        for layer in expert_layers(model).values():
            layer.up[0] += 0.1
    return model


def outcomes(model, source) -> list[str]:
    """Of the two checks that compare weights and outputs with those of the source."""
    tokenizer = tiny_tokenizer(family_of(source).model_type)
    batch = ragged(text_batches(tokenizer, TEXTS, 64, 4, source)[0])
    checks = (copied_tensors(model, source, [])[0], verification._exact_limit(model, source, batch))
    return [check.status for check in checks]


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_experts_alone_pass_the_checks(model_type):
    source = tiny_model(model_type)
    model = he.upcycle(copy.deepcopy(source), 4, top_k=2).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = check(model, source)
    assert report.passed, [check for check in report.checks if check.status == "failed"]
    assert report["exact limit"].status == "passed" and "experts" in report["exact limit"].rule
    assert report["control: mean of values"].status == "not applicable"
    assert "full attention" in report["control: mean of values"].detail["why"]
    assert report["copied tensors"].detail["tensors"] == len(source.state_dict())
    assert report["fidelity"].detail["hidden_error"] < 1e-5
    assert report["prefill = decode"].status == ("not applicable" if model_type == "bert" else "passed")
    assert report.settings["efficient_experts"]["num_experts"] == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_changed_experts_fail_the_checks():
    source = tiny_model("gpt2")
    model = he.upcycle(copy.deepcopy(source), 4).model
    assert outcomes(model, source) == ["passed", "passed"]
    # one weight that is changed in all experts makes another layer; in one of them, there is no layer to compare with
    with torch.no_grad():
        for layer in expert_layers(model).values():
            layer.up[:, 0, 0] += 1.0
    assert outcomes(model, source) == ["failed", "failed"]
    assert outcomes(apart(model), source) == ["failed", "not applicable"]


def test_experts_and_attention_pass_the_checks_against_either_source():
    source = tiny_model("bert")
    sparse = he.upcycle(copy.deepcopy(source), 4).model
    options = dict(attention_window=8, tokenizer=tiny_tokenizer("bert"))
    model = he.convert(copy.deepcopy(sparse), "local", **options).model
    report = check(model, source)
    assert report.passed, [check for check in report.checks if check.status == "failed"]
    assert report["exact limit"].status == "passed" and report["exact limit"].detail["settings"]
    assert report["control: mean of values"].detail["hidden_error"] > 0
    assert outcomes(model, sparse) == ["passed", "passed"]
    # trained experts are those of the source that has them
    trained = apart(sparse)
    model = he.convert(copy.deepcopy(trained), "local", **options).model
    assert outcomes(model, trained) == ["passed", "passed"]
    assert outcomes(model, source) == ["failed", "passed"]
