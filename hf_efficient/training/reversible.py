"""Reversible residual layers: training memory that does not grow with depth."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states


class ReversibleSequence(nn.Module):
    """Layers whose inputs are computed anew from their outputs in the backward pass, so that none are stored.

    Each pair (F, G) sends two streams of equal shape to

        y₁ = x₁ + F(x₂),   y₂ = x₂ + G(y₁)          and back: x₂ = y₂ - G(y₁),   x₁ = y₁ - F(x₂)

    Gradients are those of the same layers without this class, up to the rounding of the way back, which grows with depth:
    keep the streams in fp32. Random numbers (dropout) and autocast are the same the second time. What else a layer does on
    being called (statistics of a batch normalisation) happens twice. O(1) activations in depth for one more forward pass.

    An architecture for training, not for conversion: with both streams equal to a pretrained model's hidden state h, G
    would have to read `h + F(h)` and F the sum of both streams less their start, so no choice of F and G keeps its function;
    a model that normalises after its residual sum (BERT) has no sum to take apart either. To save memory in a converted
    model, use gradient checkpointing.

    Args:
        pairs: (F, G) of each layer, modules that map a tensor to one of its shape.

    Raises:
        ValueError: no pairs; in a call, streams of different shapes, or a module that changes the shape.

    Source: Gomez et al. 2017 (arXiv 1707.04585), §3; Kitaev et al. 2020 (arXiv 2001.04451), §3.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]]):
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)
        if not len(self.pairs):
            raise ValueError("a reversible sequence of no layers computes nothing: give at least one pair (F, G).")

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams behind all layers, of the shape of both streams before them."""
        if first.shape != second.shape:
            raise ValueError(f"streams of {tuple(first.shape)} and {tuple(second.shape)}: both must have one shape.")
        modules = [module for pair in self.pairs for module in cast(nn.ModuleList, pair)]
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        streams: tuple[Tensor, Tensor] = _Reversible.apply(modules, first, second, *parameters)
        return streams


class _Circumstances(NamedTuple):
    """What a second call needs to be the same as the first: random states and autocast."""

    cpu: Tensor
    devices: Any
    autocast: tuple[str, torch.dtype, bool]

    @classmethod
    def now(cls, x: Tensor) -> _Circumstances:
        kind = x.device.type
        autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return cls(torch.get_rng_state(), get_device_states(x), autocast)

    @contextmanager
    def again(self) -> Any:
        devices, states = self.devices
        kind, dtype, enabled = self.autocast
        with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
            torch.set_rng_state(self.cpu)
            set_device_states(devices, states, device_type=kind)
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                yield


def _called(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module(x)
    if out.shape != x.shape:
        raise ValueError(
            f"{type(module).__name__} made {tuple(out.shape)} of {tuple(x.shape)}: it must keep the shape."
        )
    return out


class _Reversible(torch.autograd.Function):
    """The parameters are arguments, so that their gradients go the ordinary way."""

    @staticmethod
    def forward(ctx: Any, modules: list[nn.Module], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        # the stream that a module adds to, and the one that it reads, in turns
        added, read = tensors[:2]
        ctx.modules, ctx.circumstances = modules, []
        for module in modules:
            ctx.circumstances.append(_Circumstances.now(read))
            added, read = read, added + _called(module, read)
        ctx.save_for_backward(added, read)
        return added, read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        streams, found = list(ctx.saved_tensors), []
        grads = list(gradients)
        for module, before in zip(reversed(ctx.modules), reversed(ctx.circumstances), strict=True):
            (read, out), (grad_read, grad_out) = streams, grads
            parameters = [p for p in module.parameters() if p.requires_grad]
            with torch.enable_grad(), before.again():
                inputs = read.detach().requires_grad_()
                change = _called(module, inputs)
                own = _gradients(change, [inputs, *parameters], grad_out)
            found.append(own[1:])
            streams = [out - change.detach(), read]
            grads = [grad_out, grad_read if own[0] is None else grad_read + own[0]]
        return None, *grads, *(gradient for own in reversed(found) for gradient in own)


def _gradients(out: Tensor, inputs: list[Tensor], gradient: Tensor) -> tuple[Tensor | None, ...]:
    if not out.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(out, inputs, gradient.to(out.dtype), allow_unused=True)
