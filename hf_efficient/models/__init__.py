"""Configs and `PreTrainedModel` subclasses of converted checkpoints, and their registration with the Auto classes.

For every head `<Stock>` that transformers has for a supported architecture there is a class `Efficient<Stock>`, for
every `<Stock>Config` an `Efficient<Stock>Config`. They are two-line subclasses, so they are made here in a loop.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from hf_efficient.experts.loss import with_router_loss
from hf_efficient.families import efficient_type, families
from hf_efficient.models.adapter_targets import register_targets
from hf_efficient.models.config import EfficientConfigMixin
from hf_efficient.models.mixin import EfficientModelMixin, honours_loss_kwargs, naming_global_mask, stock_heads
from hf_efficient.models.registry import CONFIGS, MODELS


def _define(name: str, bases: tuple[type, ...], **namespace: Any) -> Any:
    cls = type(name, bases, {"__module__": __name__, "__qualname__": name, **namespace})
    globals()[name] = cls
    return cls


def _define_all() -> None:
    for model_type in families():
        for stock in stock_heads(model_type):
            stock_config: Any = stock.config_class
            if model_type not in CONFIGS:
                CONFIGS[model_type] = _define(
                    f"Efficient{stock_config.__name__}",
                    (EfficientConfigMixin, stock_config),
                    __doc__=f"{stock_config.__name__} with `efficient_attention`: a list of mechanism options, as JSON; and "
                    "`efficient_experts`: the options of sparse experts.",
                    model_type=efficient_type(model_type),
                )
            MODELS[stock] = _define(
                f"Efficient{stock.__name__}",
                (EfficientModelMixin, stock),
                __doc__=f"{stock.__name__} with efficient attention: see `EfficientModelMixin`.",
                forward=naming_global_mask(with_router_loss(stock.forward)),
                stock_class=stock,
                config_class=CONFIGS[model_type],
                accepts_loss_kwargs=honours_loss_kwargs(stock),
            )


def _register_all() -> None:
    """Tell the Auto classes: each serves the efficient form of every head whose stock form it serves."""
    for config in CONFIGS.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
    autos: list[Any] = [
        auto
        for _, auto in inspect.getmembers(modeling_auto, inspect.isclass)
        if issubclass(auto, _BaseAutoModelClass) and getattr(auto, "_model_mapping", None) is not None
    ]
    by_name = {stock.__name__: efficient for stock, efficient in MODELS.items()}
    for auto in autos:
        names = auto._model_mapping._model_mapping
        for model_type, config in CONFIGS.items():
            name = names.get(model_type)
            for head in (name,) if isinstance(name, str) else name or ():
                if head in by_name:
                    auto.register(config, by_name[head], exist_ok=True)


_define_all()
_register_all()
register_targets()

__all__ = ["CONFIGS", "MODELS", "EfficientModelMixin", *(m.__name__ for m in [*CONFIGS.values(), *MODELS.values()])]
