"""Checks of single layers, for models larger than memory: both models' weights stay on the disk and come in layer by layer.

The converted model reads each text with full attention, once. In the sampled layers its mechanism, at exact settings and as
it is, gets the very inputs that full attention got there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.conversion.loading import load_converted, load_stock
from hf_efficient.conversion.offloading import value_of
from hf_efficient.corpus import offline_texts, text_batches
from hf_efficient.evaluation.controls import MeanOfValues, MeanOfValuesConfig
from hf_efficient.evaluation.fidelity import relative_difference
from hf_efficient.evaluation.report import Check, FidelityReport
from hf_efficient.evaluation.tensors import outcome
from hf_efficient.families import AttentionLayer, HostModel, Stack
from hf_efficient.models.provenance import REPORT_NAME, Provenance
from hf_efficient.patching.exact import converted_layers, exact_attention, mechanism_of
from hf_efficient.patching.install import brought_in
from hf_efficient.patching.names import MODULE_NAME

TOLERANCE = 1e-5
WAYS = ("exact settings", "as it is", "mean of values")


def verify_layers(
    converted: Any,
    source: Any,
    texts: Sequence[str] | None,
    count: int,
    length: int | None,
    tokenizer: Any,
    **place: str,
) -> FidelityReport:
    """The report of the checks of `count` layers; arguments as for `verify`.

    Raises:
        ValueError: a model that is loaded already, or reads no texts; and as `sampled_layers`.
    """
    if isinstance(converted, nn.Module) or isinstance(source, nn.Module):
        raise ValueError(f"sample_layers={count} reads checkpoints from the disk: give the folders of both models.")
    with pair_on_disk(converted, source, **place) as (model, stock):
        sampled = sampled_layers(model, count)
        if model.main_input_name != "input_ids":
            raise ValueError(f"{type(model).__name__} reads {model.main_input_name}: leave sample_layers={count} out.")
        limit = HostModel.of(stock).max_positions or 512
        texts = offline_texts() if texts is None else texts
        if not texts:
            raise ValueError("no texts to verify with; hf_efficient.corpus.offline_texts() has some.")
        rows = text_batches(tokenizer, texts, min(length or limit, limit), 1, model)
        equal, weights = equal_tensors(model, stock, sampled)
        checks = [equal, *compare_layers(model, sampled, rows)]
        tokens = sum(row["input_ids"].numel() for row in rows)
        settings = {"source": str(source), "efficient_attention": model.config.efficient_attention}
        settings |= {"texts": len(texts), "tokens": tokens, "dtype": str(model.dtype), "sample_layers": count}
        weights["steps"] = len(Provenance.of(model).history)
    return FidelityReport(checks, settings, weights=weights)


@contextmanager
def pair_on_disk(converted: str | Path, source: str | Path, **place: str) -> Iterator[tuple[Any, Any]]:
    """A converted model and its source, with their weights on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        model: Any = load_converted(converted, Path(folder, "converted"))
        cls = type(model).stock_class
        yield model, load_stock(str(source), model_class=cls, offload_folder=Path(folder, "source"), **place)[0]


def sampled_layers(model: Any, count: int) -> list[tuple[Stack, AttentionLayer]]:
    """`count` of the converted layers, evenly from the first to the last.

    Raises:
        ValueError: a number below 1, or a mechanism that has learned tokens in front of the whole stack.
    """
    if type(count) is not int or count < 1:
        raise ValueError(f"sample_layers={count!r} is not possible; it must be an integer ≥ 1.")
    names = converted_layers(model)
    found = [(stack, layer) for stack in HostModel.of(model).stacks for layer in stack.layers if layer.name in names]
    for _, layer in found:
        mechanism = mechanism_of(layer.module)
        if mechanism.num_extra_tokens(mechanism.config):
            raise ValueError(
                f"{mechanism.config.mechanism} has tokens that run through all layers, which can't be checked one by one: "
                "leave sample_layers out."
            )
    steps = torch.linspace(0, len(found) - 1, min(count, len(found))).round().int().tolist()
    return [found[step] for step in steps]


def equal_tensors(
    model: Any, source: Any, sampled: list[tuple[Stack, AttentionLayer]]
) -> tuple[Check, dict[str, Any]]:
    """Whether the source's tensors are in the converted model bit by bit: those of the sampled layers and of no layer.

    Returns:
        The check, and what it says of the weights, as `copied_tensors`.

    Raises:
        ValueError: the model lacks some of them, as those with experts do.
    """
    rule = (
        "tensors copied from the source are bit-equal, in the sampled layers and outside of layers, unless a recorded "
    )
    rule += "run trained them since"
    report = Provenance.of(model).reports.get(REPORT_NAME) or {}
    entries = report if isinstance(report, dict) else report.to_dict()
    statuses = {name: entry["status"] for name, entry in entries.get("tensors", {}).items()}
    blocks = [_block(stack, layer) for stack in HostModel.of(model).stacks for layer in stack.layers]
    left_out = tuple(set(blocks) - {_block(stack, layer) for stack, layer in sampled})
    names = [n for n in source.state_dict() if statuses.get(n, "copied") == "copied" and not n.startswith(left_out)]
    if lost := sorted(set(names) - set(model.state_dict())):
        raise ValueError(
            f"{type(model).__name__} has others, such as experts, in place of {len(lost)} tensors of its source, e.g. "
            f"{lost[0]}: leave sample_layers out."
        )
    changed = [n for n in names if not _are_equal(value_of(model, n), value_of(source, n))]
    detail = {"compared": len(names), "changed": len(changed), "first": changed[:3]}
    status, weights = outcome(not changed, Provenance.of(model).since(source.config._name_or_path))
    return Check("copied tensors", status, detail, rule), weights


def _are_equal(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours, theirs.to(ours.dtype))


def _block(stack: Stack, layer: AttentionLayer) -> str:
    """The beginning of the names of all tensors of the host's layer."""
    block = stack.block_around(layer) or layer.module
    name = next(name for name, module in stack.module.named_modules() if module is block)
    return f"{stack.name}.{name}.".lstrip(".")


@dataclass
class _Layer:
    """What is measured in one layer: {way: largest relative difference, or squared error and squared norm}."""

    exact: float | None = None
    squares: dict[str, list[float]] = field(default_factory=lambda: {way: [0.0, 0.0] for way in WAYS[1:]})

    def error(self, way: str) -> float:
        error, norm = self.squares[way]
        return float((error / norm) ** 0.5) if norm else float("nan")


@torch.no_grad()
def compare_layers(
    model: Any, sampled: list[tuple[Stack, AttentionLayer]], rows: Sequence[Mapping[str, Tensor]]
) -> list[Check]:
    """The exact limit and the fidelity of the sampled layers, and the control.

    Args:
        rows: inputs of one text each, without padding.
    """
    found = {layer.name: _Layer() for _, layer in sampled}
    length = max(next(iter(row.values())).shape[1] for row in rows)
    handles = [
        layer.module.register_forward_hook(
            _measuring(model, stack, layer, length, found[layer.name]), with_kwargs=True
        )
        for stack, layer in sampled
    ]
    # a layer that is called again must not find its keys in a cache
    uncached = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    try:
        with exact_attention(model):
            for row in rows:
                model(**row, **uncached)
    finally:
        for handle in handles:
            handle.remove()
    exact = {name: layer.exact for name, layer in found.items()}
    known = [value for value in exact.values() if value is not None]
    status = "not applicable" if not known else "passed" if all(v <= TOLERANCE for v in known) else "failed"
    rule = f"at exact settings the output of each sampled layer differs by ≤ {TOLERANCE:g} of the largest"
    checks = [Check("exact limit by layer", status, {"relative_difference": exact}, rule)]
    for way, rule in (
        ("as it is", "‖difference‖ / ‖output‖ of each sampled layer's attention, on the inputs of the source"),
        ("mean of values", "the same where attention carries no information: what the mechanism must be better than"),
    ):
        errors = {name: layer.error(way) for name, layer in found.items()}
        finite = all(error == error for error in errors.values())
        name = "fidelity by layer" if way == "as it is" else f"control by layer: {way}"
        checks.append(Check(name, "measured" if finite else "failed", {"error": errors}, rule))
    return checks


def _measuring(model: Any, stack: Stack, layer: AttentionLayer, length: int, found: _Layer) -> Callable[..., None]:
    """A hook that gives the inputs of full attention to the mechanism of a layer."""
    mechanism, geometry = mechanism_of(layer.module), HostModel.of(model).family.geometry(stack, layer)
    setting = type(mechanism).exact_config(mechanism.config, geometry, length)
    control = MeanOfValues(MeanOfValuesConfig(), mechanism.geometry)

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        expected = _states(output).float()

        def states(of: Any) -> Tensor:
            module._modules[MODULE_NAME] = of
            try:
                return _states(module.forward(*args, **kwargs)).float()
            finally:
                module._modules[MODULE_NAME] = None

        if setting is not None:
            with brought_in(module):
                exact = setting.attention_class(setting, geometry)
                exact.to(dtype=stack.place(layer).dtype).eval()
                exact.host_projection = mechanism.host_projection
                exact.reset_parameters()
                exact.initialise_from(HostModel.of(model).family.pretrained(stack, layer))
            error = relative_difference(states(exact), expected, None)
            found.exact = error if found.exact is None or not error <= found.exact else found.exact
        for way, of in (("as it is", mechanism), ("mean of values", control)):
            found.squares[way][0] += float((states(of) - expected).double().square().sum())
            found.squares[way][1] += float(expected.double().square().sum())

    return compare


def _states(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
