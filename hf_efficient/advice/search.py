"""The steps of advice: control, rounds, refinement, hybrid, confirmation, choice."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from hf_efficient.advice.advice import Advice
from hf_efficient.advice.bench import CHOOSE, CONFIRM, CONTROL, Bench, OutOfTime, score
from hf_efficient.advice.candidates import Candidate, Grid
from hf_efficient.advice.hybrid import by_loss_alone, fewest_exact, greedy
from hf_efficient.advice.losses import loss_of
from hf_efficient.advice.memory import peak_memory
from hf_efficient.advice.rounds import LARGEST_RATIO, Score, Scores, best_within, choose, front, run_rounds, within

LARGEST_FLOOR = 0.85
PATIENCE = 15.0
"""Seconds that must be left for fresh processes."""
ORDER_TEXTS = 4
REFINED = 3


class Search:
    """Measures step by step; whatever ends it, `conclude` says what follows from what is there.

    Args:
        embeds: the model is for embeddings. spare: by `time.monotonic`, until when steps may begin that can be left out.
    """

    def __init__(self, bench: Bench, grid: Grid, target: float, max_time: float | None, embeds: bool, spare: float):
        self.bench, self.grid, self.target, self.max_time = bench, grid, target, max_time
        self.embeds, self.spare = embeds, spare
        self.texts = {part: len(rows) for part, rows in bench.texts.items()}
        self.known: dict[str, Candidate] = {}
        self.count = 0
        self.loss = ""
        self.alive: list[str] = []
        self.left: list[int] = []
        self.skipped: list[str] = []
        self.partial = self.pays_nothing = self.confirmed = False

    def run(self, candidates: Sequence[Candidate], *, force: bool, hybrid: bool | str, memory: bool) -> None:
        """All steps. Raises OutOfTime."""
        self.measure_control()
        floor = self.control(CHOOSE).ratio
        self.pays_nothing = floor > LARGEST_FLOOR and not force
        if self.pays_nothing:
            return
        self.known = {one.name: one for one in candidates}
        if self.grid.left_out:
            others = f"{len(self.known)} settings of others come first"
            names = ", ".join(self.grid.left_out)
            self.skipped.append(f"{names}: not measured, as {others}; name them as candidates to measure them")
        self.alive = list(self.known)
        alive, _ = run_rounds(self.known, self.texts[CHOOSE], self._round)
        self.alive = alive
        self._if_time("refining the best", self.refine)
        if hybrid:
            self._if_time("the hybrid", lambda: self.find_hybrid(greedy if hybrid == "greedy" else by_loss_alone))
        self.confirm()
        if memory:
            self.measure_memory()

    # scores

    def control(self, part: str, count: int | None = None) -> Score:
        found = score(self.bench.rows[CONTROL], part, self.loss, count)
        if found is None:
            raise ValueError(f"the control can't be measured: {self.bench.rows[CONTROL].get('error', 'no figures')}.")
        return found

    def scores(self, names: Sequence[str], part: str, count: int | None = None) -> dict[str, Score]:
        rows = {name: self.bench.rows[name] for name in names if name in self.bench.rows}
        found = {name: score(row, part, self.loss, count) for name, row in rows.items()}
        return {name: one for name, one in found.items() if one is not None}

    # steps

    def measure_control(self) -> None:
        row = self.bench.measure(None, CHOOSE, self.texts[CHOOSE])
        if row[CHOOSE]["figures"]:
            self.loss = loss_of(row[CHOOSE]["figures"][0], self.embeds)
        if self.control(CHOOSE).mean() == 0:
            raise ValueError("the control loses nothing on these texts: they are too short to tell mechanisms apart.")

    def _round(self, names: Sequence[str], count: int) -> tuple[Scores, Score]:
        for name in names:
            self.bench.measure(self.known[name], CHOOSE, count)
        self.alive, self.count = list(names), count
        found = self.scores(names, CHOOSE, count)
        self.left.append(len(found))
        return found, self.control(CHOOSE, count)

    def _if_time(self, what: str, step: Any) -> None:
        """A step that can be left out gets a part of the budget."""
        deadline, self.bench.deadline = self.bench.deadline, min(self.spare, self.bench.deadline)
        try:
            step()
        except OutOfTime:
            self.skipped.append(f"{what}: no time was left")
        finally:
            self.bench.deadline = deadline

    def _add(self, candidate: Candidate) -> None:
        self.known[candidate.name] = candidate
        self.bench.measure(candidate, CHOOSE, self.texts[CHOOSE])
        if candidate.name not in self.alive:
            self.alive.append(candidate.name)

    def refine(self) -> None:
        """A step up and down from the best settings of the front."""
        scores = self.scores(self.alive, CHOOSE)
        best = sorted(front(scores), key=lambda name: scores[name].mean())[:REFINED]
        for name in best:
            for neighbour in self.grid.neighbours(self.known[name]):
                self._add(neighbour)

    def find_hybrid(self, ordered: Callable[..., list[int]]) -> None:
        """The cheapest candidate of the front that misses the target, with as few exact layers as it takes."""
        scores, control = self.scores(self.alive, CHOOSE), self.control(CHOOSE)
        allowed = set(within(scores, self.max_time))
        missing = [
            name for name in front(scores) if name in allowed and not scores[name].reaches(self.target, control)
        ]
        # of several groups of layers none is "the rest"; what must be trained is no better for exact layers beside it
        known = self.known
        missing = [name for name in missing if len(known[name].configs) == 1 and not known[name].needs_training]
        missing = [name for name in missing if self.grid.can_be_hybrid(known[name].configs[0])]
        if not missing:
            return
        config = self.known[missing[0]].configs[0]
        layers = self.grid.layers_of(config)

        few, all_texts = min(ORDER_TEXTS, self.texts[CHOOSE]), self.texts[CHOOSE]
        order = ordered(layers, lambda converted: self._hybrid(config, converted, few)[1].mean())
        exact = fewest_exact(
            order, lambda exact: self._hybrid(config, set(layers) - exact, all_texts)[1].reaches(self.target, control)
        )
        if exact is not None:
            self._add(self._hybrid(config, set(layers) - exact, all_texts)[0])

    def _hybrid(self, config: Any, converted: Collection[int], count: int) -> tuple[Candidate, Score]:
        one = Candidate((dataclasses.replace(config, layers=tuple(sorted(converted))),))
        found = score(self.bench.measure(one, CHOOSE, count), CHOOSE, self.loss, count)
        return one, found or Score([math.inf], math.inf)

    def confirm(self) -> None:
        """The front, the choice and the control on the other half of the texts, each in turn with full attention."""
        scores = self.scores(self.alive, CHOOSE)
        names = front(scores)
        chosen = choose(scores, self.control(CHOOSE), self.target, self.max_time)
        names += [chosen] if chosen is not None and chosen not in names else []
        self.bench.measure(None, CONFIRM, self.texts[CONFIRM])
        for name in names:
            self.bench.measure(self.known[name], CONFIRM, self.texts[CONFIRM])
        self.alive, self.confirmed = names, True

    def measure_memory(self) -> None:
        if time.monotonic() + PATIENCE + len(self.alive) > self.bench.deadline:
            self.skipped.append("peak memory: no time was left")
            return
        names = list(self.scores(self.alive, CONFIRM))
        if all("peak_mb" in self.bench.rows[name] for name in names):
            return
        wanted = [None, *(self.known[name] for name in names)]
        try:
            found = peak_memory(self.bench.passes.model, wanted, self.bench.length)
        except (RuntimeError, OSError) as error:  # what was measured before stays
            self.skipped.append(f"peak memory: it could not be measured ({str(error).splitlines()[-1]})")
            return
        for name, peak in zip([CONTROL, *names], found, strict=True):
            self.bench.rows[name]["full_peak_mb" if name == CONTROL else "peak_mb"] = peak
        self.bench.save()


def conclude(search: Search) -> tuple[Advice, Candidate | None]:
    """The advice that follows from what was measured, and the chosen candidate."""
    errors = {name: row["error"] for name, row in search.bench.rows.items() if "error" in row}
    facts: dict[str, Any] = dict(
        partial=search.partial, left=search.left, skipped=search.skipped, refused=search.grid.refused, errors=errors
    )
    tokens = search.bench.length
    if not search.loss:
        return Advice("Keep full attention: the time was over before anything was measured.", **facts), None
    facts |= {"loss": search.loss, "floor": search.control(CHOOSE).ratio}
    if search.pays_nothing:
        share = max(0.0, 1 - facts["floor"])
        return Advice(f"Keep full attention: at {tokens} tokens attention is {share:.0%} of the time.", **facts), None
    part = CONFIRM if search.confirmed else CHOOSE
    count = None if search.confirmed else (search.count or 1)
    scores, control = search.scores(search.alive or list(search.known), part, count), search.control(part, count)
    facts["front"] = [_row(search, name, scores[name], control) for name in front(scores)]
    chosen = choose(scores, control, search.target, search.max_time)
    best = chosen or best_within(scores, control, search.max_time)
    if best is None:
        return Advice(f"Keep full attention: {_why_none(scores, tokens, search.max_time)}", **facts), None
    text = _in_words(search, best, scores[best], control, chosen is not None)
    return Advice(text, search.known[best].attention, chosen is not None, **facts), search.known[best]


def _why_none(scores: Scores, tokens: int, max_time: float | None) -> str:
    if not scores:
        return "no candidate could be measured."
    if min(score.ratio for score in scores.values()) > LARGEST_RATIO:
        return f"at {tokens} tokens no candidate is faster."
    if not within(scores, max_time):
        return f"at {tokens} tokens no candidate takes at most {max_time:g} of its time."
    return "every candidate that is fast enough loses about as much as no attention at all."


def _in_words(search: Search, name: str, found: Score, control: Score, reached: bool) -> str:
    kept = 1 - found.mean() / control.mean()
    text = (
        f"{name}: it takes {found.ratio:.2f} of the time of full attention at {search.bench.length} tokens and removes "
        f"{kept:.1%} of the control's loss."
    )
    if reached:
        return f"Convert to {text}"
    return (
        f"Nothing that is fast enough reaches the target of {search.target:.0%} untrained. Convert to the nearest and "
        f"train it, or keep full attention. Nearest is {text}"
    )


def _row(search: Search, name: str, found: Score, control: Score) -> dict[str, Any]:
    row = search.bench.rows[name]
    shares = [a / b for a, b in zip(found.losses, control.losses, strict=True) if b]
    return {
        "name": name,
        "attention": row["attention"],
        "keys_per_query": row.get("keys_per_query"),
        "time_ratio": found.ratio,
        "peak_mb": row.get("peak_mb"),
        "loss": found.mean(),
        "loss_share": found.mean() / control.mean(),
        "loss_share_min": min(shares, default=0.0),
        "loss_share_max": max(shares, default=0.0),
        "needs_training": row["needs_training"],
    }
