"""BART as LED, with a table of positions for each stack, and BERT as Nystromformer, with its rule for the pseudo-inverse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from long_models import batch_for, error, same_tensors, spread, trained, with_head

import hf_efficient as he
from hf_efficient.conversion.loading import load_converted
from hf_efficient.testing import VOCABULARY, tiny_model

OFFSET = 2
BART_HEADS = {
    "Model": ("longformer", dict(global_tokens="first")),
    "ForConditionalGeneration": ("local", {}),
    "ForQuestionAnswering": ("longformer", {}),
}


def _differing(one: Any, other: Any) -> set[str]:
    """Tensors that differ anywhere but in the rows of position tables that no token has."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    rows = {name: OFFSET * ("embed_positions" in name or "position_embeddings" in name) for name in ours}
    return {name for name in ours if not ours[name][rows[name] :].equal(theirs[name][rows[name] :])}


@pytest.mark.parametrize("head", BART_HEADS)
def test_bart_is_an_led_of_the_same_head_and_comes_back(head, tmp_path):
    mechanism, options = BART_HEADS[head]
    original = spread(getattr(transformers, f"Bart{head}")(tiny_model("bart").config))
    decoder = original.get_decoder().embed_positions.num_embeddings - OFFSET
    setting = dict(attention_window=16, max_positions=2 * decoder + 40, **options)
    model = trained(he.convert(copy.deepcopy(original), mechanism, **setting).model)
    result = he.export(model, "led", lengths=(2 * decoder + 9,))  # whatever the decoder's length is
    loaded = getattr(transformers, f"LED{head}").from_pretrained(result.save(tmp_path / "exported")).eval()
    assert loaded.config.attention_window == [16, 16]
    assert loaded.config.max_encoder_position_embeddings == 2 * decoder + 40
    assert loaded.config.max_decoder_position_embeddings == decoder
    same_tensors(loaded, result.model)
    batch = batch_for(model, 150)
    room: dict[str, Any] = {"torch": torch, "model": loaded, "batch": batch}
    with torch.no_grad():
        exec(result.report.usage, room)
        assert error(room["outputs"], model(**batch), batch) <= 1e-5
    ours = load_converted(he.import_checkpoint(tmp_path / "exported", lengths=(33,)).save(tmp_path / "ours"))
    assert ours.config.efficient_attention == model.config.efficient_attention
    assert not _differing(ours, model)
    back = he.revert(ours)
    assert type(back) is type(original) and not _differing(back, original)
    assert back.config.max_position_embeddings == original.config.max_position_embeddings


def test_texts_of_an_led_fit_its_table_in_whole_windows():
    model = he.convert(tiny_model("bart"), "local", attention_window=24, max_positions=200).model
    report = he.export(model, "led").report
    assert report.max_positions == report.checks[-1]["length"] == 192
    assert report.cautions[0].startswith("Give texts of at most 192 tokens")
    with pytest.raises(ValueError, match=r"193 is not possible.* the class takes no more than 192 tokens"):
        he.export(model, "led", lengths=(64, 193))
    wide = he.convert(tiny_model("bart"), "local", attention_window=202, max_positions=200).model
    with pytest.raises(ValueError, match=r"attention_window=202: .* at most 200, or with max_positions=202"):
        he.export(wide, "led")


SCALED = dict(block_size=8)
REFUSED: list[tuple[Any, str, dict[str, Any], str, str]] = [
    ("bart", "longformer", dict(side="both"), "led", "the decoder is converted.* side='encoder'"),
    ("bart", "local", dict(side="decoder"), "led", "the decoder is converted(.|\n)*keep full attention"),
    ("bart", "bigbird", SCALED, "led", "bigbird has no LED class: convert with longformer or local"),
    ("bart", "longformer", dict(dilation=2), "led", "LED has none, so convert with dilation=1"),
    ("bart", "longformer", dict(global_tokens="question", separator_token_id=3), "led", "'before_separator'"),
    ("bart", "longformer", {}, "longformer", "bart has no Longformer class"),
    ("bert", "longformer", {}, "led", "bert has no LED class, which bart has: to='stock'"),
    ("bert", "nystromformer", dict(conv_kernel_size=None), "nystromformer", "with an odd conv_kernel_size"),
    ("bert", "nystromformer", dict(pinv_iterations=3), "nystromformer", "takes 6, so convert with None"),
    ("bert", "nystromformer", dict(layers=[1]), "nystromformer", r"layers \[0\] keep full attention"),
    ("bert", "local", {}, "nystromformer", "local has no Nystromformer class: convert with nystromformer"),
    ("roberta", "nystromformer", {}, "nystromformer", "roberta has no Nystromformer class, which bert has"),
]


@pytest.mark.parametrize(("family", "mechanism", "options", "to", "reason"), REFUSED)
def test_what_these_classes_can_not_be(family, mechanism, options, to, reason):
    model = he.convert(tiny_model(family), mechanism, **options).model
    with pytest.raises(ValueError, match=reason):
        he.export(model, to)


def test_classes_that_there_are_not():
    scaled = he.convert(tiny_model("bart", scale_embedding=True), "longformer").model
    with pytest.raises(ValueError, match="scale_embedding=True: an LED does not scale"):
        he.export(scaled, "led")
    for name, reason in (
        ("BertModel", "NystromformerModel has no pooler: convert .*add_pooling_layer=False"),
        ("BertForSequenceClassification", "no Nystromformer class has the head of BertForSequenceClassification"),
    ):
        with pytest.raises(ValueError, match=reason):
            he.export(he.convert(with_head(name), "nystromformer").model, "nystromformer")
    model = he.convert(tiny_model("bert"), "nystromformer", num_landmarks=16).model
    with pytest.raises(ValueError, match=r"lengths=\(64, 128\): the class takes texts of 128 tokens alone"):
        he.export(model, "nystromformer", lengths=(64, 128))
    with pytest.raises(ValueError, match="lengths=128 is not possible; give at least one"):
        he.export(model, "nystromformer", lengths=128)


# ---- Nystromformer -------------------------------------------------------------------------------------------------


def _convolving(model: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith(("convolution", "conv.weight")):
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForTokenClassification"])
def test_bert_is_a_nystromformer_but_for_the_start_of_the_inverse(head, tmp_path):
    keywords = {"add_pooling_layer": False} if head == "Model" else {}
    original = spread(getattr(transformers, f"Bert{head}")(tiny_model("bert").config, **keywords))
    setting = dict(num_landmarks=16, conv_kernel_size=7, max_positions=200)
    model = _convolving(he.convert(copy.deepcopy(original), "nystromformer", **setting).model)
    result = he.export(model, "nystromformer")
    (row,) = result.report.checks
    # the longest text of whole segments
    assert row["length"] == 192 and row["error"] <= 1e-5 and row["distance"] > 1e-4
    path = result.save(tmp_path / "exported")
    loaded = getattr(transformers, f"Nystromformer{head}").from_pretrained(path)
    same_tensors(loaded, result.model)
    ours = he.import_checkpoint(path).model
    assert ours.config.efficient_attention[0]["pinv_init"] == "batch"
    same_tensors(ours, model)
    same_tensors(he.revert(ours), original)
    del model.config.efficient_source  # as in a model that was built from a config
    same_tensors(he.import_checkpoint(he.export(model, "nystromformer").model).model, model)


@pytest.mark.parametrize(("landmarks", "length"), [(8, 40), (16, 16)])
def test_a_nystromformer_is_imported_for_any_length_and_goes_back(landmarks, length, tmp_path):
    """As many landmarks as tokens are full attention, whatever the length."""
    sizes = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_landmarks=landmarks, segment_means_seq_len=length, conv_kernel_size=5, vocab_size=VOCABULARY)
    config = transformers.NystromformerConfig(max_position_embeddings=60, **sizes)
    theirs = _convolving(spread(transformers.NystromformerForMaskedLM(config)))
    ours = load_converted(he.import_checkpoint(theirs).save(tmp_path / "ours"))
    ids = batch_for(theirs, length if landmarks < length else 55)["input_ids"]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = batch_for(theirs, 50)
    with torch.no_grad():
        assert error(ours(**whole), theirs(**whole), whole) <= 1e-5
        assert ours(**batch).logits.isfinite().all()
    back = he.export(ours, "nystromformer").model
    assert not _differing(back, theirs)
    before, after = theirs.config.to_dict(), back.config.to_dict()
    names = ("num_landmarks", "segment_means_seq_len", "conv_kernel_size", "max_position_embeddings", "hidden_act")
    assert {n: before[n] for n in names if n != "num_landmarks" or landmarks < length} == {
        n: after[n] for n in names if n != "num_landmarks" or landmarks < length
    }
    with pytest.raises(ValueError, match=r"imported from a nystromformer checkpoint .* --to nystromformer"):
        he.revert(ours)


def test_a_scale_of_the_whole_batch_is_for_imported_checkpoints_alone(tmp_path):
    reason = "pinv_init='batch' makes each row depend on the rest of its batch"
    model, options = tiny_model("bert"), dict(pinv_init="batch", num_landmarks=8)
    with pytest.raises(ValueError, match=reason):
        he.convert(model, "nystromformer", **options)
    with pytest.raises(ValueError, match=reason), he.patch_attention(model, "nystromformer", **options):
        pass
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        he.EfficientBertForMaskedLM.from_pretrained(tmp_path, efficient_attention="nystromformer", **options)
    with pytest.raises(ValueError, match="pinv_init='rows' is not possible; it must be one of matrix, batch"):
        he.attention_config("nystromformer", pinv_init="rows")
