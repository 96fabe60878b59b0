"""Causal linear attention over length: what the suite records, and that cost is linear to 65,536 tokens."""

from __future__ import annotations

import json

import generate as cards
import pytest
import torch

from hf_efficient.benchmarks import suites
from hf_efficient.benchmarks.linear import error_to_definition
from hf_efficient.ops.linear_attention import linear_attention
from hf_efficient.profiling.counters import LargestTensor, flops


def test_the_suite_records_every_length_and_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path):
    document = suites.SUITES["linear"].run(lengths=(64, 130), rounds=2, checked=200, progress=False)
    assert {(row["pass"], row["length"]) for row in document["results"]} == {
        (kind, length) for kind in ("forward", "training") for length in (64, 130)
    }
    for row in document["results"]:
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["microseconds_per_token"] == pytest.approx(1e6 * row["seconds"] / row["length"])
    header, rows = suites.SUITES["linear"].rows(document)
    assert len(rows) == 4 and len(rows[0]) == len(header)
    monkeypatch.setattr(cards, "RESULTS", tmp_path)
    assert cards.part("linear") == "not measured"
    (tmp_path / "linear.json").write_text(json.dumps(document))
    text = cards.part("linear")
    assert "| 64 |" in text and "| 130 |" in text and f"{document['relative_error']:.1e}" in text


@pytest.mark.parametrize("length", [1, 63, 1000, 2048])
def test_the_chunked_form_equals_the_definition_in_fp32(length: int):
    assert error_to_definition(length) <= 1e-5


def test_cost_is_linear_to_65536_tokens():
    costs = []
    for length in (8192, 65536):
        q, k, v = (torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3))

        def step(q=q, k=k, v=v) -> None:
            linear_attention(q, k, v, is_causal=True).sum().backward()

        with LargestTensor() as recorder:
            step()
        costs.append((recorder.numel, flops(step)))
    (small, work), (large, more) = costs
    assert large <= 8.2 * small, f"largest tensor {small} → {large}"
    assert more <= 8.2 * work, f"FLOPs {work} → {more}"
