"""Transformer-XL against its formula, its stopped gradients, and evaluation segment by segment with a cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from formulas import HEADS, WIDTH, geometry, heads
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.attention.transformer_xl import TransformerXLAttention
from hf_efficient.cache.bounded import SLACK
from hf_efficient.cache.segments import SegmentLayer
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patching.dispatch import aligned_call
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.testing import assert_close, inputs_for, tiny_model


def mechanism_of(**options: Any) -> TransformerXLAttention:
    config: Any = attention_config("transformer_xl", **options)
    mechanism = TransformerXLAttention(config, geometry(is_causal=True)).double()
    mechanism.reset_parameters()
    with torch.no_grad():
        for seed, parameter in enumerate(mechanism.parameters()):
            parameter.add_(0.3 * heads(*parameter.shape, seed=seed, count=1)[0])
    return mechanism


def bias_of(n: int) -> tuple[RelativeBias, Tensor, Tensor]:
    """Lazy, (H, N, N) dense, and the table of both."""
    table = heads(9, HEADS, seed=8, count=1)[0].requires_grad_()
    ids = (torch.arange(n) - torch.arange(n)[:, None]).clamp(-4, 4) + 4
    return RelativeBias(table, lambda offsets: offsets.clamp(-4, 4) + 4, 4), table[ids].movedim(-1, 0), table


def waves(n: int, width: int) -> Tensor:
    """(N, width) sinusoids of the distances 0 … n - 1, entry by entry."""
    half = -(-width // 2)
    rows = [
        [math.sin(o * 10000 ** (-2 * c / width)) for c in range(half)]
        + [math.cos(o * 10000 ** (-2 * c / width)) for c in range(half)]
        for o in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float64)[:, :width]


def by_formula(mechanism: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
    """The docstring with a dense mask; memory stands in a copy of its own, cut off where gradients stop."""
    config = mechanism.config
    n, size = q.shape[2], config.segment_length
    logits, past = 0.6 * q @ k.transpose(-1, -2), 0.6 * q @ k.detach().transpose(-1, -2)
    if config.relative:
        u, w = (x[:, None] for x in (mechanism.content_bias, mechanism.position_bias))
        vectors = (waves(n, HEADS * WIDTH) @ mechanism.relative_projection).unflatten(-1, (HEADS, WIDTH))
        distance = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)
        term = torch.einsum("bhid,ijhd->bhij", q + w, vectors[distance])
        logits, past = (0.6 * ((q + u) @ x.transpose(-1, -2) + term) for x in (k, k.detach()))
    if bias is not None:
        logits, past = logits + bias, past + bias
    own, memory = torch.zeros(q.shape[0], 1, n, n).bool(), torch.zeros(q.shape[0], 1, n, n).bool()
    for b in range(q.shape[0]):
        start = keep[b].int().argmax().item()
        for i in range(start, n):
            first = start + (i - start) // size * size
            for j in range(start, i + 1):
                own[b, 0, i, j] = keep[b, j] and j >= first
                memory[b, 0, i, j] = keep[b, j] and first - config.memory_length <= j < first
    if not config.stop_gradient:
        own, memory = own | memory, torch.zeros_like(memory)
    both = torch.cat([past.masked_fill(~memory, -math.inf), logits.masked_fill(~own, -math.inf)], -1)
    empty = ~(own | memory).any(-1, keepdim=True)
    weights = both.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return weights @ torch.cat([v.detach(), v], dim=2)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize(("size", "memory", "n"), [(5, 3, 23), (4, 8, 33), (3, 40, 20), (7, 7, 1), (7, 1, 2)])
def test_equals_its_formula(size: int, memory: int, n: int, stop_gradient: bool, relative: bool, with_bias: bool):
    """Padding left, right and in the middle, and a row of padding; gradients of all, stopped or not."""
    mechanism = mechanism_of(segment_length=size, memory_length=memory, stop_gradient=stop_gradient, relative=relative)
    q, k, v = (x.requires_grad_() for x in heads(4, HEADS, n, WIDTH))
    keep = torch.ones(4, n, dtype=torch.bool)
    keep[1, : n // 4], keep[1, n - n // 3 :] = False, False
    keep[2, 1::3] = False
    keep[3] = False
    lazy, dense, table = bias_of(n)
    context = AttentionContext(
        is_causal=True, scaling=0.6, key_padding_mask=keep, relative_bias=lazy if with_bias else None
    )
    actual = aligned_call(mechanism, q, k, v, context)
    expected = by_formula(mechanism, q, k, v, keep, dense if with_bias else None)
    # sinusoids are taken in fp32
    tolerance = 1e-5 if relative else 1e-9
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), tolerance, where=keep)
    upstream = heads(*q.shape, seed=3, count=1)[0] * keep[:, None, :, None]
    leaves = {"q": q, "k": k, "v": v, **dict(mechanism.named_parameters())} | ({"table": table} if with_bias else {})
    gradients = [
        torch.autograd.grad((out * upstream).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    ]
    for name, one, other in zip(leaves, *gradients, strict=True):
        # a single key has all the weight, whatever its logit
        scale = max(1.0, other.abs().max().item())
        assert (one - other).abs().max() <= tolerance * scale, f"gradient of {name}"


def test_memory_takes_no_gradient_and_its_segment_does():
    mechanism = mechanism_of(segment_length=4, memory_length=4)
    q, k, v = (x.requires_grad_() for x in heads(1, HEADS, 12, WIDTH))
    out = mechanism(q, k, v, AttentionContext(is_causal=True, scaling=0.6))
    gradients = torch.autograd.grad(out[:, :, 8:].sum(), (k, v))
    for gradient in gradients:
        assert (gradient[:, :, :8] == 0).all() and (gradient[:, :, 8:] != 0).any()


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_gradients_with_a_cache_stop_where_those_of_one_forward_do(stop_gradient: bool):
    """The second call begins inside a segment, so that its keys are its own segment's and the next one's memory."""
    mechanism = mechanism_of(segment_length=4, memory_length=6, stop_gradient=stop_gradient)
    n, cached = 15, 6
    q, k, v = (x.requires_grad_() for x in heads(2, HEADS, n, WIDTH))
    upstream = heads(*q.shape, seed=3, count=1)[0][:, :, cached:]
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[1, :3] = False
    whole = aligned_call(mechanism, q, k, v, AttentionContext(is_causal=True, scaling=0.6, key_padding_mask=keep))
    context = AttentionContext(is_causal=True, scaling=0.6, key_padding_mask=keep, query_offset=cached)
    part = aligned_call(mechanism, q[:, :, cached:], k, v, context)
    assert_close(part, whole[:, :, cached:], 1e-9)
    expected = torch.autograd.grad((whole[:, :, cached:] * upstream).sum(), (q, k, v))
    actual = torch.autograd.grad((part * upstream).sum(), (q, k, v))
    for name, one, other in zip("qkv", actual, expected, strict=True):
        assert_close(one, other, 1e-9, f"gradient of {name}")


@pytest.mark.parametrize("name", ["transformer_xl", "compressive"])
def test_many_new_tokens_after_few_cost_what_their_memory_does(name: str):
    """With a cache as without: 4 × the tokens look at 4 × the keys, not at 16 × as many."""
    options = dict(compressed_memory_length=8, compression_rate=4) if name == "compressive" else {}
    config: Any = attention_config(name, segment_length=16, memory_length=16, **options)
    mechanism = config.attention_class(config, geometry(is_causal=True)).double()
    mechanism.reset_parameters()
    past, pairs = 5, {}
    for n in (512, 2048):
        q, k, v = heads(1, HEADS, past + n, WIDTH)
        context = AttentionContext(is_causal=True, scaling=0.6, query_offset=past)
        with KeysSeen() as recorder:
            out = mechanism(q[:, :, past:], k, v, context)
        pairs[n] = recorder.pairs
        assert_close(out, mechanism(q, k, v, AttentionContext(is_causal=True, scaling=0.6))[:, :, past:], 1e-9)
    assert pairs[2048] <= 4.5 * pairs[512], pairs


class KeysSeen(TorchFunctionMode):
    """Counts the pairs of queries and keys that attention kernels are given."""

    pairs = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.pairs += args[0].shape[2] * args[1].shape[2]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_memory_as_long_as_the_text_is_exact(family: str):
    """Many segments, whose memory covers all of the past."""
    model = tiny_model(family).double()
    inputs = inputs_for(model, length=97)
    side, mask = ("decoder", "decoder_attention_mask") if family == "t5" else (None, "attention_mask")
    with torch.no_grad():
        expected = model(**inputs).logits
        with he.patch_attention(model, "transformer_xl", segment_length=8, memory_length=97, side=side):
            actual = model(**inputs).logits
    assert_close(actual, expected, 1e-9, where=inputs[mask])


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("memory", [512, 256])
def test_gpt2_segment_by_segment_is_one_forward(memory: int, relative: bool):
    """128 tokens at a time, the cache carried on: the unconverted model where memory covers the past, else the mechanism."""
    model = tiny_model("gpt2", positions=600)
    ids = inputs_for(model, batch=2, length=600, padded=False)["input_ids"]
    with torch.no_grad():
        full = model(ids).logits
        options = dict(segment_length=128, memory_length=memory, relative=relative)
        with he.patch_attention(model, "transformer_xl", **options):
            if relative and memory < 512:
                for name, parameter in model.named_parameters():
                    if ".efficient." in name:
                        parameter.normal_(std=0.1)
            one = model(ids).logits
            cache, parts = DynamicCache(config=model.config), []
            for segment in ids.split(128, dim=1):
                parts.append(model(segment, past_key_values=cache).logits)
            layer = cache.layers[0]
    assert_close(torch.cat(parts, dim=1), one, 1e-5)
    change = (one - full).abs().max() / full.abs().max()
    assert (change <= 1e-5) == (memory == 512), change
    assert isinstance(layer, SegmentLayer) and layer.get_seq_length() == 600
    assert layer.keys.shape[2] <= 128 + memory + 2 * SLACK + 128


def test_generation_keeps_a_bounded_number_of_keys():
    model = tiny_model("gpt2", positions=1024)
    ids = inputs_for(model, batch=2, length=5, padded=False)["input_ids"]
    with he.patch_attention(model, "transformer_xl", segment_length=16, memory_length=24):
        out = model.generate(ids, max_new_tokens=700, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    for layer in out.past_key_values.layers:
        assert layer.keys.shape[2] <= 16 + 24 + 2 * SLACK < 700


def test_relative_term_starts_at_nothing_and_is_computed_without_n_by_n():
    """At the start the model is the same with and without it; and at 4 × the length the largest tensor is 4 × as large."""
    model = tiny_model("gpt2", layers=1, positions=1024)
    cost = {}
    for length in (256, 1024):
        inputs = inputs_for(model, batch=2, length=length)
        logits = []
        for relative in (False, True):
            with he.patch_attention(model, "transformer_xl", segment_length=16, memory_length=32, relative=relative):
                with LargestTensor() as recorder:
                    out = model.transformer(**inputs).last_hidden_state
                    out.square().sum().backward()
                logits.append(out.detach())
        assert_close(logits[1], logits[0], 1e-5, where=inputs["attention_mask"])
        cost[length] = recorder.numel
    assert cost[1024] <= 4.5 * cost[256], cost


def test_a_text_longer_than_the_table_of_positions_is_refused():
    model = tiny_model("gpt2", positions=64)
    ids = inputs_for(model, batch=1, length=64)["input_ids"]
    with he.patch_attention(model, "transformer_xl", segment_length=16, memory_length=16), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="input of 65 tokens, but the model has 64 positions"):
            model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(segment_length=0), "segment_length=0 is not possible; it must be an integer ≥ 1"),
        (dict(memory_length=True), "memory_length=True is not possible"),
        (dict(stop_gradient=1), "stop_gradient=1 is not possible; it must be True or False"),
        (dict(relative="yes"), "relative='yes' is not possible"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        he.TransformerXLAttentionConfig(**options)


def test_encoders_are_refused():
    with pytest.raises(ValueError, match=r"transformer_xl remembers the past alone.*image_local"):
        he.patch_attention(tiny_model("bert"), "transformer_xl")
