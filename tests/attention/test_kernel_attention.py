"""Kernel mechanisms against their quadratic formulas, token by token as well, and what random features are."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from formulas import FORMULAS, HEADS, WIDTH, geometry, heads, mechanism_of
from torch import Tensor

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.attention.performer import PerformerAttention, PerformerAttentionConfig
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.random_features import orthogonal_features
from hf_efficient.testing import assert_close, tiny_model

SCALING = 0.6
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("performer", dict(num_features=24)),
    ("performer", dict(num_features=24, kernel="relu")),
    ("linear_transformer", {}),
    ("cosformer", {}),
    ("cosformer", dict(max_length=200)),
    ("random_feature", dict(num_features=12)),
]
GATED: tuple[str, dict[str, Any]] = ("random_feature", dict(num_features=12, gate=True))
each = pytest.mark.parametrize("name, options", SETTINGS, ids=[f"{n}-{o}" for n, o in SETTINGS])
each_causal = pytest.mark.parametrize(
    "name, options", [*SETTINGS, GATED], ids=[f"{n}-{o}" for n, o in [*SETTINGS, GATED]]
)


def by_formula(name: str, mechanism: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """With padding only behind the real tokens, where a gate's product passes over none."""
    weights = FORMULAS[name](mechanism, q, k, SCALING) * keep[:, None, None]
    if mechanism.geometry.is_causal:
        weights = weights.tril(k.shape[2] - q.shape[2])
    return weights @ v / weights.sum(-1, keepdim=True)


def padded(n: int) -> Tensor:
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[1, n - n // 3 :] = False
    return keep


@pytest.fixture(params=[64, 8], ids=["chunks of 64", "groups of 24"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param == 8:
        monkeypatch.setattr("hf_efficient.ops.linear_attention.CHUNK", 8)
        monkeypatch.setattr("hf_efficient.ops.linear_attention.GROUP", 3)


def equals_formula(name: str, options: dict[str, Any], n: int, is_causal: bool) -> None:
    mechanism, keep = mechanism_of(name, is_causal, **options), padded(n)
    tensors = [x.requires_grad_() for x in (*heads(2, HEADS, n, WIDTH), *mechanism.parameters())]
    context = AttentionContext(is_causal=is_causal, scaling=SCALING, key_padding_mask=keep)
    upstream = heads(2, HEADS, n, WIDTH, seed=1, count=1)[0] * keep[:, None, :, None]
    results = []
    for out in (mechanism(*tensors[:3], context), by_formula(name, mechanism, *tensors[:3], keep)):
        results.append((out, torch.autograd.grad((out * upstream).sum(), tensors)))
    (actual, gradients), (expected, truths) = results
    assert_close(actual * keep[:, None, :, None], expected * keep[:, None, :, None], 1e-9)
    for index, (gradient, truth) in enumerate(zip(gradients, truths, strict=True)):
        assert n == 1 or truth.abs().max() > 1e-6
        assert (gradient - truth).abs().max() <= 1e-8 * truth.abs().max().clamp(min=1e-4), f"gradient {index}"


@each
@pytest.mark.parametrize("n", [1, 2, 63, 150])
@pytest.mark.usefixtures("sizes")
def test_both_directions_equal_the_quadratic_formula(name: str, options: dict[str, Any], n: int):
    equals_formula(name, options, n, is_causal=False)


@each_causal
@pytest.mark.parametrize("n", [1, 2, 63, 150])
@pytest.mark.usefixtures("sizes")
def test_causal_equals_the_quadratic_formula(name: str, options: dict[str, Any], n: int):
    equals_formula(name, options, n, is_causal=True)


@each_causal
def test_dense_weights_are_those_of_the_output(name: str, options: dict[str, Any]):
    for is_causal in (True,) if options.get("gate") else (False, True):
        mechanism, keep = mechanism_of(name, is_causal, **options), padded(30)
        q, k, v = heads(2, HEADS, 30, WIDTH)
        context = AttentionContext(is_causal=is_causal, scaling=SCALING, key_padding_mask=keep)
        assert_close(mechanism.attention_weights(q, k, context) @ v, mechanism(q, k, v, context), 1e-9)


@each_causal
def test_steps_with_a_state_equal_one_pass(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Uneven steps, so that keys are folded into the state in groups of several sizes; a padded row among them."""
    monkeypatch.setattr("hf_efficient.cache.bounded.SLACK", 5)
    mechanism, n = mechanism_of(name, is_causal=True, **options), 60
    q, k, v = heads(2, HEADS, n, WIDTH)
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[1, :7] = False
    layer = mechanism.cache_layer()
    whole = AttentionContext(is_causal=True, scaling=SCALING, key_padding_mask=keep)
    pieces, start = [], 0
    for size in [13, *[1] * 20, 9, *[1] * 18]:
        new = slice(start, start + size)
        layer.prepare(torch.tensor([0, 7]), None)
        keys, values = layer.update(k[:, :, new], v[:, :, new])
        positions = layer.key_positions
        seen = torch.arange(start + size).expand(2, -1) if positions is None else positions
        there = (seen >= 0) & keep.gather(1, seen.clamp(min=0))
        context = dataclasses.replace(
            whole, key_padding_mask=there, query_offset=start, key_positions=positions, recurrent=layer
        )
        pieces.append(mechanism(q[:, :, new], keys, values, context))
        start += size
    assert start == n and layer.state is not None and layer.keys.shape[2] < 20
    actual, expected = (x.transpose(1, 2) for x in (torch.cat(pieces, 2), mechanism(q, k, v, whole)))
    assert_close(actual, expected, 1e-9, where=keep)


@each
def test_the_last_token_is_the_same_causal_or_not(name: str, options: dict[str, Any]):
    q, k, v = heads(2, HEADS, 150, WIDTH)
    both, causal = (
        mechanism_of(name, c, **options)(q, k, v, AttentionContext(is_causal=c, scaling=SCALING))
        for c in (False, True)
    )
    assert_close(causal[:, :, -1], both[:, :, -1], 1e-9)
    assert (causal - both)[:, :, 0].abs().max() > 0.1


# ---- cosFormer and RFA -------------------------------------------------------------------------------------------


def test_more_tokens_than_the_cosine_reaches_are_refused():
    mechanism = mechanism_of("cosformer", max_length=10)
    context = AttentionContext(is_causal=False, scaling=SCALING)
    assert mechanism(*heads(1, HEADS, 10, WIDTH), context).isfinite().all()
    with pytest.raises(ValueError, match=r"11 tokens are more than max_length=10, .* max_length=11"):
        mechanism(*heads(1, HEADS, 11, WIDTH), context)
    late = dataclasses.replace(context, is_causal=True, query_offset=10)
    with pytest.raises(ValueError, match="11 tokens"):
        mechanism(*[x[:, :, :1] for x in heads(1, HEADS, 1, WIDTH)], late)


def test_a_model_without_positions_must_say_how_far_the_cosine_reaches():
    config = attention_config("cosformer")
    reasons = config.attention_class.unsupported(config, geometry(max_positions=None))
    assert reasons == ["cosformer: this model has no position table that bounds its length: give max_length=…"]
    assert not config.attention_class.unsupported(
        dataclasses.replace(config, max_length=9), geometry(max_positions=None)
    )


def test_a_cosine_that_ends_before_the_positions_do_is_refused():
    with pytest.raises(ValueError, match="max_length=32 is below the 64 positions"):
        he.patch_attention(tiny_model("bert", positions=64), "cosformer", max_length=32)


@pytest.mark.parametrize("name", ["performer", "hedgehog"])
def test_the_state_is_kept_in_fp32_under_autocast(name: str):
    model = tiny_model("gpt2", positions=512)
    options = dict(attention_window=8) if name == "hedgehog" else {}
    with he.patch_attention(model, name, **options), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(torch.randint(5, 90, (1, 300)), use_cache=True).past_key_values
    for layer in cache.layers:
        assert {x.dtype for x in layer.state} == {torch.float32}


def test_a_gate_on_an_encoder_is_refused():
    with pytest.raises(ValueError, match="gate=False"):
        he.convert(tiny_model("bert"), "random_feature", gate=True, tokenizer=None)


def test_an_open_gate_changes_nothing_but_a_closing_one_forgets():
    q, k, v = heads(1, HEADS, 50, WIDTH)
    context = AttentionContext(is_causal=True, scaling=SCALING)
    gated, ungated = (mechanism_of("random_feature", True, num_features=12, gate=g) for g in (True, False))
    with torch.no_grad():
        gated.log_sigma.copy_(ungated.log_sigma)
        gated.gate_weight.zero_()
        gated.gate_bias.fill_(30.0)
        assert_close(gated(q, k, v, context), ungated(q, k, v, context), 1e-8, "an open gate")
        gated.gate_bias.fill_(-30.0)
        assert_close(gated(q, k, v, context), v, 1e-8, "a closed gate: each token sees itself alone")


def test_random_features_estimate_the_softmax_of_unit_vectors():
    """The error to softmax attention of q̂ and k̂ falls with the root of the number of features."""
    q, k, v = heads(2, HEADS, 40, WIDTH)
    context, errors = AttentionContext(is_causal=False, scaling=SCALING), []
    for size in (32, 256, 2048):
        mechanisms = [mechanism_of("random_feature", num_features=size, seed=seed) for seed in range(16)]
        for mechanism in mechanisms:  # where vectors are long, the law holds only for very many features
            mechanism.log_sigma.data -= 0.7
        sigma = mechanisms[0].log_sigma.exp()[:, None]
        unit_q, unit_k = (x / x.norm(dim=-1, keepdim=True) * sigma for x in (q, k))
        truth = (unit_q @ unit_k.transpose(-1, -2)).softmax(-1) @ v
        outputs = torch.stack([mechanism(q, k, v, context) for mechanism in mechanisms])
        errors.append((outputs - truth).square().mean().sqrt().item())
    slopes = [math.log(b / a) / math.log(8) for a, b in pairwise(errors)]
    assert all(-0.7 < slope < -0.3 for slope in slopes), (errors, slopes)


def test_sigma_starts_at_the_lengths_of_the_projections():
    """Mean of s ‖q‖ ‖k‖ over inputs of unit variance, as far as lengths of q and k are independent."""
    model = tiny_model("bert")
    layer = next(m for m in model.modules() if hasattr(m, "query") and hasattr(m, "key"))
    with torch.no_grad():
        layer.query.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(4000, layer.query.in_features, generator=torch.Generator().manual_seed(1))
    converted = he.convert(model, "random_feature", tokenizer=None).model
    mechanism = next(m for m in converted.modules() if isinstance(m, he.RandomFeatureAttention))
    shape = (-1, mechanism.geometry.num_heads, mechanism.geometry.head_dim)
    q, k = (p(x).view(shape).square().sum(-1).mean(0).sqrt() for p in (layer.query, layer.key))
    expected = (q * k / math.sqrt(shape[-1]))[:, None].expand(-1, shape[-1])
    assert_close(mechanism.log_sigma.exp().square(), expected, 0.1)


# ---- Performer ---------------------------------------------------------------------------------------------------


def performer(num_features: int, seed: int = 0, width: int = WIDTH, **options: Any) -> PerformerAttention:
    config = PerformerAttentionConfig(num_features=num_features, seed=seed, **options)
    mechanism = PerformerAttention(config, geometry(head_dim=width)).double()
    mechanism.reset_parameters()
    return mechanism


def test_orthogonal_features_are_orthogonal_and_of_gaussian_length() -> None:
    features = orthogonal_features(8 * 2000 + 3, 8, torch.Generator().manual_seed(0))
    assert features.shape == (16003, 8)
    gram = torch.einsum("brd,bsd->brs", *[features[:16000].view(-1, 8, 8)] * 2)
    assert (gram - gram.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 1e-10
    squares = features.square().sum(-1)  # χ² with 8 degrees of freedom: mean 8, variance 16
    assert abs(squares.mean() - 8) < 5 * 4 / math.sqrt(16003)
    assert abs(squares.var() - 16) < 1.5


def test_orthogonal_features_have_no_preferred_direction() -> None:
    """Q of a Householder QR has a negative diagonal on average; its sign must be fixed. The control does not."""
    blocks = 4000
    generator = torch.Generator().manual_seed(0)
    diagonal = orthogonal_features(8 * blocks, 8, generator).view(blocks, 8, 8).diagonal(dim1=1, dim2=2)
    control = torch.linalg.qr(torch.randn(blocks, 8, 8, generator=generator)).Q.diagonal(dim1=1, dim2=2)
    for name, entries, biased in (("fixed", diagonal, False), ("control", control, True)):
        deviations = entries.mean(0) / (entries.std(0) / math.sqrt(blocks))
        assert (deviations.abs().max() > 6) == biased, f"{name}: {deviations.tolist()}"


@pytest.mark.parametrize("direction", ["ones", "first", "random"])
def test_performer_kernel_is_unbiased(direction: str) -> None:
    """The mean of φ(x)·φ(z) over many draws is exp(x·z), also along the axes that an unfixed QR would favour."""
    blocks, width = 20_000, 8
    generator = torch.Generator().manual_seed(1)
    omega = orthogonal_features(width * blocks, width, generator)
    total = {
        "ones": torch.ones(width) / math.sqrt(width),
        "first": torch.eye(width)[0],
        "random": torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0),
    }[direction].double()
    x, z = 0.7 * total, 0.3 * total

    def log_features(y: Tensor) -> Tensor:
        return omega @ y - y @ y / 2

    # rows of one block depend on each other: the blocks' means are the independent samples
    samples = (log_features(x) + log_features(z)).exp().view(blocks, width).mean(1)
    error = samples.std() / math.sqrt(blocks)
    assert abs(samples.mean() - math.exp(x @ z)) < 4.5 * error
    assert error < 0.01 * math.exp(x @ z)


def test_performer_estimate_converges_to_the_softmax_kernel_over_seeds() -> None:
    """The module's own features and scaling: the mean over seeds comes close to exp(s · q·k)."""
    q, k = (0.5 * x for x in heads(1, 1, 5, WIDTH, count=2))
    scaling = 0.5
    estimates = []
    for seed in range(200):
        mechanism = performer(64, seed)
        phi_q, phi_k = (mechanism.log_features(x * math.sqrt(scaling * math.sqrt(WIDTH)), "key").exp() for x in (q, k))
        estimates.append((phi_q @ phi_k.transpose(-1, -2) / 64)[0, 0])
    samples, truth = torch.stack(estimates), (scaling * q @ k.transpose(-1, -2)).exp()[0, 0]
    deviations = (samples.mean(0) - truth) / (samples.std(0) / math.sqrt(200))
    assert deviations.abs().max() < 4.5
    assert ((samples.mean(0) - truth) / truth).abs().max() < 0.1


def test_performer_error_falls_with_the_root_of_the_number_of_features() -> None:
    q, k, v = heads(2, HEADS, 40, WIDTH)
    q, k = 0.4 * q, 0.4 * k  # where they are long, the law holds only for very many features
    context = AttentionContext(is_causal=False, scaling=WIDTH**-0.5)
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    sizes, errors = (32, 128, 512, 2048), []
    for size in sizes:
        outputs = torch.stack([performer(size, seed)(q, k, v, context) for seed in range(8)])
        errors.append((outputs - truth).square().mean().sqrt().item())
    slopes = [math.log(b / a) / math.log(4) for a, b in pairwise(errors)]
    assert all(-0.65 < slope < -0.35 for slope in slopes), (errors, slopes)
    mean_of_values = (v.mean(2, keepdim=True) - truth).square().mean().sqrt()
    assert errors[-1] < 0.2 * mean_of_values


@pytest.mark.parametrize("stored", [{}, {"num_features": None}, {"num_features": 100}])
def test_the_number_of_features_of_saved_checkpoints_stays(stored: dict[str, Any]) -> None:
    """D ln D is 266 for 64: rounded up to 272, where earlier checkpoints took 512."""
    of_new, of_stored = PerformerAttentionConfig(), PerformerAttentionConfig.from_stored(stored)
    again = PerformerAttentionConfig.from_stored(of_stored.to_dict())
    counts = [len(PerformerAttention(c, geometry(head_dim=64)).features) for c in (of_new, of_stored, again)]
    assert counts == [272, *[stored.get("num_features") or 512] * 2]
    assert PerformerAttentionConfig.from_stored(of_new.to_dict()) == of_new
    sizes = [len(PerformerAttention(of_new, geometry(head_dim=width)).features) for width in (1, 2, 8, 16, 128)]
    assert sizes == [16, 16, 32, 48, 624]


@pytest.mark.parametrize("count", [0, 1.5, True, "many"])
def test_a_number_of_features_that_makes_no_sense_is_refused(count: Any) -> None:
    with pytest.raises(ValueError, match=r"num_features=.* an integer ≥ 1, \"auto\" or None"):
        PerformerAttentionConfig(num_features=count)
