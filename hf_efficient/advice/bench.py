"""One model on a bench: candidates are put into it and taken out again, and what they lose is recorded text by text."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_efficient.advice.candidates import Candidate
from hf_efficient.advice.losses import Outputs, Passes
from hf_efficient.advice.rounds import Score
from hf_efficient.conversion.calibrate import calibrate, logger
from hf_efficient.evaluation.controls import MeanOfValuesConfig
from hf_efficient.evaluation.cost import mean_keys_per_query
from hf_efficient.families import HostModel
from hf_efficient.families.positions import LongerInputs
from hf_efficient.patching.temporary import patch_attention

CONTROL = "control"
CHOOSE, CONFIRM = "choose", "confirm"


class OutOfTime(Exception):
    """The budget is used up; what is recorded stays."""


@contextmanager
def lengthened(host: HostModel, count: int, positions: str | None) -> Iterator[str | None]:
    """Inside, the model takes inputs of `count` tokens; gives the method, `None` = it did already. Then it is what it was.

    Raises:
        ValueError: its positions can't be lengthened that way.
    """
    before, scheme, longer = host.max_positions, host.family.positions, LongerInputs(count, positions)
    made_for = next(iter(host.made_for.values()), None)
    if made_for is None or count <= made_for:
        if positions is not None:
            raise ValueError(
                f"positions={positions!r} says how to lengthen, and this model takes length={count} tokens already: leave "
                "it out."
            )
        yield None
        return
    for stack in host.stacks:
        scheme.check(stack, longer)
    method = scheme.method(host.stacks[0], longer, None)
    sides = [stack.side for stack in host.stacks]
    record = {"max_positions": before, "positions": method} | host.record_positions(sides)
    replaced = [entry for stack in host.stacks for entry in scheme.weights(stack)]
    try:
        host.lengthen(count, method)
        yield method
    finally:
        host.restore_positions(record)
        for module, weight in replaced:  # the very parameters that an optimiser may hold
            module.weight = weight


@contextmanager
def _without_advice() -> Iterator[None]:
    """Calibration says nothing of settings that are only tried."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class Bench:
    """Measures candidates in a model, which is unchanged after each.

    Args:
        texts: {"choose": rows, "confirm": rows}. rows: {name: what is recorded of it}, which is added to.
        layers: that the control is in; `None` = all. deadline: by `time.monotonic`. save: called after each candidate.
    """

    def __init__(
        self,
        passes: Passes,
        length: int,
        texts: Mapping[str, Sequence[dict[str, Tensor]]],
        rows: dict[str, dict[str, Any]],
        layers: tuple[int, ...] | None = None,
        deadline: float = math.inf,
        save: Callable[[], None] = lambda: None,
    ):
        self.passes, self.length, self.texts, self.rows = passes, length, texts, rows
        self.layers, self.deadline, self.save = layers, deadline, save
        self.references: dict[tuple[str, int], tuple[Outputs, float]] = {}
        self.passed = 0

    def run(self, batch: dict[str, Tensor]) -> tuple[Outputs, float]:
        if time.monotonic() > self.deadline:
            raise OutOfTime
        self.passed += 1
        return self.passes(batch)

    def reference(self, part: str, index: int) -> tuple[Outputs, float]:
        """Outputs and seconds of full attention; the model has no mechanism now."""
        if not self.references:
            self.run(self.texts[part][index])  # what a first pass makes is no part of its time
        if (part, index) not in self.references:
            self.references[part, index] = self.run(self.texts[part][index])
        return self.references[part, index]

    def measure(self, candidate: Candidate | None, part: str, count: int) -> dict[str, Any]:
        """The record of a candidate, `None` = the control, once it holds `count` texts of this part.

        One that fails, or computes numbers that are none, has an "error" instead.
        """
        row = self._row(candidate)
        done = row.setdefault(part, {"figures": [], "seconds": [], "full_seconds": []})
        if "error" in row or len(done["figures"]) >= count:
            return row
        wanted = range(len(done["figures"]), count)
        references = [self.reference(part, index) for index in wanted]
        full = [seconds for _, seconds in references]
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)  # of parameters that start at random: the same in every round
                with patch_attention(self.passes.model, self._settings(candidate)):
                    found = self._patched(candidate, row, part, wanted)
            if part == CONFIRM:
                # again, now, so that both times are of the same minute
                full = [self.run(self.texts[part][index])[1] for index in wanted]
            done["full_seconds"] += full
            done["figures"] += [figures for figures, _ in found]
            done["seconds"] += [seconds for _, seconds in found]
        except (ValueError, RuntimeError, NotImplementedError) as error:
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        self.save()
        return row

    def _patched(
        self, candidate: Candidate | None, row: dict[str, Any], part: str, wanted: range
    ) -> list[tuple[dict[str, float], float | None]]:
        """Figures and seconds of the wanted texts, with the mechanism in the model; a first pass that is cold has none."""
        model, texts = self.passes.model, self.texts[part]
        if candidate is not None and candidate.is_calibrated:
            with _without_advice():
                calibrate(model, self.texts[CHOOSE][:1], self.length)
        row.setdefault("keys_per_query", mean_keys_per_query(model, self.length))
        is_warm = not row[part]["seconds"]
        if is_warm:
            self.run(texts[wanted[0]])  # tables are made in it
        found = list[tuple[dict[str, float], float | None]]()
        for index in wanted:
            ours, seconds = self.run(texts[index])
            figures = self.passes.figures(ours, self.references[part, index][0], texts[index])
            if not all(map(math.isfinite, figures.values())):
                raise ValueError(f"not finite: {', '.join(k for k, v in figures.items() if not math.isfinite(v))}")
            found.append((figures, seconds if is_warm or found else None))
        return found

    def _row(self, candidate: Candidate | None) -> dict[str, Any]:
        name = CONTROL if candidate is None else candidate.name
        new: dict[str, Any] = {"name": name}
        if candidate is not None:
            new |= {"attention": candidate.attention, "needs_training": candidate.needs_training}
        return self.rows.setdefault(name, new)

    def _settings(self, candidate: Candidate | None) -> Any:
        return [MeanOfValuesConfig(layers=self.layers)] if candidate is None else list(candidate.configs)


def score(row: Mapping[str, Any], part: str, loss: str, count: int | None = None) -> Score | None:
    """What a record says of the first `count` texts, `None` = all; `None` where they were not measured."""
    done = row.get(part)
    if done is None or "error" in row or not done["figures"] or len(done["figures"]) < (count or 1):
        return None
    ratios = [a / b for a, b in zip(done["seconds"], done["full_seconds"], strict=True) if a is not None]
    return Score([figures[loss] for figures in done["figures"]][:count], statistics.median(ratios))
