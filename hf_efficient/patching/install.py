"""How mechanisms get into a model and out of it again: plan, installation, exact undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.attention.base.registry import ConfigLike, attention_configs
from hf_efficient.families import family_of
from hf_efficient.patching import downsampling as length_change
from hf_efficient.patching import extra_tokens
from hf_efficient.patching.call_checks import StackInfo, check_call, pass_hidden_states
from hf_efficient.patching.names import CHILD, IMPLEMENTATION


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
                site.module.register_forward_pre_hook(pass_hidden_states, with_kwargs=True)
        for module in stack.cross_attention:
            module.register_module(CHILD, None)
        family.swap_in(stack)
        stack.module._efficient_info = StackInfo(family, stack)  # type: ignore[assignment]
        stack.module.register_forward_pre_hook(check_call, with_kwargs=True)
        origins |= extra_tokens.install(family, stack, initialise)
        length_change.install(family, stack)
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
        length_change.remove(stack)
        for module in [site.module for site in stack.sites] + stack.cross_attention:
            module._modules.pop(CHILD, None)
            _remove_hook(module, pass_hidden_states)
        _remove_hook(stack.module, check_call)
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
