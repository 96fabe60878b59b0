"""Clustered attention against its definition, the gradients the paper states, and the tiles that queries are sorted into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formulas import HEADS, WIDTH, geometry, heads
from torch import Tensor

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.attention.clustered import ClusteredAttention
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.query_clusters import cluster_queries, tiles_of_groups
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patching.dispatch import aligned_call
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.testing import assert_close

SCALE = 0.6


def mechanism_of(**options: Any) -> ClusteredAttention:
    config: Any = attention_config("clustered", **options)
    return ClusteredAttention(config, geometry()).double()


def context_of(keep: Tensor | None = None, bias: RelativeBias | None = None) -> AttentionContext:
    return AttentionContext(is_causal=False, scaling=SCALE, key_padding_mask=keep, relative_bias=bias)


def masks(n: int) -> Tensor:
    """Padding nowhere, on both sides, in the middle, everywhere."""
    keep = torch.ones(4, n, dtype=torch.bool)
    keep[1, : n // 4], keep[1, n - n // 3 :] = False, False
    keep[2, 1:-1:3] = False
    keep[3] = False
    return keep


def bias_of(n: int) -> tuple[Tensor, RelativeBias, Tensor]:
    """A table, its lazy form, and (H, N, N); asymmetric, so that a sign error shows."""
    table = heads(9, HEADS, seed=8, count=1)[0].requires_grad_()
    ids = (torch.arange(n) - torch.arange(n)[:, None]).clamp(-4, 4) + 4
    return table, RelativeBias(table, lambda offsets: offsets.clamp(-4, 4) + 4, 4), table[ids].movedim(-1, 0)


def k_means(x: Tensor, count: int, iterations: int) -> Tensor:
    """Labels of the (L, D) real queries of one row and head, one query at a time."""
    centres = [x[c * len(x) // count] for c in range(count)]
    labels: list[int] = []
    for step in range(iterations + 1):
        labels = [min(range(count), key=lambda c: float((q - centres[c]).square().sum())) for q in x]
        if step < iterations:
            groups = [[q for q, label in zip(x, labels, strict=True) if label == c] for c in range(count)]
            centres = [torch.stack(g).mean(0) if g else old for g, old in zip(groups, centres, strict=True)]
    return torch.tensor(labels)


def by_formula(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
    """The docstring, one query at a time."""
    config, out = m.config, torch.zeros_like(q)
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        real = keep[b].nonzero().flatten()
        if not len(real):
            continue
        labels = k_means(q[b, h, real].detach(), config.num_clusters, config.steps)
        own = SCALE * q[b, h, real] @ k[b, h, real].T
        if bias is not None:
            own = own + bias[h][real][:, real]
        for place, i in enumerate(real.tolist()):
            shared = own[labels == labels[place]].mean(0).softmax(0)
            top = shared.argsort(descending=True)[: config.top_k]
            others = torch.ones(len(real), dtype=torch.bool)
            others[top] = False
            mine = own[place, top].softmax(0) @ v[b, h, real[top]]
            out[b, h, i] = shared[top].sum() * mine + shared[others] @ v[b, h, real[others]]
    return out


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("n", "options"),
    [
        (37, dict(num_clusters=3, top_k=4)),
        (37, dict(num_clusters=5, top_k=0)),
        (37, dict(num_clusters=1, top_k=6)),
        (23, dict(num_clusters=40, top_k=3, iterations=1)),
        (2, dict(num_clusters=3, top_k=1)),
        (1, dict(num_clusters=2, top_k=0)),
    ],
    ids=str,
)
def test_equals_its_definition(n: int, options: dict[str, Any], with_bias: bool) -> None:
    """Padding left, right, in the middle and all over; and gradients of queries, keys, values and the table."""
    mechanism = mechanism_of(**options)
    q, k, v = (x.requires_grad_() for x in heads(4, HEADS, n, WIDTH))
    keep = masks(n)
    table, lazy, dense = bias_of(n)
    actual = aligned_call(mechanism, q, k, v, context_of(keep, lazy if with_bias else None))
    expected = by_formula(mechanism, q, k, v, keep, dense if with_bias else None)
    assert_close(actual, expected, 1e-9)
    assert (actual.transpose(1, 2)[~keep] == 0).all(), "padded queries give 0"
    upstream = heads(*q.shape, seed=3, count=1)[0]
    leaves = {"q": q, "k": k, "v": v, **({"table": table} if with_bias else {})}
    gradients = [
        torch.autograd.grad((out * upstream).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    ]
    for name, one, other in zip(leaves, *gradients, strict=True):
        # a row of two tokens has a softmax over one key: gradients that are 0 up to rounding
        assert (one - other).abs().max() <= 1e-9 * max(1.0, float(other.abs().max())), f"gradient of {name}"


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("n", [1, 2, 63, 97])
def test_exact_where_all_keys_are_top_keys(n: int, with_bias: bool) -> None:
    """For any clustering; gradients included."""
    q, k, v = (x.requires_grad_() for x in heads(3, HEADS, n, WIDTH))
    keep = masks(n)[:3]
    keep[1, n // 2] = True
    keep[2, 0] = True
    table, lazy, dense = bias_of(n)
    logits = SCALE * q @ k.transpose(-1, -2) + (dense if with_bias else 0.0)
    expected = logits.masked_fill(~keep[:, None, None], float("-inf")).softmax(-1) @ v
    expected = expected * keep[:, None, :, None]
    actual = mechanism_of(num_clusters=4, top_k=n)(q, k, v, context_of(keep, lazy if with_bias else None))
    assert_close(actual, expected, 1e-12)
    leaves = [q, k, v] + ([table] if with_bias else [])
    upstream = heads(*q.shape, seed=3, count=1)[0]
    for one, other in zip(
        *(torch.autograd.grad((out * upstream).sum(), leaves) for out in (actual, expected)), strict=True
    ):
        assert (one - other).abs().max() <= 1e-12 * max(1.0, float(other.abs().max()))


def test_plain_form_is_exact_with_a_cluster_for_every_query() -> None:
    q, k, v = heads(2, HEADS, 19, WIDTH)
    actual = mechanism_of(num_clusters=19, top_k=0)(q, k, v, context_of())
    assert_close(actual, (SCALE * q @ k.transpose(-1, -2)).softmax(-1) @ v, 1e-12)


def test_top_keys_bring_the_output_closer() -> None:
    """The paper's claim (§3.3): the improved form is never further from full attention, row of weights by row."""
    n = 48
    q, k, _ = heads(2, HEADS, n, n)
    # values that are unit vectors show the weights themselves
    v = torch.eye(n, dtype=torch.float64).expand(2, HEADS, n, n)
    exact = (SCALE * q @ k.transpose(-1, -2)).softmax(-1)
    errors = [(mechanism_of(num_clusters=4, top_k=t)(q, k, v, context_of()) - exact).abs() for t in (0, 8, 24, n)]
    sums = [error.sum(-1) for error in errors]
    assert all((b <= a + 1e-12).all() for a, b in zip(sums[:1] * 3, sums[1:], strict=True))
    means = [float(x.mean()) for x in sums]
    assert means == sorted(means, reverse=True) and means[-1] < 1e-12 < 0.5 * means[0]


def test_the_plain_gradient_reaches_queries_through_means_alone() -> None:
    """Members of a cluster share one gradient, 1 / |c| of that of their mean."""
    n, count = 30, 3
    q, k, v = (x.requires_grad_() for x in heads(1, 1, n, WIDTH))
    mechanism = ClusteredAttention(
        he.ClusteredAttentionConfig(num_clusters=count, top_k=0), geometry(num_heads=1)
    ).double()
    out = mechanism(q, k, v, context_of())
    upstream = heads(*q.shape, seed=3, count=1)[0]
    (gradient,) = torch.autograd.grad((out * upstream).sum(), q)
    labels = cluster_queries(q, torch.ones(1, n, dtype=torch.bool), count, mechanism.config.steps)[0, 0]
    for c in range(count):
        own = labels == c
        mean = q[0, 0, own].mean(0).detach().requires_grad_()
        shared = (SCALE * mean @ k[0, 0].T).softmax(-1) @ v[0, 0]
        (expected,) = torch.autograd.grad((shared * upstream[0, 0, own].sum(0)).sum(), mean)
        assert_close(gradient[0, 0, own], (expected / own.sum()).expand(int(own.sum()), -1), 1e-9)


# ---- clusters and tiles --------------------------------------------------------------------------------------------


def test_clusters_neither_see_padding_nor_other_rows() -> None:
    n, count = 41, 5
    x = heads(1, HEADS, n, WIDTH, count=1)[0]
    alone = cluster_queries(x, torch.ones(1, n, dtype=torch.bool), count, 4)
    batch = heads(3, HEADS, n + 20, WIDTH, seed=1, count=1)[0] * 100
    keep = torch.ones(3, n + 20, dtype=torch.bool)
    for row, start in enumerate((0, 20)):
        keep[row] = False
        keep[row, start : start + n] = True
        batch[row, :, start : start + n] = x[0]
    labels = cluster_queries(batch, keep, count, 4)
    for row, start in enumerate((0, 20)):
        assert torch.equal(labels[row, :, start : start + n], alone[0])
        assert (labels[row][:, ~keep[row]] == count).all()


def test_a_group_that_lost_its_queries_keeps_its_centre() -> None:
    """Both first centres are 4, and the first group takes all; its mean is 2.75 then, and the second one gets its 4s."""
    x = torch.tensor([4.0, 1.0, 4.0, 2.0])[None, None, :, None]
    labels = [cluster_queries(x, torch.ones(1, 4, dtype=torch.bool), 2, i)[0, 0].tolist() for i in (0, 1)]
    assert labels == [[0, 0, 0, 0], [1, 0, 1, 0]]


def test_k_means_lowers_the_distance_to_the_means() -> None:
    x = heads(2, HEADS, 200, WIDTH, count=1)[0]
    keep = torch.ones(2, 200, dtype=torch.bool)
    spreads = []
    for iterations in (0, 1, 3, 10):
        labels = cluster_queries(x, keep, 8, iterations)
        members = torch.nn.functional.one_hot(labels, 8).double().transpose(-1, -2)
        means = members @ x / members.sum(-1, keepdim=True).clamp(min=1)
        spreads.append(float((x - members.transpose(-1, -2) @ means).square().sum()))
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 0.95 * spreads[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_clustered_in_fp32(dtype: torch.dtype) -> None:
    """Also under autocast, which would round the distances."""
    x = heads(2, HEADS, 63, WIDTH, count=1)[0].to(dtype)
    keep = torch.ones(2, 63, dtype=torch.bool)
    expected = cluster_queries(x.float(), keep, 6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cluster_queries(x, keep, 6, 3), expected)


@pytest.mark.parametrize("top_k", [0, 8])
def test_half_precision_is_as_close_as_that_of_full_attention(top_k: int) -> None:
    """For the same heads, so that the same queries are put together."""
    q, k, v = (x.bfloat16() for x in heads(2, HEADS, 96, WIDTH))
    mechanism = mechanism_of(num_clusters=6, top_k=top_k)
    expected = mechanism(*(x.float() for x in (q, k, v)), context_of())
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE).float()
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.float() for x in (q, k, v)), scale=SCALE)
    allowed = 3 * float((stock - exact).square().mean().sqrt())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mechanism(q, k, v, context_of())
    for actual in (mechanism(q, k, v, context_of()), mixed):
        assert actual.dtype == torch.bfloat16
        assert float((actual.float() - expected).square().mean().sqrt()) <= allowed


@pytest.mark.parametrize(("n", "count", "size"), [(37, 4, 8), (5, 9, 4), (1, 1, 16), (64, 3, 1)])
def test_every_query_has_one_slot_in_a_tile_of_its_group(n: int, count: int, size: int) -> None:
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(0, count + 1, (2, 3, n), generator=generator)
    labels[0, 0] = 0  # all in one group
    labels[0, 1] = count  # all padding
    member, group, place = tiles_of_groups(labels, count, size)
    assert member.shape[-2:] == (n // size + min(count, n), size)
    for b, h in ((b, h) for b in range(2) for h in range(3)):
        real = labels[b, h] < count
        slots = place[b, h, real]
        assert len(slots.unique()) == len(slots)
        assert torch.equal(member[b, h].flatten()[slots], real.nonzero().flatten())
        assert torch.equal(group[b, h, slots // size], labels[b, h, real])
        assert (place[b, h, ~real] == member[b, h].numel()).all()


def test_equal_queries_are_one_cluster_and_exact() -> None:
    """Groups without members, of which all but one are here, must not leave NaN behind."""
    q, k, v = heads(2, HEADS, 12, WIDTH)
    q = q[:, :, :1].expand(-1, -1, 12, -1).clone().requires_grad_()
    for top_k in (0, 3):
        out = mechanism_of(num_clusters=5, top_k=top_k)(q, k, v, context_of())
        assert_close(out, (SCALE * q @ k.transpose(-1, -2)).softmax(-1) @ v, 1e-12)
        (gradient,) = torch.autograd.grad(out.sum(), q)
        assert gradient.isfinite().all()


def test_no_tensor_holds_all_pairs_or_a_copy_of_keys_for_every_query() -> None:
    n, top_k = 2048, 32
    q, k, v = (x.requires_grad_() for x in heads(1, HEADS, n, WIDTH))
    mechanism = mechanism_of(num_clusters=16, top_k=top_k)
    with LargestTensor() as recorder:
        mechanism(q, k, v, context_of()).sum().backward()
    # queries, keys and values of tiles
    assert recorder.numel <= HEADS * n * 4 * top_k < HEADS * n * top_k * WIDTH < HEADS * n * n


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_clusters=0), "num_clusters=0 is not possible; it must be an integer ≥ 1"),
        (dict(top_k=-1), "top_k=-1 is not possible; it must be an integer ≥ 0"),
        (dict(iterations=1.5), "iterations=1.5 is not possible; it must be an integer ≥ 0"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        he.ClusteredAttentionConfig(**options)
