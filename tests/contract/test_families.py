"""Every written family passes what a family of anybody must pass, and a wrong one does not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from paths import ROOT

import hf_efficient as he
from hf_efficient.families import GenericFamily, PositionTable, families, registry
from hf_efficient.families.base import ModelFamily
from hf_efficient.families.bert import POSITION_BUFFERS, TABLE, BertFamily
from hf_efficient.families.llama import LlamaFamily
from hf_efficient.testing import check_family, tiny_model


@pytest.mark.parametrize("model_type", families())
def test_family(model_type: str):
    found = check_family(families()[model_type])
    assert found["local"] == "possible"


class _NotCausal(LlamaFamily):
    def is_causal(self, stack: Any, layer: Any) -> bool:
        return False


class _OtherTable(PositionTable):
    def restore(self, stack: Any, record: Any) -> None:
        super().restore(stack, record)
        with torch.no_grad():
            stack.module.embeddings.position_embeddings.weight[0] += 1


def row(kind: type[ModelFamily], model_type: str, **different: Any) -> ModelFamily:
    return kind(**vars(families()[model_type]) | different)


@pytest.mark.parametrize(
    "kind, model_type, different, message",
    [
        (_NotCausal, "llama", {}, "asks for causal"),
        (BertFamily, "bert", {"positions": _OtherTable(TABLE, POSITION_BUFFERS)}, "revert: other values"),
    ],
)
def test_a_wrong_family_fails(kind, model_type, different, message, monkeypatch):
    wrong = row(kind, model_type, **different)
    monkeypatch.setitem(registry._found(), model_type, wrong)
    with pytest.raises((AssertionError, ValueError), match=message):
        check_family(wrong)


def test_the_family_of_another_package_in_the_guide(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "check_family" in block]
    assert len(code.splitlines()) <= 15
    written = {name: family for name, family in registry._own().items() if name != "electra"}
    monkeypatch.setattr(registry, "_own", lambda: written)
    monkeypatch.setattr(registry, "_REGISTERED", {})
    registry._found.cache_clear()
    try:
        made: dict[str, Any] = {}
        exec(code, made)
        assert families()["electra"] is made["family"]
        result = he.convert(tiny_model("electra"), "longformer", global_tokens="first", max_positions=256)
        assert result.report.max_positions == 256 and type(result.model) is he.EfficientElectraForMaskedLM
    finally:
        registry._found.cache_clear()


def test_tiny_model_of_any_type():
    for model_type in ("bart", "vit", "whisper"):
        model = tiny_model(model_type, layers=1)
        assert sum(p.numel() for p in model.parameters()) < 1e6 and not model.training
    with pytest.raises(ValueError, match="no tiny model of timm_wrapper"):
        tiny_model("timm_wrapper")
    assert GenericFamily(model_type="vit").has_attention and not GenericFamily(model_type="bloom").has_attention
