"""Exported models are transformers' own, and compute what the converted model does; what can't be said there is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from command_line import document, run
from command_line import error as command_error
from huggingface_hub import ModelCard
from long_models import HEADS, RMS, SEPARATOR, batch_for, converted_head, error, same_tensors, with_head
from tiny import converted, tiny_tokenizer

import hf_efficient as he
from hf_efficient.exporting.names import Names, fill
from hf_efficient.testing import tiny_model

FIRST = dict(global_tokens="first")
QUESTION = dict(global_tokens="before_separator", separator_token_id=SEPARATOR)
CONFIGS = ("config.json", "generation_config.json")
# class, mechanism, options, what it is exported to
ROWS: list[tuple[str, str, dict[str, Any], str]] = [
    *((f"Bert{head}", "longformer", FIRST, "longformer") for head in HEADS),
    *((f"Roberta{head}", "longformer", FIRST, "longformer") for head in HEADS),
    ("BertForQuestionAnswering", "longformer", QUESTION, "longformer"),
    ("RobertaForMaskedLM", "longformer", QUESTION, "longformer"),
    ("RobertaForSequenceClassification", "local", {}, "longformer"),
    ("BertForMaskedLM", "local", {}, "longformer"),
    ("XLMRobertaForTokenClassification", "longformer", {}, "longformer"),
    ("CamembertForMaskedLM", "longformer", FIRST, "longformer"),
    ("T5ForConditionalGeneration", "local", {}, "longt5"),
    ("T5ForConditionalGeneration", "longt5", RMS, "longt5"),
    ("T5EncoderModel", "longt5", RMS, "longt5"),
    ("MT5Model", "longt5", RMS, "longt5"),
    ("MT5ForConditionalGeneration", "local", {}, "longt5"),
]


@pytest.mark.parametrize(("name", "mechanism", "options", "to"), ROWS, ids=lambda value: str(value)[:24])
def test_the_saved_model_is_transformers_own_and_equal(name, mechanism, options, to, tmp_path):
    """Called as its card says, at lengths that no export compared."""
    model = converted_head(name, mechanism, **options)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = he.export(model, to, lengths=(33,))
    assert result.report.error <= 1e-5 and {row["padded"] for row in result.report.checks} == {True, False}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    path = result.save(tmp_path / "exported")
    loaded = getattr(transformers, result.report.result_class).from_pretrained(path)
    assert not hasattr(loaded.config, "efficient_attention") and loaded.config.model_type == to
    assert {file.name for file in path.iterdir()} <= {"README.md", "export_report.json", "model.safetensors", *CONFIGS}
    assert "efficient" not in "".join((path / file).read_text() for file in CONFIGS if (path / file).exists())
    assert result.report.tensors.keys() == loaded.state_dict().keys()
    same_tensors(loaded, result.model)
    for length in (61, 130) if to == "longformer" else (61,):
        batch = batch_for(model, length)
        room: dict[str, Any] = {"torch": torch, "model": loaded, "batch": batch}
        with torch.no_grad():
            exec(result.report.usage, room)
            assert error(room["outputs"], model(**batch), batch) <= 1e-5


def test_a_rule_of_global_tokens_is_not_in_the_model_and_the_card_says_so(tmp_path):
    model = converted_head("BertForMaskedLM", "longformer", **FIRST)
    result = he.export(model, "longformer", lengths=(33,))
    batch = batch_for(model, 61)
    with torch.no_grad():
        assert error(result.model(**batch), model(**batch), batch) > 0.05
    card = ModelCard.load(result.save(tmp_path / "exported") / "README.md").text
    assert "global_attention_mask=mask" in card and "Calls must give" in card and "| 33 | yes |" in card
    assert "Pad on the right only" in card  # positions of BERT count from the left edge


def test_left_padding_of_bert_is_a_limit_that_is_said(logged):
    model = converted_head("BertForMaskedLM", "local")
    exported = he.export(model, "longformer", lengths=(33,)).model
    assert any("Pad on the right only" in message for message in logged)
    batch = batch_for(model, 40)
    batch = {name: value.flip(-1) for name, value in batch.items()}
    with torch.no_grad():
        assert error(exported(**batch), model(**batch), batch) > 0.05
    # RoBERTa's positions count as a Longformer's
    model = converted_head("RobertaForMaskedLM", "local")
    exported = he.export(model, "longformer", lengths=(33,)).model
    batch = {name: value.flip(-1) for name, value in batch_for(model, 40).items()}
    with torch.no_grad():
        assert error(exported(**batch), model(**batch), batch) <= 1e-5


def test_windows_may_differ_between_layers():
    groups = [dict(mechanism="local", attention_window=8 * (1 + i), layers=[i]) for i in range(2)]
    model = he.convert(tiny_model("roberta"), groups).model
    assert he.export(model, "longformer", lengths=(40,)).model.config.attention_window == [8, 16]
    model = he.convert(tiny_model("roberta"), "longformer", attention_window=[16, 8]).model
    assert he.export(model, "longformer", lengths=(40,)).model.config.attention_window == [16, 8]


# ---- the stock class ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5", "llama"])
def test_stock_is_full_attention_with_the_longer_table(family, tmp_path):
    longer = {} if family in ("t5", "llama") else {"max_positions": 256}
    tokenizer = tiny_tokenizer(family) if family != "llama" else None
    model = he.convert(tiny_model(family), "local", attention_window=8, tokenizer=tokenizer, **longer).model
    if tokenizer is not None:
        tokenizer.model_max_length = 256
    result = he.export(model, "stock", lengths=(60,), tokenizer=tokenizer)
    assert result.report.error == 0.0 and result.report.checks[0]["distance"] > 0.01
    path = result.save(tmp_path / "exported")
    loaded = type(result.model).from_pretrained(path)
    stored = json.loads((path / "config.json").read_text())
    assert not [name for name in stored if "efficient" in name or name in ("auto_map", "attn_implementation")]
    assert stored["architectures"] == [type(tiny_model(family)).__name__]
    same_tensors(loaded, result.model)
    if longer:
        assert transformers.AutoTokenizer.from_pretrained(path).model_max_length == 256
        wide = he.convert(tiny_model(family), "local", attention_window=2**10, max_positions=256).model
        batch = batch_for(wide, 201)
        with torch.no_grad():
            assert error(loaded(**batch), wide(**batch), batch) <= 1e-5


def test_trained_parameters_are_dropped_on_request_alone():
    model = converted_head("BertForMaskedLM", "longformer", **FIRST)
    with pytest.raises(ValueError, match=r"12 parameters .* were trained, .*query_global.weight.*--accept-loss"):
        he.export(model, "stock")
    report = he.export(model, "stock", lengths=(60,), accept_loss=True).report
    assert len(report.dropped) == 12 and all(row["distance"] > 0.01 for row in report.checks)
    # as they start, nothing is lost
    start = he.convert(tiny_model("bert"), "longformer", attention_window=8, **FIRST).model
    assert he.export(start, "stock", lengths=(60,)).report.error == 0.0


# ---- refusals ----------------------------------------------------------------------------------------------------

HYBRID = [dict(mechanism="longformer", layers=[0]), dict(mechanism="local", layers=[1])]
REFUSED: list[tuple[str, Any, dict[str, Any], str, str]] = [
    ("bert", HYBRID, {}, "longformer", r"layers differ \(longformer, local\).* convert all layers"),
    ("bert", "local", dict(layers=[1]), "longformer", r"layers \[0\] keep full attention"),
    ("bert", "longformer", dict(dilation=2), "longformer", "dilation=2.* convert with dilation=1"),
    ("bert", "longformer", dict(dilation=[1, 2, 1, 2]), "longformer", "convert with dilation=1"),
    ("bert", "longformer", dict(global_tokens=[0, 3]), "longformer", r"\[0, 3\].* global_tokens='first' or"),
    (
        "roberta",
        "longformer",
        dict(global_tokens="question", separator_token_id=3),
        "longformer",
        "global_tokens='before_separator'",
    ),
    ("bert", "local", dict(sink_tokens=2), "longformer", "sink_tokens=2"),
    ("bert", "bigbird", dict(block_size=8), "longformer", "bigbird has no Longformer class: convert with longformer"),
    ("gpt2", "local", {}, "longformer", "gpt2 has no Longformer class.* to='stock'"),
    ("t5", "longt5", {}, "longt5", "pooling='rms', log_count=False"),
    ("t5", "longt5", RMS | dict(log_count=True), "longt5", "pooling='rms', log_count=False"),
    ("t5", "local", dict(side="both"), "longt5", "the decoder is converted.* side='encoder'"),
    ("t5", "local", dict(dilation=2), "longt5", "dilation=2"),
    ("umt5", "local", {}, "longt5", "a relative bias of its own in every layer"),
    ("bert", "local", {}, "longt5", "bert is no T5"),
    ("bert", "etc", dict(num_global_tokens=4), "stock", "learned tokens in front of its input"),
    ("bert", "local", {}, "tflite", "to='tflite' is not possible; it must be one of stock, longformer"),
]


@pytest.mark.parametrize(("family", "mechanism", "options", "to", "reason"), REFUSED)
def test_what_a_class_can_not_say_is_refused_with_what_it_can(family, mechanism, options, to, reason):
    model = he.convert(tiny_model(family), mechanism, **options).model
    with pytest.raises(ValueError, match=reason):
        he.export(model, to)


def test_models_and_settings_that_can_not_be_exported():
    model = he.convert(tiny_model("bert"), "local", attention_window=8).model
    for options, reason in [
        (dict(lengths=(64, 129)), r"129 is not possible.* positions for 128 tokens"),
        (dict(lengths=(0,)), "0 is not possible"),
        (dict(lengths=64), "at least one"),
        (dict(tolerance=-1.0), "tolerance=-1.0 is not possible"),
        (dict(accept_loss=True), "accept_loss is for to='stock'"),
        (dict(tolerance=1e-12), r"differ by .* more than tolerance=1e-12: nothing was made"),
    ]:
        with pytest.raises(ValueError, match=reason):
            he.export(model, "longformer", **options)
    with pytest.raises(ValueError, match="has no efficient attention"):
        he.export(tiny_model("bert"), "stock")
    with pytest.raises(ValueError, match="experts like these"):
        he.export(he.upcycle(model, 2).model, "longformer")
    with pytest.raises(ValueError, match="there is no LongformerForPreTraining"):
        he.export(converted_head("BertForPreTraining", "local"), "longformer")
    relu = he.convert(tiny_model("bert", hidden_act="relu"), "local").model
    with pytest.raises(ValueError, match="hidden_act='relu': LongformerForMaskedLM has gelu"):
        he.export(relu, "longformer")
    decoder = he.convert(with_head("BertLMHeadModel", is_decoder=True), "local").model
    with pytest.raises(ValueError, match=r"no LongformerLMHeadModel(.|\n)*is_decoder=True"):
        he.export(decoder, "longformer")


def test_a_difference_is_found_and_nothing_is_written(tmp_path, monkeypatch):
    """A wrong window, and weights that lack a place or a tensor."""
    source = converted(tmp_path / "source", "roberta")
    from hf_efficient.exporting.longformer import LongformerTarget

    right = LongformerTarget.config_for

    def wrong(self, found):
        config = right(self, found)
        config.attention_window = [window + 2 for window in config.attention_window]
        return config

    monkeypatch.setattr(LongformerTarget, "config_for", wrong)
    assert "more than tolerance=1e-05" in command_error("export", source, tmp_path / "out", "--to", "longformer")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(LongformerTarget, "config_for", right)
    monkeypatch.setattr(LongformerTarget, "names", lambda *_: Names())
    said = command_error("export", source, tmp_path / "out", "--to", "longformer")
    assert "roberta.embeddings.word_embeddings.weight has no place" in said
    assert not (tmp_path / "out").exists()


def test_names_are_read_in_both_directions_and_filling_leaves_nothing_out():
    names = Names((("a.*.b.*", "x.*.y.*"), ("a.*", "x.*")))
    for ours, theirs in {"a.1.b.w": "x.1.y.w", "a.w": "x.w", "c.w": "c.w"}.items():
        assert names.there(ours) == theirs and names.here(theirs) == ours
    model = tiny_model("bert")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bias = "cls.predictions.bias"
    for changed, reason in [
        ({name: t for name, t in tensors.items() if name != bias}, f"{bias} has no tensor"),
        (tensors | {"more": torch.zeros(1)}, "more has no place"),
        (tensors | {bias: torch.zeros(3)}, r"has the shape \(3,\)"),
        (tensors | {"cls.predictions.decoder.weight": torch.zeros(99, 32)}, "shares its values"),
    ]:
        with pytest.raises(ValueError, match=reason):
            fill(tiny_model("bert", seed=1), changed)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", dict(tie_word_embeddings=False)),
        ("roberta", dict(tie_word_embeddings=False)),
        ("bert", dict(pad_token_id=5)),
        ("roberta", dict(num_labels=1)),
    ],
)
def test_configs_of_sources_are_kept_and_models_left_in_their_mode(family, config):
    model = he.convert(tiny_model(family, **config), "longformer", attention_window=8, **FIRST).model.train()
    result = he.export(model, "longformer", lengths=(1, 2, 41))
    kept = result.model.config.to_dict()
    assert result.report.error <= 1e-5 and model.training and not result.model.training
    assert {name: kept[name] for name in config if name in kept} == {k: v for k, v in config.items() if k in kept}
    assert result.model.config.num_labels == model.config.num_labels


def test_pictures_have_no_lengths():
    model = he.convert(tiny_model("vit"), "local", attention_window=8).model
    assert [row["length"] for row in he.export(model, "stock").report.checks] == [None]
    with pytest.raises(ValueError, match="ViTModel takes pixel_values"):
        he.export(model, "stock", lengths=(16,))


@pytest.mark.parametrize("to", ["stock", "longformer"])
def test_other_data_types_are_kept(to):
    model = he.convert(tiny_model("roberta"), "local", attention_window=8).model.to(torch.bfloat16)
    result = he.export(model, to, lengths=(40,))
    assert result.model.dtype == torch.bfloat16 and result.report.error <= 1e-5


# ---- command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_folder_with_card_and_report(tmp_path):
    source = converted(tmp_path / "source", "bert")
    out = tmp_path / "out"
    told = document("export", source, out, "--to", "longformer", "--lengths", "40,201")
    assert told["result_class"] == "LongformerForMaskedLM" and told["error"] <= 1e-5
    assert [row["length"] for row in told["checks"]] == [40, 40, 201, 201]
    assert json.loads((out / "export_report.json").read_text())["tensors"] == told["tensors"]
    assert transformers.AutoTokenizer.from_pretrained(out).model_max_length == 256
    assert "exists; choose another folder" in command_error("export", source, out, "--to", "longformer")
    assert "global_attention_mask=mask" in run("export", source, out, "--to", "longformer", "--overwrite").stdout
    assert "can't be read" in command_error("export", source, tmp_path / "x", "--to", "stock", "--lengths", "a")
    (source / "modules.json").write_text(
        json.dumps([{"path": "", "type": "hf_efficient.training.pooling.AttentionPooling"}])
    )
    assert "needs hf_efficient" in command_error("export", source, tmp_path / "x", "--to", "stock")
