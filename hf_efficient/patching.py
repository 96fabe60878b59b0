"""How mechanisms get into a model and out of it again: checks, installation, exact undo."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import extra_tokens
from .base import ConfigLike, EfficientAttentionConfig, attention_configs
from .decoding import bounded_cache, prepare_layers
from .dispatch import CHILD, IMPLEMENTATION
from .families import Stack, family_of

# keywords that reach the attention function without being in any forward's signature
KNOWN_KEYWORDS = {
    "cache_position", "global_attention_mask",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "use_cache", "position_ids", "logits_to_keep", "token_type_ids", "encoder_attention_mask",
    "encoder_hidden_states",
}  # fmt: skip


# ---- checks of one call, as a forward pre-hook of each stack -----------------------------------------------------


def _check_call(
    stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Refuse what the installed mechanisms can't honour, and route what they need."""
    info: _StackInfo = stack._efficient_info  # type: ignore[assignment]
    call = dict(zip(info.parameters, args, strict=False)) | kwargs
    config: Any = stack.config
    if config._attn_implementation != IMPLEMENTATION:
        raise RuntimeError(
            f"attn_implementation was changed to {config._attn_implementation!r} while efficient attention is installed, "
            "which would silently switch it off; use hf_efficient.revert(model) or handle.undo() instead."
        )
    if call.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions=True: efficient attention never builds the attention weights. Run the unconverted model "
            "with attn_implementation='eager' to look at them."
        )
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: efficient attention takes (batch, tokens) padding masks only. "
            "For another pattern convert with the mechanism that has it."
        )
    _check_length(call, info)
    _check_form(call, info)
    if not torch.compiler.is_compiling():
        unknown = sorted(set(kwargs) - info.known - info.warned)
        if unknown:
            info.warned.update(unknown)
            warnings.warn(
                f"keywords {unknown} are known neither to the model nor to efficient attention.", stacklevel=3
            )
    kwargs = dict(kwargs)
    if kwargs.get("global_attention_mask") is not None:
        if config.is_encoder_decoder and config.is_decoder:
            # the keyword is meant for the encoder's tokens, but reaches both stacks
            kwargs.pop("global_attention_mask")
        elif not info.uses_global_attention_mask:
            raise ValueError(
                "global_attention_mask was given, but no converted layer of this model has global tokens; use longformer."
            )
    if info.needs_input_ids:
        if call.get("input_ids") is None:
            raise ValueError("global_tokens='question' looks for separators and needs input_ids, not inputs_embeds.")
        kwargs["efficient_input_ids"] = call["input_ids"]
    if info.bounded:
        return _bound_cache(stack, info, call, args, kwargs)
    return args, kwargs


def _bound_cache(
    stack: Any, info: _StackInfo, call: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a call that fills a cache the layers of its mechanisms, and its attention layers the way to them."""
    cache, use_cache = call.get("past_key_values"), call.get("use_cache")
    if use_cache is None:
        use_cache = getattr(stack.config, "use_cache", False)
    if cache is None and (not use_cache or (stack.training and getattr(stack, "gradient_checkpointing", False))):
        return args, kwargs
    has_cross_attention = stack.config.is_encoder_decoder or call.get("encoder_hidden_states") is not None
    cache, own = bounded_cache(cache, info.bounded, stack.config, has_cross_attention)
    tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    masks = call.get("attention_mask"), kwargs.get("global_attention_mask")
    if prepare_layers(own, info.bounded, tokens, *masks):
        kwargs["efficient_cache"] = own
    place = info.parameters.index("past_key_values")
    if len(args) > place:
        args = (*args[:place], cache, *args[place + 1 :])
    else:
        kwargs["past_key_values"] = cache
    return args, kwargs


def _check_length(call: dict[str, Any], info: _StackInfo) -> None:
    tokens = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    if info.max_positions is None or tokens is None:
        return
    cache = call.get("past_key_values")
    length = tokens.shape[1] + (cache.get_seq_length() if cache is not None else 0)
    if length > info.max_positions:
        raise ValueError(
            f"input of {length} tokens, but the model has {info.max_positions} positions: truncate it, or convert with "
            f"max_positions={length} or more."
        )


def _check_form(call: dict[str, Any], info: _StackInfo) -> None:
    """Refuse packed rows, and keywords that would change who sees whom."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "head_mask"):
        if call.get(name) is not None:
            raise ValueError(
                f"{name} is not supported by efficient attention: leave it out, and pad instead of packing."
            )
    if call.get("is_causal") is not None and bool(call["is_causal"]) != info.is_causal:
        raise ValueError(f"is_causal={call['is_causal']}: these layers were converted as is_causal={info.is_causal}.")
    positions, cache = call.get("position_ids"), call.get("past_key_values")
    if positions is None or call.get("attention_mask") is not None or not info.is_causal:
        return
    if torch.compiler.is_compiling():
        if cache is None:
            raise ValueError(
                "compiled models can't tell packed position_ids from plain ones: pass attention_mask beside position_ids."
            )
    elif (cache is None or cache.get_seq_length() == 0) and bool((positions.diff(dim=-1) != 1).any()):
        raise ValueError(
            "position_ids restart within a row, i.e. several packed sequences per row: put one sequence into each row and "
            "pad, with attention_mask."
        )


def _pass_hidden_states(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand the attention layer's own input to the dispatcher, through the host's pass-through keywords."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"efficient_hidden_states": hidden}


class _StackInfo:
    """What `_check_call` must know of its stack, gathered once at installation."""

    def __init__(self, stack: Stack, max_positions: int | None):
        mechanisms = [m for site in stack.sites if (m := site.module._modules[CHILD]) is not None]
        self.parameters = list(inspect.signature(type(stack.module).forward).parameters)[1:]
        self.known = set(self.parameters) | KNOWN_KEYWORDS
        self.warned: set[str] = set()
        self.max_positions = max_positions
        self.is_causal = any(bool(getattr(site.module, "is_causal", False)) for site in stack.sites)
        self.uses_global_attention_mask = any(getattr(m, "uses_global_attention_mask", False) for m in mechanisms)
        self.needs_input_ids = any(getattr(m, "needs_input_ids", False) for m in mechanisms)
        placed: list[Any] = [
            (site.module.layer_idx, site.module._modules[CHILD]) for site in stack.sites if self.is_causal
        ]
        self.bounded = {i: m for i, m in placed if m is not None and m.cache_layer() is not None}


# ---- installing and undoing --------------------------------------------------------------------------------------


def is_installed(model: nn.Module) -> bool:
    """Whether some attention layer of `model` carries a mechanism."""
    return any(hasattr(module, "_efficient_info") for module in model.modules())


def plan(
    model: nn.Module, configs: list[EfficientAttentionConfig], max_positions: int | None = None
) -> dict[str, EfficientAttentionConfig]:
    """{qualified name of a self-attention module: its config}; nothing is changed.

    Args:
        max_positions: positions that the model will have by then, if they are still to be lengthened.

    Raises:
        ValueError: sides or layers that do not exist, groups that overlap, or mechanisms that can't work where they are
            put: all reasons of all layers in one message.
    """
    family = family_of(model)
    stacks = family.stacks(model)
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
            beyond = [i for i in config.layers or () if i >= len(stack.sites)]
            if beyond:
                problems.append(
                    f"layers {beyond} do not exist: the {stack.side} has layers 0 to {len(stack.sites) - 1}"
                )
            for site in stack.sites:
                if config.layers is None or site.layer in config.layers:
                    if site.name in chosen:
                        problems.append(f"{stack.side} layer {site.layer} is named by more than one config")
                    chosen[site.name] = config
                    geometry = family.geometry(stack, site, max_positions)
                    problems += config.attention_class.unsupported(config, geometry)
                    if not family.source_attention(site.module).query.weight.is_floating_point():
                        problems.append(
                            "the weights are quantised: convert the original, then quantise the converted one"
                        )
    for stack in stacks:
        problems += extra_tokens.problems(family, stack, chosen)
    if any(getattr(stack.module.config, "is_causal", True) is False and stack.side == "decoder" for stack in stacks):
        problems.append("config.is_causal=False makes this decoder bidirectional: remove it")
    problems = list(dict.fromkeys(problems))
    if problems:
        raise ValueError("these settings are not possible:\n" + "\n".join(f"- {problem}." for problem in problems))
    if not chosen:
        raise ValueError(f"nothing to convert: no layer of {type(model).__name__} was chosen.")
    return chosen


def resolve_side(config: EfficientAttentionConfig, sides: list[str]) -> list[str]:
    """The sides that a config means in a model with these sides: the encoder, else the only one there is."""
    if config.side is None:
        return ["encoder"] if "encoder" in sides else sides
    wanted = ["encoder", "decoder"] if config.side == "both" else [config.side]
    return wanted if all(side in sides for side in wanted) else []


def install(
    model: PreTrainedModel, configs: list[EfficientAttentionConfig], initialise: bool = True
) -> dict[str, str]:
    """Put mechanisms into `model` in place. Returns {new tensor: where its values came from}.

    Args:
        initialise: set new parameters from the model's weights; otherwise they keep their neutral start.

    Raises:
        ValueError: see `plan`; the model is unchanged then.
    """
    if is_installed(model):
        raise ValueError("efficient attention is already installed in this model; undo it first.")
    chosen = plan(model, configs)
    before = model.config._attn_implementation
    try:
        return _attach(model, chosen, initialise)
    except BaseException:
        uninstall(model, before)
        raise


def _attach(model: PreTrainedModel, chosen: dict[str, EfficientAttentionConfig], initialise: bool) -> dict[str, str]:
    family = family_of(model)
    origins: dict[str, str] = {}
    for stack in family.stacks(model):
        shared: dict[tuple[EfficientAttentionConfig, str], nn.Parameter] = {}
        for site in stack.sites:
            config = chosen.get(site.name)
            if config is None:
                site.module.register_module(CHILD, None)
                continue
            source = family.source_attention(site.module)._replace(relative_bias=family.relative_bias(stack, site))
            like = source.query.weight
            mechanism = config.attention_class(config, family.geometry(stack, site))
            mechanism.to(device=like.device, dtype=like.dtype)
            mechanism.train(site.module.training)
            if not like.is_meta:
                mechanism.reset_parameters()
                if initialise:
                    for name, origin in mechanism.initialise_from(source).items():
                        origins[f"{site.name}.{CHILD}.{name}"] = origin
            for name in mechanism.shared_parameters():
                owned = getattr(mechanism, name)
                setattr(mechanism, name, shared.setdefault((config, name), owned))
                if getattr(mechanism, name) is not owned:
                    # save_pretrained looks here for duplicates that it may leave out
                    mechanism._tied_weights_keys = {name: name}  # type: ignore[assignment]
            site.module.register_module(CHILD, mechanism)
            if mechanism.needs_project:
                mechanism.host_projection = family.project
            if mechanism.needs_hidden_states:
                site.module.register_forward_pre_hook(_pass_hidden_states, with_kwargs=True)
        for module in stack.cross_attention:
            module.register_module(CHILD, None)
        family.swap_in(stack)
        info = _StackInfo(stack, family.max_positions(stack.module.config))
        stack.module._efficient_info = info  # type: ignore[assignment]
        stack.module.register_forward_pre_hook(_check_call, with_kwargs=True)
        origins |= extra_tokens.install(family, stack, initialise)
    for config in _configs_of(model):
        config._attn_implementation = IMPLEMENTATION
        # a public key is honoured on load: without this package or its classes, loading fails instead of degrading
        config.attn_implementation = IMPLEMENTATION
    return origins


def uninstall(model: PreTrainedModel, attn_implementation: str = "sdpa") -> None:
    """Remove every trace of `install`, even of half of one; the model is what it was, unless it was trained since."""
    family = family_of(model)
    for stack in family.stacks(model):
        family.swap_out(stack)
        extra_tokens.remove(family, stack)
        for module in [site.module for site in stack.sites] + stack.cross_attention:
            module._modules.pop(CHILD, None)
            _remove_hook(module, _pass_hidden_states)
        _remove_hook(stack.module, _check_call)
        stack.module.__dict__.pop("_efficient_info", None)
    for config in _configs_of(model):
        config._attn_implementation = attn_implementation
        config.__dict__.pop("attn_implementation", None)


def _remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    for key in [key for key, value in module._forward_pre_hooks.items() if value is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _configs_of(model: nn.Module) -> list[Any]:
    """The distinct config objects of a model and its sub-models (the two stacks of T5 have copies)."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return list(configs.values())


class PatchHandle:
    """Undoes one `patch_attention`: as a context manager at its end, or by `undo()`."""

    def __init__(self, model: PreTrainedModel, attn_implementation: str):
        self.model = model
        self._attn_implementation = attn_implementation
        self.active = True

    def undo(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        if self.active:
            uninstall(self.model, self._attn_implementation)
            self.active = False

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(self, *exc: object) -> None:
        self.undo()


def patch_attention(model: PreTrainedModel, attention: ConfigLike, **options: Any) -> PatchHandle:
    """Replace self-attention in a loaded model, in place, until undone.

        with patch_attention(model, "longformer", attention_window=512):
            model(**batch)
        handle = patch_attention(model, [config_for_low_layers, config_for_high_layers]); …; handle.undo()

    Cross-attention and layers that no config names keep exact attention. New parameters are initialised from the
    model's weights.

    Raises:
        ValueError: unsupported model, setting or combination: all reasons at once; the model is unchanged then.
    """
    before = model.config._attn_implementation
    install(model, attention_configs(attention, **options))
    return PatchHandle(model, before)
