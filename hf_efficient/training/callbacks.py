"""Trainer callbacks of converted models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import ExportableState

from hf_efficient.attention.base import EfficientAttention
from hf_efficient.experts.layer import expert_layers


class MechanismCallback(TrainerCallback):
    """Let every mechanism do what it does between optimiser steps, and put what it reports into the training log.

    That is `EfficientAttention.after_optimizer_step` and `training_logs`: random features are drawn anew, centroids move, a
    compression reports its loss. In a loop without a Trainer call `step(model, step)` after each optimiser step, in every
    process. What is logged is process 0's own, of the last step.
    """

    def __init__(self) -> None:
        self.figures: dict[str, torch.Tensor] = {}

    @staticmethod
    def step(model: nn.Module, step: int) -> None:
        """After optimiser step `step`, counted from 1."""
        for mechanism in mechanisms_of(model):
            mechanism.is_told_of_steps = True
            mechanism.after_optimizer_step(step)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for mechanism in mechanisms_of(model):
            mechanism.is_told_of_steps = True

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.step(model, state.global_step)
        self.figures = {}
        for mechanism in mechanisms_of(model):
            for name, figure in mechanism.training_logs().items():
                self.figures[name] = self.figures.get(name, 0) + figure

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            figures = {name: float(figure) for name, figure in self.figures.items()}
            logs.update(figures)
            # the history was written before callbacks are asked
            state.log_history[-1].update(figures)


def mechanisms_of(model: nn.Module) -> list[EfficientAttention]:
    """The mechanisms installed in `model`, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, EfficientAttention)]


class LogRouting(TrainerCallback):
    """Put what the routers did in the last batch before each log beside the training loss, in the Trainer's log history.

    `router_balance` and `router_z` are means over the sparse layers, without coefficients; `expert_dropped` is the largest
    share of assignments that a layer dropped, `expert_load_max` and `expert_load_min` are the largest and the least share
    that an expert was chosen for (even: 1 / E), and `expert_load` has all of them by layer. Of process 0's own batch.
    Reporters that the Trainer adds by itself, such as TensorBoard, are called before; give them after this one.
    """

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        routings = [r for layer in expert_layers(model).values() if (r := layer.routing) is not None]
        if not routings or not logs or "loss" not in logs:
            return
        balance, z, load, dropped = (torch.stack(figures).float().cpu() for figures in zip(*routings, strict=True))
        figures = {
            "router_balance": balance.mean().item(),
            "router_z": z.mean().item(),
            "expert_dropped": dropped.max().item(),
            "expert_load_max": load.max().item(),
            "expert_load_min": load.min().item(),
        }
        logs.update(figures)
        # the history was written before callbacks are asked
        state.log_history[-1].update(figures, expert_load=load.tolist())


class NonFiniteLoss(RuntimeError):
    """Training met a loss or a gradient that is no finite number."""


class StopOnNonFiniteLoss(TrainerCallback):
    """Stop at the first step whose loss or gradient is infinite or NaN, before its update is applied or anything is saved.

    The weights are still those of the step before, and the last complete checkpoint is untouched. With several processes
    gradients are already averaged, so all of them stop at the same step.

    Raises:
        NonFiniteLoss: names the step and what to do.
    """

    def __init__(self) -> None:
        self.loss: Any = 0.0
        self.hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.loss = torch.zeros((), device=next(model.parameters()).device)
        self.hook = model.register_forward_hook(self._note_loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.remove()

    def _note_loss(self, model: Any, inputs: Any, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else None
        if model.training and loss is not None:
            self.loss = self.loss + loss.detach().float().mean()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        loss, self.loss = float(self.loss), torch.zeros_like(self.loss)
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            self.hook.remove()
            raise NonFiniteLoss(
                f"step {state.global_step + 1}: the loss is {loss} and the gradient's norm {float(norm)}. Nothing of this "
                "step was kept, and the last checkpoint is good. Start anew with a lower --learning_rate, more "
                "--warmup_steps, or without --bf16."
            )


class KeepRandomState(TrainerCallback):
    """Give training the random state back that an evaluation in its midst used up.

    Every evaluation loader draws a seed from PyTorch's global generator; with this callback dropout is the same whether and
    whenever the run is evaluated.
    """

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate:
            self.state = torch.random.get_rng_state()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.state is not None:
            torch.random.set_rng_state(self.state)
            self.state = None


class NothingLeft(Exception):
    """The checkpoint that training would go on from is the last one."""


class FirstStep(TrainerCallback, ExportableState):
    """What comes between the Trainer's preparations and the first step, and how long all steps take from there on.

    A model that is evaluated before the Trainer prepared it for training is prepared for evaluation alone, and is never
    wrapped for several processes after that: each would train a model of its own. So evaluation waits until here. The
    seconds are part of every checkpoint, so those of a resumed run are the sum over its parts.

    Args:
        seed: of training, whatever was drawn so far; a checkpoint's random state comes after it.
        evaluate: called before the first step.

    Raises:
        NothingLeft: all steps are done. The Trainer would take one more; what it resumes from is loaded by now.
    """

    def __init__(self, seed: int, evaluate: Callable[[], None] | None = None):
        self.seed, self.evaluate = seed, evaluate
        self.earlier, self.began = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.earlier = state.stateful_callbacks[type(self).__name__]["attributes"]["earlier"]
        self.began = time.perf_counter()
        if state.global_step >= state.max_steps:
            raise NothingLeft
        if self.evaluate is not None:
            self.evaluate()
        set_seed(self.seed)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # full attention needs more than what is trained
        self.began = time.perf_counter()

    def seconds(self) -> float:
        """Of training, evaluations and saves on the way included."""
        return self.earlier + (time.perf_counter() - self.began if self.began else 0.0)

    def state(self) -> dict[str, Any]:
        return {"args": {"seed": self.seed}, "attributes": {"earlier": self.seconds()}}
