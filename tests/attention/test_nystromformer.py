"""Nyströmformer against transformers' module, the exact inverse, and tokens that repeat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formulas import HEADS, WIDTH, geometry, heads
from torch import Tensor
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.attention.nystromformer import NystromformerAttention, pseudo_inverse
from hf_efficient.ops.context import AttentionContext
from hf_efficient.testing import assert_close

CONTEXT = AttentionContext(is_causal=False, scaling=WIDTH**-0.5)


def nystromformer(num_heads: int = HEADS, **options: Any) -> NystromformerAttention:
    mechanism = NystromformerAttention(attention_config("nystromformer", **options), geometry(num_heads=num_heads))  # type: ignore[arg-type]
    mechanism.double().reset_parameters()
    return mechanism


def full(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("kernel_size", [None, 7])
def test_equals_the_module_of_transformers(kernel_size: int | None):
    """One row and one head: theirs scales the start of the inverse by the largest sum in the batch."""
    n, count = 60, 12
    config = NystromformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=1,
        num_landmarks=count,
        segment_means_seq_len=n,
        conv_kernel_size=kernel_size or 3,
        inv_coeff_init_option=False,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    theirs = NystromformerSelfAttention(config).double().eval()
    theirs.conv_kernel_size = kernel_size  # the config refuses None, which the module honours
    ours = nystromformer(1, num_landmarks=count, conv_kernel_size=kernel_size)
    if kernel_size:
        ours.convolution.data.copy_(theirs.conv.weight[:, 0, :, 0])
    hidden = 3 * heads(1, n, WIDTH, count=1)[0].requires_grad_()
    q, k, v = (projection(hidden)[:, None] for projection in (theirs.query, theirs.key, theirs.value))
    actual, expected = ours(q, k, v, CONTEXT)[:, 0], theirs(hidden)[0]
    assert_close(actual, expected, 1e-9)
    upstream = heads(1, n, WIDTH, seed=1, count=1)[0]
    gradients = [
        torch.autograd.grad((out * upstream).sum(), hidden, retain_graph=True)[0] for out in (actual, expected)
    ]
    assert_close(*gradients, 1e-8, "gradient")


def test_the_iteration_ends_at_the_inverse():
    matrix = heads(2, 3, 10, 10, count=1)[0].softmax(-1)
    truth = torch.linalg.pinv(matrix)
    errors = [(pseudo_inverse(matrix, steps) - truth).norm() / truth.norm() for steps in (2, 8, 40)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6, errors


@pytest.mark.parametrize("padding", [0, 5])
def test_exact_for_tokens_repeated_within_segments(padding: int):
    """Landmarks are then the tokens themselves, and the inverse undoes what they have in common."""
    count, repeats = 6, 4
    q, k, v = (x.repeat_interleave(repeats, dim=2) for x in heads(2, HEADS, count, WIDTH))
    n = count * repeats
    mechanism = nystromformer(num_landmarks=count, pinv_iterations=60, conv_kernel_size=None)
    keep = torch.ones(2, n + padding, dtype=torch.bool)
    keep[:, n:] = False
    context = AttentionContext(is_causal=False, scaling=WIDTH**-0.5, key_padding_mask=keep if padding else None)
    with_pads = [torch.cat([x, torch.full_like(x[:, :, :padding], 9.0)], 2) for x in (q, k, v)]
    out = mechanism(with_pads[0], with_pads[1], with_pads[2], context)[:, :, :n]
    assert_close(out, full(q, k, v), 1e-6)


def test_tokens_that_change_slowly_need_few_landmarks():
    n, generator = 256, torch.Generator().manual_seed(0)
    walk = torch.randn(1, HEADS, n, WIDTH, generator=generator, dtype=torch.float64)
    for i in range(1, n):
        walk[:, :, i] = 0.99 * walk[:, :, i - 1] + (1 - 0.99**2) ** 0.5 * walk[:, :, i]
    q, k, v = walk, walk.flip(1), walk.roll(1, dims=1)
    truth = full(q, k, v)
    baseline = (v.mean(2, keepdim=True) - truth).norm()
    errors = [
        ((nystromformer(num_landmarks=count)(q, k, v, CONTEXT) - truth).norm() / baseline).item() for count in (4, 32)
    ]
    assert errors[0] > 2 * errors[1] and errors[1] < 0.1, errors


def test_a_short_row_beside_a_long_one_gets_full_attention():
    mechanism = nystromformer(num_landmarks=10)
    q, k, v = heads(2, HEADS, 40, WIDTH)
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1, 10:] = False
    context = AttentionContext(is_causal=False, scaling=WIDTH**-0.5, key_padding_mask=keep)
    out = mechanism(q, k, v, context)
    assert_close(out[1:, :, :10], full(*(x[1:, :, :10] for x in (q, k, v))), 1e-9)
    assert (out[:1] - full(q[:1], k[:1], v[:1])).abs().max() > 0.01


def test_a_segment_of_holes_has_no_landmark():
    """Equal to a row in whose formula that landmark does not occur."""
    count, size = 6, 4
    n = count * size
    mechanism = nystromformer(num_landmarks=count, pinv_iterations=40, conv_kernel_size=None)
    q, k, v = heads(1, HEADS, n, WIDTH)
    keep = torch.ones(1, n, dtype=torch.bool)
    keep[0, 2 * size : 3 * size] = False
    out = mechanism(q, k, v, AttentionContext(is_causal=False, scaling=WIDTH**-0.5, key_padding_mask=keep))
    real = keep[0].nonzero().flatten()
    k, v = k[:, :, real], v[:, :, real]
    points_q, points_k = (x.unflatten(2, (count - 1, size)).mean(3) for x in (q[:, :, real], k))
    F, A, B = (
        (x @ y.transpose(-1, -2) * WIDTH**-0.5).softmax(-1)
        for x, y in ((q, points_k), (points_q, points_k), (points_q, k))
    )
    expected = F @ pseudo_inverse(A, 40) @ B @ v
    assert_close(out[:, :, real], expected[:, :, real], 1e-6)


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="conv_kernel_size=4 is not possible; it must be an odd integer"):
        he.NystromformerAttentionConfig(conv_kernel_size=4)
