"""Configs and `PreTrainedModel` subclasses of converted checkpoints, made when they are first asked for."""

from __future__ import annotations

from typing import Any

from hf_efficient.models.adapter_targets import register_targets
from hf_efficient.models.mixin import EfficientModelMixin
from hf_efficient.models.registry import CONFIGS, MODELS, NAME, class_by_name, efficient_names, find_configs_by_type

find_configs_by_type()
register_targets()


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return ["CONFIGS", "MODELS", "EfficientModelMixin", *efficient_names()]
    found = class_by_name(name) if name.startswith(NAME) else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


_ = CONFIGS, MODELS, EfficientModelMixin
