"""Models for recipes: as they are, converted on the way, reverted, or with adapters."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_efficient.attention.base.registry import attention_configs
from hf_efficient.conversion.convert import convert
from hf_efficient.conversion.loading import load_preparation, takes_pictures
from hf_efficient.families import HostModel, family_of
from hf_efficient.families.positions import AS_LONG, LongerInputs
from hf_efficient.models.in_place import revert
from hf_efficient.models.loading import find_weights, read_config, require_host_tensors
from hf_efficient.models.mixin import honours_loss_kwargs
from hf_efficient.models.provenance import Provenance
from hf_efficient.patching.exact import converted_layers, mechanism_of
from hf_efficient.training.checkpoints import is_first_process
from hf_efficient.training.results import RunRecord

logger = logging.getLogger(f"transformers.{__name__}")

# attention projections that are not all linear layers of self-attention modules, as patterns of whole module names
LORA_TARGETS = (
    r".*attention\.(self\.(query|key|value)|output\.dense)",  # BERT
    r".*attn\.(c_attn|q_attn|c_proj)",  # GPT-2
    r".*(SelfAttention|EncDecAttention)\.(q|k|v|o)",  # T5
)


def load_model(settings: Any, auto_class: Any, *, record: RunRecord | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """(model, tokenizer or image processor) of `settings.model` in fp32: as it is, or converted on the way.

    `settings.attention` names a mechanism, or is its JSON with options; "" leaves the checkpoint as it is, "none" undoes
    the conversion of a converted one. `settings.max_positions` lengthens what is converted; 0 = as is; `settings.positions`
    says how. Tensors that the
    checkpoint lacks (a fresh head) are logged. `settings.lora_rank` > 0 freezes all but low-rank adapters of the attention
    projections, the mechanisms and fresh layers (PEFT).

    Args:
        record: keeps the conversion's report. kwargs: for `auto_class.from_pretrained`, e.g. `num_labels`.

    Raises:
        ValueError: an impossible conversion, another mechanism for a converted checkpoint, or no tokenizer.
    """
    name, attention = settings.model, getattr(settings, "attention", "")
    longer = LongerInputs(getattr(settings, "max_positions", 0) or None, getattr(settings, "positions", None))
    config = read_config(name)
    installed = getattr(config, "efficient_attention", None)
    tokenizer = load_preparation(name, _class_of(auto_class, config))
    if tokenizer is None:
        what = "image processor" if takes_pictures(_class_of(auto_class, config)) else "tokenizer"
        raise ValueError(f"{name} has no {what}; put one into the checkpoint's folder.")
    _check_attention(name, config, attention, longer, getattr(tokenizer, "model_max_length", 0))
    weights = find_weights(name, config)
    weights.require_tensors_alone()
    model, info = auto_class.from_pretrained(
        name,
        output_loading_info=True,
        dtype=torch.float32,
        use_safetensors=weights.is_safe,
        trust_remote_code=False,
        **kwargs,
    )
    require_host_tensors(name, model, info["missing_keys"])
    fresh = sorted(info["missing_keys"])
    if fresh and is_first_process():
        logger.warning(f"not in {name}, so they start fresh and must be trained: {', '.join(fresh)}.")
    provenance = Provenance.of(model, name)
    earlier = len(provenance.history)
    if installed and attention == "none":
        model = revert(model)
        if "model_max_length" in (before := getattr(config, "efficient_source", {})):
            tokenizer.model_max_length = before["model_max_length"]
    elif attention not in ("", "none") and not installed:
        result = convert(model, attention, **longer._asdict(), tokenizer=tokenizer)
        model = result.model
        if record is not None:
            record.conversion = result.report.to_dict() | {"source": name}
    for step in provenance.history[earlier:]:
        step["within"] = None if record is None else record.recipe
    return prepared(model, settings, fresh), tokenizer


def _class_of(auto_class: Any, config: Any) -> Any:
    """The model class, or the first of them, that an Auto class has for a config."""
    known = getattr(auto_class, "_model_mapping", {})
    found = known.get(type(config), PreTrainedModel)
    return found[0] if isinstance(found, tuple | list) else found


def prepared(model: Any, settings: Any, fresh: list[str] | None = None) -> Any:
    """A loaded or new model ready for the Trainer: told how it treats loss keywords, and with adapters if asked for.

    Args:
        fresh: names of tensors that no checkpoint had.
    """
    if isinstance(model, PreTrainedModel) and not hasattr(model, "accepts_loss_kwargs"):
        # a stock head that ignores num_items_in_batch would get its loss multiplied by the accumulation steps
        model.accepts_loss_kwargs = honours_loss_kwargs(type(model))  # type: ignore[assignment]
    rank = getattr(settings, "lora_rank", 0)
    return _with_lora(model, rank, fresh or []) if rank else model


def _check_attention(name: str, config: Any, attention: str, longer: LongerInputs, longest_input: int) -> None:
    installed = getattr(config, "efficient_attention", None)
    if not installed:
        if longer != AS_LONG and attention in ("", "none"):
            said = ", ".join(f"{name}={value}" for name, value in longer._asdict().items() if value is not None)
            raise ValueError(f"{said} lengthens a checkpoint while it is converted: say to what with --attention.")
        return
    if attention not in ("", "none"):
        given, there = attention_configs(attention), attention_configs(installed)
        sides = {config.side for config in there}
        if len(sides) == 1:  # the conversion noted which side was meant
            given = [dataclasses.replace(c, side=c.side or next(iter(sides))) for c in given]
        if given != there:
            raise ValueError(
                f"{name} is already converted, to {installed}, and --attention asks for something else: leave it out, or "
                "convert the original."
            )
    # T5 has no table of positions: what a conversion lengthens there is what the tokenizer says
    positions = family_of(config.model_type).of(config).positions.limit(config) or longest_input
    if longer.max_positions and longer.max_positions != positions:
        raise ValueError(
            f"{name} is already converted and has {positions} positions, not max_positions={longer.max_positions}: leave it "
            "out, or convert the original."
        )
    method = getattr(config, "efficient_source", {}).get("positions")
    if longer.positions and longer.positions != method:
        raise ValueError(
            f"{name} is already converted, with positions={method}, not {longer.positions}: leave it out, or convert the "
            "original."
        )


def attention_projections(model: Any) -> list[str]:
    """Qualified names of the linear layers around attention, which adapters are put on; those of mechanisms are not."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for pattern in LORA_TARGETS:
        if found := [name for name in linear if re.fullmatch(pattern, name)]:
            return found
    attention = {layer.name for stack in HostModel.of(model).stacks for layer in stack.layers}
    return [name for name in linear if name.rpartition(".")[0] in attention]


def _with_lora(model: Any, rank: int, fresh: list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = attention_projections(model)
    mechanisms = [mechanism_of(layer) for layer in converted_layers(model).values()]
    shared = sorted({name for mechanism in mechanisms for name in mechanism.shared_parameters()})
    if shared:
        raise ValueError(
            f"lora_rank={rank}: adapters would give every layer its own copy of {', '.join(shared)}, which the layers "
            "share; convert without sharing between layers, or train without LoRA."
        )
    modules = dict(model.named_modules())
    owners = {name.rpartition(".")[0] for name in fresh}
    saved = sorted(name for name in owners if name in modules and not any(modules[name].children()))
    # what a mechanism draws anew while it trains is part of a checkpoint too, without being a parameter
    if any(mechanism.state_dict() for mechanism in mechanisms):
        saved.append("efficient")
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        modules_to_save=saved or None,
        fan_in_fan_out=all(isinstance(modules[name], Conv1D) for name in targets),
    )
    return get_peft_model(model, config)
