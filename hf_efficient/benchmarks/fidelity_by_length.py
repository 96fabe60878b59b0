"""How close every mechanism stays, untrained, to full attention at the same length: real checkpoints, longer and longer."""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_efficient.advice.bench import CHOOSE, CONTROL, Bench, lengthened
from hf_efficient.advice.candidates import Candidate, Grid
from hf_efficient.advice.losses import Passes
from hf_efficient.advice.material import digest, longest
from hf_efficient.attention.base.registry import list_mechanisms
from hf_efficient.benchmarks.checkpoints import CHECKPOINTS
from hf_efficient.families import HostModel
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.json_files import read_json, write_json

logger = logging.getLogger(f"transformers.{__name__}")
PATH = Path("outputs/fidelity_by_length.json")
SHARES = (1 / 8, 1 / 4)
"""Keys per query ÷ those of full attention, at which every mechanism is measured."""
TOKENS = 4096
"""Of all texts of a row of the table; single reactions are as many as here fit with 100 tokens."""
MOST = 48


def fidelity_by_length(lengths: Sequence[int], path: Path = PATH, progress: bool = True) -> dict[str, Any]:
    """Every mechanism, all layers, nothing trained, at n/8 and n/4 keys per query; rows go to `path` as they are finished,
    and those that are there are not measured again.

    The reference is the same model with full attention at the same length, on the same rows. Mechanisms that start from data
    see the first of them.

    Raises:
        ValueError: `path` holds rows of other versions, settings or hardware.
    """
    settings = {
        "shares": list(SHARES),
        "tokens": TOKENS,
        "seed": 0,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
    }
    document: dict[str, Any] = {
        "suite": "fidelity", "protocol": 1, "settings": settings, "rows": [], "sources": {}, "missing": {},
        "hardware": hardware(), "versions": versions(),
    }  # fmt: skip
    if path.exists():
        known = read_json(path)
        other = [n for n in ("suite", "protocol", "settings", "versions", "hardware") if known.get(n) != document[n]]
        if other:
            raise ValueError(f"{path} holds rows of other {', '.join(other)}: delete it, or go on as it began.")
        document["rows"], document["sources"] = known["rows"], known["sources"]
    for name, checkpoint in CHECKPOINTS.items():
        wanted = lengths[:1] if checkpoint.inputs == "single reactions" else lengths
        for length in wanted:
            try:
                _measure(name, length, document, path, progress)
            except FileNotFoundError as error:
                logger.warning(f"{name} is left out: {error}")
                document["missing"][name] = str(error)
                break
            document["sources"][name] = checkpoint.source
    return document


def _measure(name: str, length: int, document: dict[str, Any], path: Path, progress: bool) -> None:
    """Append the rows of one checkpoint at one length that are not there."""
    checkpoint, rows = CHECKPOINTS[name], document["rows"]
    model = checkpoint.load()
    host = HostModel.of(model)
    done = {row["name"] for row in rows if (row["checkpoint"], row["length"]) == (name, length)}
    with torch.no_grad(), lengthened(host, length, None):
        count = MOST if checkpoint.inputs == "single reactions" else max(2, TOKENS // length)
        texts = checkpoint.rows(model, length, count)
        grid = Grid(host, longest(texts))
        bench = Bench(
            Passes(model, checkpoint.ignored_tokens), longest(texts), {CHOOSE: texts}, {}, layers=grid.layers
        )
        sought = [c for share in SHARES for m in list_mechanisms() for c in grid.near(m, share * grid.keys)]
        todo: list[Candidate | None] = [None, *dict.fromkeys(sought)]
        for one in tqdm(todo, desc=f"{name}, {length}", disable=not progress, file=sys.stderr):
            if (CONTROL if one is None else one.name) in done:
                continue
            row = bench.measure(one, CHOOSE, len(texts))
            rows.append({"checkpoint": name, "length": length, **_summary(row), "texts_sha256": digest(texts)})
            write_json(path, document)


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    """Means and the worst text of what `Bench.measure` recorded."""
    found = {key: row.get(key) for key in ("name", "attention", "keys_per_query", "needs_training")}
    if "error" in row:
        return found | {"error": row["error"]}
    done = row[CHOOSE]
    ratios = [a / b for a, b in zip(done["seconds"], done["full_seconds"], strict=True) if a is not None]
    names = list(done["figures"][0])
    columns = {name: [figures[name] for figures in done["figures"]] for name in names}
    # of losses the worst is the largest, of agreements and cosines the smallest
    worst = {n: (min if n == "token_cosine" or n.endswith("agreement") else max)(c) for n, c in columns.items()}
    return found | {
        "texts": len(done["figures"]),
        "time_ratio": statistics.median(ratios),
        "mean": {name: statistics.fmean(column) for name, column in columns.items()},
        "worst": worst,
    }


FIGURES = ("embedding", "token_cosine", "states", "kl", "top1_agreement", "class_agreement")


def by_length_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people."""
    rows = [
        [
            row["checkpoint"], row["length"], row["name"], row["keys_per_query"], row.get("time_ratio"),
            *(row["mean"].get(name) if "mean" in row else None for name in FIGURES),
        ]
        for row in document["rows"]
    ]  # fmt: skip
    return ["checkpoint", "tokens", "setting", "keys per query", "time ratio", *FIGURES], rows
