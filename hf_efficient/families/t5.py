"""T5 and its relatives: no position table, a learned bias over offsets, logits without scaling."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.attention.base.geometry import LinearWeights, SourceAttention
from hf_efficient.families.base import ModelFamily, fill_linear
from hf_efficient.families.feed_forward import Dense
from hf_efficient.families.initialised import mark_initialised
from hf_efficient.families.positions import RelativePositions
from hf_efficient.families.stack import AttentionLayer, Heads, Stack
from hf_efficient.ops.relative_bias import RelativeBias


def _swaps() -> Any:
    """The classes that attention is swapped to; importing them imports the modeling files."""
    return importlib.import_module("hf_efficient.families.swaps.t5")


class T5Family(ModelFamily):
    """The dense bias is built before attention is dispatched, so its class is swapped while a mechanism is installed.

    A class swap survives `deepcopy` and `pickle` and undoes exactly; a closure on the instance does neither.
    """

    has_relative_bias = True

    def is_cross_attention(self, name: str, module: nn.Module) -> bool:
        return name.endswith("EncDecAttention")

    def heads(self, module: Any) -> Heads:
        return Heads.alike(module.n_heads, module.key_value_proj_dim)

    def source_attention(self, module: Any) -> SourceAttention:
        query, key, value = (LinearWeights(p.weight.detach(), None) for p in (module.q, module.k, module.v))
        return SourceAttention(query, key, value)

    def relative_bias(self, stack: Stack, layer: AttentionLayer) -> RelativeBias | None:
        # one table in the first layer serves the whole stack, but UMT5 has one in every layer
        owner: Any = layer.module if layer.module.has_relative_attention_bias else stack.layers[0].module
        swaps = _swaps()
        lazy: Any = swaps.SWAPS.get(type(owner), (type(owner),))[0]
        embedding = owner.relative_attention_bias
        # a hook that brings the table in also moves the ids there
        device = "cpu" if hasattr(embedding, "_hf_hook") else next(embedding.parameters()).device
        with torch.no_grad():
            return RelativeBias(
                partial(swaps.table, owner, device),
                partial(lazy._bucket_of_offsets, owner),
                owner.relative_attention_max_distance,
            )

    def project(self, module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.heads(module)
        key, value = (p(hidden).unflatten(-1, (heads.key_value, -1)).transpose(1, 2) for p in (module.k, module.v))
        return key, value

    def attention_input(self, part: Any, hidden: Tensor) -> Tensor:
        return part.layer_norm(hidden)

    def swap_in(self, stack: Stack) -> None:
        swaps = _swaps().SWAPS
        for layer in stack.layers:
            layer.module.__class__ = swaps[type(layer.module)][0]
        for module in stack.cross_attention:
            module.__class__ = swaps[type(module)][1]

    def swap_out(self, stack: Stack) -> None:
        for module in [layer.module for layer in stack.layers] + stack.cross_attention:
            module.__class__ = _swaps().HOSTS.get(type(module), type(module))

    # no biases, with or without a gate

    def feed_forward_name(self, layer: Any) -> str:
        return f"layer.{len(layer.layer) - 1}.DenseReluDense"

    def feed_forward_products(self, layer: Any) -> list[str]:
        name = self.feed_forward_name(layer)
        return [f"{name}.{part}" for part, _ in layer.get_submodule(name).named_children() if part.startswith("w")]

    def feed_forward(self, layer: Any) -> Dense:
        part = layer.layer[-1].DenseReluDense
        is_gated = hasattr(part, "wi_0")
        up = torch.cat([part.wi_0.weight, part.wi_1.weight]) if is_gated else part.wi.weight
        return Dense(up.T, part.wo.weight.T, None, None, part.act, is_gated, inner_dropout=part.dropout.p)

    def restore_feed_forward(self, layer: Any, dense: Dense, config: Any) -> None:
        kind = "DenseGatedActDense" if dense.is_gated else "DenseActDense"
        part = getattr(self.modeling, self.stack_classes[0].removesuffix("Stack") + kind)(config)
        layer.layer[-1].DenseReluDense = part
        firsts = (part.wi_0, part.wi_1) if dense.is_gated else (part.wi,)
        for first, weight in zip(firsts, dense.up.T.chunk(len(firsts)), strict=True):
            fill_linear(first, weight, None)
        fill_linear(part.wo, dense.down.T, None)
        mark_initialised(part)


FAMILIES = tuple(
    T5Family(
        model_type=prefix.lower(),
        stack_classes=(f"{prefix}Stack",),
        attention_classes=(f"{prefix}Attention",),
        projections=("q", "k", "v"),
        projection_bias=False,
        positions=RelativePositions(),
        embeddings_module="",
        layers_module="",
    )
    for prefix in ("T5", "MT5", "UMT5")
)
