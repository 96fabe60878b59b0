"""The floor of the sweep: types that are exact stay exact, the others are refused with a reason; its own faults are seen."""

from __future__ import annotations

import json

import pytest
import transformers
from paths import ROOT

from hf_efficient.benchmarks import sweep
from hf_efficient.families import families

EXACT = """
    albert bart beit bert bert-generation biogpt blenderbot camembert clip_text_model clip_vision_model
    data2vec-text deit dinov2 dinov3_vit distilbert electra ernie esm gpt2 gpt_neox hubert layoutlm llama m2m_100 marian
    markuplm mbart mobilebert mpnet opt pegasus phi plbart qwen3 roberta siglip_vision_model smollm3 splinter t5 umt5 vit
    vit_mae wav2vec2 whisper xlm-roberta xlm-roberta-xl xmod
""".split()  # noqa: SIM905
NOT_EXACT = {
    "bloom": "own attention code",
    "deberta-v2": "own attention code",
    "clip": "composite",
    "pegasus_x": "CAUSALITY",
    "deepseek_v2": "MLA",
    "doge": "MASK",
    "llama4_text": "MASK",
    "mamba": "own attention code",
}
"""{model type: its outcome, or the reason why it is refused}; `exact` is welcome too."""


@pytest.mark.parametrize("model_type", EXACT)
def test_what_was_exact_is_exact(model_type):
    found = sweep.timed(model_type, 60)
    assert found["outcome"] == "exact", found


@pytest.mark.parametrize("model_type", NOT_EXACT)
def test_the_others_say_why(model_type):
    found = sweep.timed(model_type, 60)
    allowed = (NOT_EXACT[model_type], "exact")
    assert found["outcome"] in allowed or found["reason"] in allowed, found


def test_a_silent_difference_and_a_crash_are_seen(monkeypatch):
    """In a written family, which is not proved on the model."""
    monkeypatch.setattr(sweep, "_error", lambda *args: 0.5)
    assert sweep.timed("bert", 60)["outcome"] == "silent"
    monkeypatch.undo()

    def broken(*args, **options):
        raise IndexError("of something")

    monkeypatch.setattr(sweep, "convert", broken)
    assert sweep.timed("bert", 60)["outcome"] == "crash"


def test_keywords_are_recorded_and_unknown_ones_seen():
    found = sweep.timed("modernbert", 60)
    assert "sliding_window" in found["keywords"] and not sweep.unknown_keywords({"modernbert": found})
    assert sweep.unknown_keywords({"other": {"keywords": ["s_aux", "slopes"]}}) == {"other": ["slopes"]}


def test_the_record_has_every_outcome_of_one_run_and_no_fault():
    recorded = json.loads((ROOT / "model_cards" / "results" / "model_types.json").read_text())
    types = recorded["types"]
    assert {one["outcome"] for one in types.values()} <= set(sweep.OUTCOMES) - set(sweep.FAULTS)
    assert all(one["outcome"] == "exact" for one in types.values() if one.get("written"))
    assert not sweep.unknown_keywords(types) and "s_aux" in types["gpt_oss"]["keywords"]
    assert all(one["reason"] in sweep.REASONS for one in types.values() if one["outcome"] == "refused")
    assert sum(one["outcome"] == "exact" for one in types.values()) >= 130
    if recorded["versions"]["transformers"] == transformers.__version__:
        assert set(types) == set(sweep.model_types())
    assert set(families()) & set(types)
