"""A loaded model becomes an instance of another class: of an Efficient one, or of the stock one again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.experts.install import mark_experts, uninstall_experts
from hf_efficient.families import family_of
from hf_efficient.families.base import POSITION_METHODS
from hf_efficient.models.registry import CONFIGS, MODELS, is_efficient
from hf_efficient.patching.install import install, plan, resolve_side, uninstall
from hf_efficient.patching.names import CHILD, IMPLEMENTATION


def stock_class(model: PreTrainedModel) -> Any:
    """transformers' class of a model, Efficient or not."""
    return getattr(type(model), "stock_class", type(model))


def change_class(model: Any, cls: Any, config: Any) -> None:
    """Make a loaded model an instance of another class."""
    # transformers notes which outputs a class can return when an instance is initialised: do that on an empty one
    PreTrainedModel.__init__(cls.__new__(cls), config)
    model.__class__ = cls


def replace_config(model: PreTrainedModel, old: Any, new: Any) -> None:
    """Every module that held the model's config holds the new one; stacks with a copy of their own keep it."""
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def shared_parameters(model: PreTrainedModel) -> dict[str, str]:
    """{name: owner} of mechanism parameters that layers share."""
    owners: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if f".{CHILD}." in name:
            owner = owners.setdefault(id(parameter), name)
            if owner != name:
                ties[name] = owner
    return ties


def config_of_class(config: Any, cls: Any) -> Any:
    """The config of `cls`, the stock class or, where experts stay, the Efficient one."""
    values = config.to_dict() | {"model_type": cls.config_class.model_type}
    if is_efficient(cls):
        values.pop("efficient_source", None)
        values |= {"efficient_attention": []}
    else:
        # saving in between wrote the Efficient class there
        values["architectures"] = config.architectures and [n.removeprefix("Efficient") for n in config.architectures]
        values = {k: v for k, v in values.items() if not k.startswith("efficient_") and k != "experts_implementation"}
    new = cls.config_class.from_dict(values)
    mark_experts(new)
    new._attn_implementation = config._attn_implementation
    new._name_or_path = config._name_or_path
    return new


def convert_in_place(
    model: PreTrainedModel,
    configs: list[EfficientAttentionConfig],
    max_positions: int | None = None,
    positions: str = "tile",
) -> tuple[dict[str, str], list[str]]:
    """Turn a loaded stock model into its Efficient class.

    Returns:
        {new tensor: where its values came from}, and the names of the position tables that were lengthened.
    """
    family = family_of(model)
    if positions not in POSITION_METHODS:
        raise ValueError(f"positions={positions!r} is not possible; it must be one of {', '.join(POSITION_METHODS)}.")
    if max_positions is not None and (type(max_positions) is not int or max_positions < 1):
        raise ValueError(f"max_positions={max_positions!r} is not possible; it must be an integer ≥ 1.")
    if stock_class(model) not in MODELS:
        raise ValueError(
            f"{type(model).__name__} is no model class of transformers' {family.model_type}; load the checkpoint with one "
            f"of {', '.join(cls.__name__ for cls in MODELS if cls.config_class.model_type == family.model_type)}."
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "some weights are not loaded (offloaded or on the meta device): convert on a machine that holds the model, "
            "save it, and load the converted checkpoint with device_map."
        )
    sides = [stack.side for stack in family.stacks(model)]
    configs = [replace(config, side=_stored_side(config, sides)) for config in configs]
    before = family.max_positions(model.config)
    if max_positions is not None and before is not None and max_positions < before:
        raise ValueError(
            f"max_positions={max_positions} would drop positions; the source has {before}: give at least that."
        )
    plan(model, configs, max_positions if before is not None else None)  # refuse before anything changes
    implementation = model.config._attn_implementation
    tables = family.position_tables(model)
    resized = []
    if max_positions is not None and before is not None and max_positions != before:
        resized = family.resize_positions(model, max_positions, positions)
    try:
        origins = install(model, configs)
    except BaseException:
        if resized and before is not None:
            family.resize_positions(model, before, positions)
            for owner, name, table in tables:  # the very parameters that an optimiser may hold
                setattr(owner, name, table)
        raise
    config = model.config
    new = CONFIGS[family.model_type].from_dict(
        config.to_dict() | {"model_type": CONFIGS[family.model_type].model_type}, attn_implementation=IMPLEMENTATION
    )
    new.efficient_attention = [c.to_dict() for c in configs]
    new.efficient_source = {"max_positions": before, "positions": positions, "attn_implementation": implementation}
    new._name_or_path = config._name_or_path
    new.attn_implementation = IMPLEMENTATION
    mark_experts(new)
    change_class(model, MODELS[stock_class(model)], new)
    replace_config(model, config, new)
    model.all_tied_weights_keys.update(shared_parameters(model))
    return origins, resized


def _stored_side(config: EfficientAttentionConfig, sides: list[str]) -> str | None:
    wanted = resolve_side(config, sides)
    return config.side if not wanted else "both" if len(wanted) == 2 else wanted[0]


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `convert` in place: the original class, config and weights, bit for bit unless they were trained since.

    Experts stay as they are. In a model with experts alone this undoes `upcycle`, as long as they are still equal.

    Raises:
        ValueError: the model is no converted one, or has experts alone and they were trained apart.
    """
    if not is_efficient(type(model)):
        raise ValueError(f"{type(model).__name__} is no converted model: there is nothing to revert.")
    family = family_of(model)
    config, stock = model.config, model.stock_class
    # a model built from its config never had an original: its position table stays
    source = getattr(config, "efficient_source", {"max_positions": None})
    keeps_experts = bool(getattr(config, "efficient_experts", None) and config.efficient_attention)
    if not config.efficient_attention:
        uninstall_experts(model)
    else:
        uninstall(model, source.get("attn_implementation") or "sdpa")
    if source["max_positions"] is not None and source["max_positions"] != family.max_positions(config):
        family.resize_positions(model, source["max_positions"], source["positions"])
    # the stacks of a reloaded encoder-decoder model hold copies
    for old in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        if isinstance(old, type(config)):
            replace_config(model, old, config_of_class(old, type(model) if keeps_experts else stock))
    change_class(model, type(model) if keeps_experts else stock, model.config)
    model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if f".{CHILD}." not in k}
    return model
