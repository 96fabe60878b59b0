"""Content-based and recurrent attention over length: what the suite records, and what it compares with."""

from __future__ import annotations

import json

import generate as cards
import pytest
import torch

from hf_efficient.benchmarks import suites
from hf_efficient.benchmarks.baselines import Point
from hf_efficient.benchmarks.content import DECODERS, ENCODERS, FULL, REFORMER, TransformersReformer


def test_the_suite_records_every_method(monkeypatch: pytest.MonkeyPatch, tmp_path):
    document = suites.SUITES["content"].run(lengths=(128,), rounds=2, progress=False)
    expected = {("encoder", name) for name in (FULL, REFORMER, *ENCODERS)}
    expected |= {("decoder", name) for name in (FULL, REFORMER, *DECODERS)}
    for kind in ("forward", "training"):
        assert {(row["side"], row["contender"]) for row in document["results"] if row["pass"] == kind} == expected
    ours = next(row for row in document["results"] if row["contender"] == "reformer" and row["side"] == "encoder")
    theirs = next(row for row in document["results"] if row["contender"] == REFORMER and row["side"] == "encoder")
    ratio = ours["faster_than"][REFORMER]
    assert ratio["ratio_min"] <= ratio["ratio"] <= ratio["ratio_max"] and ours["rounds"] == 2
    assert REFORMER not in theirs["faster_than"] and ours["largest_tensor"] > 128 * 64
    header, rows = suites.SUITES["content"].rows(document)
    assert len(rows) == len(document["results"]) and len(rows[0]) == len(header)
    monkeypatch.setattr(cards, "RESULTS", tmp_path)
    assert cards.content_table("reformer") == "not measured"
    (tmp_path / "content.json").write_text(json.dumps(document))
    text = cards.cost_tables("reformer")
    assert "| encoder | forward | 128 |" in text and "num_hashes=4" in text
    assert cards.content_table("local") == "not measured"


@pytest.mark.parametrize("is_causal", [False, True])
def test_their_reformer_attends_with_the_given_heads(is_causal: bool):
    # one chunk: every token sees every other one, itself only where there is no other
    point = Point(48, batch=2, heads=2, width=8)
    query, key, value = point.tensors(3)
    found = TransformersReformer(point, is_causal)(query, key, value)
    direction = torch.nn.functional.normalize(query, dim=-1)
    logits = query @ direction.transpose(-1, -2)
    logits = logits.masked_fill(torch.eye(48, dtype=torch.bool), -1e5)
    if is_causal:
        logits = logits.masked_fill(torch.ones(48, 48, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(found, logits.softmax(-1) @ value, rtol=1e-4, atol=1e-4)
