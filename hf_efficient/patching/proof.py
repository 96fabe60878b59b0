"""A model whose family was found by introspection is compared with itself before it counts as converted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_efficient.attention.base.registry import attention_configs
from hf_efficient.families import HostModel
from hf_efficient.families.probe import probe_inputs, real_part, token_outputs
from hf_efficient.patching.install import implementations, install, plan, uninstall

WIDE, NARROW = 2**14, 4
"""Windows that are at least twice as long as any probe, and too small for all."""
ROUNDING = 100
"""Times the machine's precision that outputs may differ by; more only if the model's own implementations do."""


def prove(host: HostModel) -> None:
    """Compare a stock model with itself: exact windows in all layers, small ones, a future token, a padded row.

    The model is the same afterwards. Costs five forward passes of two short rows.

    Raises:
        ValueError: what differs, or does not run, and what was found in the model.
    """
    model, before = host.model, implementations(host.model)
    found = ", ".join(
        f"{len(stack.layers)} {stack.side} layers in {stack.name or 'the model'}" for stack in host.stacks
    )
    try:
        with _still(model):
            reason = _difference(host)
    except Exception as error:
        text = " ".join(str(error).split())
        reason = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
    if reason is not None:
        raise ValueError(
            f"{host.family.model_type} has no model family of its own, and what was found in this model ({found}) could not "
            f"be proved: {reason}"
        )


def _difference(host: HostModel) -> str | None:
    """What speaks against the family, or `None`."""
    model, before = host.model, implementations(host.model)
    inputs = probe_inputs(model)
    reference = _run_with(model, before, "eager", inputs)
    scale = reference.abs().max().clamp(min=1e-30)
    allowed = ROUNDING * torch.finfo(next(model.parameters()).dtype).eps
    other = None
    if model._supports_sdpa:
        other = _run_with(model, before, "sdpa", inputs)
        allowed = max(allowed, 10 * _relative(other, reference, inputs, scale))
    later = _with_other_last(inputs)
    with _window(host, WIDE):
        exact = _run(model, inputs)
        future = None if later is None else _run(model, later)
    with _window(host, NARROW):
        small = _run(model, inputs)
    error, change = _relative(exact, reference, inputs, scale), _relative(small, reference, inputs, scale)
    if not error <= allowed:
        return f"with windows over all tokens it differs from its eager form by {error:.1e} (at most {allowed:.0e})."
    if not change > 10 * error:
        return "small windows changed nothing, so its attention was not replaced."
    causal = any(host.family.is_causal(stack, layer) for stack in host.stacks for layer in stack.layers)
    if causal and future is not None and future.shape == exact.shape and exact.dim() == 3:
        seen = ((future - exact)[:1, :-1].abs().max() / scale).item()
        if not seen <= allowed:
            return f"a change of the last token changed outputs before it by {seen:.1e}."
    return None


def _with_other_last(inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    if name not in inputs:
        return None
    changed = inputs[name].clone()
    changed[:, -1] = changed[:, -2]
    return inputs | {name: changed}


def _relative(output: Tensor, reference: Tensor, inputs: dict[str, Tensor], scale: Tensor) -> float:
    if output.shape != reference.shape:
        return float("inf")
    return ((real_part(output, inputs) - real_part(reference, inputs)).abs().max() / scale).item()


def _run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # some models draw noise in every forward pass
    return token_outputs(model(**inputs))


def _run_with(model: Any, before: list[tuple[Any, str]], implementation: str, inputs: dict[str, Tensor]) -> Tensor:
    for config, _ in before:
        config._attn_implementation = implementation
    return _run(model, inputs)


@contextmanager
def _window(host: HostModel, size: int) -> Iterator[None]:
    before = implementations(host.model)
    side = "both" if len({stack.side for stack in host.stacks}) == 2 else host.stacks[0].side
    install(host, plan(host, attention_configs("local", attention_window=size, side=side)))
    try:
        yield
    finally:
        uninstall(host, before)


@contextmanager
def _still(model: Any) -> Iterator[None]:
    """Inside, nothing is trained, dropped out, or taken from the program's random numbers."""
    modes = {module: module.training for module in model.modules()}
    devices = [next(model.parameters()).device] if next(model.parameters()).is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
