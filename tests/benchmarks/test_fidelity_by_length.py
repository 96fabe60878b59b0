"""Fidelity by length on checkpoints of packages: pinned weights, inputs of their kind, rows that are kept."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import by_length
import pytest
import torch

from hf_efficient.benchmarks import checkpoints, fidelity_by_length
from hf_efficient.benchmarks.checkpoints import CHECKPOINTS, TOKEN, reactions, single_reaction
from hf_efficient.benchmarks.suites import SUITES
from hf_efficient.corpus import HUB_ID
from hf_efficient.testing import tiny_model


@dataclasses.dataclass(frozen=True)
class Tiny:
    model_type: str
    inputs: str
    ignored_tokens: tuple[int, ...] = ()

    @property
    def source(self) -> dict[str, str]:
        return {"package": self.model_type}

    def load(self) -> Any:
        return tiny_model(self.model_type, positions=32)

    def rows(self, model: Any, length: int, count: int) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        return [{"input_ids": torch.randint(5, 90, (1, length), generator=generator)} for _ in range(count)]


def test_rows_are_finished_one_by_one(tmp_path, monkeypatch):
    known: dict[str, Any] = {
        "missing": dataclasses.replace(CHECKPOINTS["rxnfp classifier"], module="no_such_package"),
        "decoder": Tiny("gpt2", "samples", (0, 2)),
    }
    monkeypatch.setattr(fidelity_by_length, "CHECKPOINTS", known)
    monkeypatch.setattr(fidelity_by_length, "list_mechanisms", lambda: ["local", "transformer_xl", "linformer"])
    monkeypatch.setattr(fidelity_by_length, "TOKENS", 64)
    path = tmp_path / "rows.json"
    first = fidelity_by_length.fidelity_by_length((32,), path, progress=False)
    assert "pip install --no-deps --target FOLDER rxnfp==0.1.0" in first["missing"]["missing"]
    names = [row["name"].split()[0] for row in first["rows"]]
    assert names[0] == "control" and set(names) == {"control", "local", "transformer_xl"}, "linformer is not causal"
    assert all(row["texts"] == 2 and row["worst"]["kl"] >= row["mean"]["kl"] > 0 for row in first["rows"])
    kept = [dict(row) for row in first["rows"]]
    both = fidelity_by_length.fidelity_by_length((32, 48), path, progress=False)
    assert both["rows"][: len(kept)] == kept and {row["length"] for row in both["rows"]} == {32, 48}
    headings, rows = SUITES["fidelity"].rows(both)
    assert headings[:3] == ["checkpoint", "tokens", "setting"] and len(rows) == len(both["rows"])
    monkeypatch.setattr(fidelity_by_length, "SHARES", (1 / 2,))
    with pytest.raises(ValueError, match="holds rows of other settings: delete it"):
        fidelity_by_length.fidelity_by_length((32,), path, progress=False)
    monkeypatch.undo()
    path.write_text(json.dumps(both | {"hardware": both["hardware"] | {"cpu": "another"}}))
    with pytest.raises(ValueError, match=r"holds rows of other .*hardware: delete it"):
        fidelity_by_length.fidelity_by_length((32,), path, progress=False)


def test_the_overview_has_one_figure_for_each_cost():
    def row(name: str, keys: float, loss: float) -> dict[str, Any]:
        attention = None if name == "control" else [{"mechanism": name}]
        facts = {"checkpoint": "c", "length": 64, "name": name, "attention": attention, "keys_per_query": keys}
        return facts | {"time_ratio": 0.5, "mean": {"kl": loss}}

    # with sinks and without, at an eighth and at a quarter of the keys
    rows = [row("control", 1.0, 3.0), *(row("local", k, x) for k, x in ((8, 0.9), (11, 0.8), (16, 0.5), (19, 0.6)))]
    assert "| `local` | 0.800 (×0.50) / 0.500 (×0.50) |" in by_length.overview({"rows": rows})


def test_weights_are_pinned(tmp_path, monkeypatch):
    checkpoint = CHECKPOINTS["microformer-mgm"]
    folder = tmp_path / "mgm" / checkpoint.folder
    folder.mkdir(parents=True)
    (tmp_path / "mgm/__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "pytorch_model.bin").write_bytes(b"other")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"has SHA-256 .*, expected 7a83b442"):
        checkpoint.load()
    assert CHECKPOINTS[HUB_ID].sha256 == checkpoints.WEIGHTS_SHA256
    assert len({one.sha256 for one in CHECKPOINTS.values()}) == len(CHECKPOINTS)


def test_reactions_are_tokens_without_rest():
    draw = random.Random(0)
    singles = [single_reaction(draw) for _ in range(50)]
    assert all("".join(TOKEN.findall(text)) == text and text.count(">>") == 1 for text in singles)
    joined = reactions(random.Random(0), 300)
    assert len(TOKEN.findall(joined)) >= 300 and joined.count(">>") == 1
    assert reactions(random.Random(0), 300) == joined
