"""The Triton kernels in Triton's interpreter, on the CPU. `test_kernels.py` runs this file, with TRITON_INTERPRET=1 set."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import CASES, Case, Inputs, definition, error, inputs_of, quick_interpreter, results
from torch import Tensor

from hf_efficient.kernels import block_sparse_op as library
from hf_efficient.kernels.block_sparse_op import block_sparse
from hf_efficient.kernels.configs import interpreting
from hf_efficient.patterns.kinds import GlobalColumns, Window
from hf_efficient.patterns.sets import PerHead

assert interpreting(), "run by test_kernels.py"

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy reports that 2^-inf is 0

quick_interpreter()
BY_NAME = {case.name: case for case in CASES}
# the largest error of a correct result: rounding to the type, and in bfloat16 the interpreter's truncation
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def fused(case: Case, inputs: Inputs, query_offset: int) -> tuple[Tensor, Tensor]:
    query, key, value, *bias = inputs.tensors
    return block_sparse(
        query,
        key,
        value,
        pattern=case.pattern,
        scaling=case.width**-0.5,
        is_causal=case.is_causal,
        keep=inputs.keep,
        bias=bias[0] if bias else None,
        positions=inputs.positions,
        segments=inputs.segments,
        query_offset=query_offset,
        softcap=case.softcap,
    )


def compare(case: Case, dtype: torch.dtype) -> None:
    inputs = inputs_of(case).to("cpu", dtype)
    truth = results(case, inputs.to("cpu", torch.float64, torch.float64), definition)
    actual = results(case, inputs, fused)
    assert actual.out.dtype == dtype and actual.lse.dtype == torch.float32
    for (name, x), y in zip(actual.named().items(), truth.named().values(), strict=True):
        assert error(x, y) <= BOUND[dtype], f"{name}: {error(x, y):.1e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_every_gradient_equal_the_definition(case: Case):
    compare(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grouped queries", "width 80"])
def test_half_precision(name: str, dtype: torch.dtype):
    compare(BY_NAME[name], dtype)


def test_equal_calls_give_equal_bits():
    case = BY_NAME["split, heads differ"]
    inputs = inputs_of(case).to("cpu", torch.float32)
    first, second = (results(case, inputs, fused).named() for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_gradient_of_one_output_alone():
    case = BY_NAME["window"]
    for index in range(2):
        inputs = inputs_of(case).to("cpu", torch.float32)
        truth = inputs.to("cpu", torch.float64, torch.float64)
        weight = torch.randn(definition(case, truth, 0)[index].shape)
        for x, function in ((inputs, fused), (truth, definition)):
            (function(case, x, 0)[index] * weight).sum().backward()
        for x, y in zip(inputs.tensors[:2], truth.tensors, strict=False):
            assert error(x.grad, y.grad) <= 1e-5


def test_nan_from_merging_empty_rows_reaches_no_gradient():
    case = BY_NAME["an entry without keys"]
    inputs = inputs_of(case).to("cpu", torch.float32)
    out, lse = fused(case, inputs, 0)
    empty = lse == -float("inf")
    grad_lse = torch.where(empty, float("nan"), 1.0)
    for x in torch.autograd.grad((out, lse), inputs.tensors, (torch.ones_like(out), grad_lse)):
        assert x.isfinite().all()


def test_a_bias_that_wants_no_gradient_costs_none(monkeypatch):
    case = BY_NAME["an entry without keys"]
    inputs = inputs_of(case).to("cpu", torch.float32)
    fixed = Inputs((*inputs.tensors[:3], inputs.tensors[3].detach()), *inputs[1:])
    monkeypatch.setattr(library, "_bias_gradient", None)  # calling it raises
    out, _ = fused(case, fixed, 0)
    torch.autograd.grad(out.sum(), fixed.tensors[:3])
    with pytest.raises(TypeError, match="not callable"):
        torch.autograd.grad(fused(case, inputs, 0)[0].sum(), inputs.tensors)


def test_odd_strides():
    """Slices of one fused projection, a broadcast key, and gradients that come back transposed."""
    pattern, length = Window(left=9, right=9), 63
    projected = torch.randn(2, length, 3, 2, 16).requires_grad_()
    query, key, value = (projected[:, :, i].transpose(1, 2) for i in range(3))
    key = key[:, :1].expand(-1, 2, -1, -1)
    case = Case("", pattern, n=length, batch=2)
    weight = torch.randn(2, 16, length, 2).permute(0, 3, 2, 1)
    gradients = []
    for function, dtype in ((fused, torch.float32), (definition, torch.float64)):
        out, _ = function(case, Inputs(tuple(x.to(dtype) for x in (query, key, value)), None, None, None), 0)
        gradients.append(torch.autograd.grad((out * weight).sum(), projected)[0])
    assert error(*gradients) <= 1e-5


def test_autocast_casts():
    case = BY_NAME["window"]
    inputs = inputs_of(case).to("cpu", torch.float32)
    with torch.autocast("cpu", torch.float16):
        out, _ = fused(case, inputs, 0)
    assert out.dtype == torch.float16
    assert torch.equal(out, fused(case, inputs.to("cpu", torch.float16), 0)[0])


@pytest.mark.parametrize("with_bias", [False, True])
def test_operator_is_registered_soundly(with_bias: bool):
    query, key, value = (torch.randn(1, 1, 20, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 5, requires_grad=True) if with_bias else None
    keep = torch.ones(1, 20, dtype=torch.uint8)
    spec = (Window(left=3, right=3) | GlobalColumns(positions=(0,))).spec()
    arguments = (query, key, value, keep, bias, *[None] * 4, spec, 0.25, True, 0, *[2.0] * with_bias)
    torch.library.opcheck(torch.ops.hf_efficient.block_sparse_forward.default, arguments)


def test_compiles_to_one_graph_for_every_pattern():
    case = BY_NAME["two tokens"]
    inputs = inputs_of(case).to("cpu", torch.float32)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    # several windows in a row, whose sizes the compiler then takes for symbols
    windows = [Window(left=size, right=0) | GlobalColumns(positions=(0,)) for size in (0, 1, 2)]
    for pattern in (case.pattern, *windows, PerHead(parts=(windows[0], windows[1]))):
        case = dataclasses.replace(case, pattern=pattern)
        eager = results(case, inputs, fused).named()
        for name, x in results(case, inputs, compiled).named().items():
            assert torch.equal(x, eager[name]), name


def test_refusals_name_the_remedy():
    query = torch.randn(1, 2, 20, 16)
    pattern = Window(left=3, right=3)

    def call(*tensors: Tensor, **options) -> None:
        block_sparse(*tensors, pattern=pattern, scaling=1.0, **options)

    wide, narrow = torch.randn(1, 2, 20, 256), torch.randn(1, 2, 20, 8)
    for tensors, message in (
        ([query.double()] * 3, "float64.*implementation='torch'"),
        ([wide] * 3, "16 to 128, got 256"),
        ([narrow] * 3, "16 to 128, got 8"),
        ([query, query.half(), query], "one dtype"),
        ([query.transpose(2, 3).contiguous().transpose(2, 3)] * 3, "contiguous"),
        ([query, query[:, :, :9], query], "got \\(1, 2, 20, 16\\), \\(1, 2, 9, 16\\)"),
        ([torch.randn(1, 3, 20, 16), query, query], "multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*tensors)
    positions = (torch.zeros(1, 1, 20, dtype=torch.int32),) * 2
    for options, message in (
        (dict(bias=torch.zeros(2, 4)), "2R \\+ 1"),
        (dict(bias=torch.zeros(3, 5)), "2R \\+ 1"),
        (dict(bias=torch.zeros(2, 5), positions=positions), "positions"),
        (dict(keep=torch.ones(1, 19, dtype=torch.bool)), "one entry per key"),
        (dict(segments=(positions[0], positions[1][..., 1:])), "segments"),
    ):
        with pytest.raises(ValueError, match=message):
            call(query, query, query, **options)
