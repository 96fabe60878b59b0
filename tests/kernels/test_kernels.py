"""The Triton kernels without a GPU: in Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import CASES, inputs_of, relative
from torch.nn.attention.flex_attention import flex_attention

from hf_efficient.kernels import block_sparse_op as library
from hf_efficient.kernels import flex as flex_module
from hf_efficient.kernels.flex import flex
from hf_efficient.ops.block_sparse.attention import block_sparse_attention, reference_attention
from hf_efficient.ops.context import AttentionCall
from hf_efficient.patterns.kinds import GlobalColumns, Window
from hf_efficient.testing import assert_close

SUITES = Path(__file__).parent
RESULTS = "test_results_and_every_gradient_equal_the_definition"


@pytest.mark.parametrize(
    "files, part",
    [(["interpreter_suite.py"], RESULTS), (["interpreter_suite.py", "decomposition_suite.py"], f"not {RESULTS}")],
    ids=["results", "operators and decomposition"],
)
def test_interpreter_suite(files: list[str], part: str):
    """In two processes, each of which imports everything: about as long as one another."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-k", part]
    command = [sys.executable, "-m", "pytest", *options, *[str(SUITES / file) for file in files]]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def test_kernels_are_imported_with_their_first_call():
    code = "import sys, hf_efficient.kernels.block_sparse_op\n"
    code += "print([m for m in sys.modules if m.endswith('kernels.block_sparse')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_cpu_tensors_are_refused_without_the_interpreter():
    query = torch.randn(1, 2, 20, 16)
    with pytest.raises(ValueError, match="CUDA tensors, got cpu ones; use implementation='torch'"):
        library.block_sparse(query, query, query, pattern=Window(left=1, right=1), scaling=1.0)
    spec = Window(left=1, right=1).spec()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        torch.ops.hf_efficient.block_sparse_forward(query, query, query, *[None] * 6, spec, 1.0, False, 0)


@pytest.mark.parametrize("case", [c for c in CASES if c.positions is None and c.segments is None], ids=str)
def test_flex_block_masks_are_the_pattern(case, monkeypatch):
    """FlexAttention's own definition over our block mask; compiling it is a matter for GPUs."""
    monkeypatch.setattr(flex_module, "_compiled", lambda: flex_attention)
    inputs = inputs_of(case)
    query, key, value, *bias = inputs.tensors
    table = bias[0] if bias else None
    options = dict(scaling=case.width**-0.5, is_causal=case.is_causal, query_offset=case.more, softcap=case.softcap)
    out = flex(query, key, value, pattern=case.pattern, keep=inputs.keep, bias=table, **options)
    call = AttentionCall(key_padding_mask=inputs.keep, relative_bias=relative(table), **options)
    expected = reference_attention(query, key, value, case.pattern, call)
    assert_close(out, expected, 1e-5)


def test_flex_refuses_what_it_cannot_do():
    query, bias = torch.randn(1, 2, 20, 16), torch.zeros(2, 5)
    call = dict(pattern=Window(left=1, right=1), scaling=1.0)
    for tensor, options, message in (
        (query.double(), {}, "float64"),
        (query, dict(bias=bias.clone().requires_grad_()), "no fixed order"),
        (query, dict(bias=bias[:, :4]), "2R \\+ 1"),
        (query.clone().requires_grad_(), {}, "no gradients on the CPU"),
    ):
        with pytest.raises(ValueError, match=message):
            flex(tensor, tensor, tensor, **call, **options)


def test_flex_is_an_implementation(monkeypatch):
    """By name through the public function; what it can't do is refused there as well."""
    monkeypatch.setattr(flex_module, "_compiled", lambda: flex_attention)
    query = torch.randn(1, 2, 20, 16)
    pattern, call = (
        Window(left=3, right=3) | GlobalColumns(positions=(0,)),
        AttentionCall(is_causal=False, scaling=0.25),
    )
    expected = reference_attention(query, query, query, pattern, call)
    assert_close(block_sparse_attention(query, query, query, pattern, call, implementation="flex"), expected, 1e-5)
    for refused, return_lse in ((call, True), (replace(call, dropout=0.1), False)):
        with pytest.raises(ValueError, match="implementation='flex' takes no dropout"):
            block_sparse_attention(query, query, query, pattern, refused, return_lse=return_lse, implementation="flex")
