"""Learned tokens in front of the input of a whole stack: added at the embeddings, removed at the end.

A mechanism that wants them says how many (`EfficientAttention.num_extra_tokens`); everything else happens here. The tokens
are a parameter `global_tokens` (g, hidden_size) of the first layer's mechanism. Hooks prepend it to the embeddings, lengthen
`attention_mask` by g ones, and cut the g tokens off every output, so that positions, pooler, heads, recorded hidden states
and cross-attention see the N tokens of the input only.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.attention.base.mechanism import EfficientAttentionConfig, prepend
from hf_efficient.families import ModelFamily, Stack
from hf_efficient.families.initialised import mark_initialised
from hf_efficient.patching.hooks import attach, state_of
from hf_efficient.patching.names import MODULE_NAME

PART = "extra_tokens"


@dataclass
class _ExtraTokens:
    """What the hooks of one stack share.

    Attributes:
        count: g. owner: the attention module whose mechanism holds the tokens. parameters: names of the stack's arguments.
        as_embeddings: they enter by `inputs_embeds`, and leave at the end of the stack.
        active: False while the stack runs without them (`exact_attention`).
    """

    count: int
    owner: nn.Module
    parameters: list[str]
    as_embeddings: bool
    active: bool = True

    def without_mechanism(self) -> _ExtraTokens:
        return replace(self, active=False)

    def prepend(self, embeddings: Tensor) -> Tensor:
        """(B, g + N, hidden_size) from (B, N, hidden_size)."""
        # by name at every call: adapters may have replaced the mechanism with a trained copy
        mechanism: Any = self.owner._modules[MODULE_NAME]
        tokens: Tensor = mechanism.global_tokens
        if tokens.is_meta or not tokens.numel():
            # offloaded or sharded: they are there while their module runs
            return mechanism(embeddings, None, None, None)
        return prepend(tokens, embeddings)

    def cut(self, output: Any, length: int) -> Any:
        """`output` with the first g of `length` tokens removed from every tensor (B, length, …) in it."""
        if not self.active:
            return output
        if isinstance(output, Tensor):
            return output[:, self.count :] if output.dim() > 2 and output.shape[1] == length else output
        if isinstance(output, tuple):
            return tuple(self.cut(item, length) for item in output)
        if isinstance(output, Mapping):
            return type(output)(**{name: self.cut(item, length) for name, item in output.items()})
        return output


def problems(family: ModelFamily, stack: Stack, chosen: Mapping[str, EfficientAttentionConfig]) -> list[str]:
    """Why the configs chosen for the layers of `stack`, by name, can't have their extra tokens; empty = they can."""
    configs = [chosen.get(layer.name) for layer in stack.layers]
    counts = [0 if c is None else c.attention_class.num_extra_tokens(c) for c in configs]
    if not any(counts):
        return []
    if len(set(counts)) > 1:
        return [
            f"extra global tokens run through the whole stack, but the layers of the {stack.side} have {counts}: convert "
            "all its layers with the same num_global_tokens, or set it to 0"
        ]
    if family.embeddings_name(stack) is None:
        return [f"{family.model_type} can't have extra global tokens: set num_global_tokens to 0"]
    return []


def install(family: ModelFamily, stack: Stack, initialise: bool) -> dict[str, str]:
    """Give the stack the tokens that its mechanisms ask for. Returns {new tensor: where its values came from}.

    Token t starts as the mean of the word embeddings t, t + g, t + 2g, … (all near the mean word, and no two alike, which
    training could not tell apart), as it leaves the embeddings at the first position.
    """
    layer = stack.layers[0]
    mechanism: Any = layer.module._modules[MODULE_NAME]
    count = 0 if mechanism is None else mechanism.num_extra_tokens(mechanism.config)
    if count == 0:
        return {}
    place = stack.place(layer)
    tokens = torch.empty(count, stack.module.config.hidden_size, device=place.device, dtype=place.dtype)
    if not tokens.is_meta:
        with torch.no_grad():
            tokens.copy_(_mean_words(family, stack, tokens)) if initialise else tokens.normal_(std=0.02)
    mechanism.register_parameter("global_tokens", nn.Parameter(tokens))
    if not tokens.is_meta:
        mark_initialised(mechanism)
    state = _ExtraTokens(
        count,
        layer.module,
        list(inspect.signature(type(stack.module).forward).parameters)[1:],
        as_embeddings=not (embeddings := family.embeddings_name(stack)),
    )
    attach(stack.module, PART, state, before=_enter_stack, after=_leave_stack)
    if embeddings:
        attach(stack.module.get_submodule(embeddings), PART, state, after=_leave_embeddings)
        attach(stack.module.get_submodule(family.layers_module or ""), PART, state, after=_leave_layers)
    origin = "means of disjoint sets of word embeddings" if initialise else "random"
    return {f"{layer.name}.{MODULE_NAME}.global_tokens": origin}


def _mean_words(family: ModelFamily, stack: Stack, like: Tensor) -> Tensor:
    # embeddings are called, not read: adapters and offloading take part
    embedding: Any = stack.module.get_input_embeddings()
    count, number = len(like), embedding.num_embeddings
    rows = -(-number // count)
    words = embedding(torch.arange(rows * count, device=like.device) % number)
    return family.embedded(stack, words.view(rows, count, -1).float().mean(0).to(words.dtype))


# ---- hooks -------------------------------------------------------------------------------------------------------


def _enter_stack(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Lengthen the mask, and where the embeddings are not a module of their own, the embeddings."""
    state: _ExtraTokens = state_of(stack, PART)
    if not state.active:
        return args, kwargs
    call = dict(zip(state.parameters, args, strict=False)) | kwargs
    mask = call.get("attention_mask")
    if mask is not None:
        call["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], state.count), mask], dim=1)
    if state.as_embeddings:
        if call.get("inputs_embeds") is None and call.get("input_ids") is not None:
            call["inputs_embeds"] = stack.get_input_embeddings()(call.pop("input_ids"))
        if call.get("inputs_embeds") is not None:
            call["inputs_embeds"] = state.prepend(call["inputs_embeds"])
        if (positions := call.get("position_ids")) is not None:
            first = torch.arange(state.count, device=positions.device).expand(len(positions), -1)
            call["position_ids"] = torch.cat([first, positions + state.count], dim=1)
    return (), call


def _leave_embeddings(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> Tensor:
    state: _ExtraTokens = state_of(module, PART)
    return state.prepend(output) if state.active else output


def _leave_layers(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> Any:
    return state_of(module, PART).cut(output, _length(output))


def _leave_stack(stack: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> Any:
    """Cut the recorded hidden states; the last one was cut before the pooler where there is one."""
    state: _ExtraTokens = state_of(stack, PART)
    return state.cut(output, _length(output) + (0 if state.as_embeddings else state.count))


def _length(output: Any) -> int:
    return output[0].shape[1]
