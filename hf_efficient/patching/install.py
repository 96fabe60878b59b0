"""How mechanisms get into a model and out of it again: plan, installation, exact undo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_efficient.attention.base.mechanism import EfficientAttention, EfficientAttentionConfig
from hf_efficient.families import AttentionLayer, HostModel, ModelFamily, Stack
from hf_efficient.families.config_fields import unread_fields
from hf_efficient.families.initialised import mark_initialised
from hf_efficient.patching import call_checks, downsampling, extra_tokens
from hf_efficient.patching.hooks import attach, detach, state_of
from hf_efficient.patching.keywords import keep_for_attention
from hf_efficient.patching.names import IMPLEMENTATION, KEPT, LAYER, MODULE_NAME


def is_installed(model: nn.Module) -> bool:
    """Whether some attention layer of `model` carries a mechanism."""
    return any(state_of(module, call_checks.PART) is not None for module in model.modules())


def plan(
    host: HostModel, configs: list[EfficientAttentionConfig], max_positions: int | None = None
) -> dict[str, EfficientAttentionConfig]:
    """{qualified name of a self-attention module: its config}; nothing is changed.

    Args:
        max_positions: positions that the model will have by then, if they are still to be lengthened.

    Raises:
        ValueError: sides or layers that do not exist, groups that overlap, or mechanisms that can't work where they are
            put: all reasons of all layers in one message. Efficient attention that is installed already.
    """
    if is_installed(host.model):
        raise ValueError("efficient attention is already installed in this model; undo it first.")
    family, stacks = host.family, host.stacks
    sides = [stack.side for stack in stacks]
    chosen: dict[str, EfficientAttentionConfig] = {}
    problems: list[str] = []
    for config in configs:
        wanted = resolve_side(config, sides)
        if not wanted:
            problems.append(
                f"side={config.side!r}: this {family.model_type} model has {' and '.join(sides) or 'no stack'}"
            )
        for stack in (s for s in stacks if s.side in wanted):
            problems += _choose(family, stack, config, chosen, max_positions)
    for stack in stacks:
        problems += extra_tokens.problems(family, stack, chosen)
        if not family.needs_proof and any(layer.name in chosen for layer in stack.layers):
            problems += unread_fields(family, stack.module.config)
    if any(getattr(stack.module.config, "is_causal", True) is False and stack.side == "decoder" for stack in stacks):
        problems.append("config.is_causal=False makes this decoder bidirectional: remove it")
    problems = list(dict.fromkeys(problems))
    if problems:
        raise ValueError("these settings are not possible:\n" + "\n".join(f"- {problem}." for problem in problems))
    if not chosen:
        raise ValueError(f"nothing to convert: no layer of {type(host.model).__name__} was chosen.")
    return chosen


def farthest_key(host: HostModel, chosen: dict[str, EfficientAttentionConfig]) -> int | None:
    """Distance from a query of the farthest key that it may see in any layer, with what `plan` chose; `None` = no bound."""
    farthest = 0
    for stack in host.stacks:
        for layer in stack.layers:
            geometry = host.family.geometry(stack, layer)
            window = geometry.sliding_window
            reaches = [
                None if window is None else max(window),
                chosen[layer.name].reach(geometry) if layer.name in chosen else None,
            ]
            bounds = [reach for reach in reaches if reach is not None]
            if not bounds:
                return None
            farthest = max(farthest, min(bounds))
    return farthest


def _choose(
    family: ModelFamily,
    stack: Stack,
    config: EfficientAttentionConfig,
    chosen: dict[str, EfficientAttentionConfig],
    max_positions: int | None,
) -> list[str]:
    """Enter the layers of one stack that `config` names into `chosen`. Returns what speaks against it."""
    problems = []
    beyond = [i for i in config.layers or () if i >= len(stack.layers)]
    if beyond:
        problems.append(f"layers {beyond} do not exist: the {stack.side} has layers 0 to {len(stack.layers) - 1}")
    if config.layers is not None and (shared := family.num_calls(stack)) > 1:
        problems.append(
            f"layers={list(config.layers)}: {shared} layers of this {family.model_type} model share one module, so a "
            "mechanism is in all of them or in none: leave it out"
        )
        return problems
    for layer in stack.layers:
        if config.layers is not None and layer.index not in config.layers:
            continue
        if layer.name in chosen:
            problems.append(f"{stack.side} layer {layer.index} is named by more than one config")
        chosen[layer.name] = config
        problems += config.attention_class.unsupported(config, family.geometry(stack, layer, max_positions))
        if config.attention_class.needs_project and (reason := family.projection_refusal(layer.module)):
            problems.append(f"{config.mechanism} calls projections of a layer, and {reason}")
    return problems


def resolve_side(config: EfficientAttentionConfig, sides: list[str]) -> list[str]:
    """The sides that a config means in a model with these sides: the encoder, else the only one there is."""
    if config.side is None:
        return ["encoder"] if "encoder" in sides else sides
    wanted = ["encoder", "decoder"] if config.side == "both" else [config.side]
    return wanted if all(side in sides for side in wanted) else []


def install(host: HostModel, chosen: dict[str, EfficientAttentionConfig], initialise: bool = True) -> dict[str, str]:
    """Put the mechanisms that `plan` chose into the model. Returns {new tensor: where its values came from}.

    After an exception the model is unchanged.

    Args:
        initialise: set new parameters from the model's weights; otherwise they keep their neutral start.
    """
    before = implementations(host.model)
    origins: dict[str, str] = {}
    try:
        for stack in host.stacks:
            origins |= _install_in_stack(host, stack, chosen, initialise)
        for config, _ in before:
            config._attn_implementation = IMPLEMENTATION
            # a public key is honoured on load: without this package or its classes, loading fails instead of degrading
            config.attn_implementation = IMPLEMENTATION
    except BaseException:
        uninstall(host, before)
        raise
    return origins


def implementations(model: nn.Module) -> list[tuple[Any, str]]:
    """(config, its attention implementation) for every config object in a model.

    Attention layers ask their own and a stack asks its own for the masks; whoever wraps or loads a model may have given them
    different objects, which T5's two stacks have anyway.
    """
    held = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in held if isinstance(config, PreTrainedConfig)}
    return [(config, config._attn_implementation) for config in configs.values()]


def _install_in_stack(
    host: HostModel, stack: Stack, chosen: dict[str, EfficientAttentionConfig], initialise: bool
) -> dict[str, str]:
    family = host.family
    origins: dict[str, str] = {}
    shared: dict[tuple[EfficientAttentionConfig, str], nn.Parameter] = {}
    for layer in stack.layers:
        mechanism = None
        if layer.name in chosen:
            with nullcontext() if host.put_away is None else brought_in(layer.module):
                mechanism, origin = _make_mechanism(family, stack, layer, chosen[layer.name], initialise)
            origins |= {f"{layer.name}.{MODULE_NAME}.{name}": text for name, text in origin.items()}
            _share_parameters(mechanism, shared)
            if host.put_away is not None and not _is_shared(mechanism, layer):
                host.put_away(f"{layer.name}.{MODULE_NAME}", mechanism)
            if mechanism.needs_hidden_states:
                attach(layer.module, call_checks.PART, before=call_checks.pass_hidden_states)
        layer.module.register_module(MODULE_NAME, mechanism)
        attach(layer.module, LAYER, family.geometry(stack, layer))
    for module in stack.cross_attention:
        module.register_module(MODULE_NAME, None)
    family.swap_in(stack)
    attach(stack.module, call_checks.PART, call_checks.StackInfo(family, stack), before=call_checks.check_call)
    keep_for_attention(stack, family.hands_on_keywords)
    origins |= extra_tokens.install(family, stack, initialise)
    downsampling.install(family, stack)
    return origins


def _is_shared(mechanism: EfficientAttention, layer: AttentionLayer) -> bool:
    """Whether others use its parameters, or it gets further ones: then they stay in memory."""
    has_extra = layer.index == 0 and mechanism.num_extra_tokens(mechanism.config) > 0
    return has_extra or bool(mechanism.shared_parameters())


@contextmanager
def brought_in(module: nn.Module) -> Iterator[None]:
    """Inside, weights that accelerate keeps elsewhere are in the module and all below it, as in a call."""
    away = [part for part in module.modules() if getattr(getattr(part, "_hf_hook", None), "offload", False)]
    with ExitStack() as stack:
        if away:
            from accelerate.utils import align_module_device

            for part in away:
                stack.enter_context(align_module_device(part))
        yield


def _make_mechanism(
    family: ModelFamily, stack: Stack, layer: AttentionLayer, config: EfficientAttentionConfig, initialise: bool
) -> tuple[EfficientAttention, dict[str, str]]:
    """The mechanism of one layer, and {its tensor: where the values came from} of those that were initialised."""
    mechanism = config.attention_class(config, family.geometry(stack, layer))
    place = stack.place(layer)
    mechanism.to(device=place.device, dtype=place.dtype)
    mechanism.train(layer.module.training)
    if mechanism.needs_project:
        mechanism.host_projection = family.project
    if place.device.type == "meta":
        return mechanism, {}
    mechanism.reset_parameters()
    origins = mechanism.initialise_from(family.pretrained(stack, layer)) if initialise else {}
    mark_initialised(mechanism)
    return mechanism, origins


def _share_parameters(
    mechanism: EfficientAttention, shared: dict[tuple[EfficientAttentionConfig, str], nn.Parameter]
) -> None:
    """Layers of one stack and config have the parameters in common that their mechanism says it shares."""
    for name in mechanism.shared_parameters():
        owned = getattr(mechanism, name)
        setattr(mechanism, name, shared.setdefault((mechanism.config, name), owned))
        if getattr(mechanism, name) is not owned:
            # save_pretrained looks here for duplicates that it may leave out
            mechanism._tied_weights_keys = {name: name}  # type: ignore[assignment]


def uninstall(host: HostModel, before: list[tuple[Any, str]], otherwise: str = "sdpa") -> None:
    """Remove every trace of `install`, even of half of one; the model is what it was, unless it was trained since.

    Args:
        before: the implementation of each config, from `implementations`; `otherwise`: that of all others.
    """
    for stack in host.stacks:
        host.family.swap_out(stack)
        for module in [layer.module for layer in stack.layers] + stack.cross_attention:
            module._modules.pop(MODULE_NAME, None)
    detach(host.model, LAYER, KEPT, call_checks.PART, extra_tokens.PART, downsampling.PART)
    former = {id(config): implementation for config, implementation in before}
    for config, _ in [*implementations(host.model), *before]:
        config._attn_implementation = former.get(id(config), otherwise)
        config.__dict__.pop("attn_implementation", None)
