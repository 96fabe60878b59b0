"""Which layers keep full attention: orders in which it is given back to them, and how many need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Loss = Callable[[frozenset[int]], float]
"""What is lost when exactly these layers are converted."""


def by_loss_alone(layers: Iterable[int], loss: Loss) -> list[int]:
    """First the layer that loses most when it alone is converted: as many measurements as layers."""
    alone = {layer: loss(frozenset([layer])) for layer in layers}
    return sorted(alone, key=lambda layer: (-alone[layer], layer))


def greedy(layers: Iterable[int], loss: Loss) -> list[int]:
    """Each time the layer whose return to full attention leaves the smallest loss: L (L + 1) / 2 measurements."""
    converted, order = frozenset(layers), list[int]()
    while converted:
        left = {layer: loss(converted - {layer}) if len(converted) > 1 else 0.0 for layer in sorted(converted)}
        order.append(min(left, key=left.__getitem__))
        converted -= {order[-1]}
    return order


def evenly_spaced(layers: Sequence[int], count: int) -> frozenset[int]:
    """`count` of the layers at equal distances."""
    return frozenset(layers[i * len(layers) // count] for i in range(count))


def exact_sets(order: Sequence[int]) -> list[frozenset[int]]:
    """The layers with full attention, for 0, 1, … all of them."""
    return [frozenset(order[:count]) for count in range(len(order) + 1)]


def fewest_exact(order: Sequence[int], fits: Callable[[frozenset[int]], bool]) -> frozenset[int] | None:
    """The first so many layers of the order with which the rest fits, at least one and not all; by bisection, since more
    exact layers lose less. `None` = there is no such number."""
    low, high = 0, len(order)  # low does not fit; high is full attention
    while high - low > 1:
        middle = (low + high) // 2
        if fits(frozenset(order[:middle])):
            high = middle
        else:
            low = middle
    return frozenset(order[:high]) if 0 < high < len(order) else None
