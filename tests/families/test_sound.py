"""Encoders of sound, where attention runs on frames: masks of samples, longer sound, global tokens, experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoFeatureExtractor, Wav2Vec2FeatureExtractor

import hf_efficient as he
from hf_efficient.conversion import revert_checkpoint
from hf_efficient.evaluation.verdict import quick_verdict
from hf_efficient.families.probe import probe_inputs
from hf_efficient.testing import assert_close, tiny_model

FRAMES = 60


def spectra(frames: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 99, (2, 12), generator=generator)
    return {"input_features": torch.randn(2, 16, 2 * frames, generator=generator), "decoder_input_ids": ids}


@torch.no_grad()
def test_whisper_takes_longer_sound():
    model = tiny_model("whisper")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reader = SimpleNamespace(model_max_length=48)
    result = he.convert(model, "local", attention_window=8 * FRAMES, max_positions=2 * FRAMES, tokenizer=reader)
    assert reader.model_max_length == 48, "its texts are for the decoder"
    logits = result.model(**spectra(2 * FRAMES)).logits
    assert result.report.short_inputs == "changed" and result.model.config.max_source_positions == 2 * FRAMES
    longer = tiny_model("whisper", max_source_positions=2 * FRAMES)
    longer.load_state_dict(
        before | {"model.encoder.embed_positions.weight": longer.model.encoder.embed_positions.weight}
    )
    assert_close(logits, longer(**spectra(2 * FRAMES)).logits, 1e-5, "a stock model for longer sound")
    he.revert(result.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="only its encoder can be lengthened: convert with side='encoder'"):
        he.convert(model, "local", attention_window=8, side="both", max_positions=2 * FRAMES)


def masked(**overrides: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of sound whose padding is masked, and two waveforms of different lengths."""
    model = tiny_model("wav2vec2", feat_extract_norm="layer", **overrides).base_model
    samples = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 8000, dtype=torch.long)
    mask[1, 5000:] = samples[1, 5000:] = 0
    return model, {"input_values": samples, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("stable", [False, True])
def test_a_mask_of_samples_hides_frames(stable: bool):
    model, inputs = masked(do_stable_layer_norm=stable)
    model.set_attn_implementation("eager")
    expected = model(**inputs).last_hidden_state
    count = expected.shape[1]
    real = model._get_feature_vector_attention_mask(count, inputs["attention_mask"]).bool()
    assert not real[1].all() and real[1].any()
    for window, differs in ((2 * count, False), (4, True)):
        with he.patch_attention(model, "local", attention_window=window):
            found = model(**inputs).last_hidden_state
        if differs:
            assert (found - expected)[real].abs().max() > 1e-3 * expected.abs().max()
        else:
            assert_close(found[real], expected[real], 1e-5)
    with he.patch_attention(model, "local", attention_window=2 * count):
        alone = model(inputs["input_values"][1:, :5000]).last_hidden_state
        assert_close(found := model(**inputs).last_hidden_state[1:, : alone.shape[1]], alone, 1e-4, "padded and alone")
    assert found.shape == alone.shape


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["whisper", "wav2vec2"])
def test_global_tokens_of_sound(model_type: str):
    model = tiny_model(model_type)
    inputs = probe_inputs(model, 24)
    expected = model(**inputs)[0]
    with he.patch_attention(model, "longformer", attention_window=400, global_tokens="first"):
        assert_close(model(**inputs)[0], expected, 1e-5, "projections of global tokens start as the layer's own")
        with pytest.raises(ValueError, match="has no tokens that it could name"):
            model(**inputs, global_attention_mask=torch.ones(2, 8))


@torch.no_grad()
def test_experts_of_wav2vec2():
    model, inputs = masked()
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, model(**inputs).last_hidden_state
    assert_close(he.upcycle(model, 2).model(**inputs).last_hidden_state, expected, 1e-5, "experts that are equal")
    he.revert(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_how_a_model_hears_goes_along_with_it(tmp_path):
    source, out, back = (tmp_path / name for name in ("source", "out", "back"))
    tiny_model("wav2vec2").save_pretrained(source)
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(source)
    he.convert(source, "local", attention_window=8).save(out)
    revert_checkpoint(str(out), back)
    assert all(AutoFeatureExtractor.from_pretrained(folder).sampling_rate == 8000 for folder in (out, back))


def test_texts_are_nothing_for_a_model_of_sound():
    model, tokenizer = he.convert(tiny_model("wav2vec2"), "local", attention_window=8).model, object()
    assert "reads input_values" in quick_verdict(model, tokenizer, ["a text"])["text"]
    with pytest.raises(ValueError, match="reads input_values"):
        he.verify(model, tiny_model("wav2vec2"), ["a text"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="reads input_values, which can't be made of texts"):
        he.convert(tiny_model("wav2vec2"), "routing_transformer", calibration=["a text"], tokenizer=tokenizer)
