"""The guard against divergence: every layer keeps the best that it has ever been."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_efficient.patching.exact import converted_layers, eval_mode, mechanism_of

if TYPE_CHECKING:
    from hf_efficient.training.transfer.attention_transfer import AttentionTransfer

FILE = "keep_best.pt"
WHOLE = "model"


class KeepBest(TrainerCallback):
    """Measures an active transfer now and then, and gives each layer the best parameters it had, the start included.

    With losses per layer the layers are independent, so that one that diverges costs no other as long as its loss is finite
    (`StopOnNonFiniteLoss` ends the whole run otherwise); layers that share parameters are judged together, by the mean of
    their losses. With losses end to end the whole model is one layer, named "model". A loss that is no number is never the
    best.

    As a callback of the Trainer it measures every `every` steps and at the end, restores at the end, and writes what it
    knows into every checkpoint. In another loop call `update()` and at the end `restore()`; it has `state_dict` and
    `load_state_dict`, so `accelerator.register_for_checkpointing(keep_best)` makes it part of the state.

    Args:
        transfer: an active transfer; measured once right here.
        batches: keyword arguments of the model each; the same ones every time.
        every: steps between two measurements; 0 = only at the end.

    Raises:
        ValueError: no batches, or a transfer that is not active.
    """

    def __init__(self, transfer: AttentionTransfer, batches: Iterable[Mapping[str, Any]], every: int = 0):
        self.transfer, self.batches, self.every = transfer, list(batches), every
        if not self.batches:
            raise ValueError("no batches to measure layers on.")
        self.groups = self._independent_groups() if transfer.is_local else [[WHOLE]]
        self.best = [math.inf] * len(self.groups)
        self.values: list[dict[str, Tensor]] = [self._copy(group) for group in self.groups]
        self.update()

    def measure(self) -> dict[str, float]:
        """{layer: mean loss over the batches}, with today's parameters and without dropout."""
        model, transfer = self.transfer.model, self.transfer
        names = transfer.layers if transfer.is_local else [WHOLE]
        device = next(model.parameters()).device
        total: Any = 0.0
        with torch.no_grad(), eval_mode(model):
            for batch in self.batches:
                output = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
                if not hasattr(output, "layer_loss"):
                    raise ValueError("the transfer is not active: use KeepBest inside its `with` block.")
                losses = output.layer_loss if transfer.is_local else output.loss.view(1)
                total = total + losses.double().cpu()
        return dict(zip(names, (total / len(self.batches)).tolist(), strict=True))

    def update(self) -> dict[str, float]:
        """Measure, and keep the parameters of the layers that are better than ever. Returns the losses by layer."""
        losses = self.measure()
        for index, group in enumerate(self.groups):
            loss = sum(losses[name] for name in group) / len(group)
            if loss < self.best[index]:
                self.best[index], self.values[index] = loss, self._copy(group)
        return losses

    @torch.no_grad()
    def restore(self) -> None:
        """Give every layer its best parameters."""
        for group, values in zip(self.groups, self.values, strict=True):
            for name, parameter in self._parameters(group).items():
                parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = [set(values) for values in self.values]
        if [set(values) for values in state["values"]] != names:
            raise ValueError("this state is of a transfer of other layers or mechanisms.")
        self.best, self.values = list(state["best"]), [dict(values) for values in state["values"]]

    def load(self, checkpoint: str | Path) -> None:
        """Go on from what a checkpoint of the Trainer holds."""
        self.load_state_dict(torch.load(Path(checkpoint) / FILE, map_location="cpu", weights_only=True))

    def _independent_groups(self) -> list[list[str]]:
        groups: list[tuple[set[int], list[str]]] = []
        for name in self.transfer.layers:
            ids, names = {id(p) for p in self.transfer.parameters(name)}, [name]
            for group in [g for g in groups if g[0] & ids]:
                groups.remove(group)
                ids, names = ids | group[0], group[1] + names
            groups.append((ids, names))
        return [names for _, names in groups]

    def _parameters(self, group: list[str]) -> dict[str, Any]:
        if group == [WHOLE]:
            return {name: p for name, p in self.transfer.model.named_parameters() if p.requires_grad}
        layers = converted_layers(self.transfer.model)
        found = {f"{name}.{own}": p for name in group for own, p in mechanism_of(layers[name]).named_parameters()}
        return {name: p for name, p in found.items() if p.requires_grad}

    def _copy(self, group: list[str]) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self._parameters(group).items()}

    # ---- as a callback -------------------------------------------------------------------------------------------

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self.update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.state_dict(), folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update()
        self.restore()
