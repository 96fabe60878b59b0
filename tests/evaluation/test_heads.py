"""What a model is for is what `verify` compares; the verdict against no attention; texts and tokenizers that fit."""

from __future__ import annotations

import copy
import json
import shutil
from typing import Any

import pytest
import torch
import transformers
from tiny import save_source, tiny_tokenizer, words
from transformers.utils import logging

import hf_efficient as he
from hf_efficient.attention.local import LocalAttention
from hf_efficient.corpus import text_batches
from hf_efficient.evaluation import verify as verification
from hf_efficient.evaluation.controls import MeanOfValues
from hf_efficient.evaluation.fidelity import compare
from hf_efficient.evaluation.report import Check
from hf_efficient.evaluation.verdict import quick_verdict, verdict
from hf_efficient.testing import tiny_model

TEXTS = [words(40 + 9 * i, start=i) for i in range(4)]
FIVE = dict(num_labels=5, pad_token_id=0)
# class, options of its config, the figures that its head gives beside kl
HEADS: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "classes": ("bert", "BertForSequenceClassification", FIVE, {"kl", "class_agreement", "by_label"}),
    "one score": ("bert", "BertForSequenceClassification", dict(num_labels=1), {"score_error"}),
    "many labels": (
        "bert",
        "BertForSequenceClassification",
        FIVE | dict(problem_type="multi_label_classification"),
        {"kl", "class_agreement", "by_label"},
    ),
    "tokens": ("roberta", "RobertaForTokenClassification", dict(num_labels=5), {"kl", "class_agreement", "by_label"}),
    "answers": ("bert", "BertForQuestionAnswering", {}, {"kl", "start_agreement", "end_agreement"}),
    "choices": ("bert", "BertForMultipleChoice", {}, {"kl", "choice_agreement"}),
    "causal": ("gpt2", "GPT2LMHeadModel", {}, {"kl", "top1_agreement"}),
    "last token": ("gpt2", "GPT2ForSequenceClassification", dict(num_labels=5), {"kl", "class_agreement", "by_label"}),
    "two heads": (
        "bert",
        "BertForPreTraining",
        {},
        {"kl", "top1_agreement"} | {f"seq_relationship_{name}" for name in ("kl", "class_agreement", "by_label")},
    ),
    "T5 tokens": ("t5", "T5ForTokenClassification", dict(num_labels=5), {"kl", "class_agreement", "by_label"}),
    "T5 answers": ("t5", "T5ForQuestionAnswering", {}, {"kl", "start_agreement", "end_agreement"}),
    "no head": ("bert", "BertModel", {}, set()),
}
SHARED = {"embedding_cosine", "embedding_cosine_min", "token_cosine", "hidden_error", "hidden_error_by_layer"}


def model_of(case: str) -> tuple[Any, Any]:
    """A tiny model with the head, and its tokenizer."""
    family, name, options, _ = HEADS[case]
    config = tiny_model(family, **options).config
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model, tiny_tokenizer(family)


@pytest.fixture(autouse=True)
def no_other_process(monkeypatch):
    monkeypatch.setattr(verification, "_fresh_process", lambda *_: Check("fresh process", "passed", {}, ""))


@pytest.mark.parametrize("case", HEADS)
def test_every_head_is_compared(case):
    source, tokenizer = model_of(case)
    result = he.convert(copy.deepcopy(source), "local", attention_window=4, tokenizer=tokenizer)
    report = he.verify(result.model, source, TEXTS, tokenizer=tokenizer)
    assert report.passed, [check for check in report.checks if check.status == "failed"]
    figures = report["fidelity"].detail
    assert figures.keys() == SHARED | HEADS[case][3]
    assert report.verdict["figure"] == {"one score": "score_error", "no head": "embedding_cosine"}.get(case, "kl")
    json.dumps(report.to_dict(), allow_nan=False)
    # a model is as close to itself as can be
    itself = compare(source, source, text_batches(tokenizer, TEXTS, 64, 2, source))
    for name, value in itself.items():
        if name.endswith(("kl", "error")):
            assert abs(value) < 1e-9, name
        elif name.endswith("agreement"):
            assert value == 1, name


def test_figures_of_classes_are_those_of_a_plain_loop():
    source, tokenizer = model_of("classes")
    model = he.convert(copy.deepcopy(source), "local", attention_window=2, tokenizer=tokenizer).model
    batches = text_batches(tokenizer, TEXTS, 64, 3, source)
    found = compare(model, source, batches)
    with torch.no_grad():
        p, q = (torch.cat([m(**batch).logits for batch in batches]).double().softmax(-1) for m in (source, model))
    kl = (p * (p / q).log()).sum(-1)
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found["class_agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    for index in p.argmax(-1).unique().tolist():
        of_label = p.argmax(-1) == index
        entry = found["by_label"][source.config.id2label[index]]
        assert entry["predictions"] == int(of_label.sum())
        assert entry["kl"] == pytest.approx(float(kl[of_label].mean()), rel=1e-5)
    assert sum(entry["predictions"] for entry in found["by_label"].values()) == len(TEXTS)


# ---- the verdict -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["classes", "tokens", "answers", "causal", "no head", "one score"])
@pytest.mark.parametrize("is_useful", [True, False])
def test_no_better_than_no_attention_is_the_headline(case, is_useful, monkeypatch):
    source, tokenizer = model_of(case)
    result = he.convert(source, "local", attention_window=256, tokenizer=tokenizer)
    if not is_useful:
        monkeypatch.setattr(LocalAttention, "forward", MeanOfValues.forward)
    monkeypatch.setattr("hf_efficient.evaluation.verdict.MOSTLY_UNKNOWN", 1.0)
    found = quick_verdict(result.model, tokenizer, TEXTS[:2])
    assert found["better"] is is_useful
    start = "closer to the source than no attention: " if is_useful else "no better than no attention: "
    assert found["text"].startswith(start + found["figure"].replace("_", " ") + f" {found['value']:.4g}")
    assert f"without attention {found['controls']['mean of values']:.4g}" in found["text"]


def test_the_verdict_of_figures():
    def better(value: float, control: float, figure: str = "kl") -> bool:
        return verdict({figure: value, "embedding_cosine": value}, {"mean of values": {figure: control}})["better"]

    assert better(0.5, 1.0) and not better(0.95, 1.0) and not better(1.5, 1.0)
    assert better(0.9, 0.5, "embedding_cosine") and not better(0.51, 0.5, "embedding_cosine")
    assert better(0.0, 0.0) and not better(float("nan"), 1.0) and not better(0.5, float("nan"))
    two = verdict({"kl": 0.5}, {"mean of values": {"kl": 2.0}, "window only": {"kl": 0.5}})
    assert two["better"] and "no better than its window alone: kl 0.5, window alone 0.5" in two["text"]
    assert verdict({"kl": 0.5}, {}) == {"figure": "kl", "value": 0.5, "controls": {}, "better": None, "text": None}


def test_a_useless_model_passes_with_the_verdict_and_a_window_is_named_beside_it(tmp_path):
    source, tokenizer = model_of("causal")
    result = he.convert(copy.deepcopy(source), "hedgehog", attention_window=4, tokenizer=tokenizer)
    report = he.verify(result.model, source, TEXTS, tokenizer=tokenizer)
    assert report.passed and set(report.verdict["controls"]) == {"mean of values", "window only"}
    assert str(report).splitlines()[0] == "integrity and correctness: passed"
    assert report.to_dict()["verdict"]["text"] in " ".join(str(report).split())


# ---- texts, tokenizers and heads that are missing ------------------------------------------------------------------


def test_the_sources_tokenizer_serves_and_unknown_texts_are_named(tmp_path, logged):
    source = save_source(tmp_path / "source", "bert")
    made = he.convert(source, "local", attention_window=8).save(tmp_path / "made")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / name).unlink()
    assert he.verify(made, source, TEXTS).settings["unknown_tokens"] == 0
    he.verify(made, source, ["of something else altogether"] * 2)
    (message,) = [text for text in logged if "unknown" in text]
    assert message.startswith("100% of the texts' tokens are unknown to the tokenizer") and "give --texts" in message
    bare = shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match=r"made and .*bare have no tokenizer"):
        he.verify(made, bare, TEXTS)


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertModel"])
def test_what_the_source_lacks_is_left_out(head, tmp_path):
    source = save_source(tmp_path / "source", "bert")
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"architectures": [head]}))
    made = he.convert(source, "local", attention_window=8).save(tmp_path / "made")
    report = he.verify(made, source, TEXTS)
    assert report.passed, [check for check in report.checks if check.status == "failed"]
    assert any("pooler" in name for name in report["copied tensors"].detail["left out"])
    # the head that both drew is one and the same where outputs are compared
    exact = he.convert(source, "local", attention_window=256).save(tmp_path / "exact")
    assert he.verify(exact, source, TEXTS)["fidelity"].detail.get("kl", 0.0) < 1e-9


@pytest.mark.parametrize("is_quiet", [False, True])
def test_progress_is_shown_as_transformers_shows_it(is_quiet, capfd):
    source, tokenizer = model_of("no head")
    model = he.convert(copy.deepcopy(source), "local", attention_window=8, tokenizer=tokenizer).model
    verbosity = logging.get_verbosity()
    try:
        logging.enable_progress_bar()
        (logging.set_verbosity_error if is_quiet else logging.set_verbosity_warning)()
        he.verify(model, source, TEXTS[:2], tokenizer=tokenizer)
        assert ("verify" in capfd.readouterr().err) is not is_quiet
        logging.set_verbosity_warning()
        logging.disable_progress_bar()
        he.verify(model, source, TEXTS[:2], tokenizer=tokenizer)
        assert "verify" not in capfd.readouterr().err
    finally:
        logging.set_verbosity(verbosity)
        logging.disable_progress_bar()
