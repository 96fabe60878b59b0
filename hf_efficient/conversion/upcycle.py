"""upcycle: a trained dense checkpoint as one with sparse experts that computes the same in eval mode, to be trained on."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient.conversion.loading import load_as_it_is, open_source, split_options
from hf_efficient.conversion.saving import Report, Result
from hf_efficient.experts.install import install_experts, mark_experts, unchanged_on_error
from hf_efficient.experts.layer import ExpertsConfig, expert_layers
from hf_efficient.families import HostModel
from hf_efficient.families.probe import probe_inputs
from hf_efficient.families.readable import require_model
from hf_efficient.models.in_place import (
    change_class,
    change_config,
    config_of_class,
    note_change,
    require_convertible,
    stock_class,
)
from hf_efficient.models.provenance import ABSENT, UPCYCLING_NAME, Provenance, earlier_steps
from hf_efficient.models.registry import MODELS
from hf_efficient.patching.exact import eval_mode
from hf_efficient.profiling.environment import versions

logger = logging.getLogger(f"transformers.{__name__}")

TOLERANCE = 1e-5


@dataclass
class UpcyclingReport(Report):
    """What `upcycle` did, tensor by tensor.

    Attributes:
        source, revision: where the dense checkpoint came from. model_class: its stock class.
        efficient_experts: the options, as JSON. layers: qualified names of the sparse layers.
        parameters, active_parameters: of the result, and those that one token meets; `source_parameters` before.
        difference, tolerance: of the outputs on random tokens before and after, in eval mode, relative to the largest;
            and what was allowed: 1e-5, or 8 times the precision of the weights where that is more.
        tensors: {name: {"status": "copied" | "initialised", "from": …, "shape": […]}}.
        history: every step that led to the model, see `Provenance`; later ones are added.
        fidelity: filled by `verify`, if it was run and the checkpoint has no conversion report, which would hold it.
    """

    source: str
    revision: str | None
    model_class: str
    efficient_experts: dict[str, Any]
    layers: list[str]
    source_parameters: int
    parameters: int
    active_parameters: int
    difference: float
    tolerance: float
    tensors: dict[str, dict[str, Any]]
    fidelity: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=versions)
    statuses: ClassVar[tuple[str, ...]] = ("copied", "initialised")


class UpcyclingResult(Result):
    """An upcycled model with its tokenizer (`None` if the source had none) and the report; `save(path)` writes all."""

    report: UpcyclingReport


def upcycle(
    source: str | Path | PreTrainedModel,
    num_experts: int = 8,
    *,
    top_k: int = 1,
    capacity_factor: float | None = None,
    layers: Sequence[int] | None = None,
    router_aux_loss_coef: float = 1e-2,
    router_z_loss_coef: float = 1e-3,
    seed: int = 0,
    tokenizer: Any = None,
    revision: str | None = None,
    **loading: Any,
) -> UpcyclingResult:
    """Turn feed-forward layers of a trained checkpoint into experts: E copies of each, and a router from N(0, 0.02²).

    In eval mode the result computes what the source did, until it is trained: see `experts` for the equations and
    `ExpertsConfig` for the options. In training mode it does not: dropout draws other numbers, and a capacity drops tokens.
    It needs E times the memory of these layers and, with one expert per token, their time. Only training tells the experts
    apart, so train on; `revert` goes back as long as nobody did. Attention is left as it is, efficient or not.

    Args:
        source: Hub id or folder of a BERT, RoBERTa, GPT-2, Llama or T5 checkpoint (or relative), converted or not, or loaded
            model, which is then changed in place. Optimiser states are not taken over.
        tokenizer: for a loaded model, or to use another than the source's.
        revision: of the Hub repository. loading: as for `convert`: `subfolder`, `token`, `dtype`, `model_class`, …

    Returns:
        `.model` (an Efficient class), `.tokenizer`, `.report`; `.save(path)` writes a checkpoint for the Auto classes.

    Raises:
        ValueError: an impossible option, an unsupported architecture, unreadable or unloaded weights, a model that has
            experts already, or outputs that differ. OSError: the source can't be found.

    Source: Komatsuzaki et al. 2023 (arXiv 2212.05055), §3 and appendix A; they let experts choose tokens in encoders, which
    depends on the rest of the batch, so tokens choose everywhere here.
    """
    config = ExpertsConfig(
        num_experts=num_experts,
        top_k=top_k,
        capacity_factor=capacity_factor,
        layers=None if layers is None else tuple(layers),
        router_aux_loss_coef=router_aux_loss_coef,
        router_z_loss_coef=router_z_loss_coef,
        seed=seed,
    )
    require_model(source, "upcycle")
    loading, unknown = split_options(loading)
    if unknown:
        raise ValueError(f"upcycle has no option {', '.join(map(repr, unknown))}.")
    opened = open_source(source, tokenizer, load_as_it_is, revision=revision, **loading)
    earlier = earlier_steps(opened.model, opened.folder)
    host, model = HostModel.of(opened.model), opened.model
    before = model.num_parameters()
    difference, tolerance = upcycle_in_place(host, config)
    provenance = Provenance.of(opened.model)
    provenance.history[:0], provenance.is_loaded = earlier, provenance.is_loaded or bool(earlier)
    if opened.tokenizer is None:
        logger.warning(f"{opened.name} has no tokenizer: only the model is upcycled.")
    report = UpcyclingReport(
        source=opened.name,
        revision=revision,
        model_class=stock_class(model).__name__,
        efficient_experts=config.to_dict(),
        layers=list(expert_layers(model)),
        source_parameters=before,
        parameters=model.num_parameters(),
        active_parameters=_active_parameters(model, config),
        difference=difference,
        tolerance=tolerance,
        tensors=_account(model, config, opened.missing),
        history=provenance.history,
    )
    provenance.history[-1] |= {"source": opened.name, "revision": revision, "loading": opened.given}
    provenance.reports[UPCYCLING_NAME] = report
    return UpcyclingResult(model, opened.tokenizer, report, opened.folder)


def upcycle_in_place(host: HostModel, config: ExpertsConfig) -> tuple[float, float]:
    """Put experts into a loaded model, which becomes an Efficient class. Returns the outputs' difference and its tolerance.

    Raises:
        ValueError: see `upcycle`; the model is unchanged then.
    """
    model = host.model
    if expert_layers(model):
        raise ValueError(f"{type(model).__name__} has experts already; revert it before upcycling it differently.")
    require_convertible(host, "upcycle")
    difference, tolerance = _install(host, config)
    cls = MODELS[stock_class(model)]
    if not isinstance(model.config, cls.config_class):
        change_config(model.config, config_of_class(model.config, cls))
    model.config.efficient_experts = config.to_dict()
    mark_experts(model.config)
    change_class(model, cls, model.config)
    note_change(model, "upcycle", {"efficient_experts": config.to_dict()})
    return difference, tolerance


def _install(host: HostModel, config: ExpertsConfig) -> tuple[float, float]:
    """Put experts in if the outputs stay; (their difference, its tolerance)."""
    expected = _outputs(host)
    tolerance = max(TOLERANCE, 8 * torch.finfo(host.model.dtype).eps)
    with unchanged_on_error(host.model):
        install_experts(host, config)
        difference = float((_outputs(host) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not difference <= tolerance:
            raise ValueError(
                f"the outputs differ by {difference:.1e} of the largest, more than {tolerance:.0e}, so it would be another "
                "model; it was left as it was."
            )
    return difference, tolerance


def _outputs(host: HostModel) -> Tensor:
    """Last hidden states of all stacks on 32 random tokens, or on noise of their kind, as one vector."""
    model = host.model
    last: list[Tensor] = []
    with torch.no_grad(), eval_mode(model):
        for stack in host.stacks:
            takes_ids = "input_ids" in inspect.signature(type(stack.module).forward).parameters
            name = "input_ids" if takes_ids else stack.module.main_input_name
            inputs: dict[str, Any] = {name: _tokens(model) if takes_ids else probe_inputs(stack.module)[name]}
            if last and stack.side == "decoder":
                inputs["encoder_hidden_states"] = last[0]
            last.append(stack.module(**inputs).last_hidden_state)
    return torch.cat([states.float().flatten() for states in last])


def _tokens(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def _active_parameters(model: PreTrainedModel, config: ExpertsConfig) -> int:
    """Parameters that one token meets."""
    unused = (config.num_experts - config.top_k) / config.num_experts
    copies = sum(p.numel() for layer in expert_layers(model).values() for p in layer.parameters(recurse=False))
    return model.num_parameters() - round(unused * copies)


def _account(model: PreTrainedModel, config: ExpertsConfig, missing: set[str]) -> dict[str, dict[str, Any]]:
    """Where every tensor of the result came from."""
    sparse = tuple(f"{name}." for name in expert_layers(model))
    tensors = {}
    for name, tensor in model.state_dict().items():
        status, origin = "copied", name
        if name.startswith(sparse):
            router = f"N(0, 0.02²), seed {config.seed}"
            status = "initialised"
            origin = router if ".router." in name else f"{config.num_experts} copies of the dense weights"
        elif name in missing:
            status, origin = "initialised", ABSENT
        tensors[name] = {"status": status, "from": origin, "shape": list(tensor.shape)}
    return tensors
