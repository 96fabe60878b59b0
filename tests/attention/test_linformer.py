"""Linformer against its formula: learned, pooled and convolved slots, ranks per layer and head, and longer inputs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from formulas import HEADS, WIDTH, geometry, heads
from torch import Tensor

import hf_efficient as he
from hf_efficient.attention.linformer import LinformerAttention, LinformerAttentionConfig
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.testing import assert_close, inputs_for, tiny_model


def linformer(max_length: int, **options: Any) -> LinformerAttention:
    mechanism = LinformerAttention(LinformerAttentionConfig(max_length=max_length, **options), geometry()).double()
    mechanism.reset_parameters()
    return mechanism


def linformer_by_formula(
    q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, keep: Tensor, sizes: list[int], bias: Tensor | None
) -> Tensor:
    """The docstring's formula, one query, head and slot at a time; E, F: (H, R, max_length), bias: (H, N, N)."""
    out = torch.zeros_like(q)
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        real = [j for j in range(k.shape[2]) if keep[b, j]]
        slots = []
        for r in range(E.shape[1]):
            mass = sum(abs(E[h, r, j]) for j in real) / E[h, r].abs().sum()
            mass_value = sum(abs(F[h, r, j]) for j in real) / F[h, r].abs().sum()
            if mass > 0:
                key = sum(E[h, r, j] * k[b, h, j] for j in real) / mass
                value = sum(F[h, r, j] * v[b, h, j] for j in real) / mass_value
                slots.append((r, mass, key, value))
        for i in range(q.shape[2]) if slots else ():
            logits = []
            for r, mass, key, _ in slots:
                shift = 0.0 if bias is None else sum(E[h, r, j] * bias[h, i, j] for j in real) / mass
                logits.append(0.6 * q[b, h, i] @ key + shift + torch.log(mass * sizes[r]))
            weights = torch.softmax(torch.stack(logits), 0)
            out[b, h, i] = sum(w * slot[3] for w, slot in zip(weights, slots, strict=True))
    return out


def clipped_bias(n: int) -> tuple[RelativeBias, Tensor]:
    """A lazy bias over offsets -4 … 4 and its dense (H, N, N) form."""
    table = heads(9, HEADS, seed=8, count=1)[0].requires_grad_()
    ids = [[max(-4, min(4, j - i)) + 4 for j in range(n)] for i in range(n)]
    return RelativeBias(table, lambda offsets: offsets.clamp(-4, 4) + 4, 4), table[torch.tensor(ids)].movedim(-1, 0)


def segments(rank: int, max_length: int) -> list[list[int]]:
    return [[j for j in range(max_length) if j * rank // max_length == r] for r in range(rank)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("sharing", ["none", "headwise", "kv", "layerwise"])
@pytest.mark.parametrize("n", [1, 9, 14])
def test_linformer_equals_its_formula(n: int, sharing: str, with_bias: bool) -> None:
    """Random signed projections, inputs shorter than max_length, padding at the end, holes, and a row of padding."""
    rank, max_length = 4, 14
    mechanism = linformer(max_length, rank=rank, sharing=sharing)
    with torch.no_grad():
        for seed, parameter in enumerate(mechanism.parameters()):
            parameter.copy_(heads(*parameter.shape, seed=seed, count=1)[0])
    q, k, v = heads(4, HEADS, n, WIDTH)
    keep = torch.ones(4, n, dtype=torch.bool)
    keep[1, n - n // 3 :] = False
    keep[2, 1::3] = False
    keep[3] = False
    table, bias = clipped_bias(n)
    E = mechanism.key_projection.detach().expand(HEADS, -1, -1)
    F = getattr(mechanism, "value_projection", mechanism.key_projection).detach().expand(HEADS, -1, -1)
    sizes = [len(segment) for segment in segments(rank, max_length)]
    context = AttentionContext(
        is_causal=False, scaling=0.6, key_padding_mask=keep, relative_bias=table if with_bias else None
    )
    expected = linformer_by_formula(q, k, v, E, F, keep, sizes, bias if with_bias else None)
    assert_close(mechanism(q, k, v, context), expected, 1e-9)
    context = replace(context, key_padding_mask=None)
    everything = torch.ones_like(keep)
    expected = linformer_by_formula(q, k, v, E, F, everything, sizes, bias if with_bias else None)
    assert_close(mechanism(q, k, v, context), expected, 1e-9, "without a mask")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("sharing", ["none", "headwise", "kv"])
def test_linformer_gradients_equal_those_of_its_formula(sharing: str, with_bias: bool) -> None:
    """With slots that no real token fell into, whose log-count is -∞, and with a row of padding."""
    rank, max_length, n = 4, 14, 6
    mechanism = linformer(max_length, rank=rank, sharing=sharing)
    with torch.no_grad():
        for seed, parameter in enumerate(mechanism.parameters()):
            parameter.copy_(heads(*parameter.shape, seed=seed, count=1)[0])
    q, k, v = (x.requires_grad_() for x in heads(3, HEADS, n, WIDTH))
    keep = torch.ones(3, n, dtype=torch.bool)
    keep[1, 2:] = False
    keep[2] = False
    table, bias = clipped_bias(n)
    context = AttentionContext(
        is_causal=False, scaling=0.6, key_padding_mask=keep, relative_bias=table if with_bias else None
    )
    E = mechanism.key_projection.expand(HEADS, -1, -1)
    F = getattr(mechanism, "value_projection", mechanism.key_projection).expand(HEADS, -1, -1)
    sizes = [len(segment) for segment in segments(rank, max_length)]
    expected = linformer_by_formula(q, k, v, E, F, keep, sizes, bias if with_bias else None)
    leaves = {"q": q, "k": k, "v": v, **dict(mechanism.named_parameters())}
    if with_bias:
        leaves["table"] = table.table
    actual = mechanism(q, k, v, context)
    for name, a, e in zip(
        leaves,
        torch.autograd.grad(actual.square().sum(), list(leaves.values())),
        torch.autograd.grad(expected.square().sum(), list(leaves.values())),
        strict=True,
    ):
        assert_close(a, e, 1e-9, f"gradient of {name}")


def test_linformer_starts_as_segment_means() -> None:
    mechanism = linformer(14, rank=4)
    for r, segment in enumerate(segments(4, 14)):
        expected = torch.tensor([(j in segment) / len(segment) for j in range(14)], dtype=torch.float64)
        for name in ("key_projection", "value_projection"):
            assert_close(getattr(mechanism, name)[0, r], expected, 1e-7, name)


def full_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scaling: float) -> Tensor:
    logits = (scaling * q @ k.transpose(-1, -2)).masked_fill(~keep[:, None, None], -math.inf)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("projection", ["linear", "mean", "max"])
@pytest.mark.parametrize("max_length, rank, n", [(12, 4, 12), (14, 4, 14), (14, 4, 11), (14, 5, 9), (9, 9, 7)])
def test_linformer_is_exact_for_tokens_repeated_within_segments(
    projection: str, max_length: int, rank: int, n: int
) -> None:
    """A slot then stands for equal tokens, and its log-count makes up for their number, with padding as well."""
    mechanism = linformer(max_length, rank=rank, projection=projection)
    owner = [j * rank // max_length for j in range(n)]
    q, _, _ = heads(2, HEADS, n, WIDTH)
    k, v = (x[:, :, owner] for x in heads(2, HEADS, rank, WIDTH, seed=1, count=2))
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[1, n - 3 :] = False
    context = AttentionContext(is_causal=False, scaling=0.6, key_padding_mask=keep)
    # counts are taken in fp32
    assert_close(mechanism(q, k, v, context), full_attention(q, k, v, keep, 0.6), 1e-6)


def test_linformer_max_pools_real_tokens_only() -> None:
    rank, n = 3, 10
    mechanism = linformer(12, rank=rank, projection="max")
    q, k, v = heads(2, HEADS, n, WIDTH)
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[1, 6:] = False
    context = AttentionContext(is_causal=False, scaling=0.6, key_padding_mask=keep)
    actual = mechanism(q, k, v, context)
    for row in range(2):
        members = [[j for j in segment if j < n and keep[row, j]] for segment in segments(rank, 12)]
        members = [segment for segment in members if segment]
        keys, values = (torch.stack([x[row][:, m].amax(1) for m in members], 1) for x in (k, v))
        counts = torch.tensor([len(m) for m in members], dtype=torch.float64)
        weights = (0.6 * q[row] @ keys.transpose(-1, -2) + counts.log()).softmax(-1)
        assert_close(actual[row], weights @ values, 1e-6, f"row {row}")


# ---- ranks per head and layer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["linear", "mean", "max"])
def test_each_head_has_its_own_rank(projection: str) -> None:
    """Head h equals a module of rank head_ranks[h], also after its spare slots' parameters were moved."""
    ranks, n = (6, 1, 4, 6), 14
    assert len(ranks) == HEADS
    sharing = "none" if projection == "linear" else None
    mechanism = linformer(n, rank=6, sharing=sharing, projection=projection, head_ranks=ranks)
    q, k, v = heads(2, HEADS, n, WIDTH)
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[1, 9:] = False
    context = AttentionContext(is_causal=False, scaling=0.6, key_padding_mask=keep)
    with torch.no_grad():
        for parameter in mechanism.parameters():
            for head, rank in enumerate(ranks):
                parameter[head, rank:] += 1.0
    actual = mechanism(q, k, v, context)
    for head, rank in enumerate(ranks):
        alone = linformer(n, rank=rank, sharing=sharing, projection=projection)
        expected = alone(q, k, v, context)[:, head]
        assert_close(actual[:, head], expected, 1e-9, f"head {head}")


def test_each_layer_has_its_own_rank() -> None:
    model = tiny_model("bert", positions=64)
    inputs = inputs_for(model, length=64)
    with he.patch_attention(model, "linformer", rank=(64, 8)):
        shapes = [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("key_projection")]
        mixed = model(**inputs).logits
    assert shapes == [(1, 64, 64), (1, 8, 64)]
    with he.patch_attention(model, "linformer", rank=8, layers=(1,)):
        # a layer of rank = length is exact
        assert_close(mixed, model(**inputs).logits, 1e-5, where=inputs["attention_mask"])


# ---- convolution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("sharing", ["none", "headwise", "kv", "layerwise"])
@pytest.mark.parametrize("n", [1, 10, 12])
def test_convolution_equals_its_formula(n: int, sharing: str, with_bias: bool) -> None:
    rank, max_length = 3, 12
    size = max_length // rank
    mechanism = linformer(max_length, rank=rank, sharing=sharing, projection="conv")
    with torch.no_grad():
        for seed, parameter in enumerate(mechanism.parameters()):
            parameter.copy_(heads(*parameter.shape, seed=seed, count=1)[0])
    q, k, v = heads(4, HEADS, n, WIDTH)
    keep = torch.ones(4, n, dtype=torch.bool)
    keep[1, n - n // 3 :] = False
    keep[2, 1::3] = False
    keep[3] = False
    table, bias = clipped_bias(n)
    context = AttentionContext(
        is_causal=False, scaling=0.6, key_padding_mask=keep, relative_bias=table if with_bias else None
    )
    kernels = [
        getattr(mechanism, name, mechanism.key_projection).expand(HEADS, -1, -1)
        for name in ("key_projection", "value_projection")
    ]
    expected = torch.zeros_like(q)
    for b, h in ((b, h) for b in range(3) for h in range(HEADS)):
        slots = []
        for start in range(0, n, size):
            real = [j for j in range(start, min(start + size, n)) if keep[b, j]]
            if real:
                key, value = (
                    sum(w[h, j - start] * x[b, h, j] for j in real) * size / len(real)
                    for w, x in zip(kernels, (k, v), strict=True)
                )
                slots.append((key, value, real))
        for i in range(n):
            logits = [
                0.6 * q[b, h, i] @ key + math.log(len(real)) + (bias[h, i, real].mean() if with_bias else 0.0)
                for key, _, real in slots
            ]
            weights = torch.softmax(torch.stack(logits), 0)
            expected[b, h, i] = sum(w * slot[1] for w, slot in zip(weights, slots, strict=True))
    # counts are taken in fp32
    assert_close(mechanism(q, k, v, context), expected, 1e-6)


def test_convolution_starts_as_means_of_segments() -> None:
    q, k, v = heads(2, HEADS, 11, WIDTH)
    context = AttentionContext(is_causal=False, scaling=0.6)
    outputs = [linformer(12, rank=4, projection=p)(q, k, v, context) for p in ("conv", "mean")]
    assert_close(*outputs, 1e-6)


# ---- longer inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_interpolation_equals_the_formula_of_the_stretched_projection(with_bias: bool) -> None:
    """Each row by its own length: rows of at most max_length tokens are what they are alone."""
    rank, max_length, n = 3, 8, 19
    mechanism = linformer(max_length, rank=rank, interpolate=True)
    with torch.no_grad():
        for seed, parameter in enumerate(mechanism.parameters()):
            parameter.copy_(heads(*parameter.shape, seed=seed, count=1)[0])
    q, k, v = heads(3, HEADS, n, WIDTH)
    keep = torch.ones(3, n, dtype=torch.bool)
    keep[1, 13:] = False
    keep[2, 7:] = False
    table, bias = clipped_bias(n)
    context = AttentionContext(
        is_causal=False, scaling=0.6, key_padding_mask=keep, relative_bias=table if with_bias else None
    )
    actual = mechanism(q, k, v, context)
    sizes = [len(segment) for segment in segments(rank, max_length)]
    for row, length in enumerate((19, 13, 7)):
        E, F = (
            torch.nn.functional.interpolate(p.detach(), length, mode="linear") if length > max_length else p.detach()
            for p in (mechanism.key_projection, mechanism.value_projection)
        )
        grown = [size * max(1.0, length / max_length) for size in sizes]
        one = [x[row : row + 1, :, :length] for x in (q, k, v)]
        expected = linformer_by_formula(
            *one,
            E.expand(HEADS, -1, -1),
            F.expand(HEADS, -1, -1),
            torch.ones(1, length, dtype=torch.bool),
            grown,
            bias[:, :length, :length] if with_bias else None,
        )
        assert_close(actual[row : row + 1, :, :length], expected, 1e-6, f"row of {length}")


def test_a_projection_may_be_shorter_than_the_positions_of_a_model_if_it_is_stretched() -> None:
    model = tiny_model("bert", positions=64)
    inputs = inputs_for(model, length=64)
    with he.patch_attention(model, "linformer", rank=8, max_length=32, interpolate=True):
        shapes = [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("key_projection")]
        assert shapes == [(1, 8, 32)] * 2
        assert model(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match="max_length=32 is below the 64 positions of the model"):
        he.patch_attention(model, "linformer", rank=8, max_length=32)


@pytest.mark.parametrize(
    ("family", "options"),
    [("t5", dict(max_length=128)), ("t5", dict(max_length=128, projection="mean")),
     ("bert", dict(sharing="none", head_ranks=(16, 3, 8, 16)))],
)  # fmt: skip
def test_slots_without_tokens_are_finite_in_fp16(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, positions=128).half()
    inputs = inputs_for(model, length=5)
    with he.patch_attention(model, "linformer", rank=16, **options):
        logits = model(**inputs).logits
        logits[inputs["attention_mask"].bool()].float().square().mean().backward()
        assert logits.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_longer_inputs_need_interpolate() -> None:
    q, k, v = heads(1, HEADS, 13, WIDTH)
    context = AttentionContext(is_causal=False, scaling=0.6)
    with pytest.raises(ValueError, match=r"13 tokens.*max_length=12.*larger max_length or with interpolate=True"):
        linformer(12, rank=4)(q, k, v, context)
    assert linformer(12, rank=4, projection="mean", interpolate=True)(q, k, v, context).isfinite().all()


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=(4, 0)), r"rank=\(4, 0\) is not possible; it must be integers ≥ 1"),
        (dict(interpolate=True, projection="conv"), "interpolate=True is not possible"),
        (dict(head_ranks=(4, 4, 4, 4)), r"head_ranks=.*with sharing='none'"),
        (dict(head_ranks=(4, 4, 4, 4), projection="conv", sharing="none"), "head_ranks=.*projection 'mean' or 'max'"),
        (dict(rank=(4, 8), sharing="layerwise"), "rank=.*one number with sharing='layerwise'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinformerAttentionConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=(4, 4, 4)), "rank names 3 layers, but the encoder has 2"),
        (dict(rank=8, sharing="none", head_ranks=(8, 8)), r"head_ranks=\[8, 8\] must be 4 numbers"),
        (dict(rank=8, sharing="none", head_ranks=(8, 8, 8, 9)), "each at most rank=8"),
        (dict(rank=24, projection="conv"), "rank=24 must divide max_length=64"),
        (dict(rank=65), "rank=65 exceeds max_length=64"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        he.patch_attention(tiny_model("bert", positions=64), "linformer", **options)
