"""The encoder or decoder of a loaded model, its self-attention layers, and their heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_efficient.attention.base.geometry import LinearWeights


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One self-attention layer: its qualified name in the model, the module and its index in its stack."""

    name: str
    module: nn.Module
    index: int


class Heads(NamedTuple):
    """Numbers of heads of queries and of keys and values (a divisor), width of queries and keys, and of values."""

    query: int
    key_value: int
    width: int
    value_width: int

    @classmethod
    def alike(cls, count: int, width: int) -> Heads:
        return cls(count, count, width, width)

    def expand(self, projection: LinearWeights) -> LinearWeights:
        """The rows of keys or values once for each head of queries that shares them."""
        if self.query == self.key_value:
            return projection
        weight, bias = (
            None if x is None else x.unflatten(0, (self.key_value, -1)).repeat_interleave(self.groups, 0).flatten(0, 1)
            for x in projection
        )
        assert weight is not None
        return LinearWeights(weight, bias)

    @property
    def groups(self) -> int:
        """Heads of queries that share one head of keys and values."""
        return self.query // self.key_value


class Place(NamedTuple):
    """Where a tensor lives, and its precision."""

    device: torch.device
    dtype: torch.dtype


@dataclass
class Stack:
    """One encoder or decoder of a model: its module, side, self-attention layers, and cross-attention modules."""

    name: str
    module: PreTrainedModel
    side: str
    layers: list[AttentionLayer] = field(default_factory=list)
    cross_attention: list[nn.Module] = field(default_factory=list)

    def modules_around(self, layer: AttentionLayer) -> list[nn.Module]:
        """The modules inside the stack that hold a self-attention module, from the outside in."""
        path = (layer.name.removeprefix(f"{self.name}.") if self.name else layer.name).split(".")
        return [self.module.get_submodule(".".join(path[:end])) for end in range(1, len(path))]

    def place(self, layer: AttentionLayer) -> Place:
        """Device and precision of what is new in a layer: those of its first weight that is neither packed nor elsewhere."""
        modules = [*layer.module.modules(), *self.module.modules()]
        owned = [(module, p) for module in modules for p in module.parameters(recurse=False)]
        owner, like = next((m, p) for m, p in owned if p.is_floating_point() and p.element_size() > 1)
        hook: Any = getattr(owner, "_hf_hook", None)
        # offloaded weights are on the meta device except in calls, and then where accelerate's hook brings them
        device = getattr(hook, "execution_device", None) if like.is_meta else None
        return Place(like.device if device is None else torch.device(device), like.dtype)

    def block_around(self, layer: AttentionLayer) -> nn.Module | None:
        """The host's own layer (self-attention, feed-forward, norms) around self-attention; `None` = there is none."""
        return next((m for m in self.modules_around(layer) if isinstance(m, GradientCheckpointingLayer)), None)

    def chunk_size_feed_forward(self, layer: AttentionLayer) -> int:
        """Tokens that the feed-forward part of a layer takes at once; 0 = all of them."""
        block = self.block_around(layer)
        sizes = [] if block is None else [getattr(part, "chunk_size_feed_forward", 0) for part in block.modules()]
        return max(sizes, default=0)

    def residual_module(self, layer: AttentionLayer) -> nn.Module | None:
        """The module that adds the residual of attention and nothing else; `None` = the host's own layer does it, if any."""
        around, block = self.modules_around(layer), self.block_around(layer)
        return around[-1] if around and block is not None and around[-1] is not block else None
