"""What one mechanism does in one call beside what the host's own attention does there: the hooks, and errors by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.evaluation.controls import MeanOfValues, MeanOfValuesConfig
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.dense import exact_attention
from hf_efficient.patching.dispatch import aligned_call
from hf_efficient.patching.downsampling import FullLength
from hf_efficient.patching.exact import converted_layers, eval_mode, mechanism_of
from hf_efficient.patching.names import MODULE_NAME
from hf_efficient.training.transfer.losses import relative_parts


@dataclass
class LayerCall:
    """One call of one mechanism, without extra global tokens: what went in, what came out, and what should have.

    Attributes:
        mechanism: the module that was called.
        query, key, value, context: its arguments; rows are aligned as the mechanism wants them.
        student, teacher: (B, H, N, D) its output, and that of full attention, or of the host's own window, on the same
            arguments.
    """

    mechanism: Any
    query: Tensor
    key: Tensor
    value: Tensor
    context: AttentionContext
    student: Tensor
    teacher: Tensor

    @property
    def real(self) -> Tensor | None:
        """(B, N) real queries; `None` = all."""
        keep = self.context.key_padding_mask
        return None if keep is None else keep[:, keep.shape[1] - self.query.shape[2] :]


def watch(mechanism: Any, observe: Callable[[LayerCall], None], learns: Callable[[], bool]) -> list[Any]:
    """Hooks: call `observe` for every call of `mechanism`, and hand the teacher's output on in place of its own.

    Gradients are recorded inside the mechanism alone, where `learns()`; extra global tokens have no teacher, and pass on as
    the mechanism made them. A layer that runs on fewer tokens runs on all of them. Returns the handles that undo all this.
    """

    def enter(module: nn.Module, args: Any) -> None:
        torch.set_grad_enabled(learns())

    def leave(module: Any, args: Any, output: Tensor | None) -> Tensor | None:
        try:
            if output is None:  # it raised
                return None
            call, extra = _call(module, args, output)
            observe(call)
            rows = call.teacher.to(output.dtype)
            return torch.cat([output[:, :, :extra].detach(), rows], dim=2) if extra else rows
        finally:
            torch.set_grad_enabled(False)

    hooks = mechanism.register_forward_pre_hook(enter), mechanism.register_forward_hook(leave, always_call=True)
    return [*hooks, FullLength(mechanism)]


def _call(
    mechanism: Any, args: tuple[Tensor, Tensor, Tensor, AttentionContext], output: Tensor
) -> tuple[LayerCall, int]:
    extra = mechanism.num_extra_tokens(mechanism.config)
    query, key, value, student = (x[:, :, extra:] for x in (*args[:3], output))
    context = args[3]
    keep = context.key_padding_mask
    context = dataclasses.replace(context, dropout=0.0, key_padding_mask=None if keep is None else keep[:, extra:])
    with torch.no_grad():
        teacher = exact_attention(query, key, value, context, mechanism.geometry.sliding_window)
    return LayerCall(mechanism, query, key, value, context, student, teacher), extra


def is_mechanism(name: str) -> bool:
    """Whether a module of this qualified name is (part of) a mechanism."""
    return MODULE_NAME in name.split(".")


@torch.no_grad()
def layer_errors(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """How far each converted layer is from the unconverted one on the same q, k, v, beside what controls reach there.

    An error is ‖ŷ - y‖ / ‖y‖ over the real positions of all batches, on the heads' outputs before the output projection,
    every layer seeing the states that full attention in all layers before makes. Controls: "mean of values", attention that
    weighs all visible keys alike; and where a mechanism names one (`control_config`), "window only", what is left of it
    without its learned part. A figure says something only beside these. O(N²) time.

    Returns:
        {"layers": names, "mechanism": errors, "mean of values": errors}, and if any layer has it "window only": errors, with
        `None` for layers without.

    Raises:
        ValueError: no converted layer, or an attention transfer is active.
    """
    layers = {name: mechanism_of(layer) for name, layer in converted_layers(model).items()}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no converted layer.")
    if "_attention_transfer" in model.__dict__:
        raise ValueError("an attention transfer of this model is active: leave it before measuring its layers.")
    controls = {name: _controls(mechanism) for name, mechanism in layers.items()}
    sums = {name: {kind: [0.0, 0.0] for kind in ("mechanism", *controls[name])} for name in layers}

    def observe(name: str, call: LayerCall) -> None:
        outputs = {"mechanism": call.student}
        for kind, control in controls[name].items():
            # a control may need rows that start at the left edge where the mechanism does not
            context = dataclasses.replace(call.context)
            outputs[kind] = aligned_call(control.to(call.query.device), call.query, call.key, call.value, context)
        for kind, output in outputs.items():
            for place, part in enumerate(relative_parts(output, call.teacher, call.real)):
                sums[name][kind][place] += float(part)

    handles = [
        handle
        for name, mechanism in layers.items()
        for handle in watch(mechanism, lambda call, name=name: observe(name, call), lambda: False)  # type: ignore[misc]
    ]
    try:
        with eval_mode(model):
            device = next(model.parameters()).device
            for batch in batches:
                moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                model(**moved, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    kinds = list(dict.fromkeys(kind for found in sums.values() for kind in found))
    return {"layers": list(layers)} | {kind: [_error(found.get(kind)) for found in sums.values()] for kind in kinds}


def _controls(mechanism: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"mean of values": MeanOfValues(MeanOfValuesConfig(), mechanism.geometry)}
    config = mechanism.control_config(mechanism.config)
    if config is not None:
        found["window only"] = config.attention_class(config, mechanism.geometry)
    return found


def _error(sums: list[float] | None) -> float | None:
    return None if sums is None else (sums[0] / sums[1]) ** 0.5 if sums[1] else 0.0
