"""Names of tensors in two model classes: one list of pairs, read in both directions, and models filled by them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

SHOWN = 4


@dataclass(frozen=True)
class Names:
    """Pairs (name in our class, name in the other class), in which each `*` stands for the same text on both sides.

    The first pair that fits a name renames it; a name that none fits is the same in both classes.
    """

    pairs: tuple[tuple[str, str], ...] = ()

    def there(self, ours: str) -> str:
        """The name in the other class of a tensor of ours."""
        return _renamed(ours, self.pairs)

    def here(self, theirs: str) -> str:
        """The name in our class of a tensor of the other."""
        return _renamed(theirs, tuple((there, here) for here, there in self.pairs))


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        found = _pattern(old).fullmatch(name)
        if found is not None:
            parts = new.split("*")
            return "".join(text + rest for text, rest in zip(parts, (*found.groups(), ""), strict=True))
    return name


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\*", "(.*?)"))


@torch.no_grad()
def fill(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Give a new model copies of these tensors, with their data types: every tensor has its place, every place its tensor.

    Raises:
        ValueError: names tensors without a place and places without a tensor, other shapes, and tensors that differ where
            the class has only one.
    """
    own = model.state_dict()
    problems = [f"{name} has no place" for name in tensors if name not in own]
    problems += [f"{name} has no tensor" for name in own if name not in tensors]
    problems += [
        f"{name} has the shape {tuple(tensors[name].shape)}, its place {tuple(place.shape)}"
        for name, place in own.items()
        if name in tensors and tensors[name].shape != place.shape
    ]
    _refuse(model, problems)
    places = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        places[name].data = places[name].data.to(tensor.dtype)
    model.load_state_dict(dict(tensors))
    model.config.dtype = model.dtype
    filled = model.state_dict()
    _refuse(
        model, [f"{n} shares its values with another tensor" for n, t in tensors.items() if not _same(t, filled[n])]
    )


def _same(one: Tensor, other: Tensor) -> bool:
    # bit by bit: NaN is not equal to itself
    return one.dtype == other.dtype and torch.equal(one.nan_to_num().to(other.device), other.nan_to_num())


def _refuse(model: PreTrainedModel, problems: list[str]) -> None:
    if problems:
        more = f", and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"these weights are not those of a {type(model).__name__}: {', '.join(problems[:SHOWN])}{more}."
        )
