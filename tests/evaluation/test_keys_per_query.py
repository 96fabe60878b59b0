"""Keys per query and floating-point operations, against a count of what the definitions show."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pairs import MAIN, VARIANTS, Bench, Pair, Tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import hf_efficient as he
from hf_efficient.attention.base.pattern import PatternAttentionConfig
from hf_efficient.evaluation.controls import MeanOfValues, MeanOfValuesConfig
from hf_efficient.evaluation.cost import keys_per_query, mean_keys_per_query, setting_near
from hf_efficient.kernels import flops as formulas  # noqa: F401  known to the counter
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.dense import dense_attention
from hf_efficient.patterns.kinds import Full, Window
from hf_efficient.profiling.counters import flops
from hf_efficient.testing import tiny_model

# of no block size below, so that last blocks are short
N = 46
ALONE = [pair for pair in MAIN + VARIANTS if pair.family in ("bert", "gpt2")]


def _visible(pattern: Any, n: int, is_causal: bool) -> Tensor:
    """(H or 1, n, n) dense mask."""
    place = torch.arange(n)
    mask = pattern.at_length(n).visible_per_head(place[:, None], place[None])
    return mask & (place[None] <= place[:, None]) if is_causal else mask


def _weights(bench: Bench, n: int) -> Tensor:
    """(H, n, n) how much the output of each query changes with the value of each key, by values that are unit vectors."""
    extra = bench.mechanism.num_extra_tokens(bench.mechanism.config)
    tokens, width, length = bench.tokens(1, extra + n), bench.WIDTH, extra + n
    rows = -(-length // width)
    units = torch.eye(rows * width, dtype=torch.float64)[:, :length].view(rows, 1, width, length).transpose(2, 3)
    several = [x.expand(rows, *x.shape[1:]) for x in (tokens.query, tokens.key, tokens.hidden)]
    value = units.expand(-1, bench.HEADS, -1, -1)
    out = bench(Tokens(several[0], several[1], value, several[2]))  # (rows, H, n, D)
    return out.permute(1, 2, 0, 3).flatten(2)[..., :length]


def _seen(weights: Tensor) -> float:
    """Keys of a row: what is hidden has no part at all."""
    return float((weights != 0).sum()) / weights.shape[:2].numel()


def _unlike(weights: Tensor) -> float:
    """Different weights in a row: keys that stand for several tokens give all of them one weight."""
    logarithms = weights.log().sort(-1).values
    return (
        float((logarithms.isfinite() & (logarithms.diff(dim=-1, prepend=logarithms[..., :1] - 1) > 1e-9)).sum())
        / weights.shape[:2].numel()
    )


def _rank(weights: Tensor) -> float:
    return float(torch.linalg.matrix_rank(weights, rtol=1e-13).double().mean())


def _pooled_on_both_sides(weights: Tensor) -> float:
    """Tokens of a pooled query have one row."""
    return _unlike(weights) * len(weights[0].unique(dim=0)) / weights.shape[1]


# how keys, or what stands for them, are counted in the weights of a row of n tokens
COUNTS: dict[str, Any] = {
    "transformer_xl": _seen,
    "sinkhorn": _seen,
    "synthesizer": _seen,
    "etc": _seen,
    "memory_compressed": _unlike,
    "compressive": _unlike,
    "linformer": _unlike,
    "funnel": _pooled_on_both_sides,
    **dict.fromkeys(("nystromformer", "set_transformer", "linear_transformer", "cosformer"), _rank),
}

DENSE = [pair for pair in ALONE if isinstance(pair.config, PatternAttentionConfig)]
# the largest of several values is no mean, projections of its own hide what is read, sums over the past have no rank
OTHER = {"compression": ("max", "conv", "dilated", "most_used"), "projection": ("max", "conv"), "sharing": ("none",)}
MEASURED = [
    pair
    for pair in ALONE
    if pair.mechanism in COUNTS
    and not any(pair.options.get(name) in values for name, values in OTHER.items())
    and not (pair.is_causal and COUNTS[pair.mechanism] is _rank)
]


@pytest.mark.parametrize("pair", DENSE, ids=lambda pair: pair.label)
def test_patterns_show_so_many_keys(pair: Pair):
    bench, config = Bench(pair), pair.config
    geometry, g = bench.mechanism.geometry, bench.mechanism.num_extra_tokens(config)
    mask = _visible(config.visible_keys(geometry), N, geometry.is_causal)
    pairs = float(mask.sum()) / len(mask) + g * N + g * (N + g)
    assert keys_per_query(config, geometry, N) == pytest.approx(pairs / N, rel=1e-12)
    narrow = dataclasses.replace(geometry, sliding_window=(3, 0 if geometry.is_causal else 3))
    mask = mask & _visible(Window(left=3, right=3), N, geometry.is_causal)
    assert keys_per_query(config, narrow, N) * N - g * N - g * (N + g) == pytest.approx(float(mask.sum()) / len(mask))


@pytest.mark.parametrize("pair", MEASURED, ids=lambda pair: pair.label)
def test_weights_have_so_many_different_keys(pair: Pair):
    bench = Bench(pair)
    geometry, count = bench.mechanism.geometry, COUNTS[pair.mechanism]
    # projections over all positions leave some pooled keys of shorter rows without a token
    n = geometry.max_positions if pair.mechanism == "linformer" else N
    extra = bench.mechanism.num_extra_tokens(pair.config)
    found = count(_weights(bench, n)) * (n + extra) / n
    keys = keys_per_query(pair.config, geometry, n)
    if count is _rank or pair.mechanism == "sinkhorn":  # nearly dependent rows; a short last block may be chosen
        assert 0.8 * keys <= found <= keys * (1 + 1e-12)
    else:
        assert found == pytest.approx(keys, rel=1e-12)


@pytest.mark.parametrize("pair", [pair for pair in ALONE if not pair.variant], ids=lambda pair: pair.label)
def test_every_mechanism_tells_and_has_a_setting_near_a_cost(pair: Pair):
    """At least a fifth of all keys, and no operation that the counter misses."""
    bench = Bench(pair)
    geometry = dataclasses.replace(bench.mechanism.geometry, head_dim=16, value_dim=16, max_positions=512)
    config = setting_near(pair.mechanism, geometry, 512, 128)
    assert config is not None
    assert not config.attention_class.unsupported(config, geometry)
    keys = keys_per_query(config, geometry, 512)
    assert keys is not None
    if config != type(config)():
        assert 0.8 < keys / 128 < 1.25, config


def test_choices_by_content_show_at_most_so_many_keys():
    for pair in ALONE:
        if pair.mechanism in ("reformer", "routing_transformer") and not pair.options.get("shared_qk"):
            bench = Bench(pair)
            keys = keys_per_query(pair.config, bench.mechanism.geometry, N)
            assert 0 < _seen(_weights(bench, N)) <= keys + 1e-9 < N, pair.label


def test_a_model_has_the_mean_of_its_layers():
    model = tiny_model("gpt2", layers=2, positions=N)
    causal = (N + 1) / 2
    assert mean_keys_per_query(model, N) == causal
    with he.patch_attention(model, he.attention_config("local", attention_window=4, layers=(1,))):
        assert mean_keys_per_query(model, N) == (causal + 4 - 6 / N) / 2
    with he.patch_attention(model, [MeanOfValuesConfig()]):
        assert mean_keys_per_query(model, N) == 1.0


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
def test_the_control_has_no_attention_in_it(is_causal: bool, is_padded: bool):
    """It is softmax attention of equal logits, and compares nothing: no mechanism can take less time."""
    geometry = dataclasses.replace(Bench(ALONE[0]).mechanism.geometry, is_causal=is_causal)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, :4] = not is_padded
    context = AttentionContext(is_causal=is_causal, scaling=1.0, key_padding_mask=keep if is_padded else None)
    found: list[Tensor] = []
    control = MeanOfValues(MeanOfValuesConfig(), geometry)
    assert flops(lambda: found.append(control(query, key, value, context))) == 0
    torch.testing.assert_close(found[0], dense_attention(0 * query, key, value, context))


def _counted(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_operators_count_the_visible_pairs():
    """Forward and backward, against dense masks; on tensors without data, as a graphics card would be needed."""
    b, h, n, d, m = 2, 3, 70, 16, 5
    window, own = Window(left=6, right=2), torch.ops.hf_efficient
    pairs = int(_visible(window, n, False).sum())
    causal = int(_visible(window, n, True).sum())
    unit = 2 * b * h * d
    with FakeTensorMode():
        q, k, v, out = (torch.empty(b, h, n, d) for _ in range(4))
        lse, extra, features = torch.empty(b, h, n), torch.empty(b, h, 4, d), torch.empty(b, h, n, m)
        band = (q, k, v, None, None, extra, extra, None, 6, 2, 0, 1.0)
        assert _counted(lambda: own.band_attention(*band)) == 2 * unit * (pairs + 4 * n)
        assert _counted(lambda: own.band_attention_backward(out, None, out, lse, False, *band)) == 5 * unit * (
            pairs + 4 * n
        )
        sparse = (q, k, v, *[None] * 6, window.spec(), 1.0, True, 0)
        assert _counted(lambda: own.block_sparse_forward(*sparse)) == 2 * unit * causal
        assert _counted(lambda: own.block_sparse_backward(out, None, out, lse, False, *sparse)) == 5 * unit * causal
        linear = (features, features, v, None, None)
        assert _counted(lambda: own.linear_attention_forward(*linear)) == 2 * unit * n * m
        assert _counted(lambda: own.linear_attention_backward(out, None, out, lse, *linear)) == 5 * unit * n * m


@pytest.mark.parametrize("is_causal", [False, True])
def test_fused_attention_of_the_cpu_counts(is_causal: bool):
    q, k, v = (torch.randn(2, 3, 40, 16, requires_grad=True) for _ in range(3))
    pairs = int(_visible(Full(), 40, is_causal).sum())

    def call(backward: bool) -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        if backward:
            out.sum().backward()

    assert flops(call, False) == 2 * 2 * 6 * 16 * pairs
    assert flops(call, True) == (2 + 5) * 2 * 6 * 16 * pairs


def test_a_window_costs_what_it_shows():
    """Through the model, where counts of the operators alone were the same for any window."""
    model = tiny_model("bert", layers=2, positions=256)
    ids = {"input_ids": torch.randint(5, 20, (1, 256))}
    found = {}
    for window in (16, 64):
        with he.patch_attention(model, "local", attention_window=window), torch.no_grad():
            found[window] = flops(lambda: model(**ids))
    geometry = Bench(ALONE[0]).mechanism.geometry
    keys = [keys_per_query(he.attention_config("local", attention_window=w), geometry, 256) for w in (16, 64)]
    assert found[64] - found[16] == round(2 * 4 * 256 * model.config.hidden_size * (keys[1] - keys[0]))
