"""Models that are pushed to the Hub: everything arrives that loading and reading them needs. The Hub is a stand-in."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch
import transformers
from hub import running_hub
from huggingface_hub import ModelCard
from tiny import converted

import hf_efficient as he

FILES = {"config.json", "configuration_hf_efficient.py", "model.safetensors", "README.md", "conversion_report.json"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", huggingface_hub.HfApi(endpoint=running.url))
        yield running


def test_a_pushed_model_has_its_card_report_and_loader(hub, tmp_path):
    path = converted(tmp_path / "model", "bert")
    model = he.EfficientBertForMaskedLM.from_pretrained(path)
    model.push_to_hub("someone/long-bert", token="hf_of_nobody")
    files = hub.files["someone/long-bert"]
    assert files.keys() == FILES
    card = ModelCard(files["README.md"].decode())
    assert card.data.tags == ["hf_efficient", "efficient-attention", "longformer"]
    assert "pip install hf_efficient" in files["configuration_hf_efficient.py"].decode()
    assert (
        "from hf_efficient import EfficientBertForMaskedLM" in card.text and "automatically generated" not in card.text
    )
    assert json.loads(files["conversion_report.json"])["history"][0]["what"] == "convert"
    # as whoever loads it gets it
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(
        "someone/long-bert", token="hf_of_nobody", cache_dir=tmp_path / "cache"
    )
    assert type(loaded) is type(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_card_that_someone_wrote_stays_and_saving_can_push(hub, tmp_path):
    hub.files["someone/mine"] = {"README.md": b"---\nlicense: mit\n---\n\n# Mine\n\nWritten by hand.\n"}
    model = he.EfficientBertForMaskedLM.from_pretrained(converted(tmp_path / "model", "bert"))
    model.push_to_hub("someone/mine", token="hf_of_nobody")
    card = ModelCard(hub.files["someone/mine"]["README.md"].decode())
    assert "Written by hand." in card.text and card.data.license == "mit" and "longformer" in card.data.tags
    options = dict(push_to_hub=True, repo_id="someone/saved", token="hf_of_nobody")
    model.save_pretrained(tmp_path / "saved", **options)
    assert hub.files["someone/saved"].keys() == FILES
    assert b"from hf_efficient import" in hub.files["someone/saved"]["README.md"]
    he.revert(model).push_to_hub("someone/reverted", token="hf_of_nobody")
    files = hub.files["someone/reverted"]
    assert files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert b"efficient" not in files["config.json"] and b"efficient" not in files["README.md"]
