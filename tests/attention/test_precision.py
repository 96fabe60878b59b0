"""No mechanism computes a part of its output in less precision than its inputs have."""

from __future__ import annotations

import pytest
import torch
from pairs import MAIN, VARIANTS, Pair, each, logits

from hf_efficient.testing import inputs_for


@pytest.fixture
def default_double():
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(torch.float64)
    torch.set_default_dtype(before)


@each([pair for pair in MAIN + VARIANTS if pair.family == "bert" or (pair.family == "gpt2" and pair in MAIN)])
def test_nothing_depends_on_the_default_dtype(pair: Pair, default_double):
    """In a quotient of integers, or a constant, it would be the precision of a model in fp64."""
    model = pair.model().double()
    inputs = inputs_for(model, length=41)
    with pair.patch(model):
        expected = logits(model, inputs)
        default_double()
        assert torch.equal(logits(model, inputs), expected)
