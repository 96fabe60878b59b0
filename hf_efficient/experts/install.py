"""How experts get into a model and out of it again, and how a call tells them which tokens are real.

The mask travels as a keyword from the stack to the attention module of the layer with experts, because a checkpointed layer
that is computed again gets the same keywords.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_efficient.experts.layer import ExpertLayer, ExpertsConfig, expert_layers
from hf_efficient.families import AttentionLayer, HostModel, Stack
from hf_efficient.families.initialised import mark_initialised
from hf_efficient.families.readable import require_plain
from hf_efficient.patching.hooks import attach, detach, state_of
from hf_efficient.patching.names import MODULE_NAME

KEYWORD = "efficient_tokens"
PART = "experts"
IN_FP32 = "DenseReluDense.down"  # T5's second product overflows in fp16
_MISSING = object()


@dataclass
class _StackState:
    """What the hooks of one stack know: the parameters of its forward, and its sparse layers."""

    parameters: list[str]
    layers: list[ExpertLayer]


def sparse_layers(stack: Stack, config: ExpertsConfig) -> list[AttentionLayer]:
    """The self-attention layers whose blocks get experts.

    Raises:
        ValueError: layers that do not exist, or none at all.
    """
    number = len(stack.layers)
    wanted = range(1, number, 2) if config.layers is None else config.layers
    beyond = [i for i in wanted if i >= number]
    if beyond:
        raise ValueError(f"layers {beyond} do not exist: the {stack.side} has layers 0 to {number - 1}.")
    if not wanted:
        raise ValueError(
            f"the {stack.side} has one layer, and every other one from the second on is none: give layers."
        )
    return [layer for layer in stack.layers if layer.index in wanted]


def _block_around(stack: Stack, layer: AttentionLayer) -> nn.Module:
    block = stack.block_around(layer)
    if block is None:
        raise ValueError(f"there is no layer of the model's own around {layer.name}: it can't be upcycled.")
    return block


def install_experts(host: HostModel, config: ExpertsConfig) -> None:
    """Put experts into a model in place, each a copy of the layer's feed-forward part.

    Raises:
        ValueError: see `sparse_layers`, a family whose feed-forward parts are not known, or layers that cut them into
            chunks, or weights that can't be read; the model is unchanged then.
    """
    family, stacks, model = host.family, host.stacks, host.model
    # refuse before anything changes
    blocks = {layer.name: _block_around(stack, layer) for stack in stacks for layer in sparse_layers(stack, config)}
    names = {name: family.feed_forward_name(block) for name, block in blocks.items()}
    if any(stack.chunk_size_feed_forward(layer) for stack in stacks for layer in sparse_layers(stack, config)):
        raise ValueError(
            "chunk_size_feed_forward cuts rows into chunks, each with a capacity of its own; set it to 0."
        )
    products = [(name, part) for name, block in blocks.items() for part in family.feed_forward_products(block)]
    require_plain((f"{part} of the layer of {name}", blocks[name].get_submodule(part)) for name, part in products)
    generator = torch.Generator().manual_seed(config.seed)
    for stack in stacks:
        state = _StackState(list(inspect.signature(type(stack.module).forward).parameters)[1:], [])
        for layer in stack.layers:
            experts = None
            if layer.name in blocks:
                block = blocks[layer.name]
                experts = ExpertLayer(config, family.feed_forward(block), generator)
                experts.train(block.training)
                if not experts.up.is_meta:
                    mark_initialised(experts)
                block.set_submodule(names[layer.name], experts)
                family.clear_feed_forward(block)
                state.layers.append(experts)
            attach(layer.module, PART, experts, before=_take_tokens)
        attach(stack.module, PART, state, before=_begin, after=_end)
        if "wo" in (stack.module._keep_in_fp32_modules or ()):
            model._keep_in_fp32_modules = {*(model._keep_in_fp32_modules or ()), IN_FP32}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            mark_experts(module.config)


def mark_experts(config: Any) -> None:
    """Where a config has experts, none of the implementations of experts that transformers has is chosen."""
    if getattr(config, "efficient_experts", None):
        config._experts_implementation = None


def uninstall_experts(host: HostModel) -> None:
    """Put the dense feed-forward parts back, for experts that are still equal.

    Raises:
        ValueError: experts were trained apart, so no dense layer does what they do; the model is unchanged then.
    """
    for name, sparse in expert_layers(host.model).items():
        if not sparse.are_equal():
            raise ValueError(
                f"the experts of {name} have been trained apart, so there is no dense layer to go back to; take the "
                "checkpoint that was upcycled."
            )
    for stack in host.stacks:
        for layer in stack.layers:
            experts: ExpertLayer | None = state_of(layer.module, PART)
            if experts is not None:
                block = _block_around(stack, layer)
                host.family.restore_feed_forward(block, experts.dense(0), stack.module.config)
                block.train(block.training)
    _detach(host.model)


@contextmanager
def unchanged_on_error(model: Any) -> Iterator[None]:
    """Experts that are installed inside are gone again after an exception: every module is the one that it was before."""
    modules = [(module, dict(module._modules)) for module in model.modules()]
    try:
        yield
    except BaseException:
        _detach(model)
        for module, children in modules:
            module._modules.clear()
            module._modules.update(children)
        raise


def _detach(model: Any) -> None:
    """Remove everything that `install_experts` added but the experts themselves."""
    detach(model, PART)
    if IN_FP32 in (model._keep_in_fp32_modules or ()):
        model._keep_in_fp32_modules = {*model._keep_in_fp32_modules} - {IN_FP32}


# ---- hooks -------------------------------------------------------------------------------------------------------


def _begin(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In training, send the padding mask along and have routings recorded."""
    state: _StackState = state_of(stack, PART)
    if not stack.training:
        return None
    mask = (dict(zip(state.parameters, args, strict=False)) | kwargs).get("attention_mask")
    # both stacks of an encoder-decoder model get the keyword, which is meant for the decoder
    if mask is None and KEYWORD in kwargs and stack.config.is_decoder:
        mask = kwargs[KEYWORD]
    if isinstance(mask, Tensor) and mask.dim() != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: experts in training must know which tokens are real; give a "
            "(batch, tokens) padding mask."
        )
    for layer in state.layers:
        layer.recording = True
    return args, kwargs | {KEYWORD: mask}


def _end(stack: Any, args: Any, kwargs: Any, output: Any) -> None:
    for layer in state_of(stack, PART).layers:
        layer.recording = False


def _take_tokens(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand the mask to the experts behind this attention module; a layer on means of tokens gets the mask of the means."""
    experts: ExpertLayer | None = state_of(attention, PART)
    kwargs = dict(kwargs)
    tokens = kwargs.pop(KEYWORD, _MISSING)
    if experts is None or not experts.training:
        return args, kwargs
    if getattr(attention, "_is_replica", False):
        raise RuntimeError(
            "experts can't be trained in replicas of nn.DataParallel, which can't tell theirs which tokens are real: use "
            "DistributedDataParallel (accelerate launch, torchrun)."
        )
    if tokens is _MISSING:
        raise RuntimeError(
            "experts were called in training without knowing which tokens are real: call the model itself, not its forward."
        )
    rows = kwargs.get("efficient_rows")
    if rows is not None and tokens is None and rows.sequences is not None:
        tokens = torch.ones(rows.sequences.shape, device=rows.sequences.entry.device)
    if rows is not None and tokens is not None:
        runs = attention._modules[MODULE_NAME].pooling.queries
        tokens = rows.means(tokens.unsqueeze(-1).float(), runs).squeeze(-1) > 0
    experts.tokens = tokens
    return args, kwargs
