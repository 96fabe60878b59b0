"""Which candidates go on to more texts, and which one is chosen: from scores alone, without a model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

LARGEST_RATIO = 0.97
"""A candidate that takes a larger share of full attention's time is not worth its loss."""
HOPELESS = 0.9
"""Share of the control's loss from which on a candidate does hardly more than no attention."""
AS_DEAR = 1.03
FEWEST = 3


@dataclass(frozen=True)
class Score:
    """What was measured of one candidate.

    Attributes:
        losses: of the first texts, in the order that all candidates share. ratio: time ÷ that of full attention.
    """

    losses: Sequence[float]
    ratio: float

    def mean(self, count: int | None = None) -> float:
        return statistics.fmean(self.losses[:count])

    def reaches(self, target: float, control: Score) -> bool:
        """Whether at most (1 - target) of the control's loss is left, up to rounding."""
        return self.mean() <= (1 - target + 1e-9) * control.mean()


Scores = Mapping[str, Score]


def round_sizes(texts: int) -> list[int]:
    """Texts that have been read after each round: 1, 2, 4, … and all."""
    sizes = [1]
    while sizes[-1] < texts:
        sizes.append(min(2 * sizes[-1], texts))
    return sizes


def is_dominated(one: Score, other: Score, count: int) -> bool:
    """Whether `other` is no dearer (within 3 %), and better on the same texts: by more than two standard errors of the
    differences, text by text; on a single text by more than a factor of two."""
    if other.ratio > one.ratio * AS_DEAR:
        return False
    if count == 1:
        return one.losses[0] > 2 * other.losses[0]
    differences = [a - b for a, b in zip(one.losses[:count], other.losses[:count], strict=True)]
    error = statistics.stdev(differences) / count**0.5
    return statistics.fmean(differences) > 2 * error and any(differences)


def front(scores: Scores, count: int | None = None) -> list[str]:
    """Candidates to which no other is preferable in time and in loss, the cheapest first."""
    found: list[str] = []
    for name in sorted(scores, key=lambda name: (scores[name].ratio, scores[name].mean(count))):
        if not found or scores[name].mean(count) < scores[found[-1]].mean(count):
            found.append(name)
    return found


def survivors(scores: Scores, control: Score, count: int) -> list[str]:
    """Who reads more texts after a round of `count`: all but those that lose more than 0.9 of what the control loses, and
    those that are dominated. The front of the others stays, and three at least do."""
    limit = HOPELESS * control.mean(count)
    useful = {name: score for name, score in scores.items() if score.mean(count) <= limit}
    kept = set(front(useful, count))
    kept |= {
        name
        for name, score in useful.items()
        if not any(is_dominated(score, other, count) for key, other in useful.items() if key != name)
    }
    if len(kept) < FEWEST:
        kept |= set(sorted(scores, key=lambda name: scores[name].mean(count))[:FEWEST])
    return [name for name in scores if name in kept]


def run_rounds(
    names: Iterable[str], texts: int, measure: Callable[[Sequence[str], int], tuple[Scores, Score]]
) -> tuple[list[str], list[int]]:
    """Measure all candidates on few texts and those that are left on more.

    Args:
        measure: scores of these candidates, and of the control, on the first so many texts.

    Returns:
        Who is left in the end, and how many were after each round.
    """
    alive, left = list(names), []
    for count in round_sizes(texts):
        scores, control = measure(alive, count)
        # who could not be measured is not among the scores
        alive = survivors(scores, control, count) if scores else []
        left.append(len(alive))
    return alive, left


def choose(scores: Scores, control: Score, target: float, max_time: float | None = None) -> str | None:
    """The cheapest whose loss is at most (1 - target) of the control's, and whose time ratio is allowed.

    Args:
        target: share of the control's loss that it must remove. max_time: largest time ratio; 0.97 at most.
    """
    good = [name for name in within(scores, max_time) if scores[name].reaches(target, control)]
    return min(good, key=lambda name: (scores[name].ratio, scores[name].mean()), default=None)


def best_within(scores: Scores, control: Score, max_time: float | None = None) -> str | None:
    """The one that loses least of those whose time ratio is allowed, as long as it does more than no attention."""
    allowed = [name for name in within(scores, max_time) if scores[name].mean() <= HOPELESS * control.mean()]
    return min(allowed, key=lambda name: (scores[name].mean(), scores[name].ratio), default=None)


def within(scores: Scores, max_time: float | None) -> list[str]:
    """Those whose time ratio is allowed."""
    limit = LARGEST_RATIO if max_time is None else min(max_time, LARGEST_RATIO)
    return [name for name, score in scores.items() if score.ratio <= limit]
