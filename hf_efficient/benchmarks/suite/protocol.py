"""One protocol for every mechanism: converted, finetuned, transferred and finetuned, on equal tokens, beside controls.

Batches come from the seed of the step, never of the mechanism. AdamW without weight decay, 10 steps of warm-up, a linear
decay to 0, gradients clipped to 1. *finetuned* sees S steps; *transferred, finetuned* S / 2 of layer-wise transfer and S / 2
of all weights: as many tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.attention.base.pattern import PatternAttention
from hf_efficient.benchmarks.suite.circuits import HEADS, constructed
from hf_efficient.benchmarks.suite.tasks import FIRST_SLOT, SLOTS, Batch, Task, distances, reach
from hf_efficient.conversion.calibrate import calibrate
from hf_efficient.evaluation.cost import mean_keys_per_query
from hf_efficient.families import HostModel
from hf_efficient.patching.exact import converted_layers, mechanism_of
from hf_efficient.patching.temporary import patch_attention
from hf_efficient.profiling.timing import Mark, table_of, timed
from hf_efficient.training.distill_loop import optimizer_of
from hf_efficient.training.transfer.attention_transfer import AttentionTransfer, trainable
from hf_efficient.training.transfer.layer_errors import layer_errors

ENOUGH = 0.995
WARM_UP = 10
DENSE_RATE, DENSE_BETAS = 1e-3, (0.9, 0.98)
# seeds of the batches of each use, plus the seed of the run
VALIDATION, TEST, TUNING, TRANSFER, CALIBRATION = 10_000, 20_000, 1_000, 2_000, 7


@dataclass(frozen=True)
class Budget:
    """Steps S of `batch` rows for every mechanism, at most `dense_steps` of twice as many for the dense model, and `tests`
    batches of 16 rows that are scored."""

    steps: int
    dense_steps: int = 200
    batch: int = 8
    tests: int = 4
    learning_rate: float = 5e-4


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def batches_of(task: Task, seed: int, count: int, use: int = TEST) -> list[Batch]:
    generator = seeded(use + seed)
    return [task.draw(16, generator) for _ in range(count)]


def inputs_of(task: Task, ids: Tensor) -> dict[str, Tensor]:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task.family == "t5":
        inputs["decoder_input_ids"] = torch.arange(FIRST_SLOT, FIRST_SLOT + SLOTS).repeat(len(ids), 1)
    return inputs


def answers(model: Any, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """(questions, vocabulary) logits and (questions,) labels; the head runs where something is asked alone."""
    asked, inputs = batch.labels != -100, inputs_of(task, batch.ids)
    if task.family == "t5":
        return model(**inputs).logits.flatten(0, 1), batch.labels[asked]
    states = model.base_model(input_ids=batch.ids).last_hidden_state[asked]
    return (model.lm_head if task.family == "gpt2" else model.cls)(states), batch.labels[asked]


@torch.no_grad()
def score(model: Any, task: Task, batches: list[Batch]) -> dict[str, Any]:
    """Accuracy, of all questions and by the distance of their nearest evidence: to n / 8, to n / 2, beyond."""
    model.eval()
    right, apart = [], []
    for batch in batches:
        logits, labels = answers(model, task, batch)
        right.append(logits.argmax(-1) == labels)
        apart.append(distances(task, batch))
    found, distance, n = torch.cat(right).float(), torch.cat(apart), task.length
    bins = {"near": distance <= n // 8, "middle": (distance > n // 8) & (distance <= n // 2), "far": distance > n // 2}
    parts = {name: round(float(found[which].mean()), 4) if bool(which.any()) else None for name, which in bins.items()}
    return {"accuracy": round(float(found.mean()), 4), **parts}


# ---- training ----------------------------------------------------------------------------------------------------


def finetune(
    model: Any, task: Task, steps: int, rate: float, seed: int, batch: int, betas: tuple[float, float] = (0.9, 0.999)
) -> Iterator[float]:
    """Train all weights; gives the accuracy on each batch before its step."""
    generator, parameters = seeded(seed), list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, betas=betas)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
        logits, labels = answers(model, task, task.draw(batch, generator))
        F.cross_entropy(logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float((logits.argmax(-1) == labels).float().mean())
    model.eval()


def transfer(model: Any, task: Task, steps: int, seed: int, batch: int) -> None:
    """Train what the mechanisms added to imitate full attention, layer by layer."""
    generator = seeded(seed)
    trainable(model, "mechanism")
    with AttentionTransfer(model):
        optimizer = optimizer_of(model, 0)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            model(**inputs_of(task, task.draw(batch, generator).ids)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.requires_grad_(True).eval()


def dense_model(task: Task, seed: int, budget: Budget) -> Any:
    """The constructed model, trained on the task until it is solved."""
    model, checks = constructed(task, seed), batches_of(task, seed, 1, VALIDATION)
    done = finetune(model, task, budget.dense_steps, DENSE_RATE, seed, 2 * budget.batch, DENSE_BETAS)
    for step, accuracy in enumerate(done, 1):
        if step >= WARM_UP and accuracy >= ENOUGH and score(model, task, checks)["accuracy"] >= ENOUGH:
            break
        model.train()
    return model.eval()


# ---- one row -----------------------------------------------------------------------------------------------------


class Clock:
    """CPU seconds of this process, and tokens, since it was made; `spent` were spent before."""

    def __init__(self, spent: float = 0.0) -> None:
        self.start = time.process_time() - spent

    def stage(self, tokens: int) -> dict[str, float]:
        return {"cpu_s": round(time.process_time() - self.start, 2), "tokens": tokens}


@contextmanager
def converted(dense: Any, task: Task, config: EfficientAttentionConfig | None, seed: int) -> Iterator[Any]:
    """A copy of the dense model with a mechanism, calibrated where it can be; `None` = as it is."""
    model = copy.deepcopy(dense)
    if config is None:
        yield model
        return
    with torch.random.fork_rng([]), patch_attention(model, [config]):
        torch.manual_seed(seed)
        if hasattr(config.attention_class, "calibrate"):
            calibrate(model, [inputs_of(task, task.draw(16, seeded(CALIBRATION + seed)).ids)])
        yield model


def measure(dense: Any, task: Task, config: EfficientAttentionConfig | None, seed: int, budget: Budget) -> Any:
    """One row of the record: every stage of one mechanism; steps of 0 leave the conversion alone."""
    tests, tokens = batches_of(task, seed, budget.tests), budget.steps * budget.batch * task.length
    stages: dict[str, Any] = {}
    with converted(dense, task, config, seed) as model:
        row: dict[str, Any] = {
            "keys_per_query": mean_keys_per_query(model, task.length),
            "time_ratio": 1.0 if config is None else time_ratio(model, dense, task, tests[0]),
            "reach": _reach(model, task, tests),
        }
        stages["dense" if config is None else "converted"] = score(model, task, tests) | {"cpu_s": 0.0, "tokens": 0}
        layers = converted_layers(model)
        learns = any(p.requires_grad for layer in layers.values() for p in mechanism_of(layer).parameters())
        if layers and budget.steps:
            row["layer_error"] = {"converted": _errors(model, task, tests)}
        if budget.steps:
            clock = Clock()
            for _ in finetune(model, task, budget.steps, budget.learning_rate, TUNING + seed, budget.batch):
                pass
            stages["finetuned"] = clock.stage(tokens) | score(model, task, tests)
    if learns and budget.steps:
        with converted(dense, task, config, seed) as model:
            clock, half = Clock(), budget.steps // 2
            transfer(model, task, half, TRANSFER + seed, budget.batch)
            stages["transferred"] = clock.stage(tokens // 2) | score(model, task, tests)
            row["layer_error"]["transferred"] = _errors(model, task, tests)
            clock = Clock(stages["transferred"]["cpu_s"])
            for _ in finetune(model, task, half, budget.learning_rate, TUNING + seed, budget.batch):
                pass
            stages["transferred, finetuned"] = clock.stage(tokens) | score(model, task, tests)
    return row | {"stages": stages}


@torch.no_grad()
def time_ratio(model: Any, dense: Any, task: Task, batch: Batch) -> float | None:
    """CPU time of a pass over one batch, ÷ that of the dense model: the median of three pairs in turn."""
    models = {"dense": dense, "converted": model}
    calls: dict[str, Callable[[Mark], None]] = {name: partial(_pass, one, task, batch) for name, one in models.items()}
    ratio = table_of(timed(calls, 3), "dense")["converted"].get("cpu_ratio")
    return None if ratio is None else round(ratio, 3)


def _pass(model: Any, task: Task, batch: Batch, mark: Mark) -> None:
    answers(model, task, batch)


def _errors(model: Any, task: Task, tests: list[Batch]) -> list[float]:
    found = layer_errors(model, [inputs_of(task, tests[0].ids)])["mechanism"]
    return [round(float(error), 4) for error in found]


def _reach(model: Any, task: Task, tests: list[Batch]) -> float | None:
    """Of mechanisms that are patterns: the share of questions whose evidence the last layer shows to the head that looks."""
    layers = list(converted_layers(model).values())
    mechanism = mechanism_of(layers[-1]) if layers else None
    if not isinstance(mechanism, PatternAttention):
        return None
    place = torch.arange(task.length)
    mask = mechanism.pattern.at_length(task.length).visible_per_head(place[:, None], place[None])
    if mechanism.geometry.is_causal:
        mask = mask & (place <= place[:, None])
    head = HEADS[task.family] if len(mask) > 1 else 0
    return round(reach(task, tests, mask[head]), 4)


def geometry_of(model: Any) -> Any:
    """Of the last layer of the stack that is converted: the one that looks things up."""
    host = HostModel.of(model)
    stack = host.stacks[0]
    return host.family.geometry(stack, stack.layers[-1])
