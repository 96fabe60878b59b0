"""Which families there are, and a model together with its family."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from packaging import version
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_efficient.attention.base.plugins import entry_points
from hf_efficient.families.base import ModelFamily
from hf_efficient.families.generic import GenericFamily
from hf_efficient.families.readable import require_plain, require_unaltered
from hf_efficient.families.stack import Stack
from hf_efficient.names import PREFIX

_REGISTERED: dict[str, ModelFamily] = {}
ORIGINS: dict[str, dict[str, str]] = {}
"""{model_type: name and version of the distribution} of families that came by entry points."""


def families() -> dict[str, ModelFamily]:
    """Every written family by its stock `model_type`: those of this package, of entry points, and registered ones."""
    return _found() | _REGISTERED


@cache
def _own() -> dict[str, ModelFamily]:
    names = [f"{__package__}.{module.name}" for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    rows = [family for name in names for family in getattr(importlib.import_module(name), "FAMILIES", ())]
    installed = version.parse(transformers.__version__)
    return {family.model_type: family for family in rows if installed >= version.parse(family.since or "0")}


@cache
def _found() -> dict[str, ModelFamily]:
    found = dict(_own())
    for given, entry in entry_points("families"):
        for family in given if isinstance(given, tuple | list) else (given,):
            _require_new(family, found | _REGISTERED)
            found[family.model_type] = family
            if entry.dist is not None:
                ORIGINS[family.model_type] = {"name": entry.dist.name, "version": entry.dist.version}
    return found


def register_family(family: ModelFamily) -> ModelFamily:
    """Make a model family known to every verb, and its Efficient classes to the Auto classes when they are asked for.

    Raises:
        TypeError: no `ModelFamily`. ValueError: its `model_type` has a family already.
    """
    _require_new(family, families())
    _REGISTERED[family.model_type] = family
    return family


def _require_new(family: Any, known: dict[str, ModelFamily]) -> None:
    if not isinstance(family, ModelFamily):
        raise TypeError(f"{family!r:.80} is no ModelFamily.")
    if family.model_type in known:
        raise ValueError(f"model_type {family.model_type!r} has a family already: {type(known[family.model_type])}.")


def is_family(model_type: str) -> bool:
    """Whether something is known about a stock `model_type`: a written family, or where transformers keeps its parts."""
    return model_type in families() or model_type in CONFIG_MAPPING_NAMES


def family_of(model_or_type: nn.Module | str) -> ModelFamily:
    """The family of a model or of a `model_type`, stock or converted; without a written one, the generic family.

    Raises:
        ValueError: neither transformers nor a family knows this architecture; the message lists the written families.
    """
    model_type = (
        model_or_type
        if isinstance(model_or_type, str)
        else getattr(getattr(model_or_type, "config", None), "model_type", type(model_or_type).__name__)
    ).removeprefix(PREFIX)
    if model_type in families():
        family = families()[model_type]
        return family if isinstance(model_or_type, str) else family.of(getattr(model_or_type, "config", None))
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"no model family for model_type {model_type!r}; supported are {', '.join(families())}. A BERT-like model "
            "can often be loaded with one of their classes; for a new family see CONTRIBUTING.md."
        )
    return GenericFamily(model_type=model_type)


@dataclass(frozen=True)
class HostModel:
    """A loaded model with what is known about it: found once, by whoever works on the model, and handed on.

    Attributes:
        family: of its architecture. stacks: its encoder and decoder, as far as it has them. model: the model itself, whose
            class and config may change while it is converted. put_away: where the model's weights are on the disk and come
            in for calls: takes each new mechanism, with its name, there too; `None` = the weights are in memory.
    """

    family: ModelFamily
    stacks: list[Stack]
    model: Any
    put_away: Callable[[str, nn.Module], None] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> HostModel:
        """Raises ValueError for an unsupported architecture: see `family_of`."""
        family = family_of(model)
        return cls(family, family.stacks(model), model)

    @property
    def max_positions(self) -> int | None:
        """Longest input, in tokens, that it can take; `None` = any."""
        return self.family.positions.length(self.stacks[0]) if self.stacks else None

    @property
    def first_position(self) -> int:
        """Position of a text's first token (RoBERTa counts from 2)."""
        return self.family.positions.first(self.stacks[0])

    def require_plain(self) -> None:
        """Refuse models whose weights can't all be accounted for: see `families.readable`. Raises ValueError."""
        require_unaltered(self.model, on_disk=self.put_away is not None)
        if self.put_away is not None:
            return
        layers = [layer for stack in self.stacks for layer in stack.layers]
        names = [f"{layer.name}.{part}" for layer in layers for part in self.family.projections]
        require_plain((name, self.model.get_submodule(name)) for name in names)

    @property
    def lengths(self) -> dict[str, int | None]:
        """{side: longest input, in tokens, that this stack can take; `None` = any}."""
        return {stack.side: self.family.positions.length(stack) for stack in self.stacks}

    @property
    def made_for(self) -> dict[str, int | None]:
        """{side: longest input, in tokens, that this stack was made for; `None` = any}."""
        return {stack.side: self.family.positions.made_for(stack) for stack in self.stacks}

    def set_lengths(self, lengths: Mapping[str, int]) -> None:
        """Give stacks that are being built the lengths that a checkpoint has: see `PositionScheme.set_length`."""
        for stack in self.stacks:
            if stack.side in lengths:
                self.family.positions.set_length(stack, lengths[stack.side])

    def lengthen(
        self,
        count: int,
        method: str | None = None,
        rope: Mapping[str, Any] | None = None,
        sides: Collection[str] | None = None,
    ) -> list[str]:
        """Make it take inputs of `count` tokens: see `PositionScheme.lengthen`. Returns the tensors with other values.

        Args:
            method: `None` = the usual one of its scheme.
            sides: whose inputs; `None` = of all its stacks.
        """
        scheme = self.family.positions
        method = method or next(iter(scheme.methods))
        stacks = [stack for stack in self.stacks if sides is None or stack.side in sides]
        changed = [name for stack in stacks for name in scheme.lengthen(stack, count, method, rope)]
        self._tell_config()
        return changed

    def short_inputs(self, count: int | None, method: str) -> str | None:
        """ "unchanged" or "changed": what lengthening to `count` does to inputs up to the old length; `None` = no count."""
        return None if count is None else "unchanged" if self.family.positions.methods[method] else "changed"

    def record_positions(self, sides: Collection[str]) -> dict[str, Any]:
        """What `restore_positions` needs once the stacks of these sides have been lengthened."""
        first = next((stack for stack in self.stacks if stack.side in sides), None)
        record = {} if first is None else self.family.positions.record(first)
        return record | {"lengthened": list(sides)} if len(self.stacks) > 1 else record

    def restore_positions(self, record: Mapping[str, Any]) -> None:
        """Undo `lengthen`: see `PositionScheme.restore`."""
        for stack in self.stacks:
            if stack.side in record.get("lengthened", (stack.side,)):
                self.family.positions.restore(stack, record)
        self._tell_config()

    def _tell_config(self) -> None:
        """The model's config says what those of its stacks say, which may be other objects."""
        for name in self.family.positions.fields if self.stacks else ():
            told = self.stacks[0].module.config
            if hasattr(told, name):
                setattr(self.model.config, name, copy.deepcopy(getattr(told, name)))
            else:
                self.model.config.__dict__.pop(name, None)
