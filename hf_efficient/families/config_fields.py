"""Fields of a config that change attention, where the family, or the host's own code, does not read them."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

from hf_efficient.families.rotary import RotaryPositions

if TYPE_CHECKING:
    from hf_efficient.families.base import ModelFamily

KINDS = {"full_attention", "sliding_attention"}
# {field: what is possible where it is set and the family does not read it}
FAMILY = {
    "alibi": "biases that grow with the distance are not computed; convert a checkpoint without them",
    "attention_chunk_size": "attention in chunks is not computed; convert a checkpoint without it",
    "attn_logit_softcap": "capped logits are read from attn_logit_softcapping alone",
    "layer_types": f"of its kinds only {' and '.join(sorted(KINDS))} are computed",
    "logits_soft_cap": "capped logits are read from attn_logit_softcapping alone",
    "position_embedding_type": "positions as part of the logits are not computed; convert a checkpoint without them",
    "rope_parameters": "its positions are not rotary; remove the field where the model's own code ignores it, too",
    "rope_scaling": "its positions are not rotary; remove the field where the model's own code ignores it, too",
    "use_alibi": "biases that grow with the distance are not computed; convert a checkpoint without them",
}
HOST = ("attn_logit_softcapping", "sliding_window")
"""Fields that every family reads by default, as most hosts do."""


def unread_fields(family: ModelFamily, config: Any) -> list[str]:
    """What the fields that are set in a stack's config and not read say against converting it; empty = nothing.

    A field that the family reads must be one of the host's: its code would ignore a window that a converted layer keeps to.
    """
    problems = []
    for name, remedy in FAMILY.items():
        if name not in _read_by(family) and (value := _effect(name, getattr(config, name, None))):
            problems.append(f"config.{name}={value!r} is not read by the family of {family.model_type}: {remedy}")
    for name in HOST:
        try:
            value = getattr(config, name, None)
        except Exception:  # transformers' own error for what differs from layer to layer, which the family tells
            continue
        if value and getattr(config, f"use_{name}", True) and not _mentions(family.modeling, name):
            problems.append(
                f"config.{name}={value!r} is not read by the code of {family.model_type}, so that a converted layer would "
                "differ from it: set it to None"
            )
    return problems


def _read_by(family: ModelFamily) -> tuple[str, ...]:
    rotary = ("rope_parameters", "rope_scaling")
    return (*family.reads, *(rotary if isinstance(family.positions, RotaryPositions) else ()))


def _effect(name: str, value: Any) -> Any:
    """The part of a field's value that changes attention."""
    if name == "layer_types":
        return sorted({kind for kind in value or () if kind.endswith("attention")} - KINDS)
    if name == "position_embedding_type":
        return None if value in ("absolute", "rotary") else value
    return value


@cache
def _mentions(modeling: Any, name: str) -> bool:
    try:
        return name in inspect.getsource(modeling)
    except (OSError, TypeError):
        return True
