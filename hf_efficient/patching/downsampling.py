"""Whole layers on fewer tokens: a layer runs on means of neighbouring tokens, and its change is added to each of them.

A mechanism that wants this says how its queries and keys are pooled (`EfficientAttention.pooling`); everything else happens
here. With P the means over pooling windows, U the repetition of each mean for the tokens of its window, and F the host's
layer (attention, residual and feed-forward, which all run on P x):

    x ← x + U (F(P x) - P x)

Between layers there are always the states of all N tokens, so recorded hidden states, heads, cross-attention, gradient
checkpointing and layers of other mechanisms work as usual. As P x after a layer is F(P x), consecutive layers with the same
windows compute as if the sequence stayed short. A token keeps its difference from the mean: U F(P x) alone would make
neighbours equal, and adding the whole x to it, as Funnel's decoder does with trained weights, would double the states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_efficient.families import ModelFamily, Stack
from hf_efficient.ops.pooling import PackedRows, Pooling
from hf_efficient.patching.hooks import attach, detach, state_of
from hf_efficient.patching.names import MODULE_NAME

PART = "downsampling"
FULL_LENGTH = "full_length"


class _Shortened(NamedTuple):
    """What the hooks of one layer share: its attention module, which holds the mechanism, and its family."""

    attention: nn.Module
    family: ModelFamily

    @property
    def pooling(self) -> Pooling | None:
        """`None` = the layer runs on all tokens: its mechanism is off (`exact_attention`), or is watched."""
        # by name at every call: the mechanism may have been replaced since
        mechanism: Any = self.attention._modules[MODULE_NAME]
        return None if mechanism is None or state_of(mechanism, FULL_LENGTH) else mechanism.pooling


class FullLength:
    """While this is not removed, the layer of `mechanism` runs on all tokens, and the mechanism alone pools the heads."""

    def __init__(self, mechanism: nn.Module):
        self.mechanism = mechanism
        attach(mechanism, FULL_LENGTH, state=True)

    def remove(self) -> None:
        detach(self.mechanism, FULL_LENGTH)


def install(family: ModelFamily, stack: Stack) -> None:
    """Shorten the layers of the stack whose mechanisms ask for it."""
    for layer in stack.layers:
        mechanism: Any = layer.module._modules[MODULE_NAME]
        if mechanism is None or mechanism.pooling is None or mechanism.pooling.queries.size == 1:
            continue
        state = _Shortened(layer.module, family)
        residual, block = stack.residual_module(layer), stack.block_around(layer)
        assert residual is not None and block is not None, "mechanisms that pool are refused there"
        attach(residual, PART, state, before=_enter_attention)
        # before all others: what is recorded is the layer's output at full length
        attach(block, PART, state, after=_leave_layer, after_first=True)


# ---- hooks -------------------------------------------------------------------------------------------------------


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, PackedRows]:
    """The (B, N, hidden_size) states that a layer, or its attention part, was called with, and their rows."""
    states = args[0] if args else kwargs["hidden_states"]
    token_mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    return states, PackedRows(states, token_mask, kwargs.get("efficient_sequences"))


def _enter_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Shorten the states before the attention part, so that its residual and all that follows are short too."""
    state: _Shortened = state_of(module, PART)
    if (pooling := state.pooling) is None:
        return args, kwargs
    states, rows = _rows(args, kwargs)
    # who is real, and which sequence is whose, is known by the rows
    changes: dict[str, Any] = {"attention_mask": None, "efficient_sequences": None, "efficient_rows": rows}
    if pooling.keys != pooling.queries:
        keys = rows.means(states, pooling.keys)
        changes["efficient_hidden_states"] = state.family.attention_input(module, keys)
    kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"} | changes
    return (rows.means(states, pooling.queries),), kwargs


def _leave_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Add to each token what the layer changed in the mean of its window."""
    state: _Shortened = state_of(module, PART)
    if (pooling := state.pooling) is None:
        return output
    states, rows = _rows(args, kwargs)
    short = output[0] if isinstance(output, tuple) else output
    change = short - rows.means(states, pooling.queries)
    states = states + rows.repeat(change, pooling.queries)
    return (states, *output[1:]) if isinstance(output, tuple) else states
