"""Sinkhorn attention against its definition, its balancing and learned choice, and the cache that decodes it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from formulas import HEADS, WIDTH, geometry, heads
from torch import Tensor
from transformers import DynamicCache

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.attention.sinkhorn import SinkhornAttention
from hf_efficient.cache.block_queries import BlockStartLayer
from hf_efficient.ops.block_sorting import best_blocks, log_shares
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patching.dispatch import aligned_call
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.testing import assert_close, inputs_for, tiny_model

SCALE = 0.6


def mechanism_of(is_causal: bool = False, moved: bool = False, **options: Any) -> SinkhornAttention:
    config: Any = attention_config("sinkhorn", **options)
    assert not SinkhornAttention.unsupported(config, geometry(is_causal=is_causal))
    mechanism = SinkhornAttention(config, geometry(is_causal=is_causal)).double()
    mechanism.reset_parameters()
    if moved:
        with torch.no_grad():
            mechanism.sort_weight.add_(0.5 * heads(HEADS, WIDTH, WIDTH, seed=5, count=1)[0])
    return mechanism


def context_of(is_causal: bool, keep: Tensor | None = None, bias: RelativeBias | None = None) -> AttentionContext:
    return AttentionContext(is_causal=is_causal, scaling=SCALE, key_padding_mask=keep, relative_bias=bias)


def masks(n: int) -> Tensor:
    """Padding nowhere, on both sides, in the middle (with a whole block of it), everywhere."""
    keep = torch.ones(4, n, dtype=torch.bool)
    keep[1, : n // 4], keep[1, n - n // 5 :] = False, False
    keep[2, 3 * n // 8 : 5 * n // 8] = False
    keep[2, ::5] = False
    keep[3] = False
    return keep


def bias_of(n: int) -> tuple[Tensor, RelativeBias, Tensor]:
    """A table, its lazy form, and (H, N, N)."""
    table = heads(9, HEADS, seed=8, count=1)[0].requires_grad_()
    ids = (torch.arange(n) - torch.arange(n)[:, None]).clamp(-4, 4) + 4
    return table, RelativeBias(table, lambda offsets: offsets.clamp(-4, 4) + 4, 4), table[ids].movedim(-1, 0)


def choice(m: Any, q: Tensor, k: Tensor, real: list[int], is_causal: bool) -> tuple[dict[int, list[int]], Any]:
    """Blocks of one row and head from its first real token on: what each chooses, and S as {(t, u): number}."""
    config, start = m.config, real[0]
    blocks: dict[int, list[int]] = {}
    for j in real:
        blocks.setdefault((j - start) // config.block_size, []).append(j)
    weight = (
        m.sort_weight if config.sortnet == "bilinear" else torch.eye(WIDTH, dtype=q.dtype)[None].expand(HEADS, -1, -1)
    )
    shares: Any = {}
    for h in range(HEADS):
        scores = {}
        for t, own in blocks.items():
            for u, other in blocks.items():
                if u in (t, t - 1) or (is_causal and u > t):
                    continue
                asking = q[h, own[0]] if is_causal else q[h, real if config.sortcut else own].mean(0)
                asked = k[h, other].mean(0)
                scores[t, u] = (SCALE * asking.detach() @ weight[h] @ asked.detach() / config.temperature).exp()
        for step in range(2 * config.iterations or 1):
            along = 1 if config.iterations and step % 2 == 0 else 0
            total: Any = {}
            for place, x in scores.items():
                total[place[along]] = total.get(place[along], 0.0) + x
            scores = {place: x / total[place[along]] for place, x in scores.items()}
        shares |= {(h, *place): x for place, x in scores.items()}
    chosen = {}
    for h in range(HEADS):
        for t in blocks:
            candidates = sorted(
                (u for u in blocks if (h, t, u) in shares), key=lambda u: -float(shares[h, t, u].detach())
            )
            chosen[h, t] = candidates[: config.num_sorted_blocks]
    return chosen, shares


def by_formula(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, is_causal: bool, bias: Tensor | None) -> Tensor:
    """The docstring with a dense mask: the learned factor included, which is 1 and has a gradient."""
    n, size = q.shape[2], m.config.block_size
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        real = keep[b].nonzero().flatten().tolist()
        if not real:
            continue
        chosen, shares = choice(m, q[b], k[b], real, is_causal)
        logits = SCALE * q[b] @ k[b].transpose(-1, -2) + (0.0 if bias is None else bias)
        for h, i in ((h, i) for h in range(HEADS) for i in range(real[0], n)):
            t = (i - real[0]) // size
            seen, factors = [], []
            for j in real:
                u = (j - real[0]) // size
                if not (is_causal and j > i) and u in (t, t - 1, *chosen.get((h, t), [])):
                    seen.append(j)
                    share = shares.get((h, t, u))
                    learned = m.config.sortnet == "bilinear" and share is not None
                    factors.append(share / share.detach() if learned else torch.ones((), dtype=q.dtype))
            if seen:
                weights = (logits[h, i, seen] - logits[h, i, seen].detach().max()).exp() * torch.stack(factors)
                out[b, h, i] = weights @ v[b, h, seen] / weights.sum()
    return out


DEFINITIONS: list[tuple[int, bool, dict[str, Any]]] = [
    (45, False, dict(block_size=4, num_sorted_blocks=2)),
    (45, True, dict(block_size=4, num_sorted_blocks=2)),
    (45, False, dict(block_size=5, num_sorted_blocks=2, sortcut=True)),
    (45, False, dict(block_size=4, num_sorted_blocks=1, iterations=3, temperature=0.7)),
    (45, False, dict(block_size=4, num_sorted_blocks=2, iterations=2, sortnet="bilinear")),
    (45, False, dict(block_size=5, num_sorted_blocks=2, sortcut=True, sortnet="bilinear")),
    (45, True, dict(block_size=4, num_sorted_blocks=2, sortnet="bilinear", temperature=2.0)),
    (9, False, dict(block_size=4, num_sorted_blocks=5, iterations=2, sortnet="bilinear")),
    (9, True, dict(block_size=1, num_sorted_blocks=3, sortnet="bilinear")),
    (7, True, dict(block_size=16, num_sorted_blocks=2)),
    (2, False, dict(block_size=1, num_sorted_blocks=0)),
    (1, True, dict(block_size=3, num_sorted_blocks=1)),
]


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("n", "is_causal", "options"), DEFINITIONS, ids=str)
def test_equals_its_definition(n: int, is_causal: bool, options: dict[str, Any], with_bias: bool) -> None:
    """Padding left, right, in the middle and all over; gradients of all that is learned."""
    mechanism = mechanism_of(is_causal, moved="sortnet" in options, **options)
    q, k, v = (x.requires_grad_() for x in heads(4, HEADS, n, WIDTH))
    keep = masks(n)
    table, lazy, dense = bias_of(n)
    actual = aligned_call(mechanism, q, k, v, context_of(is_causal, keep, lazy if with_bias else None))
    expected = by_formula(mechanism, q, k, v, keep, is_causal, dense if with_bias else None)
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-9, where=keep)
    assert (actual[3] == 0).all(), "a row with nothing to attend to must return 0"
    upstream = heads(*q.shape, seed=3, count=1)[0] * keep[:, None, :, None]
    leaves = {"q": q, "k": k, "v": v, **dict(mechanism.named_parameters()), **({"table": table} if with_bias else {})}
    gradients = [
        torch.autograd.grad((out * upstream).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    ]
    for name, one, other in zip(leaves, *gradients, strict=True):
        assert (one - other).abs().max() <= 1e-9 * max(1.0, float(other.abs().max())), f"gradient of {name}"
    if "sortnet" in options:
        # one block to choose has a share of 1, whatever its score
        assert bool((gradients[1][3] != 0).any()), "the definition itself learns nothing"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n", [1, 2, 63, 97])
def test_exact_with_all_other_blocks_or_one_block(n: int, is_causal: bool) -> None:
    q, k, v = heads(3, HEADS, n, WIDTH)
    keep = masks(n)[:3]
    keep[1, n // 2] = keep[2, 0] = True
    hidden = ~keep[:, None, None] | (torch.ones(n, n, dtype=torch.bool).triu(1) if is_causal else False)
    expected = (SCALE * q @ k.transpose(-1, -2)).masked_fill(hidden, -math.inf).softmax(-1) @ v
    for size in (4, 7):
        count = max(0, -(-n // size) - 1)
        for options in (dict(block_size=size, num_sorted_blocks=count), dict(block_size=n + 3)):
            actual = aligned_call(mechanism_of(is_causal, **options), q, k, v, context_of(is_causal, keep))
            assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-12, where=keep)


@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_choose_where_their_queries_look(is_causal: bool) -> None:
    """Queries of the last block match the keys of one early block: that one is chosen, and the output is that of full
    attention, which a window of the same size misses."""
    size, n = 8, 96
    q, k, v = (0.1 * x for x in heads(1, HEADS, n, WIDTH))
    direction = heads(HEADS, WIDTH, seed=2, count=1)[0]
    q[:, :, -size:] += 6 * direction[:, None]
    k[:, :, 2 * size : 3 * size] += 6 * direction[:, None]
    mask = torch.ones(n, n, dtype=torch.bool).triu(1) if is_causal else torch.zeros(n, n, dtype=torch.bool)
    expected = (SCALE * q @ k.transpose(-1, -2)).masked_fill(mask, -math.inf).softmax(-1) @ v
    found, window = (
        mechanism_of(is_causal, block_size=size, num_sorted_blocks=c)(q, k, v, context_of(is_causal)) for c in (1, 0)
    )
    assert_close(found[:, :, -size:], expected[:, :, -size:], 1e-6)
    assert (window - expected)[:, :, -size:].abs().max() > 0.1 * expected[:, :, -size:].abs().max()


# ---- balancing and learning ----------------------------------------------------------------------------------------


def test_sinkhorn_balances_rows_and_columns() -> None:
    scores = 3 * heads(2, HEADS, 9, 9, count=1)[0]
    eligible = ~torch.eye(9, dtype=torch.bool)[None, None]
    shares = log_shares(scores, eligible, 200).exp()
    for dim in (-1, -2):
        assert_close(shares.sum(dim), torch.ones(2, HEADS, 9, dtype=torch.float64), 1e-6)
    assert (shares.diagonal(dim1=-2, dim2=-1) == 0).all()
    # and stays a scaling of rows and columns: cross ratios of e^scores are kept
    logs = shares.log()
    cross = logs[..., 0, 1] + logs[..., 2, 3] - logs[..., 0, 3] - logs[..., 2, 1]
    wanted = scores[..., 0, 1] + scores[..., 2, 3] - scores[..., 0, 3] - scores[..., 2, 1]
    assert_close(cross, wanted, 1e-9)
    assert_close(log_shares(scores, eligible, 0).exp().sum(-1), torch.ones(2, HEADS, 9, dtype=torch.float64), 1e-12)


def test_balancing_spreads_the_choice() -> None:
    """One block that all want: with balancing others are chosen, too."""
    scores = heads(1, 1, 12, 12, count=1)[0] * 0.3
    scores[..., 5] += 2.0
    eligible = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    greedy, spread = (best_blocks(log_shares(scores, eligible, i), 1).unique().numel() for i in (0, 20))
    assert greedy == 1 and spread > 4


def test_of_equal_blocks_the_earlier_are_chosen_whatever_comes_later() -> None:
    """Repeated text without positions in its states (T5): what is yet to come must not decide between blocks."""
    scores = heads(1, 1, 60, 2, count=1)[0].sign().sum(-1)[:, :, None].expand(-1, -1, 60, -1)
    eligible = torch.ones(60, 60, dtype=torch.bool).tril(-2)[None, None]
    whole = best_blocks(log_shares(scores, eligible, 0), 3)
    for target in range(60):
        order = sorted(range(max(target - 1, 0)), key=lambda u: (-float(scores[0, 0, target, u]), u))
        assert sorted(whole[0, 0, target].tolist()) == sorted((order + [-1] * 3)[:3]), target


def test_shares_of_nothing_leave_finite_gradients() -> None:
    scores = heads(1, 2, 5, 5, count=1)[0].requires_grad_()
    eligible = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    eligible[..., 2, :] = eligible[..., :, 3] = False
    for iterations in (0, 3):
        shares = log_shares(scores, eligible, iterations)
        (gradient,) = torch.autograd.grad(shares.exp().square().sum(), scores)
        assert gradient.isfinite().all() and (gradient != 0).any()
        chosen = best_blocks(shares, 4)
        assert (chosen[:, :, 2] == -1).all() and not (chosen == 3).any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n", [1, 2, 6, 50])
def test_a_sortnet_starts_as_no_sortnet(n: int, is_causal: bool) -> None:
    """Also where there is nothing to choose, with finite gradients."""
    q, k, v = (x.requires_grad_() for x in heads(2, HEADS, n, WIDTH))
    options = dict(block_size=6, num_sorted_blocks=2)
    learned, plain = (mechanism_of(is_causal, **options, sortnet=name) for name in ("bilinear", "none"))
    expected, actual = plain(q, k, v, context_of(is_causal)), learned(q, k, v, context_of(is_causal))
    assert_close(actual, expected, 1e-12)
    (gradient,) = torch.autograd.grad(actual.square().sum(), learned.sort_weight)
    assert gradient.isfinite().all() and bool(gradient.any()) == (n == 50)
    with torch.no_grad():
        assert_close(learned(q, k, v, context_of(is_causal)), expected, 1e-12)


def test_a_sortnet_learns_what_to_choose() -> None:
    """A block whose mean key hides the one key that the first queries look for: W = I passes it by, a trained W finds it."""
    size, n, rows = 4, 32, 8
    torch.manual_seed(0)
    wanted = heads(HEADS, 1, WIDTH, seed=2, count=1)[0]
    q, k, v = (0.02 * x for x in heads(rows, HEADS, n, WIDTH))
    q[:, :, :size] += wanted
    for row in range(rows):
        first = size * (2 + row % 4)
        k[row, :, first : first + size] += wanted * torch.tensor([1, -1, -1, -1])[:, None]
        v[row, :, first] += 1.0
    mechanism = mechanism_of(block_size=size, num_sorted_blocks=2, sortnet="bilinear", gumbel=True, temperature=0.5)
    optimizer = torch.optim.Adam(mechanism.parameters(), lr=0.05)

    def found() -> Tensor:
        return mechanism(q, k, v, context_of(False))[:, :, :size].mean()

    mechanism.eval()
    before = float(found().detach())
    mechanism.train()
    for _ in range(60):
        optimizer.zero_grad()
        (-found()).backward()
        optimizer.step()
    mechanism.eval()
    after = float(found().detach())
    assert before < 0.01 < 0.5 < after, (before, after)


def test_noise_comes_in_training_alone() -> None:
    q, k, v = heads(2, HEADS, 60, WIDTH)
    mechanism = mechanism_of(block_size=4, num_sorted_blocks=1, sortnet="bilinear", gumbel=True)
    calm = mechanism_of(block_size=4, num_sorted_blocks=1)(q, k, v, context_of(False))
    assert_close(mechanism.eval()(q, k, v, context_of(False)), calm, 1e-12)
    mechanism.train()
    assert not torch.allclose(mechanism(q, k, v, context_of(False)), calm, rtol=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_draws_the_same(reentrant: bool, dropout: float) -> None:
    """Noise and dropout, also where the first pass ran without gradients."""
    tokens = heads(2, HEADS, 60, WIDTH)
    mechanism = mechanism_of(block_size=4, num_sorted_blocks=1, sortnet="bilinear", gumbel=True).train()

    def gradients(checkpointed: bool) -> list[Any]:
        torch.manual_seed(4)
        mechanism.zero_grad()
        leaves = [x.detach().clone().requires_grad_() for x in tokens]
        context = dataclasses.replace(context_of(False), dropout=dropout)
        call = lambda *x: mechanism(*x, context)  # noqa: E731
        out = (
            torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=reentrant)
            if checkpointed
            else call(*leaves)
        )
        out.square().sum().backward()
        return [x.grad for x in (*leaves, mechanism.sort_weight)]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert_close(one, other, 1e-12)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_converted_sortnet_trains_and_reloads(family: str, tmp_path: Any) -> None:
    side = "both" if family == "t5" else None
    model = he.convert(
        tiny_model(family), "sinkhorn", block_size=6, num_sorted_blocks=2, sortnet="bilinear", side=side
    ).model
    inputs = inputs_for(model)
    model.train()
    model(**inputs).logits.square().mean().backward()
    weights = {name: p for name, p in model.named_parameters() if "sort_weight" in name}
    assert len(weights) == (4 if family == "t5" else 2)
    with torch.no_grad():
        for seed, parameter in enumerate(weights.values()):
            assert parameter.grad.isfinite().all() and parameter.grad.any()
            parameter.add_(heads(*parameter.shape, seed=seed, count=1)[0])
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_sortnet_compiles_as_one_graph(is_causal: bool) -> None:
    """Forward and backward, noise apart, whose draws differ."""
    options: dict[str, Any] = {} if is_causal else dict(iterations=2)
    mechanism = mechanism_of(is_causal, block_size=6, num_sorted_blocks=2, sortnet="bilinear", **options)
    q, k, v = (x.requires_grad_() for x in heads(4, HEADS, 40, WIDTH))
    keep = masks(40)

    def gradients(call: Any) -> Any:
        out = call(q, k, v, context_of(is_causal, keep))
        return out, *torch.autograd.grad(out.square().sum(), [q, k, v, mechanism.sort_weight])

    torch.compiler.reset()
    compiled = torch.compile(mechanism, fullgraph=True, backend="eager")
    for one, other in zip(gradients(compiled), gradients(mechanism), strict=True):
        assert_close(one, other, 1e-12)


# ---- decoding ------------------------------------------------------------------------------------------------------


def gpt2_call(model: Any, ids: Tensor, mask: Tensor, start: int, end: int, cache: Any) -> Any:
    # from the first real token on by index: padding in between counts
    positions = (mask[:, :end].cummax(-1).values.cumsum(-1) - 1).clamp(min=0)[:, start:]
    return model(
        ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions, past_key_values=cache, use_cache=True
    )


@torch.no_grad()
def test_decoding_repeats_the_choice_of_one_forward() -> None:
    """A learned W, rows that start at different tokens or have a gap, chunks and steps, tokens taken back."""
    model = tiny_model("gpt2", positions=256)
    he.patch_attention(model, "sinkhorn", block_size=5, num_sorted_blocks=2, sortnet="bilinear")
    model = model.double()
    for seed, parameter in enumerate(p for name, p in model.named_parameters() if "sort_weight" in name):
        parameter.add_(0.5 * heads(*parameter.shape, seed=seed, count=1)[0])
    ids = inputs_for(model, length=200)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 58:74], mask[1, :13], mask[2, :42] = 0, 0, 0
    whole = gpt2_call(model, ids, mask, 0, 200, None).logits
    cache, start = None, 0
    for end in (3, 4, 50, 51, 52, 130, *range(131, 150)):
        step = gpt2_call(model, ids, mask, start, end, cache)
        assert_close(step.logits, whole[:, start:end], 1e-9, where=mask[:, start:end])
        cache, start = step.past_key_values, end
    # other tokens in between, which must leave no trace
    other = torch.where(torch.arange(200) >= 149, (ids + 7) % 90, ids)
    gpt2_call(model, other, mask, 149, 190, cache)
    cache.crop(-(190 - 147))
    step = gpt2_call(model, ids, mask, 147, 200, cache)
    assert_close(step.logits, whole[:, 147:], 1e-9, where=mask[:, 147:])
    layer = cache.layers[0]
    assert isinstance(layer, BlockStartLayer) and layer.state.queries.shape[2] == 40 and layer.keys.shape[2] == 200
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    assert layer.state.queries.shape[0] == 3


@torch.no_grad()
def test_beams_equal_those_without_a_cache() -> None:
    model = tiny_model("gpt2", positions=128)
    he.patch_attention(model, "sinkhorn", block_size=4, num_sorted_blocks=1)
    model = model.double()
    inputs = inputs_for(model, length=30)
    options: dict[str, Any] = dict(num_beams=3, do_sample=False, max_new_tokens=12, eos_token_id=None)
    inputs["attention_mask"][1] = 1  # generation continues rows at their right end
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))


@torch.no_grad()
def test_caches_that_lack_the_queries_are_refused() -> None:
    model = tiny_model("gpt2", positions=128)
    ids = inputs_for(model, length=30)["input_ids"]
    mask = torch.ones_like(ids)
    stock = gpt2_call(model, ids, mask, 0, 20, DynamicCache(config=model.config)).past_key_values
    he.patch_attention(model, "sinkhorn", block_size=4, num_sorted_blocks=1)
    with pytest.raises(ValueError, match="sinkhorn: the cache lacks the queries that choose blocks"):
        gpt2_call(model, ids, mask, 20, 30, stock)
    cache = gpt2_call(model, ids, mask, 0, 20, None).past_key_values
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="rows start at other tokens than when the cache was filled"):
        gpt2_call(model, ids, mask, 20, 30, cache)


# ---- cost, precision, refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(sortnet="bilinear")], ids=str)
def test_no_tensor_holds_all_pairs(options: dict[str, Any]) -> None:
    n, size, count = 2048, 32, 2
    q, k, v = (x.requires_grad_() for x in heads(1, HEADS, n, WIDTH))
    mechanism = mechanism_of(block_size=size, num_sorted_blocks=count, **options)
    with LargestTensor() as recorder:
        mechanism(q, k, v, context_of(False)).sum().backward()
    assert recorder.numel <= HEADS * n * (count + 2) * size < HEADS * n * n // 10


@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision_chooses_in_fp32(is_causal: bool) -> None:
    """The same choice for the same heads, whatever precision the rest is computed in."""
    q, k, v = (x.bfloat16() for x in heads(2, HEADS, 96, WIDTH))
    mechanism = mechanism_of(is_causal, block_size=8, num_sorted_blocks=2).float()
    expected = mechanism(*(x.float() for x in (q, k, v)), context_of(is_causal))
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE).float()
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.float() for x in (q, k, v)), scale=SCALE)
    allowed = 3 * float((stock - exact).square().mean().sqrt())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mechanism(q, k, v, context_of(is_causal))
    for actual in (mechanism.bfloat16()(q, k, v, context_of(is_causal)), mixed):
        assert float((actual.float() - expected).square().mean().sqrt()) <= allowed


def test_what_is_left_without_choices_is_the_control() -> None:
    config = he.SinkhornAttentionConfig(block_size=8, num_sorted_blocks=3, sortnet="bilinear", layers=(1,))
    control = SinkhornAttention.control_config(config)
    assert control == he.SinkhornAttentionConfig(block_size=8, num_sorted_blocks=0, layers=(1,))
    assert SinkhornAttention.control_config(control) is None
    # it is used as it is made
    assert not SinkhornAttention(control, geometry()).state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(block_size=0), "block_size=0 is not possible; it must be an integer ≥ 1"),
        (dict(num_sorted_blocks=-1), "num_sorted_blocks=-1 is not possible; it must be an integer ≥ 0"),
        (dict(sortnet="linear"), "sortnet='linear' is not possible; it must be one of none, bilinear"),
        (dict(temperature=0.0, iterations=2), "temperature=0.0 is not possible; it must be a number > 0"),
        (dict(temperature=0.5), "temperature=0.5 is not possible; .* 1 with neither iterations nor a sortnet"),
        (dict(num_sorted_blocks=0, sortnet="bilinear"), "num_sorted_blocks=0 is not possible; .* ≥ 1 with sortnet"),
        (dict(num_sorted_blocks=0, sortcut=True), "num_sorted_blocks=0 is not possible; .* ≥ 1 with .*sortcut"),
        (dict(num_sorted_blocks=0, iterations=2), "num_sorted_blocks=0 is not possible; .* ≥ 1 with .*iterations"),
        (dict(gumbel=True), "gumbel=True is not possible; it must be true or false, and false with sortnet='none'"),
        (dict(sortcut=True, iterations=3), "iterations=3 is not possible; it must be 0 with sortcut"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        he.SinkhornAttentionConfig(**options)


@pytest.mark.parametrize("options", [dict(sortcut=True), dict(iterations=2)], ids=str)
def test_what_reads_the_future_is_refused_in_causal_models(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"sinkhorn: {next(iter(options))}=.* can't be causal: leave"):
        he.patch_attention(tiny_model("gpt2"), "sinkhorn", **options)
    he.patch_attention(tiny_model("t5"), "sinkhorn", side="encoder", **options)
