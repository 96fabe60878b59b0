"""Checks of one call, as a forward pre-hook of each stack: refuse what can't be honoured, and route what mechanisms need."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.families import ModelFamily, Stack
from hf_efficient.ops.graph import is_captured, is_tracing
from hf_efficient.ops.packing import PackedSequences, Steps, position_steps
from hf_efficient.ops.rotary import side_by_side
from hf_efficient.patching.caches import HostWindow, bounded_cache, prepare_layers
from hf_efficient.patching.call_inputs import CallShape, checked_inputs, refuse_marked_sound, shape_of
from hf_efficient.patching.hooks import state_of
from hf_efficient.patching.names import IMPLEMENTATION, LAYER, MODULE_NAME
from hf_efficient.patching.pictures import pictures_of

# what the caller of an encoder-decoder model calls the inputs of its decoder
OTHER_NAMES = {"attention_mask": "decoder_attention_mask", "encoder_attention_mask": "attention_mask"}

HOLES = (
    "attention_mask has zeros between real tokens (before token {token} of row {row}), which position_ids do not count, but "
    "this mechanism would take for distance: pad on one side."
)

ROTATED = (
    "attention_mask pads rows on the left, which this model counts as positions, having no position_ids; this mechanism "
    "depends on them: pad on the right, or use one that mixes tokens by distance, such as local."
)

PART = "calls"


class StackInfo:
    """What `check_call` must know of its stack, gathered once at installation."""

    def __init__(self, family: ModelFamily, stack: Stack):
        mechanisms: list[Any] = [m for layer in stack.layers if (m := layer.module._modules[MODULE_NAME]) is not None]
        self.parameters = list(inspect.signature(type(stack.module).forward).parameters)[1:]
        self.positions = family.positions
        self.max_positions = family.positions.length(stack)
        self.first_position = family.positions.first(stack)
        self.attention: list[Any] = [layer.module for layer in stack.layers]
        self.is_causal = any(family.is_causal(stack, layer) for layer in stack.layers)
        self.uses_global_attention_mask = any(getattr(m, "uses_global_attention_mask", False) for m in mechanisms)
        self.needs_input_ids = any(getattr(m, "needs_input_ids", False) for m in mechanisms)
        self.has_extra_tokens = any(m.num_extra_tokens(m.config) for m in mechanisms)
        self.by_position = any(m.by_position for m in mechanisms)
        self.is_rotary = any(family.rotary(stack, layer) is not None for layer in stack.layers)
        self.by_rotation = self.is_rotary and any(m.by_rotation for m in mechanisms)
        self.positions_skip_padding = family.positions_skip_padding
        # the decoder of a model with an encoder of its own
        config: Any = stack.module.config
        self.is_other_decoder = bool(config.is_encoder_decoder and stack.side == "decoder")
        self.names = OTHER_NAMES if self.is_other_decoder else {}
        self.bounded = {}
        for layer in stack.layers if self.is_causal else ():
            source: Any = layer.module._modules[MODULE_NAME] or HostWindow.of(state_of(layer.module, LAYER))
            if source is not None and source.cache_layer() is not None:
                self.bounded[getattr(layer.module, "layer_idx", layer.index)] = source

    def without_mechanism(self) -> StackInfo:
        plain = copy.copy(self)
        plain.bounded, plain.needs_input_ids, plain.by_position, plain.by_rotation = {}, False, False, False
        return plain


def check_call(
    stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Refuse what the installed mechanisms can't honour, and route what they need."""
    info: StackInfo = state_of(stack, PART)
    call = dict(zip(info.parameters, args, strict=False)) | kwargs
    config: Any = stack.config
    _check_form(call, config, info)
    pictures = pictures_of(call, config, info.positions, info.parameters)
    shape = shape_of(call) if pictures is None else pictures.shape
    if shape is None:
        refuse_marked_sound(call)
        return args, kwargs
    if pictures is not None:
        call |= pictures.keywords
    _route_global_mask(call, info)
    call |= checked_inputs(call, shape, info.is_causal, info.names)
    if info.by_position and not is_captured():
        _check_distances(call, shape, info)
    segments = _find_sequences(call, shape, info)
    if segments is None and pictures is None:
        _check_length(shape, info)
    if info.by_rotation:
        _count_from_first_tokens(call, shape, info)
    if info.needs_input_ids:
        if call.get("input_ids") is None:
            raise ValueError("global_tokens looks for separators by its rule and needs input_ids, not inputs_embeds.")
        call["efficient_input_ids"] = call["input_ids"]
    if segments is not None:
        call |= _packed(call, segments, info)
    elif info.bounded:
        _bound_cache(stack, info, call, shape)
    return tuple(call.pop(name) for name in info.parameters[: len(args)]), call


def _route_global_mask(call: dict[str, Any], info: StackInfo) -> None:
    """Take `global_attention_mask` out of the call of a stack that it is not meant for."""
    if call.get("global_attention_mask") is None:
        return
    if info.is_other_decoder:
        # the keyword is meant for the encoder's tokens, but reaches both stacks
        call.pop("global_attention_mask")
    elif not info.uses_global_attention_mask:
        raise ValueError(
            "global_attention_mask was given, but no converted layer of this model has global tokens (longformer has none "
            "in encoders with rotary positions where global_tokens='none'); use longformer, or leave it out."
        )


def pass_hidden_states(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand the attention layer's own input to the dispatcher, through the host's pass-through keywords.

    Raises:
        ValueError: the cosines and sines of a rotary layer don't come as `position_embeddings`.
    """
    hidden = args[0] if args else kwargs["hidden_states"]
    given = {"efficient_hidden_states": hidden}
    if getattr(module._modules[MODULE_NAME], "needs_rotation", False):
        rotary, angles = state_of(module, LAYER).rotary, kwargs.get("position_embeddings")
        if not isinstance(angles, tuple):
            raise ValueError(
                f"{type(module).__name__} gets no position_embeddings=(cos, sin) from its model, by which this mechanism "
                "rotates what it projects itself: use local."
            )
        unrotated = hidden.shape[1] - angles[0].shape[-2]  # class and register tokens of pictures
        sizes = dict(dim=rotary.dim, interleaved=rotary.interleaved, rows=hidden.shape[0], unrotated=unrotated)
        given["efficient_cos_sin"] = side_by_side(*angles, **sizes)
    return args, kwargs | given


# ---- what a call may say -----------------------------------------------------------------------------------------


def _check_form(call: dict[str, Any], config: Any, info: StackInfo) -> None:
    """Refuse keywords that would change who sees whom, or ask for what does not exist."""
    # the masks follow the config of the stack, attention that of each layer: whoever wraps a model may have parted them
    configs = (config, *(c for m in info.attention if (c := m.config) is not config))
    others = {c._attn_implementation for c in configs} - {IMPLEMENTATION}
    if others:
        raise RuntimeError(
            f"attn_implementation was changed to {others.pop()!r} while efficient attention is installed, "
            "which would silently switch it off; use hf_efficient.revert(model) or handle.undo() instead."
        )
    if call.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions=True: efficient attention never builds the attention weights. Run the unconverted model "
            "with attn_implementation='eager' to look at them."
        )
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "head_mask"):
        if call.get(name) is not None:
            raise ValueError(
                f"{name} is not supported by efficient attention: leave it out. Packed sequences are told apart by "
                "position_ids that start again."
            )
    if call.get("is_causal") is not None and bool(call["is_causal"]) != info.is_causal:
        raise ValueError(f"is_causal={call['is_causal']}: these layers were converted as is_causal={info.is_causal}.")


def _check_length(shape: CallShape, info: StackInfo) -> None:
    where, side = (" in its decoder", " and side='both'") if info.is_other_decoder else ("", "")
    if info.max_positions is not None and shape.tokens > info.max_positions:
        raise ValueError(
            f"input of {shape.tokens} tokens, but the model has {info.max_positions} positions{where}: truncate it, or "
            f"convert with max_positions={shape.tokens} or more{side}."
        )


# ---- packed rows -------------------------------------------------------------------------------------------------


def _find_sequences(call: dict[str, Any], shape: CallShape, info: StackInfo) -> PackedSequences | None:
    """The sequences of packed rows, where `position_ids` start again within a row; `None` = one sequence per row.

    Raises:
        ValueError: packed rows that can't be honoured, or positions that jump ahead.
    """
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    if positions is None or shape.new < 2:
        return None
    if "position_ids" not in info.parameters:
        _refuse_without_table(positions, mask)
        return None
    if is_captured():
        _refuse_compiled(positions, mask, info, call.get("past_key_values") is not None)
        return None
    positions = positions.expand(shape.rows, -1)
    token_mask = None if mask is None else mask[:, shape.seen :].bool()
    steps = position_steps(positions, token_mask, info.first_position)
    if not bool((steps.restart | steps.jump | steps.apart).any()):
        return None
    if info.by_position and bool(steps.apart.any()):
        raise ValueError(_apart(positions, steps))
    if not bool(steps.restart.any()):
        if mask is None and info.is_causal and shape.seen == 0:
            raise ValueError(_jump(positions, steps))
        return None
    _check_packed(call, positions, token_mask, steps, info)
    return PackedSequences.find(steps, token_mask)


def _check_packed(
    call: dict[str, Any], positions: Tensor, token_mask: Tensor | None, steps: Steps, info: StackInfo
) -> None:
    """Refuse packed rows that can't be honoured."""
    if bool(steps.jump.any()):
        raise ValueError(_jump(positions, steps))
    if info.has_extra_tokens:
        raise ValueError(
            "position_ids start again within a row, i.e. several packed sequences per row; but the extra global tokens "
            "stand once in front of each row and would mix its sequences. Put one sequence into each row, or convert "
            "with num_global_tokens=0."
        )
    if call.get("past_key_values") is not None:
        raise ValueError(
            "packed rows (position_ids that start again) and past_key_values: a cache holds one sequence per row. Leave "
            "it out; to generate, put one sequence into each row."
        )
    if call.get("encoder_hidden_states") is not None:
        raise ValueError(
            "packed rows (position_ids that start again) and encoder_hidden_states: all sequences of a row would see the "
            "same encoder states. Put one sequence into each row."
        )
    marked = call.get("global_attention_mask")
    if marked is not None and marked.shape != positions.shape:
        raise ValueError(
            f"global_attention_mask of shape {tuple(marked.shape)} must be {tuple(positions.shape)} on packed rows, one "
            "entry per token."
        )
    real = positions if token_mask is None else positions[token_mask]
    low, high = int(real.min()), int(real.max())
    if low < info.first_position:
        raise ValueError(
            f"position_ids start at {low}, but the first position of this model is {info.first_position}: count each "
            f"sequence from there (DataCollatorWithFlattening: position_ids_start={info.first_position})."
        )
    if info.max_positions is not None and high >= info.first_position + info.max_positions:
        raise ValueError(
            f"position_ids go up to {high}, but the model has {info.max_positions} positions from {info.first_position}: "
            "shorten the packed sequences, or convert with a larger max_positions."
        )


def _packed(call: dict[str, Any], segments: PackedSequences, info: StackInfo) -> dict[str, Any]:
    """The keywords that a packed call gets."""
    changes: dict[str, Any] = {"efficient_sequences": segments}
    if call.get("attention_mask") is None:
        # without a mask the host would look for the sequences itself, and ask for a mask of N × N
        changes["attention_mask"] = torch.ones(segments.shape, dtype=torch.long, device=segments.entry.device)
    if info.is_causal:
        # a cache could not tell the sequences of a row apart
        changes["use_cache"] = False
    return changes


def _jump(positions: Tensor, steps: Steps) -> str:
    row, token = (steps.jump | steps.apart).nonzero()[0].tolist()
    return (
        f"position_ids jump ahead to {int(positions[row, token])} at token {token} of row {row}: neither one sequence nor "
        "the start of another. Packed sequences must start again at the first position."
    )


def _refuse_without_table(positions: Tensor, mask: Tensor | None) -> None:
    if mask is None and not is_captured() and bool((positions.diff(dim=-1) != 1).any()):
        raise ValueError(
            "position_ids start again within a row, i.e. several packed sequences per row, but this model has no "
            "position_ids: put one sequence into each row and pad, with attention_mask."
        )


def _apart(positions: Tensor, steps: Steps) -> str:
    row, token = steps.apart.nonzero()[0].tolist()
    follows_padding = bool(steps.last[row, token - 1] < token - 1)
    return HOLES.format(token=token, row=row) if follows_padding else _jump(positions, steps)


def _refuse_compiled(positions: Tensor, mask: Tensor | None, info: StackInfo, has_cache: bool) -> None:
    """A compiled call can't look at positions and split its rows; where it must run on, packing stops it while it runs."""
    advice = (
        "run packed rows (position_ids that start again) without torch.compile, or put one sequence into each row."
    )
    if mask is None and not has_cache:
        raise ValueError(
            "compiled models can't tell packed position_ids from plain ones: pass attention_mask with plain ones, and "
            + advice
        )
    length = positions.shape[-1]
    token_mask = None if mask is None else mask[:, -length:].bool()
    if token_mask is None or token_mask.shape[-1] == length:
        positions = positions if token_mask is None else positions.expand(token_mask.shape[0], -1)
        if is_tracing():
            return  # what runs the graph can't stop
        steps = position_steps(positions, token_mask, info.first_position)
        torch._assert_async(~steps.restart.any(), f"torch.compile: {advice}")
        if info.by_position:
            torch._assert_async(~steps.apart.any(), "attention_mask has zeros between real tokens: pad on one side.")


# ---- distances ---------------------------------------------------------------------------------------------------


def _check_distances(call: dict[str, Any], shape: CallShape, info: StackInfo) -> None:
    """Refuse padding between real tokens that the host's positions do not count: mechanisms would count it as distance.

    `_find_sequences` compares positions that are given among the tokens of this call; here are those before them, in the
    cache, whose positions only the mask tells, and the positions that the host makes itself.
    """
    mask, ids = call.get("attention_mask"), call.get("input_ids")
    positions = call.get("position_ids") if "position_ids" in info.parameters else None
    if mask is None or not (positions is not None if shape.seen else info.positions_skip_padding):
        return
    real = mask.bool()
    index = torch.arange(shape.tokens, device=mask.device)
    last = torch.where(real, index, -1).cummax(-1).values
    start = (last < 0).sum(-1, keepdim=True)
    holes = last - start + 1 != real.cumsum(-1)  # (B, S): some lie between the row's first token and this one
    if shape.seen and positions is not None:
        index, holes, real = (x[..., shape.seen :] for x in (index, holes, real))
        offset = positions - info.first_position
        wrong = holes & real & (offset != index) & (offset != index - start)
    elif positions is None and ids is not None:
        # tokens of the padding's id are not counted, others are
        counted = ids.reshape(shape.rows, -1) != info.first_position - 1
        ahead = counted.cumsum(-1) - index
        wrong = holes & real & counted & (ahead != ahead.gather(1, start.clamp(max=shape.new - 1)))
    else:
        return
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(HOLES.format(row=row, token=shape.seen + token))


def _count_from_first_tokens(call: dict[str, Any], shape: CallShape, info: StackInfo) -> None:
    """Give a call without `position_ids` those that count from each row's first real token.

    The host would count padding on the left. Scores of rotated queries and keys depend on distances alone, so layers that
    stay exact do not notice; but what hashes, pools or maps each of them alone would see the padding.

    Raises:
        ValueError: rows padded on the left, in a model that takes no `position_ids`.
    """
    mask = call.get("attention_mask")
    if mask is None or call.get("position_ids") is not None:
        return
    start = (mask.bool().cumsum(-1) == 0).sum(-1, keepdim=True)
    if not is_captured() and not bool(start.any()):
        return
    if "position_ids" in info.parameters:
        index = torch.arange(shape.tokens, device=mask.device) - start
        call["position_ids"] = index.clamp(min=0)[:, shape.seen :]
    elif not is_captured():
        raise ValueError(ROTATED)
    elif not is_tracing():
        torch._assert_async(~start.any(), ROTATED)


# ---- caches ------------------------------------------------------------------------------------------------------


def bound_before_drafts(model: nn.Module, cache: Any, records: bool) -> None:
    """Give an empty cache of `generate` the layers of the mechanisms before transformers tells them that drafts will come.

    Args:
        records: it has told them already, when they were not there.
    """
    for module in model.modules():
        info = state_of(module, PART)
        if info is not None and info.bounded:
            _, own = bounded_cache(cache, info.bounded, module.config, has_cross_attention=False)
            if records:
                own.activate_past_recording()


def _bound_cache(stack: Any, info: StackInfo, call: dict[str, Any], shape: CallShape) -> None:
    """Give a call that fills a cache the layers of its mechanisms, and its attention layers the way to them."""
    cache, use_cache = call.get("past_key_values"), call.get("use_cache")
    if use_cache is None:
        use_cache = getattr(stack.config, "use_cache", False)
    if cache is None and (not use_cache or (stack.training and getattr(stack, "gradient_checkpointing", False))):
        return
    has_cross_attention = stack.config.is_encoder_decoder or call.get("encoder_hidden_states") is not None
    call["past_key_values"], own = bounded_cache(cache, info.bounded, stack.config, has_cross_attention)
    tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    masks = call.get("attention_mask"), call.get("global_attention_mask")
    if prepare_layers(own, info.bounded, shape.rows, tokens.device, *masks):
        call["efficient_cache"] = own
