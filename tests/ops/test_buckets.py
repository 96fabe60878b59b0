"""Attention by content labels against its definition, pair by pair, and the cache layer that keeps labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bucket_cases import defined, defined_pairs
from formulas import heads
from torch import Tensor

from hf_efficient.cache.buckets import BucketLayer, labels_of_all
from hf_efficient.ops import bucket_attention as buckets
from hf_efficient.ops.bucket_attention import bucket_attention, paired_attention
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.testing import assert_close

HEADS, WIDTH, REACH = 3, 4, 6
SCALING = 0.6


def labels_of(batch: int, n: int, rounds: int, count: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (batch, HEADS, rounds, n), generator=generator)


def padded(n: int) -> Tensor:
    """(5, N): a full row, padding left, right, in the middle, and a row of padding."""
    keep = torch.ones(5, n, dtype=torch.bool)
    keep[1, : n // 4] = keep[2, n - n // 3 :] = keep[3, 1::3] = keep[4] = False
    return keep


def bias_of(n: int) -> tuple[RelativeBias, Tensor, Tensor]:
    """Lazy, dense, and the table of both."""
    table = (2 * heads(2 * REACH + 1, HEADS, seed=8, count=1)[0]).requires_grad_()
    ids = (torch.arange(n) - torch.arange(n)[:, None]).clamp(-REACH, REACH) + REACH
    lazy = RelativeBias(table, lambda offsets: offsets.clamp(-REACH, REACH) + REACH, REACH)
    return lazy, table[ids].movedim(-1, 0), table


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = SCALING * q @ k.transpose(-1, -2)
    logits = logits if bias is None else logits + bias
    weights = torch.where(seen, (logits - logits.amax(-1, keepdim=True)).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0) @ v


def context_of(is_causal: bool, keep: Tensor | None = None, bias: Any = None, **facts: Any) -> AttentionContext:
    return AttentionContext(is_causal=is_causal, scaling=SCALING, key_padding_mask=keep, relative_bias=bias, **facts)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("n", "rounds", "count", "size", "near"),
    [
        (1, 1, 3, 4, 0),
        (2, 2, 2, 1, 2),
        (17, 4, 3, 12, 4),
        (63, 1, 1, 6, 0),
        (63, 3, 4, 8, 6),
        (97, 4, 5, 10, 0),
        (97, 2, 3, 7, 8),
        (97, 4, 40, 3, 2),
    ],
)
def test_equals_its_definition(
    n: int, rounds: int, count: int, size: int, near: int, is_causal: bool, with_bias: bool
):
    """Padding everywhere; output, gradients of queries, keys and values, and of the table of relative biases."""
    keep, labels = padded(n), labels_of(5, n, rounds, count)
    q, k, v = (x.requires_grad_() for x in heads(5, HEADS, n, WIDTH))
    lazy, dense, table = bias_of(n)
    context = context_of(is_causal, keep, lazy if with_bias else None)
    actual = bucket_attention(q, k, v, labels, size=size, near=near, context=context)
    seen = defined(labels, keep, size, near, is_causal)
    expected = masked_softmax(q, k, v, seen, dense if with_bias else None)
    assert_close(actual, expected, 1e-12)
    assert (actual[~seen.any(-1)] == 0).all(), "a query that sees nothing"
    upstream = heads(*q.shape, seed=3, count=1)[0]
    leaves = {"q": q, "k": k, "v": v} | ({"table": table} if with_bias else {})
    gradients = [torch.autograd.grad((out * upstream).sum(), list(leaves.values())) for out in (actual, expected)]
    for name, one, other in zip(leaves, *gradients, strict=True):
        assert one.isfinite().all()
        assert (one - other).abs().max() <= 1e-11 * max(1.0, other.abs().max()), f"gradient of {name}"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("most", [10**9, 2**33])
def test_sizes_beyond_all_codes_show_all_of_a_label(most: int, is_causal: bool):
    """As sizes of the whole text do, and no padding."""
    n = 63
    keep, labels = padded(n), labels_of(5, n, 2, 4)
    q, k, v = heads(5, HEADS, n, WIDTH)
    for near in (0, most):
        actual = bucket_attention(q, k, v, labels, size=most, near=near, context=context_of(is_causal, keep))
        seen = defined(labels, keep, 2 * n, min(near, 2 * n), is_causal)
        assert_close(actual, masked_softmax(q, k, v, seen), 1e-12)
        if is_causal:
            last = context_of(is_causal, keep, query_offset=n - 3)
            step = bucket_attention(q[:, :, -3:], k, v, labels, size=most, near=near, context=last)
            assert_close(step.transpose(1, 2), actual[:, :, -3:].transpose(1, 2), 1e-12, where=keep[:, -3:])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("n", "rounds", "count", "size", "near", "before"),
    [
        (1, 1, 2, 3, 0, 1),
        (2, 2, 2, 1, 0, 0),
        (17, 3, 3, 9, 4, 1),
        (63, 1, 1, 6, 4, 2),
        (97, 4, 4, 10, 0, 0),
        (97, 2, 30, 7, 6, 1),
        (97, 3, 3, 6, 2, 4),
        (97, 1, 5, 12, 0, 9),
    ],
)
def test_paired_chunks_equal_their_definition(
    n: int, rounds: int, count: int, size: int, near: int, before: int, with_bias: bool
):
    """As above; queries and keys with labels of their own. Rows of few real tokens have fewer chunks than are shown."""
    keep, labels = padded(n), [labels_of(5, n, rounds, count, seed) for seed in (5, 6)]
    q, k, v = (x.requires_grad_() for x in heads(5, HEADS, n, WIDTH))
    lazy, dense, table = bias_of(n)
    context = context_of(False, keep, lazy if with_bias else None)
    actual = paired_attention(q, k, v, *labels, size=size, near=near, context=context, chunks_before=before)
    seen = defined_pairs(*labels, keep, size, near, before)
    expected = masked_softmax(q, k, v, seen, dense if with_bias else None)
    upstream = heads(*q.shape, seed=3, count=1)[0]
    # queries of padding see no keys that matter to anyone
    real = keep[:, None, :, None]
    assert_close(actual * real, expected * real, 1e-12)
    leaves = {"q": q, "k": k, "v": v} | ({"table": table} if with_bias else {})
    gradients = [
        torch.autograd.grad((out * upstream * real).sum(), list(leaves.values())) for out in (actual, expected)
    ]
    for name, one, other in zip(leaves, *gradients, strict=True):
        assert (one - other).abs().max() <= 1e-11 * max(1.0, other.abs().max()), f"gradient of {name}"


@pytest.mark.parametrize(("n", "size"), [(1, 4), (13, 8), (63, 5), (97, 3)])
@pytest.mark.parametrize("form", ["causal", "encoder", "paired"])
def test_own_key_comes_last(form: str, n: int, size: int):
    """Seen by those queries alone that see no other key: few tokens have a label, and some have one for themselves."""
    keep, labels = padded(n), labels_of(5, n, 2, max(2, n // 3))
    q, k, v = (x.requires_grad_() for x in heads(5, HEADS, n, WIDTH))
    context, facts = context_of(form == "causal", keep), dict(size=size, near=0, own_last=True)
    if form == "paired":
        actual = paired_attention(q, k, v, labels, labels, context=context, **facts)
        seen = defined_pairs(labels, labels, keep, size, 0)
    else:
        actual = bucket_attention(q, k, v, labels, context=context, **facts)
        seen = defined(labels, keep, size, 0, form == "causal")
    others = seen & ~torch.eye(n, dtype=torch.bool)
    own = torch.eye(n, dtype=torch.bool) & keep[:, None, None]
    seen = torch.where(others.any(-1, keepdim=True), others, own)
    real = keep[:, None, :, None]
    expected = masked_softmax(q, k, v, seen)
    assert n == 1 or form == "paired" or 0 < (others.any(-1) & keep[:, None]).sum() < keep.sum() * HEADS
    assert_close(actual * real, expected * real, 1e-12)
    upstream = heads(*q.shape, seed=3, count=1)[0] * real
    for one, other in zip(
        *(torch.autograd.grad((x * upstream).sum(), (q, k, v)) for x in (actual, expected)), strict=True
    ):
        assert (one - other).abs().max() <= 1e-11 * max(1.0, other.abs().max())


@pytest.mark.parametrize("is_causal", [False, True])
def test_groups_of_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, is_causal: bool):
    q, k, v = heads(2, HEADS, 163, WIDTH)
    labels, facts = labels_of(2, 163, 2, 3), dict(size=8, near=4, context=context_of(is_causal))
    expected = bucket_attention(q, k, v, labels, **facts)
    monkeypatch.setattr(buckets, "MASK_BUDGET", 1)
    assert_close(bucket_attention(q, k, v, labels, **facts), expected, 1e-12)


def test_a_pair_seen_in_every_round_counts_once():
    """Equal labels in all rounds are one round; and they must not be two."""
    q, k, v = heads(1, HEADS, 61, WIDTH)
    one = labels_of(1, 61, 1, 3)
    facts = dict(size=8, near=0, context=context_of(False))
    expected = bucket_attention(q, k, v, one, **facts)
    assert_close(bucket_attention(q, k, v, one.expand(-1, -1, 4, -1), **facts), expected, 1e-12)


@pytest.mark.parametrize("near", [0, 6])
def test_no_query_depends_on_later_tokens(near: int):
    """Another label, query, key and value at token t: bit-equal rows before it, and a change at t."""
    q, k, v = heads(1, HEADS, 97, WIDTH)
    labels, context = labels_of(1, 97, 3, 4), context_of(True)
    expected = bucket_attention(q, k, v, labels, size=6, near=near, context=context)
    for t in (0, 15, 16, 50, 96):
        changed = labels.clone()
        changed[..., t] = (changed[..., t] + 1) % 4
        edited = [x.clone() for x in (q, k, v)]
        for x in edited:
            x[:, :, t] += 1.0
        actual = bucket_attention(*edited, changed, size=6, near=near, context=context)
        assert_close(actual[:, :, :t] if t else expected[:, :, :1], expected[:, :, : max(t, 1)], 1e-14)
        assert not torch.allclose(actual[:, :, t], expected[:, :, t])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("size", "near", "own_last"), [(4, 0, False), (5, 6, False), (30, 2, False), (4, 0, True)])
@pytest.mark.parametrize("new", [1, 2, 40])
def test_decoding_equals_one_call(new: int, size: int, near: int, own_last: bool, with_bias: bool):
    """Few of the keys can be visible, or all; more new tokens than are handled at once; padded rows."""
    n = 97
    q, k, v = heads(4, HEADS, n, WIDTH)
    keep, labels = padded(n)[:4], labels_of(4, n, 3, 40 if own_last else 4)
    keep[2, -new:] = True
    bias = bias_of(n)[0] if with_bias else None
    context = context_of(True, keep, bias)
    facts: dict[str, Any] = dict(size=size, near=near, own_last=own_last)
    expected = bucket_attention(q, k, v, labels, context=context, **facts)[:, :, -new:]
    context = context_of(True, keep, bias, query_offset=n - new)
    actual = bucket_attention(q[:, :, -new:], k, v, labels, context=context, **facts)
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-12, where=keep[:, -new:])


def test_cost_of_a_step_is_that_of_the_visible_keys():
    """Nothing of S · D elements: O(R · S) labels, and copies of R · size + near keys."""
    s, width = 4096, 32
    q, k, v = (torch.randn(1, 2, s, width) for _ in range(3))
    labels = torch.randint(8, (1, 2, 2, s))
    with LargestTensor() as recorder:
        bucket_attention(q[:, :, -1:], k, v, labels, size=16, near=8, context=context_of(True, query_offset=s - 1))
    assert recorder.numel <= 2 * 2 * s, recorder.shape


@pytest.mark.parametrize("with_bias", [False, True])
def test_memory_grows_linearly_forward_and_backward(with_bias: bool):
    sizes = []
    for n in (512, 2048):
        q, k, v = (x.requires_grad_() for x in heads(1, HEADS, n, WIDTH))
        context = context_of(True, None, bias_of(1)[0] if with_bias else None)
        with LargestTensor() as recorder:
            bucket_attention(q, k, v, labels_of(1, n, 2, 8), size=16, near=8, context=context).sum().backward()
        sizes.append(recorder.numel)
    assert sizes[1] <= 4.5 * sizes[0], sizes


def test_compiles_as_one_graph():
    q, k, v = (x.float().requires_grad_() for x in heads(2, HEADS, 97, WIDTH))
    labels, keep = labels_of(2, 97, 2, 4), padded(97)[1:3]

    def mix(*tokens: Tensor) -> Tensor:
        return bucket_attention(*tokens, labels, size=8, near=4, context=context_of(False, keep))

    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (mix, compiled):
        out = function(q, k, v)
        gradients.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for expected, actual in zip(*gradients, strict=True):
        assert_close(actual, expected, 1e-5)


def test_wrong_labels_and_encoders_with_a_cache_are_refused():
    q, k, v = heads(1, HEADS, 9, WIDTH)
    facts = dict(size=4, near=0, context=context_of(False))
    with pytest.raises(ValueError, match=r"must be \(1, 3, 'rounds', 9\)"):
        bucket_attention(q, k, v, labels_of(1, 8, 2, 3), **facts)
    with pytest.raises(ValueError, match="only causal"):
        bucket_attention(q[:, :, 1:], k, v, labels_of(1, 9, 2, 3), **facts)
    with pytest.raises(ValueError, match="can't be causal"):
        paired_attention(q, k, v, *(labels_of(1, 9, 2, 3),) * 2, size=4, near=0, context=context_of(True))
    with pytest.raises(ValueError, match="own_last needs near=0"):
        bucket_attention(q, k, v, labels_of(1, 9, 2, 3), size=4, near=2, context=context_of(True), own_last=True)


# ---- the cache layer ---------------------------------------------------------------------------------------------


def layer_of(batch: int, n: int, labels: Tensor) -> BucketLayer:
    layer = BucketLayer()
    layer.prepare(torch.zeros(batch, dtype=torch.long), None)
    k, v = heads(batch, HEADS, n, WIDTH, count=2)
    layer.update(k, v)
    assert torch.equal(layer.append(labels), labels)
    return layer


def test_cache_layer_keeps_every_key_and_its_label():
    """More tokens than bounded layers hold at once; selections of rows and crops take the labels along."""
    n = 300
    labels = labels_of(3, n, 2, 5)
    layer = layer_of(3, n, labels)
    assert layer.keys.shape[2] == n and layer.key_positions is None
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.state.labels, labels[[2, 0, 0]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.state.labels, labels[[2, 2, 0, 0, 0, 0]])
    layer.batch_select_indices(torch.tensor([0, 3]))
    layer.crop(-250)
    assert layer.keys.shape[2] == layer.get_seq_length() == 50
    assert torch.equal(layer.state.labels, labels[[2, 0], ..., :50])
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.append(labels[:2, ..., :1])[..., 50:], labels[:2, ..., :1])
    layer.reset()
    assert layer.state is None


def test_old_tokens_without_labels_are_refused():
    with pytest.raises(ValueError, match="7 keys, but labels of 2 tokens"):
        labels_of_all(labels_of(1, 2, 1, 3), 7, context_of(True))
    layer = layer_of(1, 5, labels_of(1, 5, 1, 3))
    assert labels_of_all(labels_of(1, 2, 1, 3), 7, context_of(True, recurrent=layer)).shape[-1] == 7
