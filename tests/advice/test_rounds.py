"""Rounds, front, choice and orders of layers: decisions from scores alone, without a model."""

from __future__ import annotations

import json
import random

import pytest
from paths import ROOT

from hf_efficient.advice.hybrid import by_loss_alone, evenly_spaced, exact_sets, fewest_exact, greedy
from hf_efficient.advice.rounds import (
    Score,
    best_within,
    choose,
    front,
    is_dominated,
    round_sizes,
    run_rounds,
    survivors,
)

TARGETS = (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.2)
RECORDED = sorted((ROOT / "tests/data").glob("advice-*.json"))


def scores(**given: tuple[float, list[float]]) -> dict[str, Score]:
    return {name: Score(losses, ratio) for name, (ratio, losses) in given.items()}


def measured(known: dict[str, Score], control: Score, texts: int) -> tuple[list[str], int]:
    """Who is left, and how many texts were read, when the known scores are measured in rounds."""
    read: dict[str, int] = dict.fromkeys(known, 0)

    def measure(names, count):
        read.update(dict.fromkeys(names, count))
        return {name: Score(known[name].losses[:count], known[name].ratio) for name in names}, control

    alive, _ = run_rounds(known, texts, measure)
    return alive, sum(read.values())


def test_dominance_is_paired():
    # text by text the second is better by little, though texts differ by much
    hard_and_easy = [1.0, 9.0, 2.0, 7.0]
    one, other = Score(hard_and_easy, 0.5), Score([x - 0.1 - 0.01 * i for i, x in enumerate(hard_and_easy)], 0.51)
    assert is_dominated(one, other, 4) and not is_dominated(other, one, 4)
    assert not is_dominated(one, Score(other.losses, 0.52), 4), "the other is dearer by more than 3 %"
    assert not is_dominated(one, other, 1), "on a single text only a factor of two counts"
    assert is_dominated(Score([2.1], 0.5), Score([1.0], 0.5), 1)
    assert not is_dominated(one, one, 4), "nothing is better than itself"
    noisy = Score([0.0, 10.0, 1.0, 6.0], 0.5)
    assert not is_dominated(one, noisy, 4), "a difference inside two standard errors is none"


def test_survivors_are_the_front_the_undominated_and_three():
    control = Score([10.0, 10.0], 0.4)
    known = scores(
        hopeless=(0.42, [9.5, 9.5]), cheap=(0.5, [6.0, 6.0]), worse=(0.5, [8.0, 8.1]), good=(0.7, [1.0, 1.0]),
        dear=(0.9, [0.5, 0.6]), dearer=(0.95, [0.9, 1.0]),
    )  # fmt: skip
    assert survivors(known, control, 2) == ["cheap", "good", "dear"]
    assert survivors(scores(a=(0.5, [9.9]), b=(0.6, [9.8])), control, 1) == ["a", "b"], (
        "three stay where there are three"
    )
    assert front(known) == ["hopeless", "cheap", "good", "dear"]


def test_the_choice_is_the_cheapest_that_is_good_and_fast_enough():
    control = Score([10.0], 0.4)
    known = scores(window=(0.5, [2.0]), blocks=(0.7, [0.4]), exact=(1.2, [0.0]))
    assert [choose(known, control, target) for target in (0.8, 0.95, 0.97)] == ["window", "blocks", None]
    assert choose(known, control, 0.95, max_time=0.6) is None and best_within(known, control, 0.6) == "window"
    assert choose(known, control, 0.99, max_time=2.0) is None, "nothing slower than full attention is recommended"
    assert best_within(scores(a=(0.5, [9.5])), control) is None, "nor what does as little as no attention"


@pytest.mark.parametrize("texts", [1, 2, 5, 8])
def test_rounds_read_every_text_in_the_end(texts):
    sizes = round_sizes(texts)
    assert sizes[0] == 1 and sizes[-1] == texts and sizes == sorted(set(sizes))


@pytest.mark.parametrize("seed", range(20))
def test_rounds_choose_as_the_full_measurement_does(seed):
    """Scores made at random: cost and quality hang together loosely, texts are hard or easy for all."""
    draw, texts = random.Random(seed), 8
    hard = [draw.uniform(0.5, 2) for _ in range(texts)]
    control = Score([10 * h for h in hard], 0.4)
    known = {}
    for number in range(24):
        ratio, quality = draw.uniform(0.45, 1.1), 10 * draw.random() ** 2
        known[f"c{number}"] = Score([quality * h * draw.uniform(0.9, 1.1) for h in hard], ratio)
    _same_choice(known, control, texts)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_rounds_choose_as_the_recorded_full_measurement_does(path):
    recorded = json.loads(path.read_text())
    control = Score(**recorded["control"])
    known = {name: Score(**row) for name, row in recorded["candidates"].items()}
    _same_choice(known, control, len(control.losses))


def _same_choice(known: dict[str, Score], control: Score, texts: int) -> None:
    alive, read = measured(known, control, texts)
    assert read < 0.8 * texts * len(known), "the rounds spared too little"
    for target in TARGETS:
        full, ours = choose(known, control, target), choose({name: known[name] for name in alive}, control, target)
        if ours != full:
            assert full is not None and ours is not None, target
            assert known[ours].mean() <= 1.1 * known[full].mean() and known[ours].ratio <= known[full].ratio


def test_orders_of_layers():
    weight = {0: 1.0, 1: 4.0, 2: 2.0, 3: 3.0}
    calls = []

    def loss(converted):
        calls.append(converted)
        # layers 2 and 3 hurt only together
        return sum(weight[layer] for layer in converted if layer < 2) + 9.0 * ({2, 3} <= converted)

    assert by_loss_alone(weight, loss) == [1, 0, 2, 3] and len(calls) == 4
    calls.clear()
    assert greedy(weight, loss) == [2, 1, 0, 3] and len(calls) == 4 + 3 + 2
    assert exact_sets([1, 0]) == [set(), {1}, {0, 1}]
    assert evenly_spaced([0, 1, 2, 3, 4, 5], 3) == {0, 2, 4} and evenly_spaced([4, 5], 0) == set()


def test_as_few_exact_layers_as_it_takes():
    order = [3, 1, 0, 2, 4, 5, 6, 7]
    for needed in range(1, 8):
        assert fewest_exact(order, lambda exact, needed=needed: len(exact) >= needed) == set(order[:needed])
    assert fewest_exact(order, lambda exact: False) is None, "all layers exact is no hybrid"
    assert fewest_exact([0], lambda exact: True) is None
