"""Longformer and LongT5 checkpoints as converted models: equal to their own classes, and back bit for bit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from command_line import document, run
from command_line import error as command_error
from long_models import HEADS, RMS, batch_for, error, long_model, same_tensors, trained, with_head
from tiny import tiny_tokenizer

import hf_efficient as he
from hf_efficient.conversion.loading import load_converted
from hf_efficient.conversion.revert import revert_checkpoint
from hf_efficient.testing import tiny_model

ROWS = [
    *((f"Longformer{head}", {}) for head in HEADS),
    ("LEDForConditionalGeneration", {}),
    ("LEDModel", dict(max_decoder_position_embeddings=130)),
    ("LongT5ForConditionalGeneration", dict(encoder_attention_type="local", feed_forward_proj="gated-gelu")),
    ("LongT5ForConditionalGeneration", dict(encoder_attention_type="transient-global", tie_word_embeddings=False)),
    ("LongT5EncoderModel", dict(encoder_attention_type="transient-global", global_block_size=5)),
    ("LongT5Model", dict(encoder_attention_type="local", num_decoder_layers=1)),
]


@pytest.mark.parametrize(("name", "options"), ROWS)
def test_imported_models_equal_their_own_class_and_go_back_bit_for_bit(name, options, tmp_path):
    theirs = long_model(name, **options)
    folder = tmp_path / "theirs"
    theirs.save_pretrained(folder)
    result = he.import_checkpoint(folder, lengths=(33,))
    loaded = load_converted(result.save(tmp_path / "ours"))
    counts = result.report.counts()
    assert counts["copied"] + counts["extended"] == len(loaded.state_dict()) == len(result.report.tensors)
    assert counts["extended"] == (2 if name.startswith("LED") else 0)  # BART's two rows that no token has
    for length in (21, 77):
        batch = batch_for(theirs, length)
        with torch.no_grad():
            # the marks of multiple choice are no rule here
            given = {"global_attention_mask": torch.zeros_like(batch["input_ids"])} if "Choice" in name else {}
            assert error(loaded(**batch, **given), theirs(**batch, **given), batch) <= 1e-5
    kind = theirs.config.model_type
    with pytest.raises(ValueError, match=rf"imported from a {kind} checkpoint .* --to {kind}"):
        he.revert(loaded)
    back = he.export(tmp_path / "ours", kind, lengths=(33,)).save(tmp_path / "back")
    same_tensors(type(theirs).from_pretrained(back), theirs)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, back))
    # T5's encoder says of itself that it has no decoder
    lost = {"is_encoder_decoder", "use_cache"} if name == "LongT5EncoderModel" else set()
    assert {k: v for k, v in before.items() if k not in lost} == {k: v for k, v in after.items() if k not in lost}
    if name != "LongT5EncoderModel":  # which AutoModel takes for half a model
        assert type(transformers.AutoModel.from_pretrained(tmp_path / "ours")).__name__.startswith("Efficient")


def test_global_tokens_that_a_call_marks_are_those_of_the_class():
    theirs = long_model("LongformerForMaskedLM")
    ours = he.import_checkpoint(theirs, lengths=(33,)).model
    batch = batch_for(theirs, 50)
    marks = torch.zeros_like(batch["input_ids"])
    marks[:, [0, 9, 20]] = 1
    with torch.no_grad():
        expected = theirs(**batch, global_attention_mask=marks)
        assert error(ours(**batch, global_attention_mask=marks), expected, batch) <= 1e-5
        assert error(ours(**batch), expected, batch) > 0.01


def test_imports_and_their_refusals_at_the_command_line(tmp_path):
    theirs = long_model("LongformerForQuestionAnswering", max_position_embeddings=258)
    theirs.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer("roberta", 256).save_pretrained(tmp_path / "theirs")
    out = tmp_path / "ours"
    told = document("import", tmp_path / "theirs", out, "--lengths", "40")
    group = told["efficient_attention"][0]
    assert (group["global_tokens"], group["separator_token_id"]) == ("before_separator", 7)
    assert (
        told["history"][-1]["what"] == "import" and max(row["error"] for row in told["history"][-1]["checks"]) <= 1e-5
    )
    assert transformers.AutoTokenizer.from_pretrained(out).model_max_length == 256
    assert "hf-efficient export" in command_error("revert", out, tmp_path / "reverted")
    run("card", out)
    assert f"hf-efficient import {tmp_path / 'theirs'}" in (out / "README.md").read_text()
    assert "hf-efficient import, makes" in command_error(
        "convert", tmp_path / "theirs", tmp_path / "x", "--attention", "local"
    )
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    assert "bert checkpoint, which is not imported" in command_error("import", tmp_path / "bert", tmp_path / "x")
    with pytest.raises(ValueError, match="attention_window can't be chosen here"):
        he.import_checkpoint(theirs, attention_window=64)
    with pytest.raises(ValueError, match="more than tolerance=1e-12"):
        he.import_checkpoint(theirs, lengths=(40,), tolerance=1e-12)


def test_a_separator_ends_the_question_with_it_or_before_it():
    model = he.convert(
        tiny_model("bert"), "longformer", attention_window=4, global_tokens="before_separator", separator_token_id=7
    ).model
    batch = batch_for(model, 40)
    marks = torch.zeros_like(batch["input_ids"])
    for row, ids in zip(marks, batch["input_ids"], strict=True):
        row[: int((ids == 7).nonzero()[0])] = 1
    with torch.no_grad():
        assert error(model(**batch), model(**batch, global_attention_mask=marks), batch) <= 1e-6
        marks[:, 10] = 1
        assert error(model(**batch), model(**batch, global_attention_mask=marks), batch) > 1e-3


# ---- what was converted, and exported ------------------------------------------------------------------------------

FIRST = dict(global_tokens="first")
QUESTION = dict(global_tokens="before_separator", separator_token_id=7)
BIGBIRD = dict(block_size=4, num_random_blocks=0, first_block_weight=2.0)
EXPORTED = [
    ("BertForMaskedLM", "longformer", FIRST, "longformer"),
    ("BertModel", "local", {}, "longformer"),
    ("BertForQuestionAnswering", "longformer", QUESTION, "longformer"),
    ("RobertaForSequenceClassification", "local", {}, "longformer"),
    ("XLMRobertaForTokenClassification", "longformer", FIRST, "longformer"),
    ("CamembertForMultipleChoice", "longformer", {}, "longformer"),
    ("T5ForConditionalGeneration", "longt5", RMS, "longt5"),
    ("T5EncoderModel", "local", {}, "longt5"),
    ("MT5ForConditionalGeneration", "longt5", RMS, "longt5"),
    ("BertForMaskedLM", "bigbird", BIGBIRD, "bigbird"),
    ("BertModel", "bigbird", BIGBIRD, "bigbird"),
]


def _trained(name: str, mechanism: str, options: dict) -> tuple:
    """A stock model, and its converted form with a longer table and a trained mechanism."""
    original = with_head(name)
    options = options | ({} if mechanism == "bigbird" else {"attention_window": 16})
    longer = {} if "T5" in name else {"max_positions": 256, "positions": "interpolate"}
    return original, trained(he.convert(copy.deepcopy(original), mechanism, **longer, **options).model)


@pytest.mark.parametrize(("name", "mechanism", "options", "to"), EXPORTED)
def test_an_exported_model_comes_back_as_what_it_was_and_reverts_to_the_original(
    name, mechanism, options, to, tmp_path
):
    original, model = _trained(name, mechanism, options)
    path = he.export(model, to, lengths=(64,)).save(tmp_path / "exported")
    theirs = getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
    theirs.from_pretrained(path).save_pretrained(tmp_path / "saved by transformers")
    result = he.import_checkpoint(tmp_path / "saved by transformers", lengths=(64,))
    assert result.model.config.efficient_attention == model.config.efficient_attention
    ours = load_converted(result.save(tmp_path / "ours"))
    assert type(ours) is type(model)
    same_tensors(ours, model)
    revert_checkpoint(str(tmp_path / "ours"), tmp_path / "original")
    back = type(original).from_pretrained(tmp_path / "original")
    same_tensors(back, original)
    kept = {"dtype", "architectures", "transformers_version", "is_encoder_decoder", "use_cache", "sep_token_id"}
    before, after = (
        {name: value for name, value in one.config.to_dict().items() if name not in kept and not name.startswith("_")}
        for one in (original, back)
    )
    assert before == after


def test_training_and_another_head_in_the_other_class_stay(tmp_path):
    original, model = _trained("BertForMaskedLM", "longformer", FIRST)
    he.export(model, "longformer", lengths=(33,)).save(tmp_path / "exported")
    theirs = transformers.LongformerForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    with torch.no_grad():
        theirs.longformer.embeddings.word_embeddings.weight[9] += 1.0
    ours = he.import_checkpoint(theirs, lengths=(33,)).model
    # the class marks its first token, whatever the rule of the model that it was
    assert type(ours).__name__ == "EfficientBertForSequenceClassification"
    back = he.revert(ours)
    assert type(back) is transformers.BertForSequenceClassification and back.config.max_position_embeddings == 128
    expected = original.state_dict()
    changed = {
        name for name, t in back.bert.encoder.state_dict().items() if not t.equal(expected["bert.encoder." + name])
    }
    words = back.bert.embeddings.word_embeddings.weight - original.bert.embeddings.word_embeddings.weight
    assert not changed and words.nonzero()[:, 0].unique().tolist() == [9]
    positions = back.bert.embeddings.position_embeddings.weight
    assert positions.equal(original.bert.embeddings.position_embeddings.weight)


def test_options_and_projections_that_are_no_longer_those_of_the_export():
    _, model = _trained("RobertaForMaskedLM", "local", {})
    theirs = he.export(model, "longformer", lengths=(33,)).model
    with torch.no_grad():
        theirs.longformer.encoder.layer[1].attention.self.value_global.weight.add_(0.5)
    ours = he.import_checkpoint(theirs, lengths=(33,)).model
    assert ours.config.efficient_attention[0]["mechanism"] == "longformer"
    assert type(he.revert(ours)) is transformers.RobertaForMaskedLM
    theirs = he.export(model, "longformer", lengths=(33,)).model
    theirs.config.attention_window = [8, 16]
    theirs = type(theirs)(theirs.config).eval()
    assert he.import_checkpoint(theirs, lengths=(33,)).model.config.efficient_attention[0]["attention_window"] == [
        8,
        16,
    ]
    for note in ("yes", {"model_class": "RobertaModel"}, theirs.config.converted_from | {"model_class": "GPT2Model"}):
        theirs.config.converted_from = note
        with pytest.raises(ValueError, match=r"is damaged; remove it|GPT2Model is not among what a Longformer"):
            he.import_checkpoint(theirs, lengths=(33,))
