"""Calls whose keywords decide who sees whom: global masks beside caches and decoders, causality, bad options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import save_source

import hf_efficient as he
from hf_efficient.conversion import folders
from hf_efficient.conversion.sentence_transformers import SETTINGS
from hf_efficient.families import HostModel
from hf_efficient.models.in_place import convert_in_place
from hf_efficient.testing import assert_close, inputs_for, tiny_model

SMALL = dict(attention_window=4)


def converted(model_type: str, **options):
    model = tiny_model(model_type)
    convert_in_place(HostModel.of(model), [he.attention_config("longformer", **SMALL, **options)])
    return model


def global_mask(inputs, *positions: int):
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, list(positions)] = 1
    return mask


# ---- global_attention_mask ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_global_tokens_stay_global_while_decoding_with_padding():
    model = converted("gpt2")
    inputs = inputs_for(model, length=24)
    for rows in inputs.values():  # prompts end at the right edge
        rows[1] = rows[1].flip(0)
    mask = global_mask(inputs, 8, 9)
    options = dict(do_sample=False, max_new_tokens=6, global_attention_mask=mask)
    with_cache = model.generate(**inputs, **options)
    without = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(with_cache, without)
    full, part = model(**inputs, global_attention_mask=mask).logits, model(**inputs).logits
    assert (full - part).abs().max() > 1e-3, "the mask changes nothing, so nothing was tested"
    prefix = {k: v[:, :20] for k, v in inputs.items()}
    out = model(**prefix, global_attention_mask=mask[:, :20], use_cache=True)
    step = model(
        input_ids=inputs["input_ids"][:, 20:],
        attention_mask=inputs["attention_mask"],
        global_attention_mask=mask[:, :20],
        past_key_values=out.past_key_values,
    )
    real = inputs["attention_mask"][:, 20:]
    assert_close(step.logits, full[:, 20:], 1e-5, where=real)


@torch.no_grad()
def test_the_encoders_global_mask_leaves_the_decoder_alone():
    model = converted("t5", side="both")
    inputs = inputs_for(model, length=24, padded=False)
    mask = global_mask(inputs, 3)
    states = model.get_encoder()(input_ids=inputs["input_ids"], global_attention_mask=mask)
    decoder = {k: v for k, v in inputs.items() if k.startswith("decoder")}
    expected = model(encoder_outputs=states, **decoder).logits
    assert_close(model(**inputs, global_attention_mask=mask).logits, expected, 1e-6)
    assert (model(**inputs).logits - expected).abs().max() > 1e-5
    model.generate(input_ids=inputs["input_ids"], global_attention_mask=mask, max_new_tokens=3)


def test_looking_ahead_for_a_separator_is_refused_in_causal_models():
    with pytest.raises(ValueError, match="looks ahead"):
        converted("gpt2", global_tokens="question", separator_token_id=7)


@pytest.mark.parametrize("rule", [(0, 0), 0, (-1,), ("first",), (), "last", (True,)])
def test_impossible_global_tokens_are_refused(rule):
    with pytest.raises(ValueError, match="global_tokens"):
        he.attention_config("longformer", global_tokens=rule)
    with pytest.raises(ValueError, match="separator_token_id"):
        he.attention_config("longformer", global_tokens="question", separator_token_id="[SEP]")


# ---- keywords ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keyword", [dict(is_causal=False), dict(head_mask=torch.ones(2, 4)), dict(cu_seq_lens_q=torch.tensor([0, 6, 12]))]
)
def test_keywords_that_can_not_be_honoured_are_refused(keyword):
    model = converted("gpt2")
    with pytest.raises(ValueError, match=next(iter(keyword))):
        model(**inputs_for(model, length=12), **keyword)


# ---- conversion against the positions to come --------------------------------------------------------------------


def test_a_rank_may_use_positions_that_are_still_to_come(tmp_path):
    source = save_source(tmp_path / "source", "bert")
    model = he.convert(source, "linformer", rank=200, max_positions=256).model
    assert model(**inputs_for(model, length=250)).logits.isfinite().all()
    with pytest.raises(ValueError, match="rank=300"):
        he.convert(source, "linformer", rank=300, max_positions=256)


def test_a_refusal_leaves_the_very_parameters(tmp_path, monkeypatch):
    model = tiny_model("bert")
    before = list(model.parameters())

    def fail(*args, **kwargs):
        raise RuntimeError("half-way")

    monkeypatch.setattr(he.LinformerAttention, "initialise_from", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        he.convert(model, "linformer", rank=16, max_positions=256)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert model.config.max_position_embeddings == 128


def test_revert_gives_the_attention_implementation_back():
    model = tiny_model("bert")
    model.set_attn_implementation("eager")
    he.convert(model, "local", attention_window=8)
    assert he.revert(model).config._attn_implementation == "eager"


# ---- folders -----------------------------------------------------------------------------------------------------


def test_a_folder_that_can_not_be_put_back_is_kept(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = Path.rename

    def failing(self, target):
        if Path(target) == out:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="former content is in"), folders.atomic_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    (kept,) = tmp_path.rglob("config.json")
    assert kept.read_text() == "old"


def test_every_module_folder_of_a_sentence_transformer_comes_along(tmp_path):
    source = save_source(tmp_path / "source", "bert")
    names = ("1_Pooling", "2_Dense", "own/module")
    for name in (*names, "4_private"):
        (source / name).mkdir(parents=True)
        (source / name / "config.json").write_text("{}")
    (source / "modules.json").write_text(json.dumps([{"path": name} for name in ("", *names)]))
    out = he.convert(source, "local").save(tmp_path / "out")
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"1_Pooling", "2_Dense", "own"}
    shutil.rmtree(out)


def test_side_files_out_of_the_checkpoint_are_refused(tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("secret")
    source = save_source(tmp_path / "source", "bert")
    (source / "1_Pooling").mkdir()
    (source / "modules.json").write_text('[{"path": "1_Pooling"}]')
    links = {"1_Pooling/config.json": private / "key", "1_Pooling/more": private, SETTINGS: private / "key"}
    for link, target in links.items():
        (source / link).symlink_to(target)
        with pytest.raises(ValueError, match="link out of the checkpoint"):
            he.convert(source, "local").save(tmp_path / "out")
        (source / link).unlink()
    for path in ("../private", str(private), 3):
        (source / "modules.json").write_text(json.dumps([{"path": path}]))
        with pytest.raises(ValueError, match=r"modules\.json names"):
            he.convert(source, "local").save(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["private", "source"]
