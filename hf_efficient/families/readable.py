"""Refusals of weights that can't be read: adapters, quantised, offloaded, sharded, pruned or replaced layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_efficient.ops.plain import OFFLOADED, OWN, altered, is_adapter, not_plain

SHOWN = 3
# whose modules stock classes are made of; transformers takes T5's norms from apex where that is installed
HOSTS = ("torch", "transformers", "hf_efficient", "apex")


def require_plain(modules: Iterable[tuple[str, Any]]) -> None:
    """Refuse to read the weights of linear layers and embeddings, given with their names.

    Raises:
        ValueError: names those whose calls compute with other weights than they show, and the remedy.
    """
    _refuse([f"{name} {reason}" for name, module in modules if (reason := not_plain(module))])


def require_rows(name: str, table: Any) -> None:
    """Refuse to read the rows of an embedding, which may be of the host's own kind; raises as `require_plain`."""
    is_own = isinstance(table, nn.Embedding) and type(table).__module__.startswith(OWN)
    reason = altered(table) if is_own else not_plain(table)
    _refuse([f"{name} {reason}"] if reason else [])


def require_unaltered(model: nn.Module, on_disk: bool = False) -> None:
    """Refuse to account for all the weights of a model where some are not what they seem; raises as `require_plain`.

    Modules of other packages with weights inside count too: those have other names than in the stock class, which would not
    find them in a checkpoint.

    Args:
        on_disk: weights may be on the disk.
    """
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not any(name.startswith(f"{known}.") for known in reasons):
            reason = altered(module) or (_foreign(module) if name else None)
            if reason and not (on_disk and reason == OFFLOADED):
                reasons[name] = reason
    if reasons:
        reasons = {name: reason for name, reason in reasons.items() if name not in _built_so(model)}
    _refuse([f"{name} {reason}" for name, reason in reasons.items()])


@torch.no_grad()
def _built_so(model: Any) -> set[str]:
    """Names of modules that look altered in a new model of the same class too: HuBERT's convolution has a weight norm."""
    cls, config = getattr(type(model), "stock_class", type(model)), copy.deepcopy(getattr(model, "config", None))
    try:
        with torch.device("meta"):
            new = cls(config)
    except Exception:  # of no class that a config makes: then all of it counts
        return set()
    found = dict(model.named_modules())
    return {
        name
        for name, module in new.named_modules()
        if altered(module)
        and name in found
        and altered(module) == altered(found[name])
        and type(module).__name__ == type(found[name]).__name__
    }


def _foreign(module: nn.Module) -> str | None:
    package = type(module).__module__.partition(".")[0]
    if package in HOSTS or not any(True for _ in (*module.parameters(), *module.buffers())):
        return None
    return (
        f"is a {type(module).__name__}, which its class does not have there: put the original back, or convert before"
    )


def refuse_adapters(model: object, verb: str) -> None:
    """Refuse a model with adapters, in their library's wrapper or inside.

    Raises:
        ValueError: says to merge them first.
    """
    if not isinstance(model, nn.Module):
        return
    adapters = [name for name, module in model.named_modules() if is_adapter(module)]
    # transformers' own adapters leave the class of the model alone
    if adapters or getattr(model, "_hf_peft_config_loaded", False):
        where = next((f" ({name})" for name in adapters if name), "")
        raise ValueError(
            f"{type(model).__name__} carries adapters{where}: merge them first (`merge_and_unload`), or {verb} before "
            "adapting."
        )


def require_model(source: object, verb: str) -> None:
    """Refuse modules around a model, which are neither one nor the name of one; raises as `refuse_adapters`."""
    refuse_adapters(source, verb)
    if isinstance(source, nn.Module) and not isinstance(source, PreTrainedModel):
        raise ValueError(f"{type(source).__name__} is no transformers model: {verb} the model inside it.")


def _refuse(reasons: list[str]) -> None:
    if reasons:
        more = f"\n- and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
        raise ValueError("these weights can't be read:\n" + "\n".join(f"- {one}." for one in reasons[:SHOWN]) + more)
