"""The suites that time whole models: every model is there, works alike, and what is recorded can be shown and drawn."""

from __future__ import annotations

import pytest
import torch

from hf_efficient.benchmarks import decode, encoder
from hf_efficient.benchmarks.suites import SUITES
from hf_efficient.profiling.environment import one_thread


def test_encoders(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "FULL_UP_TO", 10**9)
    document = encoder.encoder_suite(lengths=(24,), rounds=1, progress=False)
    found = {(row["model"], row["pass"]) for row in document["results"]}
    names = {encoder.FULL, encoder.FLOOR, encoder.LONGFORMER, *encoder.CONVERTED}
    assert found == {(name, kind) for name in names for kind in ("forward", "training")}
    assert all(row["tokens_per_second"] == pytest.approx(24 / row["seconds"]) for row in document["results"])
    headings, rows = SUITES["encoder"].rows(document)
    assert headings[2:] == ["24"] and all(len(row) == len(headings) for row in rows)
    draw = SUITES["encoder"].draw
    assert draw is not None
    draw(document, tmp_path / "encoder.png")
    assert (tmp_path / "encoder.png").stat().st_size > 10_000


def test_the_floor_computes_no_attention():
    model = encoder.models_at(16)[encoder.FLOOR]
    ids = torch.arange(5, 21)[None]
    changed = ids.clone()
    changed[0, -1] = 40
    with torch.no_grad():
        before, after = (model(x).last_hidden_state for x in (ids, changed))
    assert torch.equal(before[0, :-1], after[0, :-1]) and not torch.equal(before[0, -1], after[0, -1])


def test_decoding(tmp_path):
    prompt = torch.randint(5, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
    exact = dict(mechanism="local", attention_window=64)
    ours, full = (decode.Decoding(decode.decoder("tiny", 64, spec), prompt) for spec in (exact, None))
    held = full.held()
    # two layers of keys and values, of so many tokens of the tiny width
    assert held == pytest.approx(2 * 2 * prompt.numel() * decode.WIDTHS["tiny"][0] * 4 / 1e6)
    for run in (ours, full):
        run.step(5)
    token = torch.tensor([[7], [8]])
    with torch.no_grad():
        last = [run.model(input_ids=token, past_key_values=run.cache).last_hidden_state for run in (ours, full)]
    assert torch.allclose(*last, atol=1e-5)
    document = decode.decode_suite(lengths=(12,), widths=("tiny",), batches=(1,), rounds=1, progress=False)
    assert {row["model"] for row in document["results"]} == {decode.FULL, *decode.CONVERTED}
    headings, rows = SUITES["decode"].rows(document)
    assert headings[3:] == ["12"] and all(len(row) == len(headings) for row in rows)


def test_one_thread_is_for_a_while():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
