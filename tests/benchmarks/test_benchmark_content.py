"""Content-based and recurrent attention over length: what the suite records, and what it compares with."""

from __future__ import annotations

import json
import statistics

import generate as cards
import pytest
import torch

from hf_efficient.benchmarks import suites
from hf_efficient.benchmarks.baselines import MechanismAttention, Point
from hf_efficient.benchmarks.content import (
    DECODERS,
    ENCODERS,
    FULL,
    QUERIES,
    REFORMER,
    TransformersReformer,
    keys_read,
    methods,
    options_at,
)


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
    routed = next(row for row in document["results"] if row["contender"] == "routing_transformer")
    assert routed["options"]["num_clusters"] * routed["options"]["cluster_size"] == 128 and 0 < routed["coverage"] <= 1
    header, rows = suites.SUITES["content"].rows(document)
    assert len(rows) == len(document["results"]) and len(rows[0]) == len(header)
    monkeypatch.setattr(cards, "RESULTS", tmp_path)
    assert cards.content_table("reformer") == "not measured"
    (tmp_path / "content.json").write_text(json.dumps(document))
    text = cards.cost_tables("reformer")
    assert f"| encoder | forward | 128 | {ours['keys_read']:.0f} |" in text and "num_hashes=4" in text
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


def test_both_reformers_read_as_many_keys():
    """What is compared is equal work; a longer look back on one side shows in the count."""
    point = Point(1024, heads=2, width=16)
    tensors, found = point.tensors(3), methods(point, False)
    ours = keys_read(found["reformer"], tensors)
    assert ours == pytest.approx(keys_read(found[REFORMER], tensors), rel=0.1)
    shorter = options_at("reformer", 1024, False) | {"num_chunks_before": 0}
    assert keys_read(MechanismAttention("reformer", point, **shorter), tensors) < 0.7 * ours


def test_keys_read_are_counted():
    query, key, value = Point(40, heads=1, width=8).tensors(3)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    seen = torch.linspace(0, 39, QUERIES).long() + 1
    assert keys_read(attention, [query, key, value]) == statistics.median(seen.tolist())
