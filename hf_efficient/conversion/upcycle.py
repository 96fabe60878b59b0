"""upcycle: a trained dense checkpoint as one with sparse experts that computes the same, ready to be trained on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient.conversion.loading import load_as_it_is, load_tokenizer
from hf_efficient.conversion.saving import UPCYCLING_NAME, Result
from hf_efficient.conversion.sentence_transformers import checkpoint_folder
from hf_efficient.experts.install import install_experts, mark_experts, unchanged_on_error
from hf_efficient.experts.layer import ExpertsConfig, expert_layers
from hf_efficient.families import family_of
from hf_efficient.models.in_place import change_class, replace_config, stock_class
from hf_efficient.models.registry import CONFIGS, MODELS
from hf_efficient.patching.exact import eval_mode
from hf_efficient.profiling.environment import versions

TOLERANCE = 1e-5


@dataclass
class UpcyclingReport:
    """What `upcycle` did, tensor by tensor.

    Attributes:
        source, revision: where the dense checkpoint came from. model_class: its stock class.
        efficient_experts: the options, as JSON. layers: qualified names of the sparse layers.
        parameters, active_parameters: of the result, and those that one token meets; `source_parameters` before.
        difference, tolerance: of the outputs on random tokens before and after, relative to the largest; and what was
            allowed: 1e-5, or 8 times the precision of the weights where that is more.
        tensors: {name: {"status": "copied" | "initialised", "from": …, "shape": […]}}.
        fidelity: filled by `verify`, if it was run and there is no conversion's report to hold it.
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
    versions: dict[str, str] = field(default_factory=versions)

    def counts(self) -> dict[str, int]:
        """Number of tensors by status."""
        statuses = [tensor["status"] for tensor in self.tensors.values()]
        return {status: statuses.count(status) for status in ("copied", "initialised")}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class UpcyclingResult(Result):
    """An upcycled model with its tokenizer (`None` if the source had none) and the report; `save(path)` writes all."""

    report: UpcyclingReport
    report_name = UPCYCLING_NAME


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
) -> UpcyclingResult:
    """Turn feed-forward layers of a trained checkpoint into experts: E copies of each, and a router from N(0, 0.02²).

    The result computes what the source did, until it is trained: see `experts` for the equations and `ExpertsConfig` for
    the options. It needs E times the memory of these layers and, with one expert per token, their time. Only training tells
    the experts apart, so train on; `revert` goes back as long as nobody did. Attention is left as it is, efficient or not.

    Args:
        source: Hub id or folder of a BERT, RoBERTa, GPT-2 or T5 checkpoint (or a relative), converted or not, or a loaded
            model, which is then changed in place. Optimiser states are not taken over.
        tokenizer: for a loaded model, or to use another than the source's.
        revision: of the Hub repository.

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
    folder, missing = None, set()
    if isinstance(source, PreTrainedModel):
        model, name = source, source.config._name_or_path or type(source).__name__
    else:
        name = str(source)
        model, info = load_as_it_is(name, revision)
        folder, missing = checkpoint_folder(name, revision), set(info["missing_keys"])
        tokenizer = tokenizer or load_tokenizer(name, revision)
    before = model.num_parameters()
    difference, tolerance = upcycle_in_place(model, config)
    if tokenizer is None:
        warnings.warn(f"{name} has no tokenizer: only the model is upcycled.", stacklevel=2)
    sparse = expert_layers(model)
    unused = (config.num_experts - config.top_k) / config.num_experts
    copies = sum(p.numel() for layer in sparse.values() for p in layer.parameters(recurse=False))
    report = UpcyclingReport(
        source=name,
        revision=revision,
        model_class=stock_class(model).__name__,
        efficient_experts=config.to_dict(),
        layers=list(sparse),
        source_parameters=before,
        parameters=model.num_parameters(),
        active_parameters=model.num_parameters() - round(unused * copies),
        difference=difference,
        tolerance=tolerance,
        tensors=_account(model, config, missing),
    )
    return UpcyclingResult(model, tokenizer, report, folder)


def upcycle_in_place(model: PreTrainedModel, config: ExpertsConfig) -> tuple[float, float]:
    """Put experts into a loaded model, which becomes an Efficient class. Returns the outputs' difference and its tolerance.

    Raises:
        ValueError: see `upcycle`; the model is unchanged then.
    """
    family, stock = family_of(model), stock_class(model)
    if expert_layers(model):
        raise ValueError(f"{type(model).__name__} has experts already; revert it before upcycling it differently.")
    if stock not in MODELS:
        raise ValueError(
            f"{type(model).__name__} is no model class of transformers' {family.model_type}; load the checkpoint with one "
            f"of {', '.join(cls.__name__ for cls in MODELS if cls.config_class.model_type == family.model_type)}."
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "some weights are not loaded (offloaded or on the meta device): upcycle where the model fits."
        )
    if not all(p.is_floating_point() for p in model.parameters()):
        raise ValueError("the weights are quantised: upcycle the original, then quantise the result.")
    difference, tolerance = _install(model, config)
    old = model.config
    if not isinstance(old, CONFIGS[family.model_type]):
        model_type = CONFIGS[family.model_type].model_type
        new = CONFIGS[family.model_type].from_dict(old.to_dict() | {"model_type": model_type})
        new._attn_implementation, new._name_or_path = old._attn_implementation, old._name_or_path
        new.efficient_attention = []
        replace_config(model, old, new)
    model.config.efficient_experts = config.to_dict()
    mark_experts(model.config)
    change_class(model, MODELS[stock], model.config)
    return difference, tolerance


def _install(model: PreTrainedModel, config: ExpertsConfig) -> tuple[float, float]:
    """Put experts in if the outputs stay; (their difference, its tolerance)."""
    expected = _outputs(model)
    tolerance = max(TOLERANCE, 8 * torch.finfo(model.dtype).eps)
    with unchanged_on_error(model):
        install_experts(model, config)
        difference = float((_outputs(model) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not difference <= tolerance:
            raise ValueError(
                f"the outputs differ by {difference:.1e} of the largest, more than {tolerance:.0e}, so it would be another "
                "model; it was left as it was."
            )
    return difference, tolerance


def _outputs(model: Any) -> Tensor:
    """Last hidden states of all stacks on 32 random tokens, as one vector."""
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    last: list[Tensor] = []
    stacks = [stack.module for stack in family_of(model).stacks(model)]
    with torch.no_grad(), eval_mode(model):
        for stack in stacks:
            inputs: dict[str, Any] = {"input_ids": ids}
            if last and stack.config.is_decoder:
                inputs["encoder_hidden_states"] = last[0]
            last.append(stack(**inputs).last_hidden_state)
    return torch.cat([states.float().flatten() for states in last])


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
            status, origin = "initialised", "absent from the source checkpoint"
        tensors[name] = {"status": status, "from": origin, "shape": list(tensor.shape)}
    return tensors
