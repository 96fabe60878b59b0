"""Configs and `PreTrainedModel` subclasses of converted checkpoints, made when they are first asked for."""

from __future__ import annotations

from typing import Any

from hf_efficient.models.registration import register

register()


def __getattr__(name: str) -> Any:
    from hf_efficient.models.registry import CONFIGS, MODELS, NAME, class_by_name, efficient_names

    if name == "__all__":
        return ["CONFIGS", "MODELS", "EfficientModelMixin", *efficient_names()]
    if name in ("CONFIGS", "MODELS"):
        return CONFIGS if name == "CONFIGS" else MODELS
    if name == "EfficientModelMixin":
        from hf_efficient.models.mixin import EfficientModelMixin

        return EfficientModelMixin
    found = class_by_name(name) if name.startswith(NAME) else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
