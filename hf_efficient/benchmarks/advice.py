"""Rounds of `advise` beside a full measurement: every candidate on every text of a real checkpoint, once, recorded.

python -m hf_efficient.benchmarks.advice "microformer-mgm" 512 --out advice-mgm-512.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from hf_efficient.advice.bench import CHOOSE, CONTROL, Bench, lengthened, score
from hf_efficient.advice.candidates import Grid
from hf_efficient.advice.losses import Passes, loss_of
from hf_efficient.advice.material import longest
from hf_efficient.benchmarks.checkpoints import CHECKPOINTS
from hf_efficient.corpus import HUB_ID
from hf_efficient.families import HostModel
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.json_files import read_json, write_json

TEXTS = 4


def full_measurement(name: str, length: int, path: Path, texts: int = TEXTS) -> dict[str, Any]:
    """Losses text by text and time ratios of all candidates, which the rounds can be replayed from.

    Measurements go to a file beside `path` as they are made, and one that is there is gone on with.
    """
    checkpoint, raw = CHECKPOINTS[name], path.with_suffix(".rows.json")
    model = checkpoint.load()
    host = HostModel.of(model)
    known: dict[str, dict[str, Any]] = {row["name"]: row for row in read_json(raw)["rows"]} if raw.exists() else {}
    with torch.no_grad(), lengthened(host, length, None):
        rows = checkpoint.rows(model, length, texts)
        grid = Grid(host, longest(rows))
        bench = Bench(
            Passes(model, checkpoint.ignored_tokens), longest(rows), {CHOOSE: rows}, known, layers=grid.layers,
            save=lambda: _save(raw, known),
        )  # fmt: skip
        for candidate in [None, *grid.all()]:
            bench.measure(candidate, CHOOSE, len(rows))
    loss = loss_of(known[CONTROL][CHOOSE]["figures"][0], name == HUB_ID)
    scores = {key: found for key, row in known.items() if (found := score(row, CHOOSE, loss)) is not None}
    control = scores.pop(CONTROL)
    document = {
        "suite": "advise", "checkpoint": name, "source": checkpoint.source, "length": length, "loss": loss,
        "control": vars(control), "candidates": {key: vars(found) for key, found in scores.items()},
        "hardware": hardware(), "versions": versions(),
    }  # fmt: skip
    write_json(path, document)
    return document


def _save(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    write_json(path, {"rows": list(rows.values())})


def main() -> None:
    parser = argparse.ArgumentParser(description="Record every candidate on every text of a checkpoint.")
    parser.add_argument("checkpoint", choices=list(CHECKPOINTS))
    parser.add_argument("length", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=TEXTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    full_measurement(given.checkpoint, given.length, given.out, given.texts)


if __name__ == "__main__":
    main()
