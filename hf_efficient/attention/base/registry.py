"""The registry of all mechanisms, and configs from names, JSON or lists."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from hf_efficient.attention.base.mechanism import EfficientAttention, EfficientAttentionConfig
from hf_efficient.attention.base.plugins import entry_points
from hf_efficient.attention.base.suggestions import did_you_mean

_REGISTRY: dict[str, type[EfficientAttention]] = {}


def register_mechanism(cls: type[EfficientAttention]) -> type[EfficientAttention]:
    """Class decorator: make a mechanism known under `cls.Config.mechanism`.

    Raises:
        ValueError: the name is no lower-case identifier, or another class has it.
    """
    name = cls.Config.mechanism
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"mechanism name {name!r} of {cls.__name__} must be a lower-case identifier.")
    if _REGISTRY.get(name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"mechanism {name!r} is already registered by {_REGISTRY[name].__qualname__}.")
    cls.Config.attention_class = cls
    _REGISTRY[name] = cls
    return cls


@cache
def _discover() -> None:
    # by name, since a base imports no mechanism
    attention = importlib.import_module(__package__.removesuffix(".base"))
    for module in pkgutil.iter_modules(attention.__path__):
        importlib.import_module(f"{attention.__name__}.{module.name}")
    for mechanism, _ in entry_points("mechanisms"):
        register_mechanism(mechanism)


def _registry() -> dict[str, type[EfficientAttention]]:
    _discover()
    return _REGISTRY


def list_mechanisms() -> list[str]:
    """Names of all registered mechanisms, sorted."""
    return sorted(_registry())


def get_mechanism(name: str) -> type[EfficientAttention]:
    """The mechanism class registered under `name`; an unknown name raises a ValueError that lists the known ones."""
    try:
        return _registry()[name]
    except (KeyError, TypeError):  # or not even hashable
        hint = did_you_mean(str(name), list_mechanisms())
        raise ValueError(
            f"unknown mechanism {name!r}{hint}; the registered ones are {', '.join(list_mechanisms())}."
        ) from None


def describe(name: str) -> dict[str, Any]:
    """The card facts of a mechanism: title, paper, costs, exact limit, causal or not, T5 bias or not, options."""
    cls = get_mechanism(name)
    options = {f.name: f.default for f in dataclasses.fields(cls.Config)}
    return {
        "mechanism": name,
        **cls.facts._asdict(),
        "causal": cls.causal_refusal is None,
        "relative_bias": cls.relative_bias_refusal is None,
        "options": options,
    }


def training_words(name: str) -> str:
    """What a mechanism's facts say of training, in words that stand alone: "needs training: …", "works without …"."""
    told = get_mechanism(name).facts.training
    return "needs training" + told.removeprefix("needed") if told.startswith("needed") else told


def attention_config(mechanism: str, **options: Any) -> EfficientAttentionConfig:
    """`attention_config("longformer", attention_window=512)`: the validated config of a mechanism by name."""
    return get_mechanism(mechanism).Config.from_dict(options)


def window_only(config: Any) -> EfficientAttentionConfig | None:
    """The exact window of a mechanism, with its sinks, without all that it has beside it: what it must be better than."""
    if not config.attention_window:
        return None
    shared = ("attention_window", "sink_tokens", "layers", "side")
    return attention_config("local", **{name: getattr(config, name) for name in shared if hasattr(config, name)})


ConfigLike = str | EfficientAttentionConfig | Mapping[str, Any] | Iterable[Any]


def attention_configs(spec: ConfigLike, **options: Any) -> list[EfficientAttentionConfig]:
    """Normalise any accepted form (name with options, config, JSON object or text, or a list of these) to a list.

    Raises:
        ValueError: unknown mechanism or option, options next to something that is not a name, an empty list.
        TypeError: a form that is none of these.
    """
    if isinstance(spec, str):
        if spec.lstrip()[:1] in ("[", "{"):
            return attention_configs(json.loads(spec), **options)
        return [attention_config(spec, **options)]
    if options:
        raise ValueError(f"options {', '.join(map(repr, options))} go with a mechanism's name, not with {spec!r}.")
    if isinstance(spec, EfficientAttentionConfig):
        return [spec]
    if isinstance(spec, Mapping):
        if "mechanism" not in spec:
            raise ValueError(f"{dict(spec)!r} names no mechanism; add 'mechanism': one of {list_mechanisms()}.")
        return [attention_config(spec["mechanism"], **{k: v for k, v in spec.items() if k != "mechanism"})]
    if isinstance(spec, Iterable):
        configs = [config for item in spec for config in attention_configs(item)]
        if not configs:
            raise ValueError("an empty list converts nothing; name at least one mechanism.")
        return configs
    raise TypeError(f"{spec!r} is no mechanism: give a name, a config, its JSON form, or a list of these.")


def requested_configs(spec: ConfigLike, **options: Any) -> list[EfficientAttentionConfig]:
    """As `attention_configs`, for what a model is to be converted to; raises ValueError for what only imported ones have."""
    configs = attention_configs(spec, **options)
    for reason in filter(None, (config.import_only() for config in configs)):
        raise ValueError(reason)
    return configs


def stored_attention(stored: Any) -> Any:
    """The list of groups in a checkpoint's `efficient_attention`, whichever version saved it, with all options of this one.

    Anything but a list of JSON objects comes back as it is, for `attention_configs` to judge.
    """
    if not isinstance(stored, list) or not all(isinstance(one, Mapping) and "mechanism" in one for one in stored):
        return stored
    return [get_mechanism(one["mechanism"]).Config.from_stored(one).to_dict() for one in stored]
