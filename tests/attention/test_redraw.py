"""Performer's features: the same everywhere for a seed, new ones only when asked for, between optimiser steps."""

from __future__ import annotations

import copy

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

import hf_efficient as he
from hf_efficient.testing import inputs_for, tiny_model
from hf_efficient.training import RedrawFeatures


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
        RedrawFeatures().on_step_end(arguments, state, control, model=model)
        RedrawFeatures.redraw(twin, step)
        after = features(model)
        changed.append(not torch.equal(before[0], after[0]))
        assert all(torch.equal(a, b) for a, b in zip(after, features(twin), strict=True))
        before = after
    assert changed == [False, True, False, True]
    assert RedrawFeatures.redraw(converted(interval=0), 2) == 0


def test_a_redrawn_model_reloads_as_it_is(tmp_path):
    model = converted(interval=1).eval()
    inputs = inputs_for(model)
    start = model(**inputs).logits
    RedrawFeatures.redraw(model, 1)
    redrawn = model(**inputs).logits
    assert not torch.allclose(start, redrawn)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, redrawn)
    RedrawFeatures.redraw(model, 2)
    RedrawFeatures.redraw(loaded, 2)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
