"""Reformer: hashes and shared queries and keys as in transformers, the definition pair by pair, and decoding with labels."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_cases import defined, defined_pairs
from decoding import assert_decodes, bounded_layers, call, decode, encoded, full, prompt
from formulas import HEADS, WIDTH, geometry, heads
from torch import Tensor
from transformers import DynamicCache, ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

import hf_efficient as he
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.attention.reformer import ReformerAttention
from hf_efficient.cache.buckets import BucketLayer
from hf_efficient.ops.context import AttentionContext
from hf_efficient.testing import assert_close, inputs_for, tiny_model

SCALING = 0.6


def mechanism_of(is_causal: bool = False, layer: int = 0, **options: Any) -> ReformerAttention:
    config: Any = attention_config("reformer", **options)
    side = "decoder" if is_causal else "encoder"
    mechanism = ReformerAttention(config, geometry(is_causal=is_causal, layer=layer, side=side))
    mechanism.reset_parameters()
    return mechanism.double()


def context_of(is_causal: bool = False, keep: Tensor | None = None) -> AttentionContext:
    return AttentionContext(is_causal=is_causal, scaling=SCALING, key_padding_mask=keep)


def hashed(mechanism: ReformerAttention, x: Tensor) -> Tensor:
    """(B, H, R, N): the direction, or opposite of one, with the largest product."""
    rounds = [torch.cat([directions, -directions]) for directions in mechanism.rotations]
    return torch.stack([(x @ directions.T).argmax(-1) for directions in rounds], dim=2)


def padded(n: int) -> Tensor:
    """(4, N): a full row, padding left, right, and in the middle."""
    keep = torch.ones(4, n, dtype=torch.bool)
    keep[1, : n // 4] = keep[2, n - n // 3 :] = keep[3, 1::3] = False
    return keep


# ---- the definition ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n", "before"), [(1, 1), (2, 0), (63, 1), (97, 0), (97, 1), (97, 2)])
def test_equals_its_definition(n: int, before: int, is_causal: bool, shared: bool):
    """Output and gradients of queries, keys and values: hashes are constants."""
    window = 0 if shared else 6
    options: dict[str, Any] = dict(num_buckets=6, bucket_size=8, num_hashes=3, num_chunks_before=before)
    mechanism = mechanism_of(is_causal, attention_window=window, shared_qk=shared, **options)
    keep = padded(n)
    q, k, v = (x.requires_grad_() for x in heads(4, HEADS, n, WIDTH))
    actual = mechanism(q, k, v, context_of(is_causal, keep))
    # what is hashed
    unit_q, unit_k = (x.detach() / x.detach().norm(dim=-1, keepdim=True) for x in (q, k))
    if is_causal:
        labels = hashed(mechanism, k.detach() if shared else unit_q + unit_k)
        seen = defined(labels, keep, 8 * (before + 1), window, True)
    else:
        centred = []
        for x in (k, k) if shared else (q, k):
            real = [x.detach()[b][:, keep[b]].mean(1, keepdim=True) for b in range(4)]
            centred.append(x.detach() - (0 if shared else torch.stack(real).nan_to_num()))
        seen = defined_pairs(*(hashed(mechanism, x) for x in centred), keep, 8, window, before)
    logits = k @ (k / k.norm(dim=-1, keepdim=True)).mT if shared else SCALING * q @ k.mT
    if shared:
        others = seen & ~torch.eye(n, dtype=torch.bool)
        seen = torch.where(others.any(-1, keepdim=True), others, torch.eye(n, dtype=torch.bool))
    seen = seen & keep[:, None, None]
    weights = torch.where(seen, (logits - logits.amax(-1, keepdim=True)).exp(), 0.0)
    expected = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v
    real = keep[:, None, :, None]
    assert_close(actual * real, expected * real, 1e-11)
    upstream = heads(*q.shape, seed=3, count=1)[0] * real
    gradients = [
        torch.autograd.grad((x * upstream).sum(), (q, k, v), allow_unused=True, materialize_grads=True)
        for x in (actual, expected)
    ]
    for name, one, other in zip("qkv", *gradients, strict=True):
        assert (one - other).abs().max() <= 1e-10 * max(1.0, other.abs().max()), f"gradient of {name}"


def test_hashes_find_what_queries_look_at():
    """The attention that the seen keys have is far more than their share of all keys."""
    n = 256
    q = heads(4, HEADS, n, WIDTH, count=1)[0]
    # every key is near the query of another token, far away
    k = q.roll(n // 2 + 5, dims=2) + 0.3 * heads(4, HEADS, n, WIDTH, seed=4, count=1)[0]
    weights = (1.5 * q @ k.mT).softmax(-1)
    mechanism = mechanism_of(num_buckets=8, bucket_size=16, num_hashes=4, attention_window=0)
    labels = [hashed(mechanism, x - x.mean(2, keepdim=True)) for x in (q, k)]
    seen = defined_pairs(*labels, torch.ones(4, n, dtype=torch.bool), 16, 0)
    share, mass = seen.double().mean(), (weights * seen).sum(-1).mean()
    assert share < 0.25 and mass > 2 * share, (share, mass)


@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision_hashes_in_fp32(is_causal: bool):
    """The same bf16 heads: the same choices in bf16 and under autocast, and the error of full attention."""
    q, k, v = (x.bfloat16() for x in heads(2, HEADS, 97, WIDTH))
    mechanism = mechanism_of(is_causal, num_buckets=6, bucket_size=8, num_hashes=2, attention_window=4).float()
    mechanism.rotations.copy_(mechanism.rotations.bfloat16())  # as a model in bf16 has them
    wide = [x.float() for x in (q, k, v)]
    expected = mechanism(*wide, context_of(is_causal))
    exact, stock = (
        torch.nn.functional.scaled_dot_product_attention(*x, is_causal=is_causal, scale=SCALING).float()
        for x in (wide, (q, k, v))
    )
    allowed = 3 * (stock - exact).square().mean().sqrt()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mechanism(q, k, v, context_of(is_causal))
    for actual in (mixed, mechanism.bfloat16()(q, k, v, context_of(is_causal))):
        assert actual.dtype == torch.bfloat16
        assert (actual.float() - expected).square().mean().sqrt() <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shared_keys_of_nothing_are_finite(dtype: torch.dtype):
    """Keys of 0 have no direction, which half precision must not divide by."""
    mechanism = mechanism_of(num_buckets=4, bucket_size=4, attention_window=0, shared_qk=True).to(dtype)
    q, k, v = (x.to(dtype) for x in heads(2, HEADS, 21, WIDTH))
    k[:, :, ::3] = 0
    out = mechanism(q, k.requires_grad_(), v, context_of())
    out.float().sum().backward()
    assert out.isfinite().all() and k.grad is not None and k.grad[:, :, 1::3].isfinite().all()


def test_rotations_differ_by_layer_side_and_seed_alone():
    options = dict(num_buckets=8, num_hashes=3)
    first = mechanism_of(**options).rotations
    assert first.shape == (3, 4, WIDTH)
    assert torch.equal(first, mechanism_of(**options).rotations)
    for other in (
        mechanism_of(layer=1, **options),
        mechanism_of(seed=1, **options),
        mechanism_of(is_causal=True, **options),
    ):
        assert not torch.isclose(first, other.rotations).any()
    assert mechanism_of().state_dict().keys() == {"rotations"}


# ---- side by side with transformers ------------------------------------------------------------------------------


def theirs_of(chunk: int, num_hashes: int = 1, before: int = 0, **facts: Any) -> LSHSelfAttention:
    config = ReformerConfig(
        attn_layers=["lsh"],
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=WIDTH,
        num_buckets=6,
        num_hashes=num_hashes,
        lsh_attn_chunk_length=chunk,
        lsh_num_chunks_before=before,
        lsh_num_chunks_after=0,
        hash_seed=7,
        **({"is_decoder": False} | facts),
    )
    torch.manual_seed(1)
    return LSHSelfAttention(config, layer_idx=0).double().eval()


def with_their_rotations(mechanism: ReformerAttention, num_hashes: int) -> ReformerAttention:
    """Theirs are drawn anew for each head in every call; one head at a time is compared."""
    torch.manual_seed(7)
    drawn = torch.randn(HEADS, WIDTH, num_hashes, 3, dtype=torch.float64)
    mechanism.rotations.copy_(drawn[0].permute(1, 2, 0))
    return mechanism


def test_hashes_equal_those_of_transformers():
    x = heads(3, HEADS, 50, WIDTH, count=1)[0]
    mechanism = with_their_rotations(mechanism_of(num_buckets=6, num_hashes=3), 3)
    expected = theirs_of(8, num_hashes=3)._hash_vectors(x, 3, None).unflatten(-1, (3, 50)) % 6
    assert torch.equal(mechanism.hashes(x)[:, 0], expected[:, 0])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize(("n", "chunk"), [(64, 8), (48, 12), (24, 24)])
def test_shared_queries_and_keys_equal_transformers(n: int, chunk: int, before: int, is_causal: bool):
    """One round, where theirs counts nothing twice. Causal: in one chunk, since their chunks look at later tokens."""
    theirs = theirs_of(24 if is_causal else chunk, before=before, is_decoder=is_causal)
    n = 24 if is_causal else n
    hidden = heads(2, n, HEADS * WIDTH, count=1)[0]
    split = [layer(hidden).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for layer in (theirs.query_key, theirs.value)]
    options: dict[str, Any] = dict(num_buckets=6, bucket_size=chunk, num_hashes=1, attention_window=0, shared_qk=True)
    options["num_chunks_before"] = before
    if is_causal:
        options |= dict(num_buckets=1, bucket_size=24, num_hashes=None)
    mechanism = mechanism_of(is_causal, **options)
    if not is_causal:
        with_their_rotations(mechanism, 1)
    expected = theirs(hidden).hidden_states.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
    query = torch.full_like(split[0], 1e3)  # not read
    actual = mechanism(query, *split, context_of(is_causal))
    which = slice(None) if n == 24 else slice(0, 1)  # in one chunk no hash matters
    # their norms have an epsilon of 1e-6
    assert_close(actual[:, which], expected[:, which], 1e-4)


# ---- options -----------------------------------------------------------------------------------------------------


def test_control_is_the_window_alone():
    config: Any = attention_config("reformer", attention_window=10, layers=(1,))
    control: Any = ReformerAttention.control_config(config)
    assert control == attention_config("local", attention_window=10, layers=(1,))
    assert ReformerAttention.control_config(attention_config("reformer", attention_window=0)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_buckets=3), "num_buckets=3 .* even, or 1"),
        (dict(num_buckets=0), "num_buckets=0"),
        (dict(bucket_size=0), "bucket_size=0"),
        (dict(num_hashes=1.5), "num_hashes=1.5"),
        (dict(num_chunks_before=-1), "num_chunks_before=-1"),
        (dict(attention_window=7), "attention_window=7 .* even"),
        (dict(shared_qk=1), "shared_qk=1"),
        (dict(shared_qk=True), "attention_window=128 .* 0 with shared_qk"),
        (dict(seed=-1), "seed=-1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        attention_config("reformer", **options)


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_checkpoints_without_look_back_go_on_without_it(tmp_path: Path):
    """Those that were saved before it was an option; a user's options mean today's default."""
    config: Any = attention_config("reformer", num_buckets=4, bucket_size=4, num_chunks_before=0, attention_window=0)
    source = tiny_model("bert")
    inputs = inputs_for(source)
    result = he.convert(source, config)
    expected = result.model(**inputs).logits
    result.save(tmp_path / "old")
    stored = json.loads((tmp_path / "old" / "config.json").read_text())
    assert stored["efficient_attention"][0].pop("num_chunks_before") == 0
    (tmp_path / "old" / "config.json").write_text(json.dumps(stored))
    loaded = type(result.model).from_pretrained(tmp_path / "old").eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "config.json").read_text())
    assert stored["efficient_attention"] == result.report.efficient_attention
    own = type(loaded.config)(**loaded.config.to_dict() | {"efficient_attention": [{"mechanism": "reformer"}]})
    type(loaded)(own).save_pretrained(tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "config.json").read_text())
    assert stored["efficient_attention"][0]["num_chunks_before"] == 1 == attention_config("reformer").num_chunks_before


# ---- decoding ----------------------------------------------------------------------------------------------------

SMALL = dict(num_buckets=4, bucket_size=5, num_hashes=2)
FORMS = [
    pytest.param(family, SMALL | form, id=f"{family}-{name}")
    for family in ("gpt2", "t5")
    for name, form in {
        "window": dict(attention_window=4, num_chunks_before=0),
        "alone": dict(attention_window=0),
        "shared": dict(attention_window=0, shared_qk=True),
    }.items()
]


def model_of(family: str, options: dict[str, Any]) -> Any:
    model = tiny_model(family, positions=256).double()
    he.patch_attention(model, "reformer", **options, **({"side": "decoder"} if family == "t5" else {}))
    return model


@pytest.mark.parametrize("ends", [(1, 2, 3, 40, 41), (97, *range(98, 104)), (60, 130, 131)])
@pytest.mark.parametrize(("family", "options"), FORMS)
def test_decoding_equals_one_forward(family: str, options: dict[str, Any], ends: tuple[int, ...]):
    """Rows that start late; every key is kept, and one label of each round."""
    model = model_of(family, options)
    ids, mask = prompt(3, ends[-1], (0, 11, 30) if ends[0] > 30 else (0, 0, 0))
    cache = assert_decodes(model, ids, mask, ends)
    for layer in bounded_layers(cache):
        assert isinstance(layer, BucketLayer)
        assert layer.keys.shape[2] == layer.state.labels.shape[3] == ends[-1]


@pytest.mark.parametrize(("family", "options"), FORMS[:1] + FORMS[-1:])
def test_rows_can_be_moved_and_tokens_taken_back(family: str, options: dict[str, Any]):
    """Beams' reordering, repeats, crops, copies and pickles: each as if the cache had been filled so."""
    model = model_of(family, options)
    ids, mask = prompt(2, 90, (0, 0))
    order = torch.tensor([1, 0])
    source = encoded(model, 2)
    _, cache = decode(model, ids, mask, (70, 80))
    for change in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        changed = change(cache)
        own = getattr(changed, "self_attention_cache", changed)
        own.crop(-20)
        out = call(model, ids, mask, slice(60, 90), source, past_key_values=changed).logits
        assert_close(out, full(model, ids, mask)[:, 60:], 1e-9)
    if family == "gpt2":
        cache.reorder_cache(order)
        out = call(model, ids[order], mask, slice(80, 90), source, past_key_values=cache).logits
        assert_close(out, full(model, ids[order], mask)[:, 80:], 1e-9)


@pytest.mark.parametrize(("family", "options"), FORMS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_generation_without_cache(family: str, options: dict[str, Any], beams: int):
    model = model_of(family, options)
    ids, mask = prompt(2, 40, (0, 7))
    facts: dict[str, Any] = dict(
        attention_mask=mask, max_new_tokens=12, num_beams=beams, do_sample=False, eos_token_id=None
    )
    assert torch.equal(model.generate(ids, **facts), model.generate(ids, use_cache=False, **facts))


def test_a_cache_that_another_model_filled_is_refused():
    """It has keys, but no labels."""
    stock = tiny_model("gpt2", positions=256)
    model = model_of("gpt2", FORMS[0].values[1]).float()
    ids, _ = prompt(1, 20, (0,))
    with torch.no_grad():
        cache = stock(ids, past_key_values=DynamicCache(config=stock.config), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="21 keys, but labels of 1 tokens"):
            model(ids[:, :1], past_key_values=cache)
