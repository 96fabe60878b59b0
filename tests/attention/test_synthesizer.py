"""Synthesizer: every kind of logits by its own formula, its start, step-by-step decoding, and refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from formulas import HEADS, WIDTH, geometry, heads
from pairs import MAX_POSITIONS, Bench, Pair, Tokens
from torch import Tensor

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.attention.synthesizer import LOGITS, SynthesizerAttention
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.synthetic_logits import FactorizedRandomLogits
from hf_efficient.patching.dispatch import aligned_call
from hf_efficient.testing import assert_close, inputs_for, tiny_model

PLACES = {"bert": None, "gpt2": None, "t5-encoder": "encoder", "t5-decoder": "decoder"}
OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "random": {},
    "factorized_dense": dict(factors=(5, 26)),
    "factorized_random": dict(rank=3),
}
SETTINGS = [
    *(pytest.param(dict(variant=kind, **options), id=kind) for kind, options in OPTIONS.items()),
    *(
        pytest.param(dict(variant="mixture", mixture_of=kind, **options), id=f"mixture-{kind}")
        for kind, options in OPTIONS.items()
    ),
]
PURE = SETTINGS[:4]


def bench_of(place: str, options: dict[str, Any], moved: bool = True) -> Bench:
    """With parameters away from their start, of which some see distances alone and some are 0."""
    family, side = place.split("-")[0], PLACES[place]
    bench = Bench(Pair("synthesizer", family, side, options | dict(max_length=MAX_POSITIONS), "synthesizer"))
    if moved:
        for parameter in bench.mechanism.parameters():
            parameter.data.add_(0.5 * bench.normal(*parameter.shape))
    return bench


def padded(rows: int, n: int) -> Tensor:
    """Row 1 is padded on the right, row 2 on the left, row 3 on both sides."""
    keep = torch.ones(rows, n, dtype=torch.bool)
    keep[1, n - n // 3 :] = keep[2, : n // 4] = keep[3, : n // 5] = keep[3, n - n // 5 :] = False
    return keep


def dense(part: Any, query: Tensor) -> Tensor:
    """(B, H, N, L) of (B, H, N, D)."""
    hidden = torch.einsum("bhnd,hmd->bhnm", query, part.hidden_weight) + part.hidden_bias[:, None]
    return torch.einsum("bhnm,hjm->bhnj", hidden.clamp(min=0), part.weight) + part.bias[:, None]


def synthetic(mechanism: Any, query: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """(B, H, N, S) logits of queries at positions i (B, N) and keys at j (B, S), as the docstring says."""
    part, kind = mechanism.synthetic, mechanism.config.logits
    if kind == "random":
        return torch.stack([part.table[:, rows][:, :, columns] for rows, columns in zip(i, j, strict=True)])
    if kind == "factorized_random":
        a, b = part.query_factor, part.key_factor
        return torch.stack([(a[:, r, None] * b[:, None, c]).sum(-1) for r, c in zip(i, j, strict=True)])

    def at(values: Tensor, index: Tensor) -> Tensor:
        return torch.stack([row[..., places] for row, places in zip(values, index, strict=True)])

    if kind == "dense":
        return at(dense(part, query), j)
    a = part.within.bias.shape[1]
    return at(dense(part.within, query), j % a) * at(dense(part.blocks, query), j // a)


def defined_weights(bench: Bench, tokens: Tokens, keep: Tensor) -> Tensor:
    """(B, H, N, N) weights without any shift of rows: positions are counted from each row's first real token."""
    n, mechanism = keep.shape[1], bench.mechanism
    place = (torch.arange(n) - keep.int().argmax(-1)[:, None]).clamp(min=0)
    logits = synthetic(mechanism, tokens.query, place, place)
    if mechanism.config.variant == "mixture":
        product = torch.einsum("bhid,bhjd->bhij", tokens.query, tokens.key) * bench.WIDTH**-0.5
        logits = product + mechanism.gamma[:, None, None] * logits
    offset = torch.arange(n) - torch.arange(n)[:, None]
    bias = bench.relative_bias()
    if bias is not None:
        logits = logits + bias.at(offset)
    visible = keep[:, None, None] & (offset <= 0 if bench.is_causal else torch.tensor(True))
    weights = logits.exp() * visible
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


# ---- against the definition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("n", [1, 2, 63, 97])
def test_output_and_gradients_equal_the_definition(place: str, options: dict[str, Any], n: int):
    bench = bench_of(place, options)
    tokens, keep = bench.tokens(4, n), padded(4, n)
    leaves = [x.requires_grad_() for x in tokens[:3]] + list(bench.mechanism.parameters())
    leaves += [] if bench.table is None else [bench.table]
    weights = defined_weights(bench, tokens, keep)
    expected, actual = weights @ tokens.value, bench(tokens, keep)
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-9, where=keep)
    direction = bench.normal(*actual.shape) * keep[:, None, :, None]
    theirs = torch.autograd.grad((expected * direction).sum(), leaves, allow_unused=True)
    ours = torch.autograd.grad((actual * direction).sum(), leaves)
    scale = max(g.abs().max().item() for g in theirs if g is not None)
    for number, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        assert (one - (0.0 if two is None else two)).abs().max() <= 1e-9 * scale, f"gradient {number}"


@pytest.mark.parametrize("with_padding", [True, False])
@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("place", ["gpt2", "t5-decoder"])
@pytest.mark.parametrize("ends", [(40, *range(41, 62)), (1, 2, 3, 30, 61), (13, 45, 61)])
def test_steps_with_a_cache_equal_one_forward(
    place: str, options: dict[str, Any], ends: tuple[int, ...], with_padding: bool
):
    """Rows padded on the left, one of them beyond the first calls; each call sees the keys of all before."""
    bench = bench_of(place, options)
    tokens = bench.tokens(3, 61)
    keep = None
    if with_padding:
        keep = torch.ones(3, 61, dtype=torch.bool)
        keep[1, :9] = keep[2, :31] = False
    parts, start = [], 0
    for end in ends:
        context = AttentionContext(
            is_causal=True,
            scaling=bench.WIDTH**-0.5,
            key_padding_mask=None if keep is None else keep[:, :end],
            query_offset=start,
            relative_bias=bench.relative_bias(),
        )
        arguments = tokens.query[:, :, start:end], tokens.key[:, :, :end], tokens.value[:, :, :end]
        parts.append(aligned_call(bench.mechanism, *arguments, context))
        start = end
    actual, expected = torch.cat(parts, dim=2), bench(tokens, keep)
    assert_close(actual, expected, 1e-12)
    assert with_padding == bool((actual[2, :, :31] == 0).all()), "a query before its row's first token sees nothing"


@pytest.mark.parametrize("options", SETTINGS)
def test_generation_with_a_cache_equals_generation_without(options: dict[str, Any]):
    """In a whole model, with parameters for which positions matter and not distances alone."""
    model = tiny_model("gpt2").double()
    torch.manual_seed(3)
    with he.patch_attention(model, "synthesizer", **options):
        for name, parameter in model.named_parameters():
            if ".efficient." in name:
                parameter.data.add_(torch.randn_like(parameter))
        inputs = inputs_for(model, batch=2, length=21)
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
        call = dict(inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        cached = model.generate(**call)
        assert torch.equal(cached, model.generate(**call, use_cache=False))


def test_dense_logits_can_be_those_of_one_key_per_position():
    """W₁ = [I, -I] as at the start, and W₂ = s [k̄_j, -k̄_j]: the logits are s · q_i·k̄_j."""
    n, scaling = 63, 0.3
    mechanism = SynthesizerAttention(attention_config("synthesizer", variant="dense"), geometry()).double()  # type: ignore[arg-type]
    mechanism.reset_parameters()
    q, k, v = heads(2, HEADS, n, WIDTH)
    k = k[:1].expand_as(k)
    with torch.no_grad():
        mechanism.synthetic.weight[:, :n] = scaling * torch.cat([k[0], -k[0]], dim=-1)
    out = mechanism(q, k, v, AttentionContext(is_causal=False, scaling=scaling))
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
    assert_close(out, full, 1e-12)


@pytest.mark.parametrize("options", PURE)
def test_keys_have_no_part_in_pure_forms(options: dict[str, Any]):
    bench = bench_of("bert", options)
    tokens = bench.tokens(2, 30)
    expected = bench(tokens)
    assert torch.equal(bench(tokens._replace(key=tokens.key * 100)), expected)
    other = bench(tokens._replace(query=-tokens.query))
    assert torch.equal(other, expected) == ("random" in options["variant"])


@pytest.mark.parametrize("options", SETTINGS)
def test_dense_weights_are_those_of_the_output(options: dict[str, Any]):
    bench = bench_of("gpt2", options)
    tokens = bench.tokens(3, 41)
    context = AttentionContext(is_causal=True, scaling=bench.WIDTH**-0.5)
    weights = bench.mechanism.attention_weights(tokens.query, tokens.key, context)
    assert weights.shape == (3, bench.HEADS, 41, 41)
    assert_close(weights @ tokens.value, bench(tokens), 1e-12)
    assert_close(weights.sum(-1), torch.ones(3, bench.HEADS, 41, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("options", SETTINGS)
def test_logits_are_not_rounded_to_half_precision(options: dict[str, Any]):
    """Under autocast, and for queries and keys in bf16: logits of up to a hundred, which bf16 would round by up to ½."""
    bench = bench_of("bert", options)
    mechanism, tokens = bench.mechanism, bench.tokens(2, 40)
    for parameter in mechanism.parameters():
        parameter.data.mul_(8)
    q, k = ((3 * x).bfloat16() for x in tokens[:2])
    context = AttentionContext(is_causal=False, scaling=1.0)
    expected = mechanism.attention_weights(q.double(), k.double(), context)
    mechanism.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = mechanism.attention_weights(q, k, context)
    assert actual.dtype == torch.float32
    assert_close(actual.double(), expected, 1e-3)


# ---- the start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("place", PLACES)
def test_a_mixture_starts_exact_and_learns(place: str, kind: str):
    bench = bench_of(place, dict(variant="mixture", mixture_of=kind), moved=False)
    tokens, keep = bench.tokens(4, 63), padded(4, 63)
    logits = bench.WIDTH**-0.5 * tokens.query @ tokens.key.mT
    offset = torch.arange(63) - torch.arange(63)[:, None]
    bias = bench.relative_bias()
    logits = logits if bias is None else logits + bias.at(offset)
    visible = keep[:, None, None] & (offset <= 0 if bench.is_causal else torch.tensor(True))
    full = logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(-1) @ tokens.value
    assert_close(bench(tokens, keep).transpose(1, 2), full.transpose(1, 2), 1e-12, where=keep)
    direction = bench.normal(*tokens.value.shape)
    for step in range(2):
        bench.mechanism.zero_grad()
        (bench(tokens, keep) * direction).sum().backward()
        gamma = bench.mechanism.gamma
        assert (gamma.grad != 0).all()
        for parameter in bench.mechanism.synthetic.parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()) == (step == 1)
        with torch.no_grad():
            gamma.sub_(gamma.grad)


@pytest.mark.parametrize(("length", "longest"), [(3, 4), (9, 9)])
@pytest.mark.parametrize("kind", LOGITS)
def test_the_exact_limit_is_a_mixture_of_the_same_kind(kind: str, length: int, longest: int):
    """A rank or factors that fit the given length alone must not stand in its way."""
    factors = (2, 2) if kind == "factorized_dense" else None
    rank = 4 if kind == "factorized_random" else None
    config = attention_config("synthesizer", variant=kind, max_length=4, rank=rank, factors=factors)
    place = geometry(max_positions=None)
    exact = SynthesizerAttention.exact_config(config, place, length)
    assert (exact.variant, exact.mixture_of, exact.max_length) == ("mixture", kind, longest)  # type: ignore[attr-defined]
    assert not SynthesizerAttention.unsupported(exact, place)


@pytest.mark.parametrize("options", PURE)
@pytest.mark.parametrize("place", PLACES)
def test_every_parameter_of_a_pure_form_learns_from_its_start(place: str, options: dict[str, Any]):
    bench = bench_of(place, options, moved=False)
    tokens = bench.tokens(2, 63)
    for tensor in tokens[:3]:
        tensor.requires_grad_()
    (bench(tokens) * bench.normal(*tokens.value.shape)).sum().backward()
    for name, parameter in bench.mechanism.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        assert (parameter.grad.flatten(1) != 0).any(1).all(), f"{name}: a head learns nothing"
    assert tokens.key.grad is not None and not tokens.key.grad.any()
    assert tokens.query.grad is not None and bool(tokens.query.grad.any()) == ("dense" in options["variant"])


def distances(size: int) -> Tensor:
    return (torch.arange(size) - torch.arange(size)[:, None]).abs().double()


@pytest.mark.parametrize("place", PLACES)
def test_random_logits_start_at_the_distance(place: str):
    """A relative bias says the distance itself, so that it gets next to nothing on top."""
    table = bench_of(place, dict(variant="random"), moved=False).mechanism.synthetic.table
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=torch.float64)
    slopes = slopes * (0.02 if place.startswith("t5") else 1.0)
    assert_close(table, -slopes[:, None, None] * distances(MAX_POSITIONS), 1e-6)


def test_factorized_dense_logits_start_at_those_of_the_blocks():
    """All but 1 within a block, so that the first gradient of a block is that of all its keys."""
    mechanism = bench_of("bert", dict(variant="factorized_dense", factors=(8, 16)), moved=False).mechanism
    query = heads(2, Bench.HEADS, 30, Bench.WIDTH, count=1)[0]
    blocks = dense(mechanism.synthetic.blocks, query).repeat_interleave(8, dim=-1)
    assert_close(mechanism.synthetic(query, slice(0, 30), 100), blocks[..., :100], 0.2)


@pytest.mark.parametrize("size", [1, 2, 17, 64])
def test_factors_of_full_rank_start_at_the_distance(size: int):
    """Up to what is the same for all keys of a query."""
    module = FactorizedRandomLogits([0.5, 0.01], size, size, False).double()
    module.reset()
    logits = module(torch.empty(1, 2, size, 2, dtype=torch.float64), slice(0, size), size)[0]
    expected = torch.tensor([0.5, 0.01]).double()[:, None, None] * -distances(size)
    difference = logits - expected
    assert (difference - difference[..., :1]).abs().max() < 1e-6 * size


def test_factors_of_low_rank_come_closer_with_every_term():
    size, errors = 64, []
    for rank in (1, 2, 4, 8, 16, 32):
        module = FactorizedRandomLogits([1.0], size, rank, False).double()
        module.reset()
        logits = module(torch.empty(1, 1, size, 2, dtype=torch.float64), slice(0, size), size)[0]
        difference = logits + distances(size)
        errors.append((difference - difference.mean(-1, keepdim=True)).norm().item())
    assert all(fine < 0.7 * coarse for coarse, fine in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_causal_factors_start_at_the_distance_with_any_rank(rank: int):
    bench = bench_of("gpt2", dict(variant="factorized_random", rank=rank), moved=False)
    tokens, keep = bench.tokens(4, 97), padded(4, 97)
    expected = bench_of("gpt2", dict(variant="random"), moved=False)(tokens, keep)
    assert_close(bench(tokens, keep).transpose(1, 2), expected.transpose(1, 2), 1e-5, where=keep)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(variant="convex"), "variant='convex' is not possible; it must be one of mixture, dense, random"),
        (dict(mixture_of="mixture"), "mixture_of='mixture' is not possible; it must be one of dense, random"),
        (dict(max_length=0), "max_length=0"),
        (dict(rank=0), "rank=0"),
        (dict(variant="factorized_dense", factors=(8,)), "factors=.* two integers ≥ 1"),
        (dict(variant="factorized_dense", factors=(8, 0)), "factors=.* two integers ≥ 1"),
        (dict(variant="factorized_dense", factors=64), "factors=64 .* two integers ≥ 1"),
        (dict(variant="dense", factors=(8, 16)), r"factors=\(8, 16\) .* dense logits have none"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        he.SynthesizerAttentionConfig(**options)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("t5", {}, "no position table to take a length from: give max_length"),
        ("bert", dict(max_length=127), "max_length=127 is below the 128 positions of the model"),
        ("bert", dict(variant="factorized_random", rank=129), "rank=129 exceeds max_length=128"),
        (
            "bert",
            dict(variant="factorized_dense", factors=(11, 11)),
            "factors=11, 11 make 121 logits, but max_length=128: give a · b ≥ 128",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(family: str, options: dict[str, Any], message: str):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=message):
        he.patch_attention(model, "synthesizer", **options)
    assert not he.patching.is_installed(model)


def test_too_long_inputs_are_refused():
    model = tiny_model("t5")
    with he.patch_attention(model, "synthesizer", max_length=40):
        assert model(**inputs_for(model, length=40)).logits.isfinite().all()
        with pytest.raises(ValueError, match=r"41 tokens, .* max_length=40: .* longformer"):
            model(**inputs_for(model, length=41))


def test_the_limit_counts_tokens_in_the_cache():
    model = tiny_model("t5")
    options = dict(min_new_tokens=45, max_new_tokens=45, do_sample=False)
    inputs = {k: v for k, v in inputs_for(model, length=9).items() if not k.startswith("decoder")}
    with (
        he.patch_attention(model, "synthesizer", side="decoder", max_length=40),
        pytest.raises(ValueError, match=r"41 tokens, .* max_length=40"),
    ):
        model.generate(**inputs, **options)
