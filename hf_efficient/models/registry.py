"""The Efficient class of each stock class, and the Efficient config of each model type, made when they are asked for."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from threading import RLock
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from hf_efficient.families import families, is_family

NAME = "Efficient"
# what transformers calls model classes, among the other names that its modeling files export
MODEL_NAME = re.compile(r"^(?!.*[pP]re[tT]rained).*(Model|ModelWithProjection|Backbone|For[A-Z]\w*)$")
made_configs: dict[str, type[PreTrainedConfig]] = {}
made_models: dict[Any, Any] = {}
_making = RLock()


def define(model_type: str) -> None:
    """Make and register the classes of a stock model type, once; this imports its modeling file."""
    if model_type in made_configs:
        return
    # by name, since these classes are made of modules that import this one
    make = importlib.import_module("hf_efficient.models.classes").make
    with _making:  # threads that load models get one class
        if model_type not in made_configs:
            make(model_type)


class _Configs(Mapping[str, type[PreTrainedConfig]]):
    def __getitem__(self, model_type: str) -> type[PreTrainedConfig]:
        if not is_family(model_type):
            raise KeyError(model_type)
        define(model_type)
        return made_configs[model_type]

    def __iter__(self) -> Iterator[str]:
        return iter(families())

    def __len__(self) -> int:
        return len(families())


class _Models(Mapping[Any, Any]):
    def __getitem__(self, stock: Any) -> Any:
        model_type = getattr(getattr(stock, "config_class", None), "model_type", None)
        if stock not in made_models and model_type is not None and is_family(model_type):
            define(model_type)
        return made_models[stock]

    def __iter__(self) -> Iterator[Any]:
        return (stock for model_type in families() for stock in heads(model_type))

    def __len__(self) -> int:
        return sum(1 for _ in self)


CONFIGS = _Configs()
"""Efficient config classes by stock `model_type`; lists the written families, and finds others too."""
MODELS = _Models()
"""Efficient model classes by stock class; lists those of the written families, which imports all their modeling files."""


def heads(model_type: str) -> list[Any]:
    """The stock model classes of a model type that have an Efficient form."""
    define(model_type)
    return [stock for stock in list(made_models) if stock.config_class.model_type == model_type]


def is_efficient(cls: type) -> bool:
    """Whether a model class is one of the Efficient ones, or a subclass of one."""
    return issubclass(cls, tuple(made_models.values()))


def class_by_name(name: str) -> Any:
    """The model or config class of that name, stock or Efficient, as far as it has both forms; else `None`."""
    bare = name.removeprefix(NAME)
    stock = getattr(transformers, bare, None) or _of_registered(bare)
    is_config = isinstance(stock, type) and issubclass(stock, PreTrainedConfig)
    try:
        efficient = CONFIGS[stock.model_type] if is_config else MODELS[stock]
    except (KeyError, TypeError):
        return None
    return {stock.__name__: stock, efficient.__name__: efficient}.get(name)


def _of_registered(name: str) -> Any:
    """A class of a family whose host is no part of transformers."""
    for model_type in families():
        if model_type not in CONFIG_MAPPING_NAMES:
            define(model_type)
            for stock in (*heads(model_type), made_configs[model_type].__mro__[2]):
                if stock.__name__ == name:
                    return stock
    return None


def efficient_names() -> list[str]:
    """Names of the Efficient classes of all written families, without importing any modeling file."""
    folders = {model_type_to_module_name(t) for t, family in families().items() if not family.model_classes}
    exported: dict[str, str] = vars(sys.modules["transformers"])["_class_to_module"]
    names = [CONFIG_MAPPING_NAMES[model_type] for model_type in families() if model_type in CONFIG_MAPPING_NAMES]
    names += [name for family in families().values() for name in family.model_classes]
    for name, module in exported.items():
        _, folder, file = [*module.split("."), "", ""][:3]
        if folder in folders and file == f"modeling_{folder}" and MODEL_NAME.search(name):
            names.append(name)
    return [NAME + name for name in dict.fromkeys(names)]


def named_class(config: PreTrainedConfig) -> Any:
    """The model class, stock or Efficient, that a checkpoint's config names; `None` = it names none of them."""
    named = [cls for name in config.architectures or () if (cls := class_by_name(name)) is not None]
    return next((cls for cls in named if cls.config_class.model_type == config.model_type), None)
