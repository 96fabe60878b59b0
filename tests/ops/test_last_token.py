"""One new query over a cache: what is computed, over how many keys, and where new keys are put."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_efficient.cache.bounded import SLACK, BoundedLayer
from hf_efficient.ops import decoding
from hf_efficient.ops.block_sparse.attention import block_sparse_attention, reference_attention
from hf_efficient.ops.context import AttentionCall
from hf_efficient.ops.linear_attention import absorb, read
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patterns.kinds import GlobalColumns, Window
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.random_blocks import BigBirdBlocks

BIAS = RelativeBias(torch.linspace(-2, 2, 32).view(8, 4), lambda offset: (-offset).clamp(0, 7), 8)
PATTERNS: dict[str, Pattern] = {
    "window": Window(left=5, right=0),
    "dilated": Window(left=3, right=0, dilation=3),
    "window and first tokens": Window(left=5, right=0) | GlobalColumns(positions=(0, 1)),
    "window and other tokens": Window(left=5, right=0) | GlobalColumns(positions=(1, 4)),
    "window and dilated window": Window(left=5, right=0) | Window(left=3, right=0, dilation=4),
}

BLOCKS = {
    count: BigBirdBlocks(block_size=8, num_random_blocks=count, seed=1, layer=0, heads=4, is_causal=True)
    for count in (0, 2)
}


def heads(tokens: int, count: int = 4) -> Tensor:
    return torch.randn(2, count, tokens, 8, generator=torch.Generator().manual_seed(tokens + count)).double()


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "biased"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_new_token_after_a_cache_is_the_last_row_of_the_definition(name: str, bias: RelativeBias | None):
    """Token by token, with two heads of keys, through a layer that forgets: every 64 tokens."""
    pattern, length = PATTERNS[name], 150
    query, key, value = heads(length), heads(length, 2), heads(length, 2) + 1
    bias = bias and RelativeBias(bias.table.double(), bias.bucket, bias.saturation)
    call = AttentionCall(is_causal=True, scaling=0.3, relative_bias=bias)
    expected = reference_attention(query, key, value, pattern, call)
    layer = BoundedLayer(pattern)
    with torch.no_grad():
        for token in range(length):
            here = slice(token, token + 1)
            layer.prepare(torch.zeros(2, dtype=torch.long), None)
            keys, values = layer.update(key[:, :, here], value[:, :, here])
            own = AttentionCall(
                is_causal=True, scaling=0.3, relative_bias=bias, query_offset=token, key_positions=layer.key_positions
            )
            out = block_sparse_attention(query[:, :, here], keys, values, pattern, own)
            assert torch.allclose(out, expected[:, :, here], rtol=0, atol=1e-12), token
    assert layer.has_forgotten


@pytest.mark.parametrize("pattern", BLOCKS.values(), ids=BLOCKS)
def test_a_new_token_gathers_the_blocks_that_it_sees(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "rows_attention", None)
    query, key, value = heads(150), heads(150, 2), heads(150, 2) + 1
    expected = reference_attention(query, key, value, pattern, AttentionCall(is_causal=True, scaling=0.3))
    for token in (0, 7, 8, 23, 100, 149):
        call = AttentionCall(is_causal=True, scaling=0.3, query_offset=token)
        new = query[:, :, token : token + 1]
        out = decoding.pattern_attention(new, key[:, :, : token + 1], value[:, :, : token + 1], pattern, call)[0]
        assert torch.allclose(out, expected[:, :, token : token + 1], rtol=0, atol=1e-12), token


@pytest.mark.parametrize("name", ["window", "dilated", "window and first tokens"])
def test_nothing_is_computed_for_keys_that_the_cache_holds_in_vain(name: str, monkeypatch: pytest.MonkeyPatch):
    """4096 keys: no tensor beside the heads has an entry for each, and windows are slices without a mask."""
    seen: list[tuple[int, Any]] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, logits: Tensor | None, **options: Any) -> Any:
        seen.append((key.shape[2], logits))
        return query, None

    monkeypatch.setattr(decoding, "attend", spy)
    monkeypatch.setattr(decoding, "rows_attention", None)
    key = heads(4096)
    call = AttentionCall(is_causal=True, scaling=0.3, query_offset=4095)
    block_sparse_attention(key[:, :, -1:], key, key, PATTERNS[name], call)
    [(count, logits)] = seen
    assert (count, logits is None) == {"window": (6, True), "dilated": (4, True)}.get(name, (count, False))


def filled(tokens: int, layer: BoundedLayer | None = None) -> BoundedLayer:
    layer = layer or BoundedLayer(Window(left=20, right=0))
    with torch.no_grad():
        for _ in range(tokens):
            layer.prepare(torch.zeros(2, dtype=torch.long), None)
            layer.update(*torch.randn(2, 2, 4, 1, 8))
    return layer


def storage(layer: BoundedLayer) -> int:
    held = (x for x in vars(layer).values() if isinstance(x, Tensor))
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}.values())


def test_memory_is_equal_after_256_and_after_2048_tokens():
    layer = filled(256)
    before = storage(layer)
    assert storage(filled(2048 - 256, layer)) == before


def test_new_keys_are_written_in_place():
    layer = filled(SLACK + 5)
    assert layer.keys is not None
    place, held = layer.keys.data_ptr(), layer.keys
    copy = held.clone()
    filled(3, layer)
    assert layer.keys.data_ptr() == place and torch.equal(layer.keys[:, :, : held.shape[2]], copy)
    filled(2 * SLACK, layer)
    assert torch.equal(held, copy)  # what was handed out stays what it was


def test_keys_of_a_graph_are_not_written_over():
    layer, leaf = filled(3), torch.ones(2, 4, 1, 8, requires_grad=True)
    layer.prepare(torch.zeros(2, dtype=torch.long), None)
    keys, _ = layer.update(leaf, leaf)
    product = (keys * keys).sum()
    filled(5, layer)
    product.backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.full_like(leaf, 2.0))


def test_a_cache_of_inference_mode_serves_other_calls():
    layer = BoundedLayer(Window(left=20, right=0))
    with torch.inference_mode():
        filled(3, layer)
    assert filled(4, layer).get_seq_length() == 7 and layer.keys is not None and layer.keys.shape[2] == 7


@pytest.mark.parametrize("missing", [False, True])
def test_a_key_joins_a_state_alike_with_and_without_gradients(missing: bool):
    """Also features that no key has yet, and rows without keys."""
    features, value = heads(3)[..., :6], heads(3)
    if missing:
        features[:, :, :, :2] = -float("inf")
        features[0] = -float("inf")
    state = absorb(None, features[:, :, :2], value[:, :, :2])
    expected = read(features[:, :, 2:].nan_to_num(neginf=0.0), absorb(state, features[:, :, 2:], value[:, :, 2:]))
    with torch.no_grad():
        joined = absorb(state, features[:, :, 2:], value[:, :, 2:])
        actual = read(features[:, :, 2:].nan_to_num(neginf=0.0), joined)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(actual, expected, strict=True))
