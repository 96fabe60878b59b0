"""What a model family is: where its self-attention sits, what its weights and positions are called."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.attention.base.geometry import AttentionGeometry, LinearWeights, Rotary, SourceAttention
from hf_efficient.families.feed_forward import Dense
from hf_efficient.families.positions import UNKNOWN, PositionScheme
from hf_efficient.families.readable import require_plain
from hf_efficient.families.rotary import RotaryPositions
from hf_efficient.families.stack import AttentionLayer, Heads, Stack
from hf_efficient.families.windows import config_window
from hf_efficient.ops.relative_bias import RelativeBias


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One transformers architecture, as data.

    Args:
        model_type: of the stock config.
        stack_classes, attention_classes: class names in the architecture's modeling module.
        module_name: of that module, where it does not follow from `model_type`: `"clip"` for `clip_vision_model`. With its
            folder in front where that has another name: `"data2vec.data2vec_text"`.
        model_classes: names of this architecture's model classes, where that module has those of others, too.
        projections: names of the projections inside an attention module.
        projection_bias: whether they may have a bias vector.
        key_norm: name of the norm of keys inside an attention module, before their rotation, where it has one.
        rotary_interleaved: neighbouring entries turn together (see `Rotary`).
        scales_queries: the host multiplies queries by `1 / √head_dim` itself, and asks attention for a scaling of 1.
        positions: how they enter, and what longer inputs need.
        embeddings_module, layers_module: where extra tokens enter and leave inside a stack: the module whose output are the
            embeddings, and the one that runs all layers and returns the last hidden states. `""` = the stack itself, by
            `inputs_embeds`, for stacks without absolute positions; `None` = extra tokens are not possible.
        reads: fields of the config that change attention and that its methods read: see `config_fields`.
        since: first version of transformers whose modules this describes; with an older one the type has no written family.

    Subclasses override what is not data.
    """

    model_type: str
    stack_classes: tuple[str, ...]
    attention_classes: tuple[str, ...]
    module_name: str | None = None
    model_classes: tuple[str, ...] = ()
    projections: tuple[str, ...] = ("query", "key", "value")
    projection_bias: bool = True
    key_norm: str | None = None
    rotary_interleaved: bool = False
    scales_queries: bool = False
    positions: PositionScheme = UNKNOWN
    embeddings_module: str | None = None
    layers_module: str | None = None
    reads: tuple[str, ...] = ()
    since: str | None = None

    @property
    def modeling(self) -> Any:
        folder, _, name = (self.module_name or self.model_type.replace("-", "_")).rpartition(".")
        return importlib.import_module(f"transformers.models.{folder or name}.modeling_{name}")

    def of(self, config: Any) -> ModelFamily:
        """What describes models of this config, where one `model_type` has two kinds of positions."""
        return self

    # which modules

    def stacks(self, model: nn.Module) -> list[Stack]:
        """All stacks of `model` in order, each with its self-attention layers in order."""
        stack_classes, attention_classes = (
            tuple(getattr(self.modeling, name) for name in names)
            for names in (self.stack_classes, self.attention_classes)
        )
        found = [
            Stack(name, module, self.side(module))
            for name, module in model.named_modules()
            if isinstance(module, stack_classes)
        ]
        for stack in found:
            for name, module in stack.module.named_modules():
                if self.is_cross_attention(name, module):
                    stack.cross_attention.append(module)
                elif isinstance(module, attention_classes):
                    full = f"{stack.name}.{name}" if stack.name else name
                    stack.layers.append(AttentionLayer(full, module, len(stack.layers)))
        return found

    def is_cross_attention(self, name: str, module: nn.Module) -> bool:
        """Attention over another sequence, which always stays exact."""
        return "CrossAttention" in type(module).__name__ and hasattr(module, "key")

    def side(self, stack: Any) -> str:
        return "decoder" if getattr(stack.config, "is_decoder", False) else "encoder"

    # what they are like

    def geometry(self, stack: Stack, layer: AttentionLayer, max_positions: int | None = None) -> AttentionGeometry:
        """Where a mechanism would sit; `max_positions` is that of a stack which is still to be lengthened."""
        config = stack.module.config
        heads = self.heads(layer.module)
        bias = self.relative_bias(stack, layer)
        is_causal = self.is_causal(stack, layer)
        return AttentionGeometry(
            num_heads=heads.query,
            head_dim=heads.width,
            hidden_size=self.hidden_size(stack),
            layer=layer.index,
            num_layers=len(stack.layers),
            side=stack.side,
            is_causal=is_causal,
            has_relative_bias=self.has_relative_bias,
            projection_bias=self.has_projection_bias(layer.module),
            max_positions=max_positions or self.positions.length(stack),
            num_relative_buckets=getattr(config, "relative_attention_num_buckets", 0) if self.has_relative_bias else 0,
            chunk_size_feed_forward=stack.chunk_size_feed_forward(layer),
            relative_bias_reach=0 if bias is None else bias.reach(is_causal=is_causal),
            num_key_value_heads=heads.key_value,
            value_dim=heads.value_width,
            rotary=self.rotary(stack, layer),
            has_key_norm=self.key_norm is not None and hasattr(layer.module, self.key_norm),
            sliding_window=self.sliding_window(stack, layer),
            softcap=self.softcap(config, layer),
            has_residual_module=stack.residual_module(layer) is not None,
            has_sinks=self.sinks(layer.module) is not None,
            position_scheme=self.positions.kind,
            grid=self.positions.grid(config),
            prefix_tokens=self.positions.prefix_tokens(config),
        )

    has_relative_bias = False
    needs_proof = False
    """What is known was found by introspection: a model is compared with itself before it is called converted."""
    positions_skip_padding = False
    """Without `position_ids` the host counts its tokens, without padding, instead of their indices."""
    hands_on_keywords = True
    """Keywords of a call of the stack reach its attention modules."""

    def num_calls(self, stack: Stack) -> int:
        """Layers that share one attention module (ALBERT): how often each runs in a forward pass."""
        return 1

    def hidden_size(self, stack: Stack) -> int:
        """Width of the states between layers."""
        size: int = stack.module.config.hidden_size
        return size

    def heads(self, module: Any) -> Heads:
        """Numbers of heads of an attention module, and their widths: under their usual names, there or in its config."""
        names = ("num_attention_heads", "num_heads", "n_heads")
        query = _first(module, names) or _first(module.config, names)
        width = _first(module, ("attention_head_size", "head_dim", "head_size"))
        if query is None or width is None:
            raise ValueError(f"{type(module).__name__}: the number of its heads, or their width, is not known.")
        key_value = query // (_first(module, ("num_key_value_groups",)) or 1)
        return Heads(query, key_value, width, width)

    def has_projection_bias(self, module: Any) -> bool:
        """Whether the projections of an attention module have a bias vector."""
        return self.projection_bias and getattr(module.get_submodule(self.projections[-1]), "bias", None) is not None

    def is_causal(self, stack: Stack, layer: AttentionLayer) -> bool:
        """Query i of this layer may only see keys j ≤ i. Masks and keywords of a call are checked against it."""
        return stack.side == "decoder"

    def rotary(self, stack: Stack, layer: AttentionLayer) -> Rotary | None:
        """How queries and keys of this layer are rotated by their positions; `None` = they are not."""
        if not isinstance(self.positions, RotaryPositions) or not getattr(layer.module, "use_rope", True):
            return None
        kinds = getattr(stack.module.config, "layer_types", None)
        return Rotary(self.positions.dim(stack, kinds[layer.index] if kinds else None), self.rotary_interleaved)

    def sliding_window(self, stack: Stack, layer: AttentionLayer) -> tuple[int, int] | None:
        """(left, right) keys beside the token itself that the host lets a query of this layer see: see `config_window`."""
        return config_window(stack.module.config, layer.module, layer.index, self.is_causal(stack, layer))

    def softcap(self, config: Any, layer: AttentionLayer) -> float | None:
        """c where the host's logits become `c · tanh(logits / c)`: `attn_logit_softcapping`."""
        cap: float | None = getattr(config, "attn_logit_softcapping", None)
        return cap

    def sinks(self, module: Any) -> Tensor | None:
        """(H,) learned logits in the denominator of each head's softmax, with no value; `None` = there are none."""
        sinks = getattr(module, "sinks", None)
        return sinks if isinstance(sinks, Tensor) else None

    def pretrained(self, stack: Stack, layer: AttentionLayer) -> SourceAttention:
        """What a mechanism of this layer starts from; weights are read, and must be plain, only as far as it takes them."""
        return PretrainedAttention(self, stack, layer)  # type: ignore[return-value]

    def source_attention(self, module: Any) -> SourceAttention:
        """The host's q, k, v projections as (out, in) weights and biases; they must be plain (`ops.plain`)."""
        query, key, value = (
            LinearWeights(p.weight.detach(), _detach(p.bias)) for p in map(module.get_submodule, self.projections)
        )
        return SourceAttention(query, key, value)

    def relative_bias(self, stack: Stack, layer: AttentionLayer) -> RelativeBias | None:
        """The pretrained bias over offsets that enters this layer's logits, read-only; `None` where there is none."""
        return None

    def projection_refusal(self, module: Any) -> str | None:
        """Why `project` can't give keys and values of an attention module; `None` = it can."""
        return None

    def project(self, module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G, hidden) states through the host's key and value projections: two tensors (B, H or fewer, G, D).

        Keys are normalised where the host does that; they are not rotated.
        """
        heads = self.heads(module)
        key, value = (module.get_submodule(name)(hidden) for name in self.projections[1:])
        norm: Any = getattr(module, self.key_norm, None) if self.key_norm else None
        weight = getattr(norm, "weight", None)
        if weight is not None and weight.shape[-1] == key.shape[-1] != heads.width:  # over all heads of a token
            key, norm = norm(key), None
        key, value = (x.unflatten(-1, (heads.key_value, -1)) for x in (key, value))
        if norm is not None and weight is not None:
            key, norm = norm(key), None
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        return (key if norm is None else norm(key)), value  # StableLM has a norm for each head

    def attention_input(self, part: Any, hidden: Tensor) -> Tensor:
        """(B, G, hidden) states that enter a layer, as its projections get them.

        Args:
            part: the module around the attention module, which adds the residual.
        """
        return hidden

    def embeddings_name(self, stack: Stack) -> str | None:
        """`embeddings_module` of this stack."""
        return self.embeddings_module

    def embedded(self, stack: Stack, words: Tensor) -> Tensor:
        """(G, hidden) word vectors as they enter the first layer at the first position."""
        return words

    # the feed-forward part of a layer, which experts can replace

    def feed_forward_name(self, layer: Any) -> str:
        """Qualified name, inside the layer, of the module that experts replace.

        Raises:
            ValueError: nothing is known about this family.
        """
        raise ValueError(f"the feed-forward parts of {self.model_type} are not known: it can't be upcycled.")

    def feed_forward_products(self, layer: Any) -> list[str]:
        """Qualified names, inside the layer, of the linear layers whose weights `feed_forward` reads."""
        raise NotImplementedError

    def feed_forward(self, layer: Any) -> Dense:
        """The weights of a layer's feed-forward part; its linear layers must be plain (`ops.plain`)."""
        raise NotImplementedError

    def clear_feed_forward(self, layer: Any) -> None:
        """Remove what is left of it once experts are in; undone by `restore_feed_forward`."""

    def restore_feed_forward(self, layer: Any, dense: Dense, config: Any) -> None:
        """Put the stock modules back, with these weights; `config` is that of the stack."""
        raise NotImplementedError

    # for families whose host code must be replaced while patched

    def swap_in(self, stack: Stack) -> None:
        """Replace host code that would defeat sub-quadratic cost."""

    def swap_out(self, stack: Stack) -> None:
        """Undo `swap_in`."""


class PretrainedAttention:
    """`SourceAttention` of a layer, read part by part as a mechanism takes it.

    Raises:
        ValueError: a part is taken whose weights can't be read (adapters, quantised, offloaded, …).
    """

    def __init__(self, family: ModelFamily, stack: Stack, layer: AttentionLayer):
        self._family, self._stack, self._layer = family, stack, layer

    @cached_property
    def _weights(self) -> SourceAttention:
        name, module = self._layer.name, self._layer.module
        require_plain((f"{name}.{part}", module.get_submodule(part)) for part in self._family.projections)
        return self._family.source_attention(module)

    @property
    def query(self) -> LinearWeights:
        return self._weights.query

    @property
    def key(self) -> LinearWeights:
        return self._family.heads(self._layer.module).expand(self._weights.key)

    @property
    def value(self) -> LinearWeights:
        return self._family.heads(self._layer.module).expand(self._weights.value)

    @property
    def relative_bias(self) -> RelativeBias | None:
        return self._family.relative_bias(self._stack, self._layer)

    @property
    def query_scale(self) -> float:
        heads = self._family.heads(self._layer.module)
        return float(heads.width**-0.5) if self._family.scales_queries else 1.0

    as_attention_gets = SourceAttention.as_attention_gets


def fill_linear(linear: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear module copies of these weights."""
    linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())


def _first(owner: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int)), None)


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
