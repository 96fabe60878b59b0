"""Compressive memory against its formula, repeated tokens, exact limits, the cache of pooled keys, and its own loss."""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

import pytest
import torch
from formulas import HEADS, WIDTH, geometry, heads
from torch import Tensor
from transformers import DynamicCache

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.attention.compressive import CompressiveAttention
from hf_efficient.cache.bounded import SLACK
from hf_efficient.cache.segments import SegmentLayer
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patching.dispatch import aligned_call
from hf_efficient.testing import assert_close, inputs_for, tiny_model

KINDS = ("mean", "max", "conv", "dilated", "most_used")


def mechanism_of(moved: bool = True, **options: Any) -> CompressiveAttention:
    config: Any = attention_config("compressive", **options)
    mechanism = CompressiveAttention(config, geometry(is_causal=True)).double()
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


def pooled_by_formula(mechanism: Any, q: Tensor, k: Tensor, v: Tensor, keep: list[bool]) -> dict[int, tuple[Any, ...]]:
    """{number: (key, value, its real tokens)} of one head of a row that starts at its first token: (N, D) q, k, v."""
    config, n = mechanism.config, k.shape[0]
    size, rate, kind = config.segment_length, config.compression_rate, config.compression
    found: dict[int, tuple[Any, ...]] = {}
    for w in range(-(-n // size)):
        block = [t for t in range(w * size - config.memory_length, (w + 1) * size - config.memory_length)]
        real = [t for t in block if 0 <= t < n and keep[t]]
        first = w * size // rate
        if kind == "most_used":
            readers = [i for i in range(w * size, min(n, (w + 1) * size)) if keep[i]]
            score = {t: 0.0 for t in real}
            for i in readers:
                weights = torch.tensor([0.6 * (q[i] @ k[t]).item() for t in real]).double().softmax(0)
                for t, weight in zip(real, weights.tolist(), strict=True):
                    score[t] += weight
            best = sorted(sorted(real, key=lambda t: -score[t])[: size // rate])
            # tokens in their order; where fewer are real, which slot holds which does not matter
            found |= {first + r: (k[t], v[t], [t]) for r, t in enumerate(best)}
            continue
        for r in range(size // rate):
            if kind == "dilated":
                tokens = [block[r // 2 * 2 * rate + r % 2 + 2 * tap] for tap in range(rate)]
            else:
                tokens = block[r * rate : (r + 1) * rate]
            taps = [(tap, t) for tap, t in enumerate(tokens) if t in real]
            if not taps:
                continue
            here = [t for _, t in taps]
            if kind == "max":
                found[first + r] = (k[here].amax(0), v[here].amax(0), here)
            elif kind == "mean":
                found[first + r] = (k[here].mean(0), v[here].mean(0), here)
            else:
                found[first + r] = (taps, taps, here)
    return found


def by_formula(mechanism: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
    """The docstring, one query at a time; each row counted from its first real token."""
    config = mechanism.config
    size, rate = config.segment_length, config.compression_rate
    convolves = config.compression in ("conv", "dilated")
    out = torch.zeros_like(q)
    stopped = [x.detach() if config.stop_gradient else x for x in (k, v)]
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        if not keep[b].any():
            continue
        start = keep[b].int().argmax().item()
        far_k, far_v = (x[b, h, start:] for x in stopped)
        pooled_keys = pooled_by_formula(mechanism, q[b, h, start:].detach(), far_k, far_v, keep[b, start:].tolist())
        if convolves:
            for g, (taps, _, here) in pooled_keys.items():
                pooled = [
                    rate / len(taps) * sum(x[t] @ weight[h, tap] for tap, t in taps)
                    for x, weight in (
                        (far_k, mechanism.key_convolution),
                        (far_v, mechanism.value_convolution),
                    )
                ]
                pooled_keys[g] = (*pooled, here)
        for i in range(q.shape[2] - start):
            u = i // size
            logits, values = [], []
            for j in range(max(0, u * size - config.memory_length), i + 1):
                if keep[b, start + j]:
                    source = (k, v) if j >= u * size else stopped
                    shift = 0.0 if bias is None else bias[h, i, j]
                    logits.append(0.6 * q[b, h, start + i] @ source[0][b, h, start + j] + shift)
                    values.append(source[1][b, h, start + j])
            for g, (key, value, here) in pooled_keys.items():
                if u * size // rate - config.compressed_memory_length <= g < u * size // rate:
                    shift = 0.0 if bias is None else bias[h, i, here].mean()
                    logits.append(0.6 * q[b, h, start + i] @ key + shift + math.log(len(here)))
                    values.append(value)
            if logits:
                out[b, h, start + i] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "memory", "most", "rate", "n", "with_bias"),
    [
        (4, 4, 3, 2, 23, True),
        (4, 4, 3, 2, 23, False),
        (4, 6, 100, 2, 21, True),
        (12, 13, 5, 3, 43, False),
        (4, 4, 1, 1, 17, True),
    ],
)
def test_equals_its_formula(size: int, memory: int, most: int, rate: int, n: int, kind: str, with_bias: bool):
    """Padding left, right and in the middle, a row of padding; gradients, stopped in memory and pooled keys."""
    options = dict(segment_length=size, memory_length=memory, compressed_memory_length=most, compression_rate=rate)
    mechanism = mechanism_of(**options, compression=kind)
    q, k, v = (x.requires_grad_() for x in heads(4, HEADS, n, WIDTH))
    keep = torch.ones(4, n, dtype=torch.bool)
    keep[1, : n // 4], keep[1, n - n // 5 :] = False, False
    if kind != "most_used" or most >= n // rate:
        keep[2, 1::3] = False
    keep[3] = False
    lazy, dense = bias_of(n)
    context = AttentionContext(
        is_causal=True, scaling=0.6, key_padding_mask=keep, relative_bias=lazy if with_bias else None
    )
    actual = aligned_call(mechanism, q, k, v, context)
    expected = by_formula(mechanism, q, k, v, keep, dense if with_bias else None)
    # logarithms of counts are taken in fp32
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-6, where=keep)
    upstream = heads(*q.shape, seed=3, count=1)[0] * keep[:, None, :, None]
    leaves = {"q": q, "k": k, "v": v, **dict(mechanism.named_parameters())}
    gradients = [
        torch.autograd.grad((out * upstream).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    ]
    for name, one, other in zip(leaves, *gradients, strict=True):
        assert_close(one, other, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("kind", ["mean", "conv", "dilated"])
def test_exact_for_tokens_that_repeat_within_pooled_keys(kind: str):
    """At the start: a slot then stands for equal tokens, and its log-count makes up for their number."""
    rate, n = 2, 46
    options = dict(segment_length=8, memory_length=8, compressed_memory_length=100, compression_rate=rate)
    mechanism = mechanism_of(False, **options, compression=kind)
    q, _, _ = heads(2, HEADS, n, WIDTH)
    k, v = (x.repeat_interleave(2 * rate, dim=2)[:, :, :n] for x in heads(2, HEADS, n, WIDTH, seed=1, count=2))
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[1, 41:] = False
    context = AttentionContext(is_causal=True, scaling=0.6, key_padding_mask=keep)
    hidden = ~keep[:, None, None] | torch.ones(n, n, dtype=torch.bool).triu(1)
    expected = (0.6 * q @ k.transpose(-1, -2)).masked_fill(hidden, -math.inf).softmax(-1) @ v
    assert_close(mechanism(q, k, v, context).transpose(1, 2), expected.transpose(1, 2), 1e-6, where=keep)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        dict(memory_length=97, compression_rate=4),
        *(dict(memory_length=9, compression_rate=1, compressed_memory_length=97, compression=kind) for kind in KINDS),
    ],
    ids=["memory", *KINDS],
)
def test_exact_limits_of_a_short_segment(family: str, options: dict[str, Any]):
    """A memory of the whole text, which is never compressed; and pooled keys of one token each, of all of it."""
    model = tiny_model(family).double()
    inputs = inputs_for(model, length=97)
    side, mask = ("decoder", "decoder_attention_mask") if family == "t5" else (None, "attention_mask")
    with torch.no_grad():
        expected = model(**inputs).logits
        with he.patch_attention(model, "compressive", segment_length=8, side=side, **options):
            actual = model(**inputs).logits
    assert_close(actual, expected, 1e-9, where=inputs[mask])


@pytest.mark.parametrize(
    ("kind", "side"), [*zip(KINDS, cycle((None, "decoder")), strict=False), ("most_used", "decoder")], ids=str
)
def test_the_cache_keeps_a_bounded_number_of_pooled_keys(kind: str, side: str | None):
    """So long that much is forgotten: in chunks and in steps as in one forward; M + T keys and G pooled ones are kept."""
    length, steps = 420, 8
    model = tiny_model("gpt2" if side is None else "t5", positions=512).double()
    prefix = "" if side is None else "decoder_"
    inputs = inputs_for(model, batch=3, length=length + steps)
    mask = inputs[f"{prefix}attention_mask"] = torch.ones(3, length + steps, dtype=torch.long)
    mask[1, :9], mask[2, :101], mask[0, 30:44] = 0, 0, 0
    if side is None:
        inputs["position_ids"] = (mask.cummax(-1).values.cumsum(-1) - 1).clamp(min=0)
    fixed = {name: value for name, value in inputs.items() if side and not name.startswith(prefix)}
    own = {name: value for name, value in inputs.items() if name not in fixed}
    options = dict(segment_length=8, memory_length=13, compressed_memory_length=11, compression_rate=2)
    with he.patch_attention(model, "compressive", **options, compression=kind, side=side), torch.no_grad():
        for seed, parameter in enumerate(p for name, p in model.named_parameters() if "convolution" in name):
            parameter.add_(0.1 * heads(*parameter.shape, seed=seed, count=1)[0])
        whole = model(**inputs).logits
        cache, logits = None, []
        for start, end in [(0, 150), (150, 151), (151, 340), (340, length), *((i, i + 1) for i in range(length, 428))]:
            part = {name: value[:, :end] if "mask" in name else value[:, start:end] for name, value in own.items()}
            step = model(**part, **fixed, past_key_values=cache, use_cache=True)
            logits.append(step.logits)
            cache = step.past_key_values
    assert_close(torch.cat(logits, 1), whole, 1e-9, where=mask)
    layers = (cache if isinstance(cache, DynamicCache) else cache.self_attention_cache).layers
    for layer in layers:
        assert isinstance(layer, SegmentLayer) and layer.state is not None
        assert layer.keys.shape[2] <= 8 + 13 + 2 * SLACK
        assert layer.state.keys.shape[2] == 11


@pytest.mark.parametrize("kind", ["conv", "most_used"])
def test_beams_and_taken_back_tokens(kind: str):
    """Beam search reorders pooled keys and queries with the keys, and assisted generation crops them."""
    model = tiny_model("gpt2", positions=400).double()
    draft = tiny_model("gpt2", positions=400, seed=1).double()
    ids = inputs_for(model, batch=2, length=150, padded=False)["input_ids"]
    options: dict[str, Any] = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    settings = dict(segment_length=8, memory_length=9, compressed_memory_length=8, compression_rate=2)
    with he.patch_attention(model, "compressive", **settings, compression=kind):
        beams = model.generate(ids, num_beams=3, **options)
        assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))
        plain = model.generate(ids[:1], **options)
        assert torch.equal(model.generate(ids[:1], assistant_model=draft, **options), plain)


# ---- the loss of its own -----------------------------------------------------------------------------------------


def dense_reconstruction(mechanism: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The docstring's loss without padding, block by block; q, k, v cut off."""
    config, n = mechanism.config, k.shape[2]
    size, memory, rate = config.segment_length, config.memory_length, config.compression_rate
    q, k, v = (x.detach() for x in (q, k, v))
    error, total = torch.zeros((), dtype=q.dtype), torch.zeros((), dtype=q.dtype)
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(HEADS)):
        far = pooled_by_formula(mechanism, q[b, h], k[b, h], v[b, h], [True] * n)
        for w in range(-(-n // size) - 1):
            old = [t for t in range(w * size - memory, (w + 1) * size - memory) if t >= 0]
            if not old:
                continue
            queries = q[b, h, w * size : (w + 1) * size]
            expected = (0.6 * queries @ k[b, h, old].T).softmax(-1) @ v[b, h, old]
            pooled_keys = [far[g] for g in range(w * size // rate, (w + 1) * size // rate) if g in far]
            pooled = [
                torch.stack(
                    [
                        rate / len(taps) * sum(x[b, h, t] @ weight[h, tap] for tap, t in taps)
                        for taps, _, _ in pooled_keys
                    ]
                )
                for x, weight in ((k, mechanism.key_convolution), (v, mechanism.value_convolution))
            ]
            counts = torch.tensor([len(here) for _, _, here in pooled_keys]).double().log()
            actual = (0.6 * queries @ pooled[0].T + counts).softmax(-1) @ pooled[1]
            error, total = error + (actual - expected).square().sum(), total + expected.square().sum()
    return error / total


@pytest.mark.parametrize("kind", ["conv", "dilated"])
@pytest.mark.parametrize("memory", [6, 4])
def test_reconstruction_loss_is_that_of_its_formula_and_reaches_the_convolutions_alone(kind: str, memory: int):
    options = dict(segment_length=4, memory_length=memory, compressed_memory_length=6, compression_rate=2)
    n, weight = 23, 0.7
    gradients, q, k, v = {}, *(x.requires_grad_() for x in heads(2, HEADS, n, WIDTH))
    for scale in (0.0, weight):
        mechanism = mechanism_of(**options, compression=kind, reconstruction_weight=scale)
        leaves = [q, k, v, mechanism.key_convolution, mechanism.value_convolution]
        out = mechanism(q, k, v, AttentionContext(is_causal=True, scaling=0.6))
        gradients[scale] = torch.autograd.grad(out.square().sum(), leaves)
    loss = dense_reconstruction(mechanism, q, k, v)
    assert mechanism.reconstruction_loss is not None
    assert_close(mechanism.reconstruction_loss, loss, 1e-6, "loss")
    for name, plain, both in zip("qkv", gradients[0.0], gradients[weight], strict=False):
        assert torch.equal(plain, both), f"{name} takes a gradient of the loss"
    expected = torch.autograd.grad(weight * loss, leaves[3:])
    for plain, both, part in zip(gradients[0.0][3:], gradients[weight][3:], expected, strict=True):
        assert_close(both - plain, part, 1e-5, "gradient of the convolutions")


def test_reconstruction_loss_is_off_in_evaluation_and_falls_in_training():
    """Host weights frozen and no loss of the task: what is learnt is the compression."""
    model = tiny_model("gpt2").train()
    inputs = inputs_for(model, length=97)
    options = dict(segment_length=8, memory_length=8, compressed_memory_length=8, reconstruction_weight=1.0)
    with he.patch_attention(model, "compressive", compression_rate=4, **options):
        mechanisms = [block.attn.efficient for block in model.transformer.h]
        model.eval()(**inputs)
        assert all(mechanism.reconstruction_loss is None for mechanism in mechanisms)
        model.train()
        own = [p for name, p in model.named_parameters() if ".efficient." in name]
        optimizer = torch.optim.Adam(own, lr=3e-3)
        losses = []
        for _ in range(30):
            model.zero_grad()
            (0.0 * model(**inputs).logits.sum()).backward()
            host = [p for name, p in model.named_parameters() if ".efficient." not in name]
            assert all(p.grad is None or not p.grad.any() for p in host)
            assert all(p.grad is not None and p.grad.any() for p in own)
            optimizer.step()
            losses.append(sum(mechanism.reconstruction_loss.item() for mechanism in mechanisms))
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(segment_length=10, compression_rate=4), "segment_length=10 is not possible; it must be a multiple of 4"),
        (dict(segment_length=12, compression_rate=4, compression="dilated"), "must be a multiple of 8"),
        (dict(compression="best"), "compression='best' is not possible; it must be one of mean, max"),
        (dict(segment_length=64, memory_length=32, compression="most_used"), "memory_length=32 is not possible"),
        (dict(compression="mean", reconstruction_weight=1.0), "reconstruction_weight=1.0 is not possible"),
        (dict(reconstruction_weight=-1), "reconstruction_weight=-1 is not possible"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        he.CompressiveAttentionConfig(**options)


def test_only_convolutions_have_parameters():
    for kind in KINDS:
        mechanism = mechanism_of(segment_length=8, memory_length=8, compression_rate=2, compression=kind)
        assert bool(list(mechanism.parameters())) == (kind in ("conv", "dilated"))
        assert not list(mechanism.buffers())
