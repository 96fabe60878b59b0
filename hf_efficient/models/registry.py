"""The Efficient class of each stock class, and the Efficient config of each model type; filled by `models`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

CONFIGS: dict[str, type[PreTrainedConfig]] = {}
"""Efficient config classes by stock `model_type`."""
MODELS: dict[Any, Any] = {}
"""Efficient model classes by stock class."""


def is_efficient(cls: type) -> bool:
    """Whether a model class is one of the Efficient ones, or a subclass of one."""
    return issubclass(cls, tuple(MODELS.values()))


def named_class(config: PreTrainedConfig) -> Any:
    """The model class, stock or Efficient, that a checkpoint's config names; `None` = it names none of them."""
    classes = {cls.__name__: cls for pair in MODELS.items() for cls in pair}
    named = [classes[name] for name in config.architectures or () if name in classes]
    return next((cls for cls in named if cls.config_class.model_type == config.model_type), None)
