"""A loaded model becomes an instance of another class: of an Efficient one, or of the stock one again."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .expert_sites import mark_experts
from .models import EfficientModelMixin


def stock_class(model: PreTrainedModel) -> Any:
    """transformers' class of a model, Efficient or not."""
    return getattr(type(model), "stock_class", type(model))


def change_class(model: Any, cls: Any, config: Any) -> None:
    """Make a loaded model an instance of another class."""
    # transformers notes which outputs a class can return when an instance is initialised: do that on an empty one
    PreTrainedModel.__init__(cls.__new__(cls), config)
    model.__class__ = cls


def replace_config(model: PreTrainedModel, old: Any, new: Any) -> None:
    """Every module that held the model's config holds the new one; stacks with a copy of their own keep it."""
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def config_of_class(config: Any, cls: Any) -> Any:
    """The config of `cls`, the stock class or, where experts stay, the Efficient one."""
    values = config.to_dict() | {"model_type": cls.config_class.model_type}
    if issubclass(cls, EfficientModelMixin):
        values.pop("efficient_source", None)
        values |= {"efficient_attention": []}
    else:
        # saving in between wrote the Efficient class there
        values["architectures"] = config.architectures and [n.removeprefix("Efficient") for n in config.architectures]
        values = {k: v for k, v in values.items() if not k.startswith("efficient_") and k != "experts_implementation"}
    new = cls.config_class.from_dict(values)
    mark_experts(new)
    new._attn_implementation = config._attn_implementation
    new._name_or_path = config._name_or_path
    return new
