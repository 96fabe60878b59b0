"""What mechanisms do between optimiser steps, and Performer's features: the same everywhere for a seed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import hf_efficient as he
from hf_efficient.testing import inputs_for, tiny_model
from hf_efficient.training import MechanismCallback


def features(model) -> list[torch.Tensor]:
    return [m.features.clone() for m in model.modules() if isinstance(m, he.PerformerAttention)]


def converted(interval: int, seed: int = 0):
    return he.convert(tiny_model("bert"), "performer", num_features=16, redraw_interval=interval, seed=seed).model


def test_features_depend_on_seed_and_layer_alone():
    one, other, reseeded = converted(0), converted(0), converted(0, seed=1)
    for a, b, c in zip(features(one), features(other), features(reseeded), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    first, second = features(one)
    assert not torch.equal(first, second)


def test_callback_redraws_at_the_interval_and_every_process_alike(tmp_path):
    model = converted(interval=2)
    twin = copy.deepcopy(model)
    arguments, state, control = TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl()
    before = features(model)
    changed = []
    for step in range(1, 5):
        state.global_step = step
        MechanismCallback().on_step_end(arguments, state, control, model=model)
        MechanismCallback.step(twin, step)
        after = features(model)
        changed.append(not torch.equal(before[0], after[0]))
        assert all(torch.equal(a, b) for a, b in zip(after, features(twin), strict=True))
        before = after
    assert changed == [False, True, False, True]


def test_features_stay_without_an_interval():
    model = converted(interval=0)
    before = features(model)
    for step in range(1, 4):
        MechanismCallback.step(model, step)
    assert all(torch.equal(a, b) for a, b in zip(before, features(model), strict=True))


def test_any_mechanism_takes_part_in_training(monkeypatch, tmp_path):
    """What a mechanism does between steps and what it logs needs no callback of its own."""
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(
        he.LocalAttention, "after_optimizer_step", lambda self, step: steps.append((self.geometry.layer, step))
    )
    monkeypatch.setattr(
        he.LocalAttention, "training_logs", lambda self: {"layers_above": torch.tensor(self.geometry.layer + 1.0)}
    )
    model = he.convert(tiny_model("bert"), "local", attention_window=8).model
    rows = [{"input_ids": torch.arange(5, 25), "labels": torch.arange(5, 25)} for _ in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[MechanismCallback()])
    trainer.train()
    assert steps == [(0, 1), (1, 1), (0, 2), (1, 2)]
    logged = [entry["layers_above"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [3.0, 3.0]


def test_a_redrawn_model_reloads_as_it_is(tmp_path):
    model = converted(interval=1).eval()
    inputs = inputs_for(model)
    start = model(**inputs).logits
    MechanismCallback.step(model, 1)
    redrawn = model(**inputs).logits
    assert not torch.allclose(start, redrawn)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, redrawn)
    MechanismCallback.step(model, 2)
    MechanismCallback.step(loaded, 2)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("callbacks", [[], [MechanismCallback()]])
@pytest.mark.parametrize(
    "options",
    [dict(mechanism="performer", redraw_interval=2), dict(mechanism="routing_transformer", ema_decay=0.5)],
)
def test_training_without_the_callback_says_that_nothing_moves(
    options: dict[str, Any], callbacks: list[Any], logged: list[str]
):
    """Once per layer; with it nothing is said, however many calls make a step."""
    model = tiny_model("bert").train()
    inputs = inputs_for(model)
    he.patch_attention(model, options)
    for callback in callbacks:
        callback.on_train_begin(None, None, None, model=model)
    for _ in range(5):
        model(**inputs)
    found = [text for text in logged if "nothing has moved" in text]
    assert len(found) == (0 if callbacks else model.config.num_hidden_layers)
    assert all("MechanismCallback" in text for text in found)
