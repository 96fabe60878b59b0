"""Caches that others fill or take back: drafts longer than what bounded caches hold in reserve, and prefixes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decoding import decode, full, prompt
from pairs import MAIN, VARIANTS, Bench, Pair, each
from transformers import DynamicCache

import hf_efficient as he
from hf_efficient.cache.bounded import SLACK, BoundedLayer
from hf_efficient.testing import assert_close, tiny_model


def has_own_layer(pair: Pair) -> bool:
    first = Bench(pair).mechanism
    second = type(first)(first.config, replace(first.geometry, layer=1))
    return first.cache_layer() is not None and second.cache_layer() is not None


OWN_CACHE = list({
    pair.mechanism: pair for pair in reversed(MAIN + VARIANTS) if pair.family == "gpt2" and has_own_layer(pair)
}.values())  # fmt: skip
GREEDY: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
LOOKUP: dict[str, Any] = dict(prompt_lookup_num_tokens=101, max_matching_ngram_size=2)


@pytest.fixture
def taken_back(monkeypatch) -> list[int]:
    """How many tokens each `crop` of a layer took back."""
    counts: list[int] = []
    crop = BoundedLayer.crop

    def counting(layer: BoundedLayer, tokens_to_remove: int) -> None:
        counts.append(-int(tokens_to_remove))
        crop(layer, tokens_to_remove)

    monkeypatch.setattr(BoundedLayer, "crop", counting)
    return counts


def converted(pair: Pair) -> Any:
    return he.convert(tiny_model("gpt2", positions=400), pair.config).model.double().eval()


@each(OWN_CACHE)
def test_a_draft_of_any_length_changes_nothing(pair: Pair, taken_back: list[int]):
    """Prompt lookup, whose draft comes with the first call: the prompt ends as it starts."""
    model, ids = converted(pair), prompt(1, 130, (0,))[0]
    ids[:, -2:] = ids[:, :2]
    plain = model.generate(ids, **GREEDY)
    looked_up = model.generate(ids, **GREEDY, **LOOKUP)
    assert torch.equal(looked_up, plain)
    assert max(taken_back) > SLACK


def test_models_draft(taken_back: list[int]):
    """A converted assistant, all of whose drafts are wrong; the model itself, all of whose are right."""
    pair = next(pair for pair in OWN_CACHE if pair.mechanism == "local")
    model, assistant, ids = converted(pair), converted(pair), prompt(1, 130, (0,))[0]
    assistant.transformer.wte.weight.data.neg_()
    for drafter in (model, assistant):
        drafter.generation_config.num_assistant_tokens = 101
        drafter.generation_config.num_assistant_tokens_schedule = "constant"
        drafter.generation_config.assistant_confidence_threshold = 0.0
    options = GREEDY | {"max_new_tokens": 110}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, assistant_early_exit=1), plain)
    two_rounds = [lambda ids, scores: torch.tensor([ids.shape[1] >= 132])]
    drafted = model.generate(ids, **options, assistant_model=assistant, stopping_criteria=two_rounds)
    assert torch.equal(drafted, plain[:, : drafted.shape[1]])
    assert max(taken_back) > SLACK


def test_a_patched_model_says_what_it_can_not_take_back():
    """Its class is the stock one, which makes the cache."""
    model, ids = tiny_model("gpt2", positions=400), prompt(1, 130, (0,))[0]
    ids[:, -2:] = ids[:, :2]
    with (
        he.patch_attention(model, "local", attention_window=4),
        pytest.raises(ValueError, match="Draft at most 64 tokens"),
    ):
        model.generate(ids, **GREEDY, **LOOKUP)


@each(OWN_CACHE)
def test_drafts_of_many_calls_are_taken_back(pair: Pair):
    """As an assistant does, which drafts a token a call; and what was settled before is forgotten as ever."""
    model, (ids, mask) = converted(pair), prompt(1, 330, (0,))
    drafted = ids.roll(1, dims=1)
    _, cache = decode(model, ids, mask, (150,))
    cache.activate_past_recording()
    for start in (150, 170, 190):
        decode(model, drafted, mask, tuple(range(start + 30, start + 91, 30)), cache)
        cache.crop(-90)
        decode(model, ids, mask, (start + 20,), cache)
    actual, cache = decode(model, ids, mask, (220, 330), cache)
    assert_close(actual, full(model, ids, mask)[:, 210:], 1e-9)


@pytest.mark.parametrize("mechanism", ["reformer", "routing_transformer", "sinkhorn"])
def test_a_prefix_in_the_cache_is_refused_with_what_works_instead(mechanism: str):
    model = tiny_model("gpt2")
    config = model.config
    cache = DynamicCache(config=config)
    for layer in range(config.n_layer):
        cache.update(*torch.randn(2, 1, config.n_head, 5, config.n_embd // config.n_head), layer)
    with he.patch_attention(model, mechanism), pytest.raises(ValueError, match="use LoRA or prompt tuning instead"):
        model(torch.randint(5, 99, (1, 20)), past_key_values=cache)
