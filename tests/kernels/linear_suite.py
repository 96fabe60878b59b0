"""The kernels of linear attention in Triton's interpreter, on the CPU; `test_kernels_linear.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import error, quick_interpreter
from linear_cases import LINEAR_CASES, LinearCase, attend, linear_inputs, linear_results, moved

import hf_efficient as he
from hf_efficient.kernels.configs import interpreting
from hf_efficient.ops.linear_attention import linear_attention
from hf_efficient.testing import assert_close, tiny_model

assert interpreting(), "run by test_kernels_linear.py"

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy reports that exp(-inf) is 0

quick_interpreter()
BY_NAME = {case.name: case for case in LINEAR_CASES}
SHORT = LinearCase("", n=17, features=4)


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_results_and_every_gradient_equal_the_definition(case: LinearCase):
    inputs = linear_inputs(case)
    truth = linear_results(moved(inputs, "cpu", torch.float64, torch.float64), "torch")
    actual = linear_results(moved(inputs, "cpu", torch.float32, torch.float32), "triton")
    assert len(actual) == (7 if case.state else 5)
    for name, x in actual.items():
        assert x.dtype == torch.float32
        assert error(x, truth[name]) <= case.bound, f"{name}: {error(x, truth[name]):.1e}"
    if case.keep == "row":
        for name, x in actual.items():
            assert x[-1].eq(0).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_in_half_precision(dtype: torch.dtype):
    """Nothing but the values' own gradient is rounded to their type; the interpreter cuts bfloat16 off."""
    inputs = linear_inputs(SHORT)
    inputs[2] = inputs[2].to(dtype)
    truth = linear_results(moved(inputs, "cpu", torch.float64, torch.float64), "torch")
    actual = linear_results(moved(inputs, "cpu", torch.float32, dtype), "triton")
    assert actual["value"].dtype == dtype and actual["out"].dtype == torch.float32
    for name, x in actual.items():
        assert error(x, truth[name]) <= (8e-3 if name == "value" else 3e-6), name


def test_no_later_key_changes_a_bit():
    case = LinearCase("", n=97)
    query, key, value = linear_inputs(case)
    out, lse = attend((query, key, value), "triton")
    again = attend((query, key, value), "triton")
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    position = 42
    key[:, :, position:] += 500.0
    value[:, :, position:] = 7.0
    changed, other = attend((query, key, value), "triton")
    assert torch.equal(changed[:, :, :position], out[:, :, :position])
    assert torch.equal(other[:, :, :position], lse[:, :, :position])
    assert (changed[:, :, position] - out[:, :, position]).abs().max() > 0.1


def test_nan_from_merging_empty_rows_reaches_no_gradient():
    inputs = moved(linear_inputs(LinearCase("", n=17, features=4, keep="left")), "cpu", torch.float32, torch.float32)
    out, lse = attend(inputs, "triton")
    grad_lse = torch.where(lse == -float("inf"), float("nan"), 1.0)
    assert grad_lse.isnan().any()
    for x in torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), grad_lse)):
        assert x.isfinite().all()


def test_odd_strides():
    """Features whose last dimension is not dense, a value shared by heads, a gradient that comes back broadcast."""
    query, key, value = linear_inputs(LinearCase("", n=17, heads=2, features=4))
    query, key = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key))
    gradients = []
    for dtype, implementation in ((torch.float32, "triton"), (torch.float64, "torch")):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value[:, :1])]
        out, _ = attend((*leaves[:2], leaves[2].expand(-1, 2, -1, -1)), implementation)
        gradients.append(torch.autograd.grad(out.sum() + out[:, 0].sum(), leaves))
    for one, two in zip(*gradients, strict=True):
        assert error(one, two) <= 3e-6


def test_operator_is_registered_soundly():
    inputs = linear_inputs(LinearCase("", n=2, features=2, width=2, state=True))
    arguments = moved(inputs, "cpu", torch.float32, torch.float32)
    # the remaining one compiles, as the next test does
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_efficient.linear_attention_forward.default, arguments, test_utils=checks)


def test_compiles_to_one_graph():
    leaves = moved(linear_inputs(LinearCase("", n=2, features=2, width=2)), "cpu", torch.float32, torch.float32)
    found = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out, lse = function(leaves, "triton")
        found.append((out, lse, *torch.autograd.grad((out.square().sum() + lse.sum()), leaves)))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_second_derivatives_are_refused():
    leaves = moved(linear_inputs(LinearCase("", n=1, features=2, width=2)), "cpu", torch.float32, torch.float32)
    (gradient,) = torch.autograd.grad(attend(leaves, "triton")[0].sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


def test_the_process_wide_choice_is_heeded():
    inputs = linear_inputs(LinearCase("", n=2, features=2, width=2))
    expected = attend(inputs, "triton")[0]
    he.set_implementation("triton")
    try:
        assert torch.equal(attend(inputs, "auto")[0], expected)
        with pytest.raises(ValueError, match="in both directions at once"):
            linear_attention(*inputs, is_causal=False)
    finally:
        he.set_implementation("auto")


def test_models_run_on_the_kernels():
    """A causal one, whose second pass continues from the cache's state, under the process-wide choice."""
    model = tiny_model("gpt2", n_embd=16, n_head=1, layers=1)
    ids = torch.randint(5, 50, (1, 24))
    logits = []
    with he.patch_attention(model, "performer"), torch.no_grad():
        for implementation in ("torch", "triton"):
            he.set_implementation(implementation)
            try:
                first = model(ids[:, :20], use_cache=True)
                second = model(ids[:, 20:], past_key_values=first.past_key_values)
            finally:
                he.set_implementation("auto")
            logits.append(torch.cat([first.logits, second.logits], dim=1))
    assert_close(logits[1], logits[0], 1e-5)
    assert not torch.equal(*logits), "the kernels did not run"


def test_refusals_name_the_remedy():
    x, value = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 8)
    for tensors, message in (
        ((x.double(), x.double(), value), "float32, got torch.float64.*implementation='torch'"),
        ((x, x, value.double()), "values, got torch.float64"),
        ((x, x, torch.randn(1, 2, 5, 129)), "up to 128, got 129"),
        ((x, x[:, :1], value[:, :1]), "got \\(1, 2, 5, 4\\), \\(1, 1, 5, 4\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_attention(*tensors, is_causal=True, implementation="triton")
