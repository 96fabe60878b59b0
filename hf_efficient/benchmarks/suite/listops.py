"""ListOps by Long Range Arena's generator, and rules that read next to nothing: a calibration of published figures.

A score under the best rule ranks nothing, and every published row of the original length is under it.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any, NamedTuple

OPERATORS = ("MIN", "MAX", "MED", "SM")
# an operator below the root, in place of a digit
PROBABILITY = 0.25
# a digit, or an operator with its arguments
Tree = Any


class Example(NamedTuple):
    """The tokens of an expression, brackets included, and its value, a digit."""

    tokens: tuple[str, ...]
    value: int


def examples(
    count: int, seed: int, depth: int = 10, arguments: int = 10, shortest: int = 500, longest: int = 2000
) -> list[Example]:
    """Expressions of `shortest` to `longest` tokens; the defaults are those of Long Range Arena (arXiv 2011.04006, §2.1)."""
    generator, found = random.Random(seed), list[Example]()
    while len(found) < count:
        tree = _tree(generator, depth, arguments)
        tokens = tuple(_tokens(tree))
        if shortest <= len(tokens) <= longest:
            found.append(Example(tokens, _value(tree)))
    return found


def rules(train: list[Example], test: list[Example]) -> dict[str, float]:
    """Accuracy of the most frequent value, the most frequent one of each first operator, and the first operator applied to
    its own digits alone."""
    majority = Counter(example.value for example in train).most_common(1)[0][0]
    by_operator: dict[str, Counter[int]] = defaultdict(Counter)
    for example in train:
        by_operator[example.tokens[0]][example.value] += 1
    best = {operator: counts.most_common(1)[0][0] for operator, counts in by_operator.items()}

    def of_own_digits(example: Example) -> int:
        digits = _own_digits(example.tokens)
        return apply(example.tokens[0][1:], digits) if digits else best[example.tokens[0]]

    answers: dict[str, Any] = {
        "majority": lambda example: majority,
        "first operator": lambda example: best.get(example.tokens[0], majority),
        "root operator over its own digits": of_own_digits,
    }
    return {name: sum(answer(e) == e.value for e in test) / len(test) for name, answer in answers.items()}


def apply(operator: str, digits: list[int]) -> int:
    """MIN, MAX, MED (rounded down) or SM, the sum modulo 10."""
    if operator == "MED":
        ordered, middle = sorted(digits), len(digits) // 2
        return ordered[middle] if len(digits) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    functions: dict[str, Any] = {"MIN": min, "MAX": max, "SM": lambda values: sum(values) % 10}
    return int(functions[operator](digits))


def _tree(generator: random.Random, depth: int, arguments: int, is_root: bool = True) -> Tree:
    if depth == 1 or (not is_root and generator.random() > PROBABILITY):
        return generator.randrange(10)
    operator, count = generator.choice(OPERATORS), generator.randint(2, arguments)
    return [operator, *(_tree(generator, depth - 1, arguments, False) for _ in range(count))]


def _tokens(tree: Tree) -> list[str]:
    if isinstance(tree, int):
        return [str(tree)]
    return [f"[{tree[0]}", *(token for part in tree[1:] for token in _tokens(part)), "]"]


def _value(tree: Tree) -> int:
    return tree if isinstance(tree, int) else apply(str(tree[0]), [_value(part) for part in tree[1:]])


def _own_digits(tokens: tuple[str, ...]) -> list[int]:
    level, digits = 0, []
    for token in tokens:
        if token.startswith("["):
            level += 1
        elif token == "]":
            level -= 1
        elif level == 1:
            digits.append(int(token))
    return digits
