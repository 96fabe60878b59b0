"""The Triton kernels on a CUDA device: accuracy, repeatability, long addresses, FlexAttention. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, Case, Inputs, Results, definition, error, inputs_of, results
from linear_cases import LINEAR_CASES, LinearCase, attend, linear_inputs, linear_results, moved
from torch import Tensor

from hf_efficient.kernels.block_sparse_op import block_sparse
from hf_efficient.kernels.flex import flex
from hf_efficient.patterns.kinds import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE = 16  # up to 3200 tokens
# what may be lost beside twice the error of dense PyTorch: rounding of the result, where PyTorch happens to be exact
FLOOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
BY_NAME = {case.name: case for case in CASES}


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


def exact(case: Case, inputs: Inputs, scale: int) -> Results:
    return results(case, inputs.to("cuda", torch.float64, torch.float64), definition, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1, SCALE])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_dense_attention(case: Case, scale: int, dtype: torch.dtype):
    inputs = inputs_of(case, scale).to("cuda", dtype)
    truth = exact(case, inputs, scale).named()
    dense = results(case, inputs, definition, scale).named()
    for name, x in results(case, inputs, fused, scale).named().items():
        bound = 2 * error(dense[name], truth[name]) + FLOOR[dtype]
        assert error(x, truth[name]) <= bound, f"{name}: {error(x, truth[name]):.1e} > {bound:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_calls_give_equal_bits(case: Case, dtype: torch.dtype):
    inputs = inputs_of(case, SCALE).to("cuda", dtype)
    first = results(case, inputs, fused, SCALE).named()
    for _ in range(3):
        for name, x in results(case, inputs, fused, SCALE).named().items():
            assert torch.equal(x, first[name]), name


def test_tensor_float32_is_used_only_where_allowed():
    case = BY_NAME["window"]
    inputs = inputs_of(case, SCALE).to("cuda", torch.float32)
    truth = exact(case, inputs, SCALE).named()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        for name, x in results(case, inputs, fused, SCALE).named().items():
            assert error(x, truth[name]) <= 3e-3, name
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["split rows and columns", "grouped queries, heads differ"])
def test_bias_gradient_equals_finite_differences(name: str):
    case = BY_NAME[name]
    inputs = inputs_of(case, 4).to("cuda", torch.float32)
    *tensors, bias = (x.detach() for x in inputs.tensors)
    weight = torch.randn(tensors[0].shape, device="cuda", dtype=torch.float64)

    def loss(table: Tensor) -> Tensor:
        return (fused(case, Inputs((*tensors, table), *inputs[1:]), 0)[0].double() * weight).sum()

    table = bias.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(table), table)[0]
    step = 1e-2
    for entry in (0, 1, case.radius, bias.shape[1] - 2, bias.shape[1] - 1):
        moved = torch.zeros_like(bias)
        moved[1, entry] = step
        slope = (loss(bias + moved) - loss(bias - moved)) / (2 * step)
        assert abs(slope - gradient[1, entry]) <= 5e-3 * gradient.abs().max(), entry


@pytest.mark.parametrize(
    "name", ["window", "padding on the right", "split rows and columns", "grouped queries", "width 128"]
)
def test_flex_attention_agrees(name: str):
    """Two independent implementations; FlexAttention gives no gradient of the bias."""
    case = BY_NAME[name]
    inputs = inputs_of(case, SCALE).to("cuda", torch.bfloat16)
    tensors, bias = inputs.tensors[:3], [x.detach() for x in inputs.tensors[3:]]
    inputs = Inputs((*tensors, *bias), *inputs[1:])
    weight = torch.randn_like(tensors[0])
    options = dict(pattern=case.pattern, scaling=case.width**-0.5, is_causal=case.is_causal, keep=inputs.keep)
    options |= dict(softcap=case.softcap)
    outs = fused(case, inputs, 0)[0], flex(*tensors, bias=bias[0] if bias else None, **options)
    ours, theirs = ((out, *torch.autograd.grad((out * weight).sum(), tensors)) for out in outs)
    for x, y, what in zip(ours, theirs, ("out", "query", "key", "value"), strict=True):
        assert error(x, y) <= 1.5e-2, f"{what}: {error(x, y):.1e}"


def test_addresses_beyond_32_bits():
    """Tokens that lie 2^22 elements apart, so that the last ones start past 2^31."""
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs a GPU with 16 GiB")
    length, stride = 600, 2**22
    storage = torch.empty(length * stride, dtype=torch.bfloat16, device="cuda")
    spread = storage.as_strided((1, 1, length, 64), (64, 64, stride, 1))
    spread.copy_(torch.randn_like(spread, memory_format=torch.contiguous_format))
    dense = spread.contiguous()
    call = dict(pattern=Window(left=50, right=50), scaling=0.125)
    assert torch.equal(block_sparse(spread, spread, spread, **call)[0], block_sparse(dense, dense, dense, **call)[0])


def test_compiled_call_equals_the_eager_one():
    case = BY_NAME["grouped queries"]
    inputs = inputs_of(case).to("cuda", torch.bfloat16)
    eager = results(case, inputs, fused).named()
    for name, x in results(case, inputs, torch.compile(fused, fullgraph=True)).named().items():
        assert torch.equal(x, eager[name]), name


# ---- linear attention --------------------------------------------------------------------------------------------

# products of tiles in TensorFloat-32 where the values have half precision, and rounding of the values' gradient
LINEAR_BOUND = {torch.bfloat16: 1e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1, SCALE])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear_attention_equals_the_definition(case: LinearCase, scale: int, dtype: torch.dtype):
    inputs = linear_inputs(case, scale)
    inputs[2] = inputs[2].to(dtype)
    truth = linear_results(moved(inputs, "cuda", torch.float64, torch.float64), "torch")
    bound = LINEAR_BOUND.get(dtype, 3 * case.bound)
    for name, x in linear_results(moved(inputs, "cuda", torch.float32, dtype), "triton").items():
        assert error(x, truth[name]) <= bound, f"{name}: {error(x, truth[name]):.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features, width", [(64, 64), (256, 64), (100, 128), (16, 8)])
def test_linear_attention_gives_equal_bits(features: int, width: int, dtype: torch.dtype):
    case = LinearCase("", n=777, batch=2, heads=2, features=features, width=width, keep="left", state=True)
    inputs = moved(linear_inputs(case), "cuda", torch.float32, dtype)
    first = linear_results(inputs, "triton")
    for _ in range(3):
        for name, x in linear_results(inputs, "triton").items():
            assert torch.equal(x, first[name]), name


def test_no_later_key_changes_a_bit_of_linear_attention():
    query, key, value = moved(linear_inputs(LinearCase("", n=300)), "cuda", torch.float32, torch.bfloat16)
    out, lse = attend((query, key, value), "triton")
    for position in (5, 64, 200):
        later = torch.arange(300, device="cuda")[:, None] >= position
        changed = attend((query, key + later * 500.0, value.masked_fill(later, 7.0)), "triton")
        assert torch.equal(changed[0][:, :, :position], out[:, :, :position])
        assert torch.equal(changed[1][:, :, :position], lse[:, :, :position])


def test_linear_attention_is_chosen_on_its_own():
    inputs = moved(linear_inputs(LinearCase("", n=97)), "cuda", torch.float32, torch.bfloat16)
    assert torch.equal(attend(inputs, "auto")[0], attend(inputs, "triton")[0])


def test_compiled_linear_attention_equals_the_eager_one():
    inputs = moved(linear_inputs(LinearCase("", n=97, state=True)), "cuda", torch.float32, torch.bfloat16)
    compiled = torch.compile(attend, fullgraph=True)
    for x, y in zip(compiled(inputs, "triton"), attend(inputs, "triton"), strict=True):
        assert torch.equal(x, y)
