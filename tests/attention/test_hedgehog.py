"""Learned feature maps beside a window: against their definition, on T5, and with a recurrent state."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from decoding import bounded_layers, decode, full, prompt
from pairs import Bench, Pair
from torch import Tensor
from torch.profiler import profile

import hf_efficient as he
from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.cache import bounded as decoding
from hf_efficient.cache.features import FeatureLayer
from hf_efficient.cache.recurrent import RecurrentLayer
from hf_efficient.ops import linear_attention
from hf_efficient.ops import linear_beyond_window as beyond_window
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.linear_attention import absorb
from hf_efficient.patterns.kinds import Window
from hf_efficient.testing import assert_close, tiny_model

PLACES = [("bert", None), ("gpt2", None), ("t5", "encoder"), ("t5", "decoder")]
SETTINGS = [
    pytest.param(mechanism, family, side, window, sinks, id=f"{mechanism}-{side or family}-{window}-{sinks}")
    for mechanism in ("hedgehog", "t2r")
    for family, side in PLACES
    for window, sinks in (((0, 0), (6, 0), (2, 0), (2, 12)) if family != "t5" else ((8, 0), (12, 0), (8, 2)))
]


def bench_of(mechanism: str, family: str, side: str | None, window: int, **options: Any) -> Bench:
    """With parameters away from their start, which has zeros."""
    bench = Bench(Pair(mechanism, family, side, dict(attention_window=window, **options), mechanism))
    for parameter in bench.mechanism.parameters():
        parameter.data.add_(0.3 * bench.normal(*parameter.shape))
    return bench


def features(mechanism: Any, x: Tensor, name: str) -> Tensor:
    """φ by its definition, not in log space."""
    projected = torch.einsum("hmd,bhnd->bhnm", getattr(mechanism, f"{name}_map"), x)
    if mechanism.config.mechanism == "hedgehog":
        return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1)
    return (projected + getattr(mechanism, f"{name}_bias")[:, None]).clamp(min=0) + 1e-3


def defined_weights(bench: Bench, query: Tensor, key: Tensor, keep: Tensor) -> Tensor:
    """(B, H, N, N) normalised weights, pair by pair as the docstring says."""
    mechanism, n, window = bench.mechanism, query.shape[2], bench.mechanism.config.attention_window
    kernel = features(mechanism, query, "query") @ features(mechanism, key, "key").mT
    offset = torch.arange(n) - torch.arange(n)[:, None]
    left, right = (window - 1, 0) if bench.is_causal else (window // 2, window // 2)
    visible = keep[:, None, None].expand(-1, 1, n, -1)
    if bench.is_causal:
        visible = visible & (offset <= 0)
    # queries of padding may see nothing
    sees = visible.any(-1, keepdim=True)
    if not window:
        weights = kernel * visible
        return weights / torch.where(sees, weights.sum(-1, keepdim=True), 1.0)
    bias = bench.relative_bias()
    b = torch.zeros(bench.HEADS, n, n, dtype=query.dtype) if bias is None else bias.at(offset)
    far = torch.zeros(bench.HEADS, 2 * n) if bias is None else bias.at(torch.arange(-n, n) * 1000)
    mean_b = 0.0 if bias is None else bias.at(torch.arange(-left, right + 1)).mean(-1)[:, None]
    plain = bench.WIDTH**-0.5 * query @ key.mT
    near = visible & (offset >= -left) & (offset <= right)
    hidden = torch.where(near.any(-1, keepdim=True), -torch.inf, 0.0)
    log_sum = torch.where(near, plain + b, hidden).logsumexp(-1)
    level = (plain * near).sum(-1) / near.sum(-1).clamp(min=1)
    outside = torch.where(offset < 0, far[:, :1, None], far[:, -1:, None])
    scale = mechanism.log_scale[:, None] + level + mechanism.sharpness[:, None] * (log_sum - level - mean_b)
    since_start = (torch.arange(n) - keep.int().argmax(-1)[:, None])[:, None, None]
    exact = near | (since_start >= 0) & (since_start < mechanism.config.sink_tokens)
    weights = torch.where(exact, (plain + b).exp(), kernel * (scale[..., None] + outside).exp()) * visible
    return weights / torch.where(sees, weights.sum(-1, keepdim=True), 1.0)


# ---- against the definition --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mechanism", "family", "side", "window", "sinks"), SETTINGS)
@pytest.mark.parametrize("n", [1, 2, 63, 97])
def test_output_and_gradients_equal_the_definition(
    mechanism: str, family: str, side: str | None, window: int, sinks: int, n: int, monkeypatch
):
    """Rows padded on both sides; chunks far shorter than the input."""
    monkeypatch.setattr(linear_attention, "CHUNK", 16)
    monkeypatch.setattr(linear_attention, "GROUP", 3)
    bench = bench_of(mechanism, family, side, window, sink_tokens=sinks, feature_dim=3)
    tokens = bench.tokens(3, n)
    keep = torch.ones(3, n, dtype=torch.bool)
    keep[1, n - n // 3 :] = keep[2, : n // 4] = False
    leaves = [x.requires_grad_() for x in tokens[:3]] + list(bench.mechanism.parameters())
    leaves += [] if bench.table is None else [bench.table]
    expected = defined_weights(bench, tokens.query, tokens.key, keep) @ tokens.value
    actual = bench(tokens, keep)
    real = keep[:, None, :, None]
    direction = bench.normal(*actual.shape) * real
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-9, where=keep)
    theirs = torch.autograd.grad((expected.where(real, 0.0) * direction).sum(), leaves, allow_unused=True)
    ours = torch.autograd.grad((actual.where(real, 0.0) * direction).sum(), leaves)
    scale = max(g.abs().max().item() for g in theirs if g is not None)
    for number, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        assert (one - (0.0 if two is None else two)).abs().max() <= 1e-9 * scale, f"gradient {number}"


@pytest.mark.parametrize(("mechanism", "family", "side", "window", "sinks"), SETTINGS)
def test_dense_weights_are_those_of_the_output(mechanism: str, family: str, side: str | None, window: int, sinks: int):
    bench = bench_of(mechanism, family, side, window, sink_tokens=sinks)
    tokens = bench.tokens(3, 61)
    keep = torch.ones(3, 61, dtype=torch.bool)
    keep[1, 40:] = keep[2, :7] = False
    context = AttentionContext(
        is_causal=bench.is_causal,
        scaling=bench.WIDTH**-0.5,
        key_padding_mask=keep,
        relative_bias=bench.relative_bias(),
    )
    weights = bench.mechanism.attention_weights(tokens.query, tokens.key, context)
    assert_close((weights @ tokens.value).transpose(1, 2), bench(tokens, keep).transpose(1, 2), 1e-9, where=keep)
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-9, where=keep[:, None].expand(-1, 4, -1))
    assert weights.masked_select(~keep[:, None, None]).abs().sum() == 0
    leaves = list(bench.mechanism.parameters())
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(weights[:, :, 40, 7].sum(), leaves))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_only_differences_of_the_relative_bias_matter(side: str):
    """As in softmax attention, the same number added to every bias changes nothing."""
    bench = bench_of("hedgehog", "t5", side, 12)
    tokens = bench.tokens(2, 61)
    expected = bench(tokens)
    assert bench.table is not None
    bench.table.data += 3.0
    assert_close(bench(tokens), expected, 1e-9)
    bench.table.data[0] += 1.0  # the constant of the far past
    assert (bench(tokens) - expected).abs().max() > 1e-3


def test_parameters_take_part_when_no_key_is_far():
    """Distributed training stops at parameters without gradient."""
    for family in ("bert", "gpt2"):
        bench = bench_of("hedgehog", family, None, 64)
        bench(bench.tokens(2, 9)).sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in bench.mechanism.parameters())


def test_the_control_is_the_window_alone():
    for mechanism in ("hedgehog", "t2r"):
        config = he.attention_config(mechanism, attention_window=8, layers=(1,), side="decoder")
        control = config.attention_class.control_config(config)
        assert control == he.attention_config("local", attention_window=8, layers=(1,), side="decoder")
        with_sinks = dataclasses.replace(config, sink_tokens=3)
        assert config.attention_class.control_config(with_sinks) == dataclasses.replace(control, sink_tokens=3)
        alone = he.attention_config(mechanism, attention_window=0)
        assert alone.attention_class.control_config(alone) is None


@pytest.mark.parametrize("sinks", [-1, 1.0, True])
def test_sinks_that_make_no_sense_are_refused(sinks: Any):
    for mechanism in ("hedgehog", "local"):
        with pytest.raises(ValueError, match=f"sink_tokens={sinks}"):
            he.attention_config(mechanism, attention_window=8, sink_tokens=sinks)
    with pytest.raises(ValueError, match=r"sink_tokens=1 .*attention_window"):
        he.attention_config("t2r", sink_tokens=1)


# ---- T5 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["hedgehog", "t2r"])
@pytest.mark.parametrize(("side", "smallest"), [("encoder", 180), ("decoder", 114)])
def test_t5_windows_must_reach_to_where_the_bias_is_constant(mechanism: str, side: str, smallest: int):
    model = tiny_model("t5", relative_attention_max_distance=128, relative_attention_num_buckets=32)
    for window in (0, 64, smallest - 2):
        with pytest.raises(ValueError, match=f"{mechanism}: attention_window={window} .*={smallest} or more"):
            he.patch_attention(model, mechanism, attention_window=window, side=side)
    with he.patch_attention(model, mechanism, attention_window=smallest, side=side):
        pass


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("reach", [1, 2, 7, 8])
def test_the_smallest_window_leaves_one_bias_per_direction(reach: int, is_causal: bool):
    facts: dict[str, Any] = dict(num_heads=2, head_dim=4, hidden_size=8, layer=0, num_layers=1, side="encoder")
    geometry = AttentionGeometry(
        **facts,
        is_causal=is_causal,
        has_relative_bias=True,
        projection_bias=False,
        max_positions=None,
        relative_bias_reach=reach,
    )
    cls = he.get_mechanism("hedgehog")
    for window in range(0, 20, 2):
        first_outside = window if is_causal else window // 2 + 1
        fits = window > 0 and first_outside >= reach
        assert bool(cls.unsupported(he.attention_config("hedgehog", attention_window=window), geometry)) != fits


def test_the_reach_of_a_bias_is_where_it_ends():
    from hf_efficient.families import family_of

    for family, expected in (("t5", (91, 113)), ("mt5", (91, 113)), ("umt5", (91, 113))):
        model = tiny_model(family, relative_attention_max_distance=128, relative_attention_num_buckets=32)
        reaches = []
        for stack in family_of(model).stacks(model):
            bias = family_of(model).relative_bias(stack, stack.layers[0])
            reach = family_of(model).geometry(stack, stack.layers[0]).relative_bias_reach
            past = bias.at(-torch.arange(reach - 1, 400))
            assert (past[:, 1:] == past[:, -1:]).all()
            future = bias.at(torch.arange(reach - 1, 400))
            assert (future[:, 1:] == future[:, -1:]).all()
            assert (past[:, 0] != past[:, 1]).any()
            reaches.append(reach)
        assert tuple(reaches) == expected


# ---- the operators -----------------------------------------------------------------------------------------------


def log_features(n: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, 3, m, d, generator=generator, dtype=torch.float64) for m, d in ((n, 5), (s, 5), (s, 4)))
    return (3 * q).requires_grad_(), (3 * k).requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n", "s"), [(1, 1), (29, 29), (9, 29), (29, 9)])
def test_log_sum_exp_of_linear_attention(n: int, s: int, is_causal: bool, monkeypatch):
    monkeypatch.setattr(linear_attention, "CHUNK", 8)
    monkeypatch.setattr(linear_attention, "GROUP", 3)
    q, k, v = log_features(n, s)
    logits = (q[:, :, :, None] + k[:, :, None]).logsumexp(-1)
    visible = torch.ones(n, s, dtype=torch.bool)
    visible = visible.tril(s - n) if is_causal else visible
    expected = logits.masked_fill(~visible, -torch.inf).logsumexp(-1)
    out, actual = linear_attention.linear_attention(q, k, v, is_causal=is_causal, return_lse=True)
    sees = visible.any(-1)
    assert (actual[:, :, ~sees] == -torch.inf).all() and (out[:, :, ~sees] == 0).all()
    assert_close(actual[:, :, sees], expected[:, :, sees], 1e-12)
    for one, two in zip(
        torch.autograd.grad(actual[:, :, sees].sin().sum(), (q, k)),
        torch.autograd.grad(expected[:, :, sees].sin().sum(), (q, k)),
        strict=True,
    ):
        assert_close(one, two, 1e-11)


@pytest.mark.parametrize("gap", [40, 95, 300])
def test_features_that_lie_far_apart(gap: int):
    """A query and a key may meet in features that are next to nothing for both; a strong gradient must survive that too."""
    q = torch.tensor([[0.0, -gap], [0.0, -gap], [-gap, 0.0]]).view(1, 1, 3, 2).requires_grad_()
    k = torch.tensor([[-gap, 0.0], [-gap - 2.0, -1.0], [-gap, -gap]]).view(1, 1, 3, 2).requires_grad_()
    v = torch.tensor([[1.0], [0.0], [3.0]]).view(1, 1, 3, 1)
    logits = (q.double()[:, :, :, None] + k.double()[:, :, None]).logsumexp(-1)
    expected = logits.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v.double()
    out, lse = linear_attention.linear_attention(q, k, v, is_causal=True, return_lse=True)
    assert_close(out.double(), expected, 1e-5)
    assert lse.isfinite().all()
    ours, theirs = (torch.autograd.grad(65536 * y.sum(), (q, k)) for y in (out, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert_close(one, two, 1e-5)


def test_backward_is_linear_in_the_length():
    """Bytes that the backward pass allocates: gradients of slices would be as large as the whole, chunk by chunk."""

    def allocated(n: int) -> int:
        q, k, v = (torch.randn(1, 1, n, 32, requires_grad=True) for _ in range(3))
        out = linear_attention.linear_attention(q, k, v, is_causal=True)
        with profile(profile_memory=True) as profiler:
            out.sum().backward()
        return sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())

    assert allocated(8192) < 2.2 * allocated(4096)


def test_window_means_far_from_zero():
    key = 1000 + torch.randn(1, 2, 4000, 3, dtype=torch.float64)
    keep = torch.ones(1, 4000, dtype=torch.bool)
    keep[:, :50] = False
    expected = beyond_window.window_means(key, keep, 1, 0, 4000)
    assert_close(expected[:, :, 60], key[:, :, 59:61].mean(2), 1e-12)
    assert (expected[:, :, :50] == 0).all()
    actual = beyond_window.window_means(key.float(), keep, 1, 0, 4000)
    assert (actual - expected)[:, :, 50:].abs().max() < 1e-3


@pytest.mark.parametrize("cuts", [(0, 10), (1, 11), (4, 5, 20), (28,)])
def test_a_state_stands_for_the_keys_in_it(cuts: tuple[int, ...], monkeypatch):
    """Folded in one or several steps, with keys that don't exist and one that dwarfs the others."""
    monkeypatch.setattr(linear_attention, "CHUNK", 8)
    monkeypatch.setattr(linear_attention, "GROUP", 3)
    q, k, v = (x.detach() for x in log_features(29, 29))
    k[0, :, :7] = -torch.inf
    k[1, :, 3] += 500.0
    expected, lse = linear_attention.linear_attention(q, k, v, is_causal=True, return_lse=True)
    state, before = None, 0
    for cut in cuts:
        if cut:
            state = absorb(state, k[:, :, before:cut], v[:, :, before:cut])
        before = cut
    rest: dict[str, Any] = dict(is_causal=True, state=state, return_lse=True)
    out, actual = linear_attention.linear_attention(q[:, :, before:], k[:, :, before:], v[:, :, before:], **rest)
    assert_close(out, expected[:, :, before:], 1e-12)
    assert_close(actual.exp(), lse[:, :, before:].exp(), 1e-12)


@pytest.mark.parametrize("beyond", [0, 1, 5, 29, 40])
def test_far_keys_are_counted_by_token(beyond: int, monkeypatch):
    monkeypatch.setattr(linear_attention, "CHUNK", 8)
    monkeypatch.setattr(linear_attention, "GROUP", 3)
    q, k, v = (x.detach() for x in log_features(29, 29))
    offset = torch.arange(29) - torch.arange(29)[:, None]
    logits = linear_attention.log_kernel(q, k)
    for function, visible in (
        (beyond_window.far_past, offset <= -beyond),
        (beyond_window.far_future, offset >= beyond),
    ):
        hidden = logits.masked_fill(~visible, -torch.inf)
        out, lse = function(q, k, v, beyond)
        assert (out - hidden.softmax(-1).nan_to_num() @ v).abs().max() < 1e-12
        sees = visible.any(-1)
        assert (lse[:, :, ~sees] == -torch.inf).all()
        assert (lse - hidden.logsumexp(-1))[:, :, sees].abs().sum() < 1e-9


# ---- decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 6])
def test_decoding_keeps_a_window_and_a_state_in_fp32(window: int, monkeypatch):
    monkeypatch.setattr(decoding, "SLACK", 4)
    model = tiny_model("gpt2", positions=400).bfloat16()
    ids, mask = prompt(2, 300, (0, 11))
    with he.patch_attention(model, "hedgehog", attention_window=window):
        _, cache = decode(model, ids, mask, (100, *range(101, 301)))
    for layer in bounded_layers(cache):
        assert isinstance(layer, RecurrentLayer) and layer.state is not None
        assert layer.keys.shape[2] <= max(window - 1, 0) + 9
        assert {x.dtype for x in layer.state} == {torch.float32}
        assert layer.state.means.shape == (2, 4, 16, 8)
        # every key that left the window is counted once: the features of one key sum to 1 in each half
        features_per_key = layer.state.levels.exp().sum(-1)
        gone = 300 - max(window - 1, 0) - torch.tensor([0.0, 11.0])
        assert_close(features_per_key, 2 * gone[:, None].expand(-1, 4), 1e-4)


@pytest.mark.parametrize("exact", [0, 5])
def test_what_decoding_holds_does_not_grow(exact: int):
    """After 256 and after 2048 tokens; every step gets the keys that are not in the state, and no others."""
    layer, held = FeatureLayer(Window(left=exact, right=0), exact), []
    for token in range(2048):
        layer.prepare(torch.zeros(1, dtype=torch.long), None)
        key, value = layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
        assert key.shape[2] == layer.pending == min(exact, token) + 1
        layer.fold(torch.zeros(1, 1, max(0, key.shape[2] - exact), 3), value[:, :, : max(0, key.shape[2] - exact)])
        if token + 1 in (256, 2048):
            states = [layer.state, layer._last.state, layer._next.state]
            held.append(sum(x.untyped_storage().size() for x in (layer.keys, layer.values, *sum(states, ()))))
    assert held[0] == held[1] and layer.keys.shape[2] <= 2 * decoding.SLACK + exact + 1
    assert_close(layer.state.levels.exp(), torch.full((1, 1, 3), 2048.0 - exact), 1e-4)


def test_other_row_starts_are_refused_once_keys_are_in_the_state(monkeypatch):
    """Without its mask the padding of the window would join the state."""
    monkeypatch.setattr(decoding, "SLACK", 0)
    model = tiny_model("gpt2").double()
    ids, mask = prompt(2, 60, (0, 11))
    with he.patch_attention(model, "hedgehog", attention_window=4):
        _, cache = decode(model, ids, mask, (59,))
        with pytest.raises(ValueError, match="rows start at other tokens"):
            model(ids[:, 59:], past_key_values=cache)


def test_a_cache_of_another_kind_serves_as_well():
    """One that a stock model has filled holds every key and no state."""
    model = tiny_model("gpt2").double()
    ids, mask = prompt(2, 60, (0, 11))
    with torch.no_grad():
        cache = model(ids[:, :40], attention_mask=mask[:, :40], use_cache=True).past_key_values
    keys = [layer.keys.clone() for layer in cache.layers]
    with he.patch_attention(model, "hedgehog", attention_window=4, layers=(0,)):
        expected = full(model, ids, mask)
        _, own = decode(model, ids, mask, (40,))
        actual, cache = decode(model, ids, mask, (50, 60), cache)
        assert type(cache.layers[0]).__name__ == "DynamicLayer"
        assert torch.equal(cache.layers[0].keys[:, :, :40], keys[0]) and isinstance(own.layers[0], RecurrentLayer)
        # the first layer's keys do not depend on attention; those of the second are stock ones
        assert (actual - expected[:, 40:]).abs().max() > 1e-9
