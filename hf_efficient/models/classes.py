"""The Efficient config and model classes of one model type, and their registration with the Auto classes."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from transformers import AutoConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from hf_efficient.experts.loss import with_router_loss
from hf_efficient.families import efficient_type
from hf_efficient.models.config import EfficientConfigMixin
from hf_efficient.models.mixin import EfficientModelMixin, honours_loss_kwargs, naming_global_mask, stock_heads
from hf_efficient.models.registry import NAME, made_configs, made_models

# where the classes are found by name: see `hf_efficient.models.__getattr__`
HOME = "hf_efficient.models"


def make(model_type: str) -> None:
    """`Efficient<Stock>` for every head `<Stock>` of a model type, and `Efficient<Stock>Config`; two-line subclasses."""
    stocks = stock_heads(model_type)
    stock_config: Any = stocks[0].config_class
    config = _class(
        stock_config.__name__,
        (EfficientConfigMixin, stock_config),
        __doc__=f"{stock_config.__name__} with `efficient_attention`: a list of mechanism options, as JSON; and "
        "`efficient_experts`: the options of sparse experts.",
        model_type=efficient_type(model_type),
    )
    for stock in stocks:
        made_models[stock] = _class(
            stock.__name__,
            (EfficientModelMixin, stock),
            __doc__=f"{stock.__name__} with efficient attention: see `EfficientModelMixin`.",
            forward=naming_global_mask(with_router_loss(stock.forward)),
            stock_class=stock,
            config_class=config,
            accepts_loss_kwargs=honours_loss_kwargs(stock),
        )
    _keep_form_of_files({model_type: config.model_type} | {stock.__name__: NAME + stock.__name__ for stock in stocks})
    _register(model_type, config, {stock.__name__: made_models[stock] for stock in stocks})
    # last: whoever finds the config finds the models
    AutoConfig.register(config.model_type, config, exist_ok=True)
    made_configs[model_type] = config


def _keep_form_of_files(names: dict[str, str]) -> None:
    """Files hold the weights of Efficient classes as they hold those of stock ones: Mixtral's experts one by one, say.

    Args:
        names: {what transformers calls a stock class or its type: what it is called here}.
    """
    for stock, own in names.items():
        conversions = get_checkpoint_conversion_mapping(stock)
        if conversions is not None:
            register_checkpoint_conversion_mapping(own, conversions, overwrite=True)


def _class(name: str, bases: tuple[type, ...], **namespace: Any) -> Any:
    name = NAME + name
    return type(name, bases, {"__module__": HOME, "__qualname__": name, **namespace})


@cache
def _autos() -> list[Any]:
    return [
        auto
        for _, auto in inspect.getmembers(modeling_auto, inspect.isclass)
        if issubclass(auto, _BaseAutoModelClass) and getattr(auto, "_model_mapping", None) is not None
    ]


def _register(model_type: str, config: Any, by_name: dict[str, Any]) -> None:
    """Tell the Auto classes: each serves the efficient form of every head whose stock form it serves."""
    for auto in _autos():
        name = auto._model_mapping._model_mapping.get(model_type)
        for head in (name,) if isinstance(name, str) else name or ():
            if head in by_name:
                auto.register(config, by_name[head], exist_ok=True)
