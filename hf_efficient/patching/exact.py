"""The unconverted model inside a converted one: full attention for a while, without a second copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_efficient.attention.base.mechanism import EfficientAttention
from hf_efficient.patching.hooks import without_mechanisms
from hf_efficient.patching.names import MODULE_NAME


def converted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{qualified name: self-attention module} of every layer that carries a mechanism, in order of the modules."""
    return {name: module for name, module in model.named_modules() if module._modules.get(MODULE_NAME) is not None}


def mechanism_of(attention: nn.Module) -> Any:
    """The mechanism in a converted self-attention module (with adapters: the trained copy, in its wrapper)."""
    return attention._modules[MODULE_NAME]


def host_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of everything but the mechanisms."""
    own = {id(p) for layer in converted_layers(model).values() for p in mechanism_of(layer).parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in own}


@contextmanager
def exact_attention(model: nn.Module) -> Iterator[None]:
    """Inside, every converted layer of `model` computes full softmax attention with the host's own weights.

        with exact_attention(model):
            original = model(**batch)

    This is the model before its conversion (on the positions it has now): no mechanism, no extra global tokens, no bounded
    caches; `global_attention_mask` changes nothing, as full attention looks everywhere. On exit everything is as before,
    also after an exception. Works on wrapped models (adapters, data-parallel) and does nothing to an unconverted one.
    O(N²) time as the original. A cache that was filled inside belongs to the original model, not to the converted one.
    """
    with substituted(model, lambda mechanism: None):
        yield


@contextmanager
def substituted(model: nn.Module, make: Callable[[Any], EfficientAttention | None]) -> Iterator[None]:
    """Inside, `make(mechanism)` replaces every mechanism; `None` = full attention. Extra tokens are off."""
    layers = converted_layers(model)
    before = {name: mechanism_of(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer._modules[MODULE_NAME] = make(before[name])
        with without_mechanisms(model):
            yield
    finally:
        for name, layer in layers.items():
            layer._modules[MODULE_NAME] = before[name]


@contextmanager
def eval_mode(model: nn.Module, keep: Callable[[str], bool] = lambda name: False) -> Iterator[None]:
    """Inside, every module is in eval mode (no dropout), except those whose qualified name `keep` wants left alone."""
    modes = [(module, module.training) for name, module in model.named_modules() if not keep(name)]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Teacher:
    """The unconverted model as it was when this was made, however the weights of `model` are trained since.

    A call runs `model` under `exact_attention`, in eval mode and without gradients, on the former values of all host
    weights that required gradients when it was made; those alone are copied. Takes and returns what the model does.

    Raises:
        ValueError: a host weight requires gradients now and did not then, or is held in another form (sharded) than then.
    """

    def __init__(self, model: Any):
        self.model = model
        self._former = {name: p.detach().clone() for name, p in host_parameters(model).items() if p.requires_grad}

    @property
    def config(self) -> Any:
        return self.model.config

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def __call__(self, **batch: Any) -> Any:
        model = self.model
        with torch.no_grad(), self._former_weights(), exact_attention(model), eval_mode(model):
            try:
                # autocast keeps casts of weights: neither today's values may serve here, nor these the student
                torch.clear_autocast_cache()
                return model(**batch)
            finally:
                torch.clear_autocast_cache()

    @contextmanager
    def _former_weights(self) -> Iterator[None]:
        host = host_parameters(self.model)
        self._check(host)
        today = {name: host[name].data for name in self._former}
        try:
            for name, value in today.items():
                self._former[name] = self._former[name].to(value.device, value.dtype)
                host[name].data = self._former[name]
            yield
        finally:
            for name, value in today.items():
                host[name].data = value

    def _check(self, host: Mapping[str, nn.Parameter]) -> None:
        new = [name for name, p in host.items() if p.requires_grad and name not in self._former]
        if new:
            raise ValueError(
                f"{len(new)} host weights are trained, e.g. {new[0]}, of which the teacher has no former value: choose what "
                "is trained before the transfer is made."
            )
        for name, former in self._former.items():
            now = host.get(name)
            if now is None or now.shape != former.shape or type(now.data) is not type(former):
                raise ValueError(
                    f"host weight {name} is sharded or gone since the transfer was made, so the teacher can't take its "
                    "former value: train the mechanisms alone, or use data-parallel training."
                )
