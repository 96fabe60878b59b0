"""Checkpoints of pictures: their image processor goes along, what reads texts says so, and verify draws its own."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import hf_efficient as he
from hf_efficient.cards.checkpoint import checkpoint_card
from hf_efficient.conversion.inspect import inspect_checkpoint
from hf_efficient.conversion.revert import revert_checkpoint
from hf_efficient.evaluation import verify
from hf_efficient.evaluation.pictures import picture_batches
from hf_efficient.testing import tiny_model


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4))
    model.save_pretrained(tmp_path / "source")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_the_image_processor_goes_along_and_comes_back(source, tmp_path, logged):
    result = he.convert(str(source), "image_local", block_size=2, memory_size=1)
    assert type(result.tokenizer) is ViTImageProcessorPil and not logged
    saved = result.save(tmp_path / "saved")
    revert_checkpoint(str(saved), tmp_path / "back")
    first, *others = (
        AutoImageProcessor.from_pretrained(folder).to_dict() for folder in (source, saved, tmp_path / "back")
    )
    assert first["size"] == {"height": 32, "width": 32} and all(other == first for other in others)
    assert inspect_checkpoint(str(saved))["inputs"] == "pixel_values"
    assert "AutoImageProcessor.from_pretrained" in str(checkpoint_card(saved))

    (source / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"the image processor of .* can't be read"):
        he.convert(str(source), "axial")
    (source / "preprocessor_config.json").unlink()
    assert he.convert(str(source), "axial").tokenizer is None
    assert any("has no image processor" in message for message in logged)


def test_what_reads_texts_says_so(source):
    with pytest.raises(ValueError, match="reads pictures, not texts: give calibration as batches of pixel_values"):
        he.convert(str(source), "routing_transformer", num_clusters=2, cluster_size=8, calibration=["a text"])
    batches = picture_batches(tiny_model("vit", image_size=32))
    model = he.convert(str(source), "routing_transformer", num_clusters=2, cluster_size=8, calibration=batches).model
    with pytest.raises(ValueError, match="reads pictures: give batches such as"):
        he.verify(model, str(source), ["a text"])
    with pytest.raises(ValueError, match=r"speed_lengths=.* are lengths of texts"):
        he.verify(model, str(source), None, speed_lengths=[64])


@pytest.mark.parametrize("model_type", ["vit", "vit_mae", "siglip2_vision_model"])
def test_verify_on_drawn_pictures(model_type, monkeypatch):
    # another process costs seconds
    monkeypatch.setattr(verify, "_fresh_process", lambda *args: verify.Check("fresh process", "passed", {}, ""))
    stock, model = (tiny_model(model_type) for _ in range(2))
    mechanism, options = ("axial", {}) if model_type == "vit" else ("local", {"attention_window": 8})
    report = he.verify(he.convert(model, mechanism, **options).model, stock, None)
    assert report.passed, str(report)
    found = {check.name: check.status for check in report.checks}
    assert found["exact limit"] == ("not applicable" if model_type == "vit" else "passed")
    assert found["padding and batch"] == "passed"
    assert report.settings["texts"] == {"siglip2_vision_model": 4}.get(model_type, 8)
    json.dumps(report.to_dict())
