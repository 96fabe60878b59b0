"""A loaded model becomes an instance of another class: of an Efficient one, or of the stock one again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.experts.install import mark_experts, uninstall_experts
from hf_efficient.families import GenericFamily, HostModel
from hf_efficient.families.positions import AS_LONG, LongerInputs
from hf_efficient.families.readable import refuse_adapters
from hf_efficient.models.config import is_hub_id
from hf_efficient.models.provenance import ATTRIBUTE, REPORT_NAME, UPCYCLING_NAME, Provenance, watch
from hf_efficient.models.registry import MODELS, heads, is_efficient
from hf_efficient.patching.install import farthest_key, install, plan, resolve_side, uninstall
from hf_efficient.patching.names import IMPLEMENTATION, MODULE_NAME
from hf_efficient.patching.proof import prove


def stock_class(model: PreTrainedModel) -> Any:
    """transformers' class of a model, Efficient or not."""
    return getattr(type(model), "stock_class", type(model))


def change_class(model: Any, cls: Any, config: Any) -> None:
    """Make a loaded model an instance of another class."""
    # transformers notes which outputs a class can return when an instance is initialised: do that on an empty one
    PreTrainedModel.__init__(cls.__new__(cls), config)
    model.__class__ = cls


def change_config(config: Any, new: Any) -> None:
    """Make a config what `new` is, for all who hold it: modules of the model, and the config of a model around it."""
    config.__class__ = type(new)
    config.__dict__.clear()
    config.__dict__.update(new.__dict__)


def shared_parameters(model: PreTrainedModel) -> dict[str, str]:
    """{name: owner} of mechanism parameters that layers share."""
    owners: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if f".{MODULE_NAME}." in name:
            owner = owners.setdefault(id(parameter), name)
            if owner != name:
                ties[name] = owner
    return ties


def config_of_class(config: Any, cls: Any) -> Any:
    """A config's values as a config of `cls`: the stock class, or the Efficient one, then without mechanisms as yet."""
    values = config.to_dict() | {"model_type": cls.config_class.model_type}
    if is_efficient(cls):
        values = {k: v for k, v in values.items() if k not in ("efficient_source", "efficient_positions")}
        values |= {"efficient_attention": []}
    else:
        # saving in between wrote the Efficient class there
        values["architectures"] = config.architectures and [n.removeprefix("Efficient") for n in config.architectures]
        marks = ("auto_map", "experts_implementation")
        values = {k: v for k, v in values.items() if not k.startswith("efficient_") and k not in marks}
    new = cls.config_class.from_dict(values)
    mark_experts(new)
    new._attn_implementation = config._attn_implementation
    new._name_or_path = config._name_or_path
    return new


def require_convertible(host: HostModel, verb: str) -> None:
    """Refuse models that have no Efficient class, and weights that are elsewhere or not what they seem.

    Raises:
        ValueError: says what to load instead.
    """
    model, model_type = host.model, host.family.model_type
    if stock_class(model) not in MODELS:
        raise ValueError(
            f"{type(model).__name__} is not a model class of transformers' {model_type}; load the checkpoint with one "
            f"of {', '.join(cls.__name__ for cls in heads(model_type))}."
        )
    if host.put_away is None and any(p.is_meta for p in model.parameters()):
        raise ValueError(
            f"some weights are not loaded (offloaded or on the meta device): {verb} on a machine that holds the model, "
            "save it, and load the result with device_map."
        )
    refuse_adapters(model, verb)
    host.require_plain()


def convert_in_place(
    host: HostModel,
    configs: list[EfficientAttentionConfig],
    longer: LongerInputs = AS_LONG,
) -> tuple[dict[str, str], list[str]]:
    """Turn a loaded stock model into its Efficient class; after an exception it is unchanged.

    Returns:
        {new tensor: where its values came from}, and the names of the tensors that were lengthened.
    """
    require_convertible(host, "convert")
    scheme, count, before = host.family.positions, longer.max_positions, host.max_positions
    sides = [stack.side for stack in host.stacks]
    meant = {side for config in configs for side in resolve_side(config, sides)}
    for stack in host.stacks:
        if stack.side in meant:
            scheme.check(stack, longer)
    configs = [replace(config, side=_stored_side(config, sides)).for_length(count or before) for config in configs]
    chosen = plan(host, configs, count if before is not None else None)
    method = scheme.method(host.stacks[0], longer, farthest_key(host, chosen))
    if isinstance(host.family, GenericFamily):
        prove(host)
    # a stack that stays exact keeps its length
    converted = [stack.side for stack in host.stacks if any(layer.name in chosen for layer in stack.layers)]
    source = {"max_positions": before, "positions": method}
    source |= host.record_positions([] if count is None else converted) | _names_of_source(host.model.config)
    replaced = [entry for stack in host.stacks for entry in scheme.weights(stack)]
    try:
        resized = [] if count is None else host.lengthen(count, method, longer.rope, converted)
        origins = install(host, chosen)
    except BaseException:
        if count is not None:
            host.restore_positions(source)
            for module, weight in replaced:  # the very parameters that an optimiser may hold
                module.weight = weight
        raise
    _become_efficient(host, configs, source)
    settings = {
        "attention": host.model.config.efficient_attention,
        "max_positions": count,
        "positions": method,
        "rope": None if longer.rope is None else dict(longer.rope),
    }
    note_change(host.model, "convert", settings)
    return origins, resized


def _names_of_source(config: Any) -> dict[str, Any]:
    name = config._name_or_path
    return {"attn_implementation": config._attn_implementation} | ({"base_model": name} if is_hub_id(name) else {})


def note_change(model: PreTrainedModel, what: str, settings: dict[str, Any]) -> None:
    """Put a change into the model's history, which from now on notes its training too."""
    Provenance.of(model).add(what, model.config._name_or_path or None, settings)
    watch(model)


def _stored_side(config: EfficientAttentionConfig, sides: list[str]) -> str | None:
    wanted = resolve_side(config, sides)
    return config.side if not wanted else "both" if len(wanted) == 2 else wanted[0]


def _become_efficient(host: HostModel, configs: list[EfficientAttentionConfig], source: dict[str, Any]) -> None:
    """Give a model with mechanisms the class and config that say so."""
    model, config, cls = host.model, host.model.config, MODELS[stock_class(host.model)]
    new = config_of_class(config, cls)
    new.efficient_attention = [c.to_dict() for c in configs]
    new.efficient_source = source
    if len(set(host.lengths.values())) > 1:
        new.efficient_positions = host.lengths
    new.attn_implementation = IMPLEMENTATION
    change_class(model, cls, new)
    change_config(config, new)
    model.all_tied_weights_keys.update(shared_parameters(model))


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `convert` in place: the original class, config and weights, bit for bit unless they were trained since.

    Experts stay as they are. In a model with experts alone this undoes `upcycle`, as long as they are still equal.

    Raises:
        ValueError: the model is not a converted one, was imported and never had full attention, carries adapters, or has
            experts alone and they were trained apart.
    """
    refuse_adapters(model, "revert")
    if not is_efficient(type(model)):
        raise ValueError(f"{type(model).__name__} is not a converted model: there is nothing to revert.")
    host, provenance = HostModel.of(model), Provenance.of(model)
    config, stock = model.config, stock_class(model)
    # a model built from its config never had an original: its position table stays
    source = getattr(config, "efficient_source", {"max_positions": None})
    if (imported := source.get("import")) is not None:
        raise ValueError(
            f"this model was imported from a {imported} checkpoint and never had full attention: "
            f"hf_efficient.export(model, to={imported!r}), or hf-efficient export … --to {imported}, gives that "
            "checkpoint again."
        )
    keeps_experts = bool(getattr(config, "efficient_experts", None) and config.efficient_attention)
    undone = "convert" if config.efficient_attention else "upcycle"
    if undone == "upcycle":
        uninstall_experts(host)
    else:
        usual = "sdpa" if model._supports_sdpa else "eager"
        uninstall(host, [], source.get("attn_implementation") or usual)
    host.restore_positions(source)
    # the stacks of a reloaded encoder-decoder model hold copies
    for old in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        if isinstance(old, type(config)):
            change_config(old, config_of_class(old, type(model) if keeps_experts else stock))
    change_class(model, type(model) if keeps_experts else stock, model.config)
    model.__dict__.pop("_model_tags", None)
    model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if f".{MODULE_NAME}." not in k}
    provenance.reports.pop(REPORT_NAME if undone == "convert" else UPCYCLING_NAME, None)
    if provenance.is_loaded or [step["what"] for step in provenance.history] != [undone]:
        note_change(model, "revert", {"undone": undone})
    else:  # the very object that it was
        delattr(model, ATTRIBUTE)
    return model
