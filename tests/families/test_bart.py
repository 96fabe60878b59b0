"""BART and its relatives: two stacks with a shared config, each as long as it was made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from command_line import document, run
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import AutoTokenizer

import hf_efficient as he
from hf_efficient.cards.checkpoint import checkpoint_card
from hf_efficient.families import HostModel
from hf_efficient.testing import assert_close, inputs_for, tiny_model

TYPES = ("bart", "mbart", "plbart", "blenderbot", "blenderbot-small", "pegasus", "marian", "m2m_100")
TABLES = TYPES[:-1]
OLD, NEW = 132, 300
NARROW = dict(attention_window=8)


def logits(model: Any, source: int, target: int) -> Tensor:
    inputs = inputs_for(model, length=max(source, target))
    inputs = {name: x[:, : target if name.startswith("decoder") else source] for name, x in inputs.items()}
    with torch.no_grad():
        output: Tensor = model(**inputs).logits
    return output


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("side", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("model_type", TABLES)
def test_each_stack_has_its_own_length(model_type: str, side: str, tmp_path):
    """What is converted is lengthened, also after loading through an Auto class; what stays exact keeps its table."""
    model = tiny_model(model_type)
    state, short = state_of(model), logits(model, 90, 90)
    result = he.convert(model, "local", attention_window=2 * NEW, side=side, max_positions=NEW)
    lengths = {name: NEW if side in (name, "both") else OLD for name in ("encoder", "decoder")}
    assert HostModel.of(result.model).lengths == lengths
    config = result.model.config
    assert config.max_position_embeddings == NEW
    assert getattr(config, "efficient_positions", None) == (None if side == "both" else lengths)
    assert result.report.short_inputs == "unchanged"
    assert result.report.counts()["extended"] == list(lengths.values()).count(NEW)
    assert_close(logits(result.model, 90, 90), short, 1e-5)
    long = logits(result.model, lengths["encoder"], lengths["decoder"])
    for stack in ("encoder", "decoder"):
        where = " in its decoder.*side='both'" if stack == "decoder" else ": truncate"
        too_long = lengths | {stack: lengths[stack] + 1}
        with pytest.raises(ValueError, match=f"{lengths[stack]} positions{where}"):
            logits(result.model, too_long["encoder"], too_long["decoder"])
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(result.save(tmp_path / "saved"))
    assert type(loaded) is type(result.model) and HostModel.of(loaded).lengths == lengths
    assert torch.equal(logits(loaded, lengths["encoder"], lengths["decoder"]), long)
    for reverted in (he.revert(result.model), he.revert(loaded)):
        assert all(torch.equal(tensor, state[name]) for name, tensor in reverted.state_dict().items())
        assert torch.equal(logits(reverted, 90, 90), short)
        assert reverted.config.max_position_embeddings == OLD and not hasattr(reverted.config, "efficient_positions")


def test_other_stacks_of_a_hand_made_model_stay():
    """What was not lengthened is not touched on the way back, whatever its length."""
    model = tiny_model("bart")
    HostModel.of(model).lengthen(200, sides=["decoder"])
    state = state_of(model)
    for longer in ({}, dict(max_positions=150), dict(max_positions=NEW)):
        reverted = he.revert(he.convert(model, "local", **NARROW, side="encoder", **longer).model)
        assert all(torch.equal(tensor, state[name]) for name, tensor in reverted.state_dict().items())


def test_groups_of_both_stacks_and_a_decoder_alone():
    groups = [
        {"mechanism": "local", "attention_window": 8, "side": "encoder", "layers": [1]},
        {"mechanism": "local", "attention_window": 6, "side": "decoder", "layers": [0]},
    ]
    model = he.convert(tiny_model("bart"), groups, max_positions=NEW).model
    assert HostModel.of(model).lengths == {"encoder": NEW, "decoder": NEW}
    assert logits(model, NEW, NEW).isfinite().all()
    config = transformers.BartConfig(**tiny_model("bart").config.to_diff_dict())
    alone = transformers.BartForCausalLM(config).eval()
    assert not alone.config.is_encoder_decoder
    before = logits(alone, 90, 0)
    converted = he.convert(alone, "local", attention_window=2 * NEW, max_positions=NEW).model
    assert HostModel.of(converted).lengths == {"decoder": NEW}
    assert_close(logits(converted, 90, 0), before, 1e-5)


def test_a_stock_export_has_one_length_for_both_stacks(tmp_path):
    model = tiny_model("bart")
    result = he.convert(model, "local", attention_window=2 * NEW, max_positions=NEW)
    expected = logits(result.model, NEW, OLD)
    exported = he.export(result.model, "stock")
    assert exported.report.tensors["model.decoder.embed_positions.weight"]["status"] == "extended"
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(exported.save(tmp_path / "stock"))
    assert type(loaded) is transformers.BartForConditionalGeneration
    assert HostModel.of(loaded).lengths == {"encoder": NEW, "decoder": NEW}
    assert_close(logits(loaded, NEW, OLD), expected, 1e-5)


def test_lengths_are_told_where_checkpoints_are_described(tmp_path):
    tiny_model("bart").save_pretrained(tmp_path / "source")
    tiny_tokenizer("roberta").save_pretrained(tmp_path / "source")
    options = ["--attention", "local", "--attention-window", 8, "--max-positions", NEW]
    told = document("convert", tmp_path / "source", tmp_path / "long", *options)
    assert told["lengths"] == {"encoder": NEW, "decoder": OLD}
    shown = " ".join(run("inspect", tmp_path / "long").stdout.split())  # a long path breaks the line anywhere
    assert f"encoder {NEW}, decoder {OLD} positions" in shown
    card = checkpoint_card(str(tmp_path / "long")).text
    assert f"Inputs: encoder {NEW}, decoder {OLD} positions." in card
    assert f"The original was made for {OLD} tokens; longer inputs were not tested." in card
    assert AutoTokenizer.from_pretrained(tmp_path / "long").model_max_length == NEW
    shown = run("convert", tmp_path / "source", tmp_path / "answers", *options, "--side", "decoder").stdout
    assert f"encoder {OLD}" in shown and f"decoder {NEW}" in shown
    assert AutoTokenizer.from_pretrained(tmp_path / "answers").model_max_length == 128


@pytest.mark.parametrize("model_type", ["bart", "pegasus", "m2m_100", "nllb-moe"])
def test_decoders_are_causal(model_type: str):
    model = he.convert(tiny_model(model_type), "local", attention_window=2 * NEW, side="both").model
    inputs = inputs_for(model, length=20, padded=False)
    states = model.get_input_embeddings()(inputs.pop("decoder_input_ids")).detach().requires_grad_()
    out = model(**inputs, decoder_inputs_embeds=states).logits
    (gradient,) = torch.autograd.grad(out[0, 9].sum(), states)
    assert gradient[0, :10].abs().amax(-1).min() > 0 and not gradient[0, 10:].any()


# ---- sinusoids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["pegasus", "marian"])
def test_sinusoids_are_those_of_a_longer_model(model_type: str):
    longer = tiny_model(model_type, max_position_embeddings=NEW).model.encoder.embed_positions.weight
    model = tiny_model(model_type)
    table = model.model.encoder.embed_positions
    result = he.convert(model, "local", **NARROW, max_positions=NEW)
    assert result.report.positions == "recompute" and torch.equal(table.weight, longer)
    assert not table.weight.requires_grad
    he.revert(result.model)
    assert torch.equal(table.weight, longer[:OLD])


def test_sinusoids_that_were_trained_are_lengthened_as_learned_rows():
    model = tiny_model("pegasus")
    table = model.model.encoder.embed_positions
    with torch.no_grad():
        table.weight += 0.1
    before = table.weight.clone()
    with pytest.raises(ValueError, match=r"does not hold the sines and cosines.*positions='tile' or 'interpolate'"):
        he.convert(model, "local", **NARROW, max_positions=NEW)
    assert torch.equal(table.weight, before) and model.config.max_position_embeddings == OLD
    he.convert(model, "local", **NARROW, max_positions=2 * OLD, positions="tile")
    assert torch.equal(table.weight, torch.cat([before] * 2))


def test_sinusoids_without_an_end(tmp_path):
    model = tiny_model("m2m_100")
    short = logits(model, 90, 90)
    result = he.convert(model, "local", attention_window=2 * NEW, max_positions=NEW)
    assert (result.report.positions, result.report.short_inputs) == ("recompute", "unchanged")
    assert_close(logits(result.model, 90, 90), short, 1e-5)
    long = logits(result.model, NEW, 90)
    loaded = type(result.model).from_pretrained(result.save(tmp_path / "saved"))
    assert loaded.config.max_position_embeddings == NEW and torch.equal(logits(loaded, NEW, 90), long)
    assert he.revert(loaded).config.max_position_embeddings == OLD


def test_holes_that_positions_do_not_count_are_refused():
    model = he.convert(tiny_model("m2m_100"), "local", **NARROW).model
    inputs = inputs_for(model, length=20, padded=False)
    inputs["attention_mask"][1, 5:8] = 0
    inputs["input_ids"][1, 5:8] = model.config.pad_token_id
    with torch.no_grad(), pytest.raises(ValueError, match="zeros between real tokens"):
        model(**inputs)
