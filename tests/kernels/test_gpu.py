"""The same functions on a CUDA device: outputs and gradients as on the CPU, padding included. Skipped without one."""

from __future__ import annotations

import copy

import pytest
import torch
from pairs import MAIN, Pair, each, labelled

from hf_efficient.testing import assert_close, inputs_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@each(MAIN)
def test_outputs_and_gradients_equal_the_cpu_ones(pair: Pair):
    model = pair.model()
    pair.patch(model)
    inputs = labelled(model, inputs_for(model))
    twin = copy.deepcopy(model).cuda()
    there = twin(**{k: v.cuda() for k, v in inputs.items()})
    here = model(**inputs)
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    assert_close(there.logits.cpu(), here.logits, 1e-4, "logits", where=mask)
    here.loss.backward()
    there.loss.backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if a.grad is not None and a.grad.abs().max() > 1e-6:
            assert_close(b.grad.cpu(), a.grad, 1e-3, name)


@each(MAIN)
def test_bfloat16_is_finite_with_padding(pair: Pair):
    model = pair.model()
    pair.patch(model)
    model = model.to("cuda", torch.bfloat16)
    assert model(**{k: v.cuda() for k, v in inputs_for(model).items()}).logits.isfinite().all()
