"""Set Transformer: inducing points against their formula, tokens that repeat, and the pooling head that starts as a mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from formulas import HEADS, WIDTH, geometry, heads
from torch import Tensor

import hf_efficient as he
from hf_efficient.attention.base.pooling import PoolingByMultiheadAttention
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.attention.set_transformer import SetTransformerAttention
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patching.dispatch import aligned_call
from hf_efficient.testing import assert_close


def mechanism_of(moved: bool = True, **options: Any) -> SetTransformerAttention:
    config: Any = attention_config("set_transformer", **options)
    mechanism = SetTransformerAttention(config, geometry()).double()
    mechanism.reset_parameters()
    if moved:
        with torch.no_grad():
            for seed, parameter in enumerate(mechanism.parameters()):
                parameter.add_(0.5 * heads(*parameter.shape, seed=seed, count=1)[0])
    return mechanism


def by_formula(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
    count, out = m.config.num_inducing, torch.zeros_like(q)
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        real = keep[b].nonzero().flatten()
        if not len(real):
            continue
        span = int(real[-1] - real[0]) + 1
        segment = (real - real[0]) * count // max(span, count)
        keys, values, shifts, sizes = [], [], [], []
        for t in segment.unique().tolist():
            own = segment == t
            point = m.inducing_points[h, t] + m.key_weight[h] * k[b, h, real[own]].mean(0)
            shares = (0.6 * k[b, h, real] @ point + m.segment_bias[h] * own).softmax(-1)
            keys.append(shares @ k[b, h, real])
            values.append(shares @ v[b, h, real])
            shifts.append(0.0 * q[b, h, :, 0] if bias is None else bias[h][:, real] @ shares)
            sizes.append(own.sum())
        logits = 0.6 * q[b, h] @ torch.stack(keys).T + torch.stack(shifts, -1) + torch.stack(sizes).log()
        out[b, h] = logits.softmax(-1) @ torch.stack(values)
    return out


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("count", "n"), [(4, 19), (4, 3), (2, 7), (6, 12)])
def test_equals_its_formula(count: int, n: int, with_bias: bool) -> None:
    """Moved parameters; padding left, right and in the middle, a row of padding; and gradients."""
    mechanism = mechanism_of(num_inducing=count, segment_bias=1.5)
    q, k, v = (x.requires_grad_() for x in heads(4, HEADS, n, WIDTH))
    keep = torch.ones(4, n, dtype=torch.bool)
    keep[1, : n // 4], keep[1, n - n // 3 :] = False, False
    keep[2, 1:-1:3] = False
    keep[3] = False
    table = heads(9, HEADS, seed=8, count=1)[0]
    dense = table[(torch.arange(n) - torch.arange(n)[:, None]).clamp(-4, 4) + 4].movedim(-1, 0)
    lazy = RelativeBias(table, lambda offsets: offsets.clamp(-4, 4) + 4, 4)
    context = AttentionContext(
        is_causal=False, scaling=0.6, key_padding_mask=keep, relative_bias=lazy if with_bias else None
    )
    actual = aligned_call(mechanism, q, k, v, context)
    expected = by_formula(mechanism, q, k, v, keep, dense if with_bias else None)
    # logarithms of counts are taken in fp32
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-6, where=keep)
    assert (actual[3] == 0).all()
    upstream = heads(*q.shape, seed=3, count=1)[0] * keep[:, None, :, None]
    leaves = {"q": q, "k": k, "v": v, **dict(mechanism.named_parameters())}
    gradients = [torch.autograd.grad((out * upstream).sum(), list(leaves.values())) for out in (actual, expected)]
    for name, one, other in zip(leaves, *gradients, strict=True):
        assert_close(one, other, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("repeats", [1, 3])
def test_exact_for_tokens_repeated_within_segments(repeats: int) -> None:
    """With a large β the slots are the segments' tokens, and their log-count makes up for the number of these."""
    count = 7
    n = count * repeats
    mechanism = mechanism_of(moved=False, num_inducing=count, segment_bias=60.0)
    q, _, _ = heads(2, HEADS, n, WIDTH)
    k, v = (x.repeat_interleave(repeats, dim=2) for x in heads(2, HEADS, count, WIDTH, seed=1, count=2))
    context = AttentionContext(is_causal=False, scaling=0.6)
    expected = (0.6 * q @ k.transpose(-1, -2)).softmax(-1) @ v
    assert_close(mechanism(q, k, v, context), expected, 1e-6)


def test_points_gather_by_content() -> None:
    """Points of large weight pick tokens wherever they stand: two kinds of keys, two points, equal to full attention."""
    n = 12
    kinds, values = heads(2, HEADS, 2, WIDTH, count=2)
    which = torch.arange(n) % 2
    k, v = kinds[:, :, which], values[:, :, which]
    q = heads(2, HEADS, n, WIDTH, seed=4, count=1)[0]
    mechanism = mechanism_of(moved=False, num_inducing=2, segment_bias=0.0)
    difference = kinds[0, :, 0] - kinds[0, :, 1]
    with torch.no_grad():
        mechanism.inducing_points.copy_(200 * torch.stack([difference, -difference], 1))
    out = mechanism(q[:1], k[:1], v[:1], AttentionContext(is_causal=False, scaling=0.6))
    expected = (0.6 * q[:1] @ k[:1].transpose(-1, -2)).softmax(-1) @ v[:1]
    assert_close(out, expected, 1e-6)


# ---- the pooling head ----------------------------------------------------------------------------------------------


def test_pooling_starts_as_the_mean_of_real_tokens() -> None:
    hidden = heads(3, 11, 24, count=1)[0]
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 6:] = 0
    mask[2, :4] = 0
    pooling = PoolingByMultiheadAttention(24, num_heads=4, num_seeds=2).double()
    means = torch.stack([hidden[row][mask[row].bool()].mean(0) for row in range(3)])
    assert_close(pooling(hidden, mask)[:, 0], means, 1e-12)
    assert_close(pooling(hidden)[:, 0], hidden.mean(1), 1e-12)
    difference = (pooling(hidden)[:, 1] - hidden.mean(1)).abs().max()
    assert 0 < difference < 0.2, "a second seed must start near the first, and not as its equal"


def test_pooling_equals_its_formula_and_ignores_padding() -> None:
    pooling = PoolingByMultiheadAttention(24, num_heads=3, num_seeds=2).double()
    with torch.no_grad():
        for seed, parameter in enumerate(pooling.parameters()):
            parameter.add_(0.3 * heads(*parameter.shape, seed=seed, count=1)[0])
    hidden = heads(1, 9, 24, count=1)[0]
    key, value = pooling.key(hidden)[0], pooling.value(hidden)[0]
    read = []
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        read.append((pooling.seeds[:, part] @ key[:, part].T / math.sqrt(8)).softmax(-1) @ value[:, part])
    expected = pooling.seeds + pooling.output(torch.cat(read, -1))
    expected = expected + pooling.expand(pooling.hidden(expected).relu())
    assert_close(pooling(hidden)[0], expected, 1e-12)
    padded = torch.cat([hidden, torch.full_like(hidden[:, :4], 1e4)], 1)
    mask = (torch.arange(13) < 9)[None]
    assert_close(pooling(padded, mask)[0], expected, 1e-9)


def test_gradients_reach_all_of_the_pooling_head() -> None:
    """From the second step on: what starts at 0 must move first."""
    torch.manual_seed(0)
    pooling = PoolingByMultiheadAttention(16, num_heads=2)
    optimizer = torch.optim.SGD(pooling.parameters(), lr=0.1)
    hidden = torch.randn(4, 7, 16)
    for _ in range(2):
        optimizer.zero_grad()
        (pooling(hidden) - 1.0).square().mean().backward()
        optimizer.step()
    assert all((parameter.grad != 0).any() for parameter in pooling.parameters())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=5 must divide hidden_size=24"):
        PoolingByMultiheadAttention(24, num_heads=5)
    for options in (dict(num_heads=0), dict(num_seeds=0), dict(num_heads=-4)):
        with pytest.raises(ValueError, match="must be at least 1"):
            PoolingByMultiheadAttention(24, **options)
    with pytest.raises(ValueError, match="segment_bias=-1 is not possible; it must be a number ≥ 0"):
        he.SetTransformerAttentionConfig(segment_bias=-1)
