"""The tensors of a converted model against those of its source: bit-equal, trained since, or damaged."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_efficient.evaluation.report import Check
from hf_efficient.experts.install import install_experts, uninstall_experts
from hf_efficient.experts.layer import ExpertsConfig, expert_layers
from hf_efficient.families import HostModel
from hf_efficient.models.provenance import CHANGED, EQUAL, TRAINED, Provenance, Step, described, runs
from hf_efficient.patching.names import MODULE_NAME

RULE = (
    "every tensor of the source is bit-equal, in each expert, unless a recorded run trained it since; only position tables "
    "may be longer; no number is infinite or NaN"
)


def copied_tensors(
    model: Any, source: PreTrainedModel, history: list[Step], left_out: Collection[str] = ()
) -> tuple[Check, dict[str, Any]]:
    """The check of the tensors, and what it says of the weights (`state` and `runs`, see `FidelityReport`).

    Args:
        history: the steps that led from `source` to `model`. left_out: names of tensors that the source's checkpoint lacks.
    """
    theirs = {name: tensor for name, tensor in source.state_dict().items() if name not in left_out}
    experts = {} if expert_layers(source) else expert_layers(model)
    if experts and all(layer.are_equal() for layer in experts.values()):
        model, experts = copy.deepcopy(model), {}
        uninstall_experts(HostModel.of(model))
    ours = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    extended, different, missing = [], [], []
    for name, tensor in theirs.items():
        if name not in ours:
            missing.append(name)
        elif ours[name].shape != tensor.shape:
            extended.append(name)
        elif not torch.equal(ours[name].cpu(), tensor.cpu()):
            different.append(name)
    extra = [name for name in ours if name not in theirs and f".{MODULE_NAME}." not in name]
    # experts that differ from each other stand where the source has one layer
    apart = _of_experts(model, source) if experts else set()
    apart &= {*missing, *extra}
    strange = [name for name in missing + extra if name not in apart]
    no_number = [name for name, t in ours.items() if t.is_floating_point() and not t.isfinite().all()]
    is_equal = not (different or apart or strange or no_number)
    detail = {"tensors": len(theirs), "extended": extended, "different": missing + different, "unexplained": extra}
    detail |= {"not finite": no_number} if no_number else {}
    detail |= {"left out": sorted(left_out)} if left_out else {}
    status, weights = outcome(is_equal, history, is_damaged=bool(strange or no_number))
    return Check("copied tensors", status, detail, RULE), weights


def outcome(is_equal: bool, history: list[Step], *, is_damaged: bool = False) -> tuple[str, dict[str, Any]]:
    """The status of the check of copied tensors, and what is said of the weights (`state` and `runs`).

    Args:
        history: the steps since the source. is_damaged: in a way that no training explains.
    """
    trained = runs(history)
    is_explained = any(step.get("trained") != "mechanism" for step in trained) and not is_damaged
    state = TRAINED if trained and (is_equal or is_explained) else EQUAL if is_equal else CHANGED
    status = "passed" if is_equal else TRAINED if is_explained else "failed"
    return status, {"state": state, "runs": [described(step) for step in trained]}


def _of_experts(model: Any, source: PreTrainedModel) -> set[str]:
    """Names that upcycling takes from the state of `source`, and those that it adds."""
    sparse = copy.deepcopy(source)
    install_experts(HostModel.of(sparse), ExpertsConfig.from_dict(model.config.efficient_experts))
    return set(source.state_dict()) ^ set(sparse.state_dict())


def fresh_tensors(model: Any) -> set[str]:
    """Tensors of a converted model that its source's checkpoint lacked, a new head for example, as its reports name them."""
    found = set()
    for report in Provenance.of(model).reports.values():
        tensors = (report.get("tensors") or {}) if isinstance(report, dict) else report.tensors
        absent = ("random", "absent from the source checkpoint")
        found |= {name for name, told in tensors.items() if told.get("status") in absent or told.get("from") in absent}
    return found


@torch.no_grad()
def fill(source: PreTrainedModel, model: Any, names: Collection[str]) -> None:
    """Give `source` the values of `model` in the tensors that its checkpoint lacks, which were drawn for each of both."""
    ours = model.state_dict()
    for name, tensor in source.state_dict().items():
        if name in names and name in ours and ours[name].shape == tensor.shape:
            tensor.copy_(ours[name])
