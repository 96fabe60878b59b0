"""Whole patterns through `implementation="triton"`, in Triton's interpreter; `test_kernels.py` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_efficient as he
from hf_efficient.kernels.block_sparse_op import block_sparse
from hf_efficient.kernels.configs import interpreting
from hf_efficient.ops.block_sparse.attention import block_sparse_attention, reference_attention
from hf_efficient.ops.context import AttentionCall
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.ops.softmax import with_sinks
from hf_efficient.patterns.kinds import BlockWindow, GlobalColumns, GlobalRows, Strided, Summary, Window
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.random_blocks import BigBirdBlocks
from hf_efficient.patterns.sets import PerHead
from hf_efficient.testing import assert_close, inputs_for, tiny_model

assert interpreting(), "run by test_kernels.py"

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HEADS, WIDTH, LENGTH, REACH = 4, 16, 61, 5
BIGBIRD = BigBirdBlocks(
    block_size=8, num_random_blocks=1, seed=0, layer=0, heads=HEADS, is_causal=False, length=LENGTH
)
NEAR = Window(left=30, right=12)
PATTERNS: dict[str, Pattern] = {
    "dilated": Window(left=3, right=3, dilation=3),
    "strided": Window(left=6, right=6) | Strided(stride=7),
    "fixed": BlockWindow(block_size=10) | Summary(stride=10, size=1),
    "mixed heads": PerHead(
        parts=(Window(left=2, right=2), Strided(stride=3), Window(left=2, right=2), BlockWindow(block_size=16))
    ),
    "global in a window": (Window(left=8, right=8) | GlobalColumns(positions=(0, 1)) | GlobalRows(positions=(0, 1)))
    & NEAR,
    "random blocks in a window": BIGBIRD & NEAR,
}


@pytest.mark.parametrize("form", ["plain", "bias"])
@pytest.mark.parametrize("name", PATTERNS)
def test_pieces_equal_the_definition(name: str, form: str, monkeypatch: pytest.MonkeyPatch):
    """Folded strides, summaries as extra keys and heads in groups, merged exactly; every gradient, that of the bias too.

    Heads of queries share those of keys, which nothing repeats; without a bias logits are capped.
    """
    query = torch.randn(2, HEADS, LENGTH, WIDTH)
    key, value = torch.randn(2, 2, HEADS // 2, LENGTH, WIDTH)
    table, sinks = torch.randn(2 * REACH + 1, HEADS), torch.randn(HEADS)
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    keep[1, 40:] = False
    weight = torch.randn(2, HEADS, LENGTH, WIDTH)

    def run(function, dtype: torch.dtype, **options):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value, sinks, table)]
        facts: dict[str, Any] = dict(softcap=1.5)
        if form == "bias":
            facts = dict(relative_bias=RelativeBias(leaves[4], lambda o: o.clamp(-REACH, REACH) + REACH, REACH))
        call = AttentionCall(is_causal=False, scaling=WIDTH**-0.5, key_padding_mask=keep, **facts)
        out = with_sinks(*function(*leaves[:3], PATTERNS[name], call, return_lse=True, **options), leaves[3])
        return out, *torch.autograd.grad((out * weight).sum(), leaves if form == "bias" else leaves[:4])

    expected = run(reference_attention, torch.float64)
    for module in ("softmax", "block_sparse.decompose"):
        monkeypatch.setattr(f"hf_efficient.ops.{module}.expand_heads", None)  # calling it raises
    actual = run(block_sparse_attention, torch.float32, implementation="triton")
    for x, y in zip(actual, expected, strict=True):
        assert_close(x.double(), y.double(), 2e-5, name)


@pytest.mark.parametrize("mechanism, options", [("bigbird", dict(block_size=8)), ("local", dict(attention_window=8))])
def test_models_run_on_the_kernels(mechanism: str, options: dict):
    """Rows of different lengths, whose random blocks differ; the explicit choice is saved with the config."""
    model = tiny_model("bert", hidden_size=64, layers=1)
    inputs = inputs_for(model, length=40)
    logits = []
    for implementation in ("torch", "triton"):
        with he.patch_attention(model, mechanism, implementation=implementation, **options), torch.no_grad():
            logits.append(model(**inputs).logits)
    assert_close(logits[1], logits[0], 1e-4, where=inputs["attention_mask"])
    assert not torch.equal(*logits), "the kernels did not run"


def test_second_derivatives_are_refused():
    query = torch.randn(1, 1, 20, 16, requires_grad=True)
    out, _ = block_sparse(query, query, query, pattern=Window(left=3, right=3), scaling=0.25)
    (gradient,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


def test_a_transposed_bias_gets_the_gradient_that_was_promised():
    """What the compiler assumes of the gradient's strides is what comes back."""
    bias = torch.randn(5, 2).t().requires_grad_()
    query = torch.randn(1, 2, 20, 16)
    spec = Window(left=3, right=3).spec()
    arguments = (query, query, query, None, bias, *[None] * 4, spec, 0.25, True, 0)
    torch.library.opcheck(torch.ops.hf_efficient.block_sparse_forward.default, arguments)
