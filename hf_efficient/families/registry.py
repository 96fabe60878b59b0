"""Which families there are, and a model together with its family."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from hf_efficient.families.base import ModelFamily
from hf_efficient.families.readable import require_plain, require_unaltered
from hf_efficient.families.stack import Stack

PREFIX = "efficient_"


def efficient_type(model_type: str) -> str:
    """`model_type` of converted checkpoints of a stock architecture."""
    return PREFIX + model_type


@cache
def families() -> dict[str, ModelFamily]:
    """Every family by its stock `model_type`."""
    names = [f"{__package__}.{module.name}" for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    rows = [family for name in names for family in getattr(importlib.import_module(name), "FAMILIES", ())]
    return {family.model_type: family for family in rows}


def family_of(model_or_type: nn.Module | str) -> ModelFamily:
    """The family of a model or of a `model_type`, stock or converted.

    Raises:
        ValueError: no family knows this architecture; the message lists the known ones and says what to do.
    """
    model_type = (
        model_or_type
        if isinstance(model_or_type, str)
        else getattr(getattr(model_or_type, "config", None), "model_type", type(model_or_type).__name__)
    )
    family = families().get(model_type.removeprefix(PREFIX))
    if family is None:
        raise ValueError(
            f"no model family for model_type {model_type!r}; supported are {', '.join(families())}. A BERT-like model "
            "can often be loaded with one of their classes; for a new family see CONTRIBUTING.md."
        )
    return family


@dataclass(frozen=True)
class HostModel:
    """A loaded model with what is known about it: found once, by whoever works on the model, and handed on.

    Attributes:
        family: of its architecture. stacks: its encoder and decoder, as far as it has them. model: the model itself, whose
            class and config may change while it is converted.
    """

    family: ModelFamily
    stacks: list[Stack]
    model: Any

    @classmethod
    def of(cls, model: nn.Module) -> HostModel:
        """Raises ValueError for an unsupported architecture: see `family_of`."""
        family = family_of(model)
        return cls(family, family.stacks(model), model)

    @property
    def max_positions(self) -> int | None:
        """Usable rows of its position table; `None` = it has none."""
        return self.family.positions(self.stacks[0]) if self.stacks else None

    @property
    def first_position(self) -> int:
        """Position of a text's first token (RoBERTa counts from 2)."""
        return self.family.first_position(self.stacks[0])

    def require_plain(self) -> None:
        """Refuse models whose weights can't all be accounted for: see `families.readable`. Raises ValueError."""
        require_unaltered(self.model)
        layers = [layer for stack in self.stacks for layer in stack.layers]
        names = [f"{layer.name}.{part}" for layer in layers for part in self.family.projections]
        require_plain((name, self.model.get_submodule(name)) for name in names)

    def resize_positions(self, max_positions: int, method: str = "tile") -> list[str]:
        """Give the model another number of positions: see `ModelFamily.resize_positions`."""
        return self.family.resize_positions(self.model, self.stacks, max_positions, method)
