"""Whole layers on fewer tokens: a layer takes in means of neighbouring tokens, and what it changes goes back to each token.

A mechanism that wants this says which slots its queries and keys are (`EfficientAttention.pooling`); everything else happens
here. With P the means of slots, U the repetition of each slot for its tokens, and F the host's layer (attention, residual
and feed-forward, which all run on P x):

    x ← x + U (F(P x) - P x)

Between layers there are always the states of all N tokens, so that recorded hidden states, heads, cross-attention, gradient
checkpointing and layers of other mechanisms are as ever; and as P x after a layer is F(P x), layers with the same slots
follow each other as if the sequence stayed short. A token keeps by what it differs from its slot: U F(P x) alone would make
neighbours equal, and adding the whole x to it, as Funnel's decoder does with trained weights, would double the states.
Hooks are plain functions, and what they need to know lies beside them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_efficient.families import ModelFamily, Stack
from hf_efficient.ops.pooling import Pooling, Rows
from hf_efficient.patching.names import CHILD

NOTE = "_efficient_length_change"
FULL_LENGTH = "_efficient_full_length"


class _Place(NamedTuple):
    """What the hooks of one layer share: its attention module, which holds the mechanism, and its family."""

    attention: nn.Module
    family: ModelFamily

    @property
    def pooling(self) -> Pooling | None:
        """`None` = the layer runs on all tokens: its mechanism is off (`exact_attention`), or is watched."""
        # by name at every call: something else may have been put in the mechanism's place
        mechanism: Any = self.attention._modules[CHILD]
        return None if mechanism is None or FULL_LENGTH in mechanism.__dict__ else mechanism.pooling


class FullLength:
    """While this is not removed, the layer of `mechanism` runs on all tokens, and the mechanism alone pools the heads."""

    def __init__(self, mechanism: nn.Module):
        self.mechanism = mechanism
        mechanism.__dict__[FULL_LENGTH] = True

    def remove(self) -> None:
        self.mechanism.__dict__.pop(FULL_LENGTH, None)


def install(family: ModelFamily, stack: Stack) -> None:
    """Shorten the layers of the stack whose mechanisms ask for it."""
    for site in stack.sites:
        mechanism: Any = site.module._modules[CHILD]
        if mechanism is None or mechanism.pooling is None or mechanism.pooling.queries.size == 1:
            continue
        path = site.name.removeprefix(f"{stack.name}.").split(".")
        around = [stack.module.get_submodule(".".join(path[:end])) for end in range(1, len(path))]
        layer = next(module for module in around if isinstance(module, GradientCheckpointingLayer))
        for module in (layer, around[-1]):
            setattr(module, NOTE, _Place(site.module, family))
        around[-1].register_forward_pre_hook(_enter_attention, with_kwargs=True)
        # before all others: what is recorded is the layer's output at full length
        layer.register_forward_hook(_leave_layer, with_kwargs=True, prepend=True)


def remove(stack: Stack) -> None:
    """Undo `install`, whether it was done or not."""
    for module in stack.module.modules():
        if module.__dict__.pop(NOTE, None) is None:
            continue
        for hooks, ours in ((module._forward_pre_hooks, _enter_attention), (module._forward_hooks, _leave_layer)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)


# ---- hooks -------------------------------------------------------------------------------------------------------


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Rows]:
    """The (B, N, hidden_size) states that a layer, or its attention part, was called with, and their rows."""
    states = args[0] if args else kwargs["hidden_states"]
    keep = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    return states, Rows(states, keep, kwargs.get("efficient_segments"))


def _enter_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Shorten the states before the attention part, so that its residual and all that follows are short too."""
    place: _Place = module.__dict__[NOTE]
    if (pooling := place.pooling) is None:
        return args, kwargs
    states, rows = _rows(args, kwargs)
    # who is real, and which sequence is whose, is known by the rows
    changes: dict[str, Any] = {"attention_mask": None, "efficient_segments": None, "efficient_rows": rows}
    if pooling.keys != pooling.queries:
        keys = rows.means(states, pooling.keys)
        changes["efficient_hidden_states"] = place.family.attention_input(module, keys)
    kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"} | changes
    return (rows.means(states, pooling.queries),), kwargs


def _leave_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Give each token what the layer changed in its slot."""
    place: _Place = module.__dict__[NOTE]
    if (pooling := place.pooling) is None:
        return output
    states, rows = _rows(args, kwargs)
    short = output[0] if isinstance(output, tuple) else output
    change = short - rows.means(states, pooling.queries)
    states = states + rows.repeat(change, pooling.queries)
    return (states, *output[1:]) if isinstance(output, tuple) else states
