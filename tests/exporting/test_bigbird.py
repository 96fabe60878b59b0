"""BERT with `bigbird` as transformers' BigBird and back, where that class does what it says: long, unpadded, in blocks."""

from __future__ import annotations

import pytest
import torch
import transformers
from long_models import batch_for, error, same_tensors, with_head

import hf_efficient as he
from hf_efficient.conversion.loading import load_converted
from hf_efficient.testing import tiny_model

SETTING = dict(block_size=4, num_random_blocks=0)
HEADS = ("Model", "ForMaskedLM", "ForPreTraining", "ForTokenClassification")


@pytest.mark.parametrize(("head", "blocks"), [(head, 1 + 2 * (i % 2)) for i, head in enumerate(HEADS)])
def test_both_ways_are_equal_and_the_way_back_is_the_same(head, blocks, tmp_path):
    model = he.convert(
        with_head(f"Bert{head}"), "bigbird", max_positions=256, first_block_weight=1.0 + blocks, **SETTING
    ).model
    path = he.export(model, "bigbird", lengths=(64,)).save(tmp_path / "theirs")
    theirs = getattr(transformers, f"BigBird{head}").from_pretrained(path).eval()
    assert (theirs.config.block_size, theirs.config.num_random_blocks) == (4, blocks)
    imported = he.import_checkpoint(path, lengths=(64,)).save(tmp_path / "ours")
    ours = load_converted(imported)
    same_tensors(ours, model)
    batch = {"input_ids": batch_for(model, 100)["input_ids"]} | {"attention_mask": torch.ones(2, 100).long()}
    with torch.no_grad():
        expected = theirs(**batch)
        assert error(model(**batch), expected, batch) <= 1e-5 and error(ours(**batch), expected, batch) <= 1e-5
        # without the weight of the first block they are not equal
        other = he.convert(he.revert(model), "bigbird", **SETTING).model
        assert error(other(**batch), expected, batch) > 1e-3
    same_tensors(he.export(ours, "bigbird", lengths=(64,)).model, theirs)
    del theirs.config.converted_from
    with pytest.raises(ValueError, match=r"imported from a bigbird checkpoint .* --to bigbird"):
        he.revert(he.import_checkpoint(theirs, lengths=(64,)).model)


def test_what_a_bigbird_can_not_be():
    weighted = SETTING | dict(first_block_weight=2.0)
    for family, mechanism, options, reason in [
        ("bert", "bigbird", dict(block_size=4), r"num_random_blocks=3 .* first_block_weight=1 \+ r"),
        ("bert", "bigbird", SETTING | dict(first_block_weight=1.5), r"first_block_weight=1 \+ r"),
        ("bert", "bigbird", dict(block_size=4, form="etc", num_random_blocks=0), "convert with form='itc'"),
        ("bert", "local", {}, "local has no BigBird class: convert with bigbird"),
        ("roberta", "bigbird", weighted, "roberta has no BigBird class"),
        ("bert", "bigbird", weighted | dict(layers=[0]), r"layers \[1\] keep full attention"),
    ]:
        with pytest.raises(ValueError, match=reason):
            he.export(he.convert(tiny_model(family), mechanism, **options).model, "bigbird")
    model = he.convert(with_head("BertForQuestionAnswering"), "bigbird", **weighted).model
    with pytest.raises(ValueError, match="no BigBird class has the head of BertForQuestionAnswering"):
        he.export(model, "bigbird")
    model = he.convert(tiny_model("bert"), "bigbird", **weighted).model
    with pytest.raises(ValueError, match="multiples of 4 above 28"):
        he.export(model, "bigbird", lengths=(64, 28))
    assert [row["length"] for row in he.export(model, "bigbird").report.checks] == [64, 80, 128]
    wide = he.convert(tiny_model("bert"), "bigbird", block_size=64, num_random_blocks=0, first_block_weight=2.0).model
    with pytest.raises(ValueError, match="128 positions are too few"):
        he.export(wide, "bigbird")
    with pytest.raises(ValueError, match=r"first_block_weight=2 is what .* leave it out in a causal model"):
        he.convert(tiny_model("gpt2"), "bigbird", **weighted)
    for option in (dict(first_block_weight=2.0), dict(form="etc", num_global_tokens=2)):
        part = dict(mechanism="bigbird", num_random_blocks=0) | option
        with pytest.raises(ValueError, match=r"bigbird: \w+=2 is no pattern, and a combination"):
            he.convert(tiny_model("bert"), "combined", patterns=["local", part])
    for value in (0.5, float("inf"), True):
        with pytest.raises(ValueError, match="first_block_weight"):
            he.attention_config("bigbird", first_block_weight=value)
    sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=99, intermediate_size=48)
    for theirs, reason in (
        (
            dict(attention_type="original_full"),
            "attention_type='original_full': BERT with bigbird can be 'block_sparse'",
        ),
        (dict(num_random_blocks=0), "num_random_blocks=0: BigBird's class can't run"),
    ):
        with pytest.raises(ValueError, match=reason):
            he.import_checkpoint(transformers.BigBirdModel(transformers.BigBirdConfig(**theirs, **sizes)))
