"""Model families: one file per architecture, found by itself; a relative is one more row in its file."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from torch import nn

from hf_efficient.families.base import AttentionSite, ModelFamily, Stack

__all__ = ["AttentionSite", "ModelFamily", "Stack", "efficient_type", "families", "family_of"]

PREFIX = "efficient_"


def efficient_type(model_type: str) -> str:
    """`model_type` of converted checkpoints of a stock architecture."""
    return PREFIX + model_type


@cache
def families() -> dict[str, ModelFamily]:
    """Every family by its stock `model_type`."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    rows = [family for module in modules for family in getattr(module, "FAMILIES", ())]
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
