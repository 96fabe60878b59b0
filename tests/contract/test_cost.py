"""Cost as claimed: at 4 × the length, the largest tensor and the FLOPs grow ≤ 4.5 × (n √n: ≤ 9 ×), forward and backward."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import CASES
from pairs import MAIN, Pair, each, labelled
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_efficient.profiling.counters import LargestTensor, flops
from hf_efficient.testing import inputs_for

SHORT, LONG = 256, 1024
ALLOWED = 4.5
SLACK = ALLOWED / 4


def _inputs(pair: Pair, model: Any, length: int) -> dict[str, torch.Tensor]:
    """Two rows, one padded; in T5 the stack that stays exact, and with it cross-attention, gets a few tokens only."""
    inputs = inputs_for(model, batch=2, length=length)
    if pair.family != "t5":
        return labelled(model, inputs)
    other = "decoder_" if pair.side == "encoder" else ""
    inputs[f"{other}input_ids"] = inputs[f"{other}input_ids"][:, :8]
    inputs[f"{other}attention_mask"] = torch.ones(2, 8, dtype=torch.long)
    return inputs | {"labels": inputs["decoder_input_ids"].flip(1)}


def _cost(pair: Pair, length: int, patched: bool) -> tuple[int, int]:
    """(elements of the largest tensor, FLOPs) of one training step."""
    model = pair.model(layers=1, positions=LONG)
    inputs = _inputs(pair, model, length)
    config = pair.config
    if "max_length" in pair.options:
        config = dataclasses.replace(config, max_length=LONG)
    if (options_at := CASES[pair.mechanism].options_at) is not None:
        config = dataclasses.replace(config, **options_at(length))

    def step() -> None:
        model(**inputs).loss.backward()

    # the fused kernels hide their products from both recorders
    with sdpa_kernel(SDPBackend.MATH), pair.patch(model, config) if patched else nullcontext():
        with LargestTensor() as recorder:
            work = flops(step)
        return recorder.numel, work


def _growth(pair: Pair, patched: bool) -> tuple[float, float]:
    short, long = (_cost(pair, length, patched) for length in (SHORT, LONG))
    return long[0] / short[0], long[1] / short[1]


@each(MAIN, of="attention")
def test_cost_grows_as_claimed(pair: Pair):
    allowed = SLACK * CASES[pair.mechanism].growth
    memory, work = _growth(pair, patched=True)
    assert memory <= allowed, f"largest tensor grows {memory:.1f} ×"
    assert work <= allowed, f"FLOPs grow {work:.1f} ×"


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_full_attention_fails_both_bounds(family: str):
    """So that the test above can fail."""
    pair = next(pair for pair in MAIN if pair.family == family)
    memory, work = _growth(pair, patched=False)
    assert memory > 2 * ALLOWED, f"{memory:.1f}"
    assert work > ALLOWED, f"{work:.1f}"
