"""The Triton kernels of linear attention without a GPU: in Triton's interpreter, chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_efficient.kernels.linear_attention_op import linear_attention as fused
from hf_efficient.ops.linear_attention import linear_attention

SUITE = Path(__file__).with_name("linear_suite.py")


def test_interpreter_suite():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", str(SUITE)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.parametrize(
    "implementation, is_causal, message",
    [
        ("triton", True, "implementation='triton' can't take this call: .*implementation='torch'"),
        ("triton", False, "in both directions at once"),
        ("flex", True, "FlexAttention computes softmax attention.*'auto', 'torch' or 'triton'"),
        ("flex", False, "in both directions at once"),
        ("cuda", True, "must be one of auto, torch, triton, flex"),
        ("cuda", False, "must be one of auto, torch, triton, flex"),
    ],
)
def test_what_no_kernel_computes_is_refused(implementation: str, is_causal: bool, message: str):
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        linear_attention(x, x, x, is_causal=is_causal, implementation=implementation)


def test_cpu_tensors_are_refused_without_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="CUDA tensors, got cpu ones; use implementation='torch'"):
        fused(x, x, x)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        torch.ops.hf_efficient.linear_attention_forward(x, x, x, None, None)


def test_kernels_are_imported_with_their_first_call():
    code = (
        "import sys, hf_efficient.kernels.linear_attention_op; "
        "print([m for m in sys.modules if m.endswith('kernels.linear_attention')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
