"""Checkpoints as a whole: what one uses or could take, without its weights, and the original written back to disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from hf_efficient.attention.base.registry import get_mechanism, list_mechanisms, training_words
from hf_efficient.families import AttentionLayer, HostModel, ModelFamily, Stack, family_of
from hf_efficient.models.loading import class_named, read_config, require_architecture
from hf_efficient.models.provenance import REPORT_NAME
from hf_efficient.models.registry import named_class
from hf_efficient.patching.names import MODULE_NAME
from hf_efficient.profiling.json_files import read_json

EXACT = "full attention"


def inspect_checkpoint(name: str, model_class: Any = None, **location: Any) -> dict[str, Any]:
    """What a checkpoint uses, layer by layer; for an original one also what it could take. Weights are not loaded.

    Args:
        model_class: stock or Efficient class or its name, by default what the config says.
        location: `revision`, `subfolder`, `cache_dir`, `token`, as for `convert`.

    Returns:
        `model_class`, `inputs` (name of what it reads), `model_type`, `family`, `converted`, `max_positions`, the longest
        input (`None` = any length);
        `lengths` and `made_for`, {side: longest input of this stack, and what it was made for}; `layers`, each with `side`,
        `layer`, `mechanism`, `options` and `training` (whether the mechanism needs it); `mechanisms`, each with `side`,
        `possible`, the `reasons` against it at default options, and `training` (empty for converted checkpoints); `experts`,
        the options of sparse experts or `None`; `source`, the checkpoint it was converted from, if its report is there.

    Raises:
        ValueError: an architecture without a family. OSError: no such checkpoint.
    """
    given = None if model_class is None else class_named(model_class)
    config = read_config(name, given, **location)
    if given is not None:
        require_architecture(name, given, config)
    family = family_of(config.model_type)
    converted = config.model_type != family.model_type
    cls = given or named_class(config)
    with torch.device("meta"):
        model = AutoModel.from_config(config) if cls is None else cls(config)
    host = HostModel.of(model)
    stacks = host.stacks
    report = Path(name, location.get("subfolder") or "") / REPORT_NAME
    return {
        "checkpoint": name,
        "model_class": type(model).__name__,
        "inputs": model.main_input_name,
        "model_type": config.model_type,
        "family": family.model_type,
        "converted": converted,
        "source": read_json(report).get("source") if converted and report.is_file() else None,
        "max_positions": host.max_positions,
        "lengths": host.lengths,
        "made_for": host.made_for,
        "experts": getattr(config, "efficient_experts", None),
        "layers": [_layer(stack, layer) for stack in stacks for layer in stack.layers],
        "mechanisms": []
        if converted
        else [_fit(n, host.family, stack) for stack in stacks for n in list_mechanisms()],
    }


def length_words(lengths: Mapping[str, int | None], made_for: Mapping[str, int | None]) -> str:
    """How long inputs may be, by what `inspect_checkpoint` says of each side: "512 positions", "any length", …"""
    takes, meant = (
        str(next(iter(values.values()), None))
        if len(set(values.values())) < 2
        else ", ".join(f"{side} {n}" for side, n in values.items())
        for values in (lengths, made_for)
    )
    if None not in lengths.values():
        return f"{takes} positions"
    return "any length" if None in made_for.values() else f"any length, made for {meant}"


def _layer(stack: Stack, layer: AttentionLayer) -> dict[str, Any]:
    mechanism: Any = layer.module._modules.get(MODULE_NAME)
    options = {} if mechanism is None else mechanism.config.to_dict()
    return {
        "side": stack.side,
        "layer": layer.index,
        "mechanism": options.pop("mechanism", EXACT),
        "options": {key: value for key, value in options.items() if key not in ("layers", "side")},
        "training": None if mechanism is None else training_words(mechanism.config.mechanism),
    }


def _fit(mechanism: str, family: ModelFamily, stack: Stack) -> dict[str, Any]:
    """Whether a mechanism could work in all layers of a stack, at its default options."""
    cls = get_mechanism(mechanism)
    try:
        config = cls.Config()
        reasons = [
            reason for layer in stack.layers for reason in cls.unsupported(config, family.geometry(stack, layer))
        ]
    except (TypeError, ValueError) as error:  # an option without a default
        reasons = [str(error)]
    return {
        "mechanism": mechanism,
        "side": stack.side,
        "possible": not reasons,
        "reasons": list(dict.fromkeys(reasons)),
        "training": training_words(mechanism),
    }
