"""The card that a checkpoint is saved with, and the tags of what is pushed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from command_line import run
from huggingface_hub import ModelCard
from tiny import save_source, tiny_tokenizer
from transformers import AutoModel

import hf_efficient as he
from hf_efficient.models.card import is_first_card
from hf_efficient.testing import FAMILIES, tiny_model

BASE = "someone/tiny-model"


def named(family: str):
    """A model that came from the Hub."""
    model = tiny_model(family)
    model.config._name_or_path = BASE
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_checkpoints_name_the_project_and_their_base(family, tmp_path):
    result = he.convert(named(family), "local", attention_window=8, tokenizer=tiny_tokenizer(family))
    assert result.model.model_tags == ["hf_efficient", "efficient-attention", "local", f"base_model:{BASE}"]
    path = result.save(tmp_path / "converted")
    card = ModelCard.load(path / "README.md")
    assert card.data.base_model == BASE and card.data.library_name == "transformers"
    assert card.data.tags == ["hf_efficient", "efficient-attention", "local"]
    assert type(result.model).__name__ in card.text and "local attention" in card.text
    loaded = AutoModel.from_pretrained(path)
    assert loaded.model_tags == result.model.model_tags
    experts = he.upcycle(path, 2).save(tmp_path / "experts")
    assert "sparse-experts" in ModelCard.load(experts / "README.md").data.tags


def test_tags_of_users_stay_with_their_model():
    model = he.convert(named("bert"), "local", attention_window=8, tokenizer=tiny_tokenizer("bert")).model
    model.add_model_tags("mine")
    assert model.model_tags[-1] == copy.deepcopy(model).model_tags[-1] == "mine"
    assert "mine" not in he.convert(tiny_model("bert"), "local", tokenizer=tiny_tokenizer("bert")).model.model_tags
    model.model_tags = ["other"]
    assert model.model_tags == ["other"]
    model = he.revert(model)
    assert model.model_tags is None
    model = he.convert(model, "bigbird", block_size=8, tokenizer=tiny_tokenizer("bert")).model
    assert model.model_tags[:3] == ["hf_efficient", "efficient-attention", "bigbird"]


def test_a_first_card_gives_way_to_the_full_one_and_changed_ones_do_not(tmp_path):
    source = save_source(tmp_path / "source", "bert")
    path = he.convert(source, "local", attention_window=8).save(tmp_path / "converted")
    first = path / "README.md"
    assert is_first_card(first) and ModelCard.load(first).data.base_model is None
    written = first.read_text()
    run("card", path)
    assert not is_first_card(first) and "## Conversion" in first.read_text()
    for changed in (written.replace("converted", "my model"), "mine\n" + written, written + "mine\n", "", "# mine\n"):
        first.write_text(changed)
        assert not is_first_card(first)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_every_saving_writes_the_card_again_and_leaves_cards_of_others_alone(family, tmp_path):
    """After training with a loop of one's own, too: `save_pretrained` alone is called."""
    model = he.convert(named(family), "local", attention_window=8).model
    model.save_pretrained(tmp_path / "first")
    card = ModelCard.load(tmp_path / "first" / "README.md")
    assert card.data.base_model == BASE and "local" in card.data.tags and type(model).__name__ in card.text
    again = type(model).from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second/README.md").read_text() == (tmp_path / "first/README.md").read_text()
    # made of something else meanwhile
    other = he.convert(he.revert(again), "bigbird" if family == "bert" else "longt5").model
    other.save_pretrained(tmp_path / "second")
    assert "local" not in ModelCard.load(tmp_path / "second" / "README.md").data.tags
    (tmp_path / "second" / "README.md").write_text("# Mine\n")
    other.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_text() == "# Mine\n"
    he.revert(other).save_pretrained(tmp_path / "stock")
    assert not (tmp_path / "stock" / "README.md").exists()


def test_cards_that_are_there_already_stay(tmp_path, monkeypatch):
    result = he.convert(tiny_model("bert"), "local", attention_window=8, tokenizer=tiny_tokenizer("bert"))
    save = type(result.model).save_pretrained

    def with_card(model, folder, **options):
        Path(folder, "README.md").write_text("# Mine\n")
        save(model, folder, **options)

    monkeypatch.setattr(type(result.model), "save_pretrained", with_card)
    assert (result.save(tmp_path / "converted") / "README.md").read_text() == "# Mine\n"
