"""Memory-compressed attention against its formula, tokens that repeat, and the cache of pooled keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from formulas import HEADS, WIDTH, geometry, heads
from torch import Tensor
from transformers import DynamicCache

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.attention.memory_compressed import MemoryCompressedAttention
from hf_efficient.cache.bounded import SLACK
from hf_efficient.cache.pooled import CompressedLayer
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patching.dispatch import aligned_call
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.testing import assert_close, inputs_for, tiny_model


def mechanism_of(is_causal: bool, moved: bool = True, **options: Any) -> MemoryCompressedAttention:
    config: Any = attention_config("memory_compressed", **options)
    mechanism = MemoryCompressedAttention(config, geometry(is_causal=is_causal)).double()
    mechanism.reset_parameters()
    if moved:
        with torch.no_grad():
            for seed, parameter in enumerate(mechanism.parameters()):
                parameter.add_(0.3 * heads(*parameter.shape, seed=seed, count=1)[0])
    return mechanism


def bias_of(n: int) -> tuple[RelativeBias, Tensor]:
    table = heads(9, HEADS, seed=8, count=1)[0]
    ids = (torch.arange(n) - torch.arange(n)[:, None]).clamp(-4, 4) + 4
    return RelativeBias(table, lambda offsets: offsets.clamp(-4, 4) + 4, 4), table[ids].movedim(-1, 0)


def by_formula(mechanism: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, keep: Tensor, bias: Any) -> Tensor:
    """The docstring, one query at a time; each row counted from its first real token."""
    rate, block = mechanism.config.compression_rate, mechanism.config.block_size
    out = torch.zeros_like(q)
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        real = keep[b].nonzero().flatten().tolist()
        if not real:
            continue
        start = real[0]
        pooled_keys: dict[int, list[int]] = {}
        for j in real:
            pooled_keys.setdefault((j - start) // rate, []).append(j)
        pooled = {
            u: [
                rate / len(js) * sum(x[b, h, j] @ w[h, (j - start) % rate] for j in js)
                for x, w in ((k, mechanism.key_convolution), (v, mechanism.value_convolution))
            ]
            for u, js in pooled_keys.items()
        }
        for i in range(start, q.shape[2]):
            own = (i - start) // block
            logits, values = [], []
            for j in real:
                if (j - start) // block == own and not (is_causal and j > i):
                    logits.append(0.6 * q[b, h, i] @ k[b, h, j] + (0.0 if bias is None else bias[h, i, j]))
                    values.append(v[b, h, j])
            for u, js in pooled_keys.items():
                other = u * rate // block
                if other < own if is_causal else other != own:
                    shift = 0.0 if bias is None else bias[h, i, js].mean()
                    logits.append(0.6 * q[b, h, i] @ pooled[u][0] + shift + math.log(len(js)))
                    values.append(pooled[u][1])
            if logits:
                out[b, h, i] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("rate", "block", "n"), [(3, 6, 20), (1, 4, 9), (4, 4, 17), (5, 10, 1)])
def test_equals_its_formula(rate: int, block: int, n: int, is_causal: bool, with_bias: bool) -> None:
    """Moved convolutions; padding left, right and in the middle, a row of padding; and gradients."""
    mechanism = mechanism_of(is_causal, compression_rate=rate, block_size=block)
    q, k, v = (x.requires_grad_() for x in heads(4, HEADS, n, WIDTH))
    keep = torch.ones(4, n, dtype=torch.bool)
    keep[1, : n // 4], keep[1, n - n // 3 :] = False, False
    keep[2, 1::3] = False
    keep[3] = False
    lazy, dense = bias_of(n)
    context = AttentionContext(
        is_causal=is_causal, scaling=0.6, key_padding_mask=keep, relative_bias=lazy if with_bias else None
    )
    actual = aligned_call(mechanism, q, k, v, context)
    expected = by_formula(mechanism, q, k, v, is_causal, keep, dense if with_bias else None)
    # logarithms of counts are taken in fp32
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-6, where=keep)
    upstream = heads(*q.shape, seed=3, count=1)[0] * keep[:, None, :, None]
    leaves = {"q": q, "k": k, "v": v, **dict(mechanism.named_parameters())}
    gradients = [
        torch.autograd.grad((out * upstream).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    ]
    for name, one, other in zip(leaves, *gradients, strict=True):
        if other.any():
            assert_close(one, other, 1e-5, f"gradient of {name}")
        else:  # of a query that sees a single key
            assert one.abs().max() <= 1e-14, f"gradient of {name} should vanish"


@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_for_tokens_repeated_within_pooled_keys(is_causal: bool) -> None:
    """At the start: a slot then stands for equal tokens, and its log-count makes up for their number."""
    rate, n = 4, 46
    mechanism = mechanism_of(is_causal, moved=False, compression_rate=rate, block_size=8)
    q, _, _ = heads(2, HEADS, n, WIDTH)
    k, v = (x.repeat_interleave(rate, dim=2)[:, :, :n] for x in heads(2, HEADS, n, WIDTH, seed=1, count=2))
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[1, 41:] = False
    context = AttentionContext(is_causal=is_causal, scaling=0.6, key_padding_mask=keep)
    hidden = ~keep[:, None, None] | (torch.ones(n, n, dtype=torch.bool).triu(1) if is_causal else False)
    expected = (0.6 * q @ k.transpose(-1, -2)).masked_fill(hidden, -math.inf).softmax(-1) @ v
    actual = mechanism(q, k, v, context)
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-6, where=keep)


@pytest.mark.parametrize("side", [None, "decoder"], ids=["gpt2", "t5"])
def test_the_cache_keeps_pooled_keys_in_place_of_keys(side: str | None) -> None:
    """What is kept grows by one slot per `compression_rate` tokens, and continues as one forward does."""
    rate, block, length, steps = 4, 8, 400, 12
    model = tiny_model("gpt2" if side is None else "t5", positions=512).double()
    prefix = "" if side is None else "decoder_"
    inputs = inputs_for(model, batch=2, length=length + steps)
    inputs[f"{prefix}attention_mask"] = torch.ones(2, length + steps, dtype=torch.long)
    inputs[f"{prefix}attention_mask"][1, :9] = 0
    if side is None:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    fixed = {name: value for name, value in inputs.items() if side and not name.startswith(prefix)}
    own = {name: value for name, value in inputs.items() if name not in fixed}
    with (
        he.patch_attention(model, "memory_compressed", compression_rate=rate, block_size=block, side=side),
        torch.no_grad(),
    ):
        for seed, parameter in enumerate(p for name, p in model.named_parameters() if "convolution" in name):
            parameter.add_(0.1 * heads(*parameter.shape, seed=seed, count=1)[0])
        whole = model(**inputs).logits
        cache, logits = None, []
        for start, end in [
            (0, 150),
            (150, 151),
            (151, 340),
            (340, length),
            *((i, i + 1) for i in range(length, length + steps)),
        ]:
            part = {name: value[:, :end] if "mask" in name else value[:, start:end] for name, value in own.items()}
            step = model(**part, **fixed, past_key_values=cache, use_cache=True)
            logits.append(step.logits)
            cache = step.past_key_values
    assert_close(torch.cat(logits, 1), whole, 1e-9, where=own[f"{prefix}attention_mask"])
    layers = (cache if isinstance(cache, DynamicCache) else cache.self_attention_cache).layers
    for layer in layers:
        assert isinstance(layer, CompressedLayer) and layer.state is not None
        assert layer.keys.shape[2] <= block + 2 * SLACK
        assert (length - layer.keys.shape[2]) // rate - 2 <= layer.state.keys.shape[2] <= length // rate


def test_rows_that_start_at_different_tokens_keep_no_empty_pooled_keys():
    rate, block, length, rows = 4, 5 * SLACK, 1000, 6
    model = tiny_model("gpt2", positions=1024)
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, : 37 * row] = 0
    ids = torch.randint(5, 90, (rows, length))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with he.patch_attention(model, "memory_compressed", compression_rate=rate, block_size=block), torch.no_grad():
        cache = None
        for end in range(20, length + 1, 20):
            part = slice(end - 20, end)
            step = model(
                ids[:, part], attention_mask=mask[:, :end], position_ids=positions[:, part], past_key_values=cache
            )
            cache = step.past_key_values
    for layer in cache.layers:
        pooled_keys = layer.state.token_mask.any(-1)[:, 0]
        assert pooled_keys.shape[1] == pooled_keys.sum(-1).max() <= length // rate


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_long_continuation_needs_no_quadratic_memory(family: str):
    """After a cache of 16 tokens the largest tensor grows as without one: n / c pooled keys, block by block, and no n²."""
    cost = {}
    for length in (256, 1024):
        model = tiny_model(family, positions=1100)
        prefix = "" if family == "gpt2" else "decoder_"
        ids = torch.randint(5, 90, (1, 16 + length))
        rest = {} if family == "gpt2" else {"encoder_outputs": (torch.randn(1, 4, model.config.d_model),)}
        side = None if family == "gpt2" else "decoder"
        with (
            he.patch_attention(model, "memory_compressed", compression_rate=16, block_size=16, side=side),
            torch.no_grad(),
        ):
            cache = model(**{f"{prefix}input_ids": ids[:, :16]}, **rest, use_cache=True).past_key_values
            with LargestTensor() as recorder:
                model(**{f"{prefix}input_ids": ids[:, 16:]}, **rest, past_key_values=cache, use_cache=True)
        cost[length] = recorder.numel
    assert cost[1024] <= 4.5 * cost[256], cost


def test_blocks_that_are_no_whole_number_of_pooled_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size=10 is not possible; it must be a multiple of compression_rate=4"):
        he.MemoryCompressedAttentionConfig(compression_rate=4, block_size=10)
