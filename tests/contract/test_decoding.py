"""Bounded decoding: memory that does not grow, with the results of one full forward."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from decoding import assert_decodes, bounded_layers, call, decode, encoded, full, layers_of, most_needed, prompt
from pairs import MAIN, VARIANTS, Bench, Pair, chosen, each
from torch import Tensor
from transformers import DynamicCache

import hf_efficient as he
from hf_efficient.cache import bounded as decoding
from hf_efficient.cache.bounded import BoundedLayer
from hf_efficient.families import HostModel
from hf_efficient.models.in_place import convert_in_place
from hf_efficient.ops.context import AttentionCall
from hf_efficient.ops.decoding import rows_attention
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patterns.kinds import GlobalColumns, Strided, Window
from hf_efficient.patterns.sets import PerHead
from hf_efficient.testing import assert_close, inputs_for, tiny_model

CAUSAL = [pair for pair in MAIN + VARIANTS if pair.is_causal]


def has_bounded_layers(pair: Pair) -> bool:
    """In even and in odd layers; those that keep all keys, for what they keep beside them, are not bounded."""
    first = Bench(pair).mechanism
    second = type(first)(first.config, dataclasses.replace(first.geometry, layer=1))
    layers = [mechanism.cache_layer() for mechanism in (first, second)]
    return all(layer is not None and type(layer)._prune is BoundedLayer._prune for layer in layers)


BOUNDED = [pair for pair in CAUSAL if has_bounded_layers(pair)]
UNBOUNDED = [pair for pair in CAUSAL if pair not in BOUNDED]
# one of each mechanism and family
SOME = list({(pair.mechanism, pair.family): pair for pair in BOUNDED}.values())


@pytest.fixture
def sharp(monkeypatch):
    """Prune at every step and keep nothing that is not needed."""
    monkeypatch.setattr(decoding, "SLACK", 0)


# ---- prefill and decoding equal one forward ----------------------------------------------------------------------


def test_every_pattern_with_bounded_state_has_a_layer():
    found = {(pair.mechanism, pair.family) for pair in BOUNDED}
    assert found >= {(name, family) for name in ("local", "longformer", "bigbird") for family in ("gpt2", "t5")}


# (SLACK, tokens seen after each call, first real token of each row)
FORGETTING = {
    "one": (0, (1, *range(2, 26)), (0, 0, 0)),
    "two": (5, (2, *range(3, 26)), (0, 1, 0)),
    "late-rows": (0, (2, *range(3, 36)), (0, 11, 30)),
    "63": (5, (63, *range(64, 81)), (0, 11, 30)),
    "97": (0, (97, *range(98, 107)), (0, 11, 30)),
    "chunks": (0, (2, 9, 40, 41, 60, 97, 98), (0, 1, 0)),
    "long-chunk": (5, (17, 96, 97, 98), (0, 11, 3)),
}
LATE = [schedule for schedule, (*_, starts) in FORGETTING.items() if starts[2]]
SCHEDULES = {
    "prefill-and-steps": ((64, *range(65, 80)), (0, 11, 30)),
    "from-one-token": ((1, 2, 3, 4, 9), (0, 0, 0)),
    "chunks-and-steps": ((40, 41, 60, 61, 97), (0, 11, 30)),
    "coarse-chunks": ((8, 31, 55, 97), (0, 11, 30)),
}


@pytest.mark.parametrize(
    ("pair", "schedule"),
    # variants of a mechanism forget by the same rules: each in one place, by one schedule in which rows start late
    [(pair, schedule) for pair in SOME for schedule in FORGETTING]
    + list(zip(chosen([pair for pair in BOUNDED if pair not in SOME], "attention", 0), cycle(LATE), strict=False)),
    ids=lambda value: getattr(value, "label", value),
)
def test_decoding_while_forgetting_equals_one_forward(pair: Pair, schedule: str, monkeypatch):
    """Left-padded rows, with one that starts long after the first call; the cache is the one that the model makes."""
    slack, ends, starts = FORGETTING[schedule]
    monkeypatch.setattr(decoding, "SLACK", slack)
    model = pair.model().double()
    ids, mask = prompt(3, ends[-1], starts)
    with pair.patch(model):
        cache = assert_decodes(model, ids, mask, ends)
    assert all(layer.get_seq_length() == ends[-1] for layer in layers_of(cache))
    # otherwise nothing was tested
    assert ends[-1] < 80 or any(layer.keys.shape[2] < ends[-1] for layer in bounded_layers(cache))


def _scheduled() -> list[tuple[Pair, str]]:
    """All by every schedule, variants by every other one, in turn."""
    return [
        (pair, schedule)
        for turn, pair in enumerate(chosen(UNBOUNDED, "attention", 1))
        for number, schedule in enumerate(SCHEDULES)
        if not pair.variant or (turn + number) % 2
    ]


@pytest.mark.parametrize(("pair", "schedule"), _scheduled(), ids=lambda value: getattr(value, "label", value))
def test_decoding_equals_one_forward(pair: Pair, schedule: str):
    ends, starts = SCHEDULES[schedule]
    model = pair.model().double()
    ids, mask = prompt(3, ends[-1], starts)
    with pair.patch(model):
        assert_decodes(model, ids, mask, ends)


@each(SOME, of="attention")
def test_decoding_as_users_do_equals_one_forward(pair: Pair):
    """With the slack that layers have unless a test changes it."""
    test_decoding_equals_one_forward(pair, "chunks-and-steps")


@each(SOME, of="attention")
def test_an_unpadded_batch_needs_no_mask(pair: Pair, sharp):
    model = pair.model().double()
    ids, mask = prompt(2, 60, (0, 0))
    with pair.patch(model):
        expected = full(model, ids, mask)
        source, name = encoded(model, 2), "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        with torch.no_grad():
            cache = model(**{name: ids[:, :50]}, **source, use_cache=True).past_key_values
            for i in range(50, 60):
                step = model(**{name: ids[:, i : i + 1]}, **source, past_key_values=cache).logits
                assert_close(step[:, 0], expected[:, i], 1e-9)


MIXED = {
    "one exact": ["gpt2", dict(attention_window=6, layers=(1,))],
    "first exact": ["t5", dict(attention_window=6, layers=(1,), side="decoder")],
    "last exact": ["t5", dict(attention_window=6, layers=(0,), side="decoder")],
}


@pytest.mark.parametrize(("family", "options"), MIXED.values(), ids=MIXED)
def test_exact_layers_share_the_cache(family: str, options: dict[str, Any], sharp):
    model = tiny_model(family).double()
    ids, mask = prompt(3, 70, (0, 11, 30))
    with he.patch_attention(model, "longformer", global_tokens="first", **options):
        cache = assert_decodes(model, ids, mask, (40, *range(41, 71)))
    stored = {i: layer.keys.shape[2] for i, layer in enumerate(layers_of(cache))}
    (bounded,) = options["layers"]
    assert stored[1 - bounded] == 70
    assert stored[bounded] == 6


def test_layers_may_have_different_windows(sharp):
    model = tiny_model("gpt2", layers=3).double()
    ids, mask = prompt(3, 70, (0, 11, 30))
    configs = [
        he.attention_config("local", attention_window=4, layers=(0,)),
        he.attention_config("local", attention_window=6, dilation=3, layers=(1,)),
        he.attention_config("bigbird", block_size=4, num_random_blocks=2, layers=(2,)),
    ]
    with he.patch_attention(model, configs):
        cache = assert_decodes(model, ids, mask, (40, *range(41, 71)))
    assert [layer.keys.shape[2] for layer in layers_of(cache)] == [3, 15, 70]


def test_layers_take_turns(sharp):
    """Rows of a grid need the keys of their own row (70 = 8 · 8 + 6), columns all keys."""
    model = tiny_model("gpt2").double()
    ids, mask = prompt(3, 70, (0, 11, 30))
    with he.patch_attention(model, "axial", row_length=8, form="interleaved"):
        cache = assert_decodes(model, ids, mask, (40, *range(41, 71)))
    assert [type(layer).__name__ for layer in layers_of(cache)] == ["BoundedLayer", "DynamicLayer"]
    assert [layer.keys.shape[2] for layer in layers_of(cache)] == [6, 70]


# ---- generation --------------------------------------------------------------------------------------------------


def generation_inputs(model: Any) -> dict[str, Any]:
    ids, mask = prompt(3, 41, (0, 11, 30))
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask}
    source = inputs_for(model, length=23)
    encoder = {name: source[name] for name in ("input_ids", "attention_mask")}
    return encoder | {"decoder_input_ids": ids, "decoder_attention_mask": mask}


@each([pair for pair in CAUSAL if pair in BOUNDED or pair.family == "gpt2"], of="attention")
def test_generation_equals_generation_without_cache(pair: Pair, monkeypatch):
    """Greedily; and the first new token is the best one of a plain forward."""
    monkeypatch.setattr(decoding, "SLACK", 5)
    model = pair.model().double()
    options: dict[str, Any] = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
    with pair.patch(model):
        inputs = generation_inputs(model)
        cached = model.generate(**inputs, **options)
        assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
        if not model.config.is_encoder_decoder:
            assert torch.equal(cached[:, :41], inputs["input_ids"])
            plain = full(model, inputs["input_ids"], inputs["attention_mask"])
            assert torch.equal(cached[:, 41], plain[:, -1].argmax(-1))
    assert cached.shape[1] >= 41 + 10


@each(SOME, of="attention")
def test_beam_search_equals_beam_search_without_cache(pair: Pair, sharp):
    model = pair.model().double()
    options: dict[str, Any] = dict(max_new_tokens=10, do_sample=False, num_beams=3, eos_token_id=None)
    with pair.patch(model):
        inputs = generation_inputs(model)
        cached = model.generate(**inputs, **options)
        assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_converted_models_decode_boundedly(family: str, sharp):
    model = tiny_model(family).double()
    convert_in_place(HostModel.of(model), [he.attention_config("local", attention_window=6, side="decoder")])
    inputs = generation_inputs(model)
    options: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached.sequences, model.generate(**inputs, **options, use_cache=False).sequences)
    assert [layer.keys.shape[2] for layer in layers_of(cached.past_key_values)] == [5, 5]


@each(SOME, of="attention")
def test_memory_does_not_grow(pair: Pair, monkeypatch):
    """96 tokens: neither the keys in a layer nor the memory behind them, at any step."""
    monkeypatch.setattr(decoding, "SLACK", 8)
    model = pair.model(positions=200)
    stored, update = [], BoundedLayer.update

    def spy(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out = update(self, key, value, *args, **kwargs)
        row = self.keys[:, :, 0].numel() * self.keys.element_size()
        stored.append(max(self.keys.shape[2], self.keys.untyped_storage().nbytes() // row))
        return out

    monkeypatch.setattr(BoundedLayer, "update", spy)
    with pair.patch(model):
        inputs = generation_inputs(model)
        out = model.generate(
            **inputs, max_new_tokens=96, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
    layers = bounded_layers(out.past_key_values)
    needed = most_needed(layers)
    assert needed < 60
    assert len(stored) == 96 * len(layers)
    assert max(stored) <= needed + 2 * decoding.SLACK < 96
    assert all(layer.get_seq_length() >= 136 for layer in layers)


def test_prompt_lookup_goes_back_within_the_slack():
    """Rejected candidates are cropped."""
    model = tiny_model("gpt2", positions=400).double()
    ids = torch.randint(5, 9, (1, 150), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = dict(max_new_tokens=60, do_sample=False, eos_token_id=None)
    with he.patch_attention(model, "longformer", attention_window=6, global_tokens="first"):
        plain = model.generate(ids, **options, use_cache=False)
        out = model.generate(ids, **options, prompt_lookup_num_tokens=5, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert all(layer.positions is not None for layer in layers_of(out.past_key_values))


# ---- global tokens -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("rule", "sees"), [("first", True), ("none", False)])
def test_global_tokens_stay_visible_beyond_the_window(rule: str, sees: bool, sharp):
    model = tiny_model("gpt2", layers=1).double()
    ids, mask = prompt(2, 80, (0, 11))
    other = ids.clone()
    other[0, 0], other[1, 11] = 104 - ids[0, 0], 104 - ids[1, 11]
    with he.patch_attention(model, "longformer", attention_window=4, global_tokens=rule):
        (one, _), (two, _) = (decode(model, tokens, mask, (60, *range(61, 81))) for tokens in (ids, other))
    changed = (one - two)[:, 60:].abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [sees, sees]


def marked(ids: Tensor, *positions: int) -> Tensor:
    mask = torch.zeros_like(ids)
    mask[:, list(positions)] = 1
    return mask


@pytest.mark.parametrize("rule", ["none", "first"])
def test_a_given_global_mask_is_kept(rule: str, sharp, monkeypatch):
    """Also where another layer has no global tokens; without the mask the rule holds again."""
    model = tiny_model("gpt2").double()
    ids, mask = prompt(3, 80, (0, 11, 14))
    given = marked(ids[:, :50], 3, 15, 49)
    configs = [
        he.attention_config("local", attention_window=4, layers=(0,)),
        he.attention_config("longformer", attention_window=4, global_tokens=rule, layers=(1,)),
    ]
    with he.patch_attention(model, configs):
        whole = full(model, ids, mask, global_attention_mask=given)
        cut, cache = decode(model, ids, mask, (50, *range(51, 71)), global_attention_mask=given)
        assert_close(cut, whole[:, :70], 1e-9, where=mask[:, :70])
        assert (whole - full(model, ids, mask))[:, 70:].abs().max() > 1e-6, "the mask changes nothing"
        assert [layer.keys.shape[2] for layer in layers_of(cache)] == [3, 6 + (rule == "first")]
        without = copy.deepcopy(cache)
        rest, _ = decode(model, ids, mask, tuple(range(71, 81)), cache, global_attention_mask=given)
        assert_close(rest, whole[:, 70:], 1e-9)
        actual, _ = decode(model, ids, mask, (71,), without)
        # the same with a cache that never forgets
        monkeypatch.setattr(BoundedLayer, "_prune", lambda *args: None)
        _, cache = decode(model, ids, mask, (70,), global_attention_mask=given)
        assert_close(actual, decode(model, ids, mask, (71,), cache)[0], 1e-9)


def test_global_tokens_that_were_forgotten_are_refused(sharp):
    model = tiny_model("gpt2").double()
    ids, mask = prompt(2, 60, (0, 4))
    with he.patch_attention(model, "longformer", attention_window=4):
        _, cache = decode(model, ids, mask, (59,), global_attention_mask=marked(ids[:, :59], 5))
        with pytest.raises(ValueError, match="has forgotten"):
            decode(model, ids, mask, (60,), cache, global_attention_mask=marked(ids, 5, 6))
    with he.patch_attention(model, "longformer", attention_window=4):
        _, cache = decode(model, ids, mask, (59,))
        with pytest.raises(ValueError, match=r"global_attention_mask of shape \(2, 61\)"):
            decode(model, ids, mask, (60,), cache, global_attention_mask=torch.ones(2, 61))


# ---- the layer as a cache ----------------------------------------------------------------------------------------


def filled(pair: Pair) -> tuple[Any, Any, Tensor, Tensor]:
    model = pair.model().double()
    ids, mask = prompt(3, 80, (0, 11, 30))
    pair.patch(model)
    _, cache = decode(model, ids, mask, (60, *range(61, 71)))
    return model, cache, ids, mask


@each(SOME)
def test_rows_can_be_moved(pair: Pair, sharp):
    model, cache, ids, mask = filled(pair)
    whole, encoder = full(model, ids, mask), encoded(model, 3)
    some, twice = torch.tensor([2, 0, 0, 1]), torch.arange(3).repeat_interleave(2)
    for how, given, rows in (
        ("reorder_cache", some, some),
        ("batch_select_indices", some, some),
        ("batch_repeat_interleave", 2, twice),
    ):
        moved, source = copy.deepcopy(cache), dict(encoder)
        getattr(moved, how)(given)
        if source:
            source["encoder_outputs"] = copy.copy(source["encoder_outputs"])
            source["encoder_outputs"].last_hidden_state = source["encoder_outputs"].last_hidden_state[rows]
            source["attention_mask"] = source["attention_mask"][rows]
        for i in range(70, 80):
            out = call(model, ids[rows], mask[rows], slice(i, i + 1), source, past_key_values=moved, use_cache=True)
            assert_close(out.logits[:, 0], whole[rows, i], 1e-9, how)


@each(SOME)
def test_crop_goes_back_as_far_as_nothing_is_missing(pair: Pair, monkeypatch):
    monkeypatch.setattr(decoding, "SLACK", 8)
    model, cache, ids, mask = filled(pair)
    latest = max(layer.pruned_at for layer in bounded_layers(cache))
    back = 70 - latest
    assert 8 <= back < 60
    cache.crop(0)
    cache.crop(-back)
    assert cache.get_seq_length() == latest
    with pytest.raises(ValueError, match="forgotten"):
        cache.crop(-1)
    expected = full(model, ids, mask)
    actual, cache = decode(model, ids, mask, tuple(range(latest + 1, 81)), cache)
    assert_close(actual, expected[:, 80 - actual.shape[1] :], 1e-9)


def test_crop_of_what_never_forgot():
    model = tiny_model("gpt2").double()
    ids, mask = prompt(3, 60, (0, 11, 30))
    with he.patch_attention(model, "local", attention_window=4):
        _, cache = decode(model, ids, mask, (60,))
        cache.crop(-50)
        actual, _ = decode(model, ids, mask, (20, 60), cache)
        assert_close(actual, full(model, ids, mask)[:, 10:], 1e-9, where=mask[:, 10:])
        with pytest.raises(ValueError, match="negative"):
            cache.layers[0].crop(3)


@each(SOME)
def test_a_cache_can_be_copied_pickled_and_reset(pair: Pair, sharp):
    model, cache, ids, mask = filled(pair)
    expected = full(model, ids, mask)[:, 70:]
    # or else a copy would drag a model along
    assert all(len(pickle.dumps(layer.pattern)) < 5000 for layer in bounded_layers(cache))
    assert not any(isinstance(x, torch.nn.Module) for layer in layers_of(cache) for x in vars(layer).values())
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for other in (copy.deepcopy(cache), torch.load(file, weights_only=False), cache):
        assert_close(decode(model, ids, mask, tuple(range(71, 81)), other)[0], expected, 1e-9)
    getattr(cache, "self_attention_cache", cache).reset()
    assert cache.get_seq_length() == 0
    assert_close(decode(model, ids, mask, (60, 61, 80), cache)[0][:, 70:], expected, 1e-9)


def test_caches_of_the_caller(sharp):
    """An empty dynamic cache gets bounded layers; one with keys in it stays what it is."""
    model = tiny_model("gpt2").double()
    ids, mask = prompt(3, 70, (0, 11, 30))
    with torch.no_grad():
        filled_by_stock = call(model, ids, mask, slice(0, 40), {}, use_cache=True).past_key_values
    with he.patch_attention(model, "local", attention_window=4, layers=(1,)):
        for empty in (DynamicCache(), DynamicCache(config=model.config)):
            actual, _ = decode(model, ids, mask, (50, 51, 70), empty)
            assert_close(actual, full(model, ids, mask), 1e-9, where=mask)
            assert [type(layer).__name__ for layer in empty.layers] == ["DynamicLayer", "BoundedLayer"]
        positional = DynamicCache()
        with torch.no_grad():
            out = model.transformer(ids, positional, mask)
        assert out.past_key_values is positional
        assert isinstance(positional.layers[1], BoundedLayer)
        decode(model, ids, mask, (70,), filled_by_stock)
    assert [layer.keys.shape[2] for layer in filled_by_stock.layers] == [70, 70]


def test_rows_that_start_elsewhere_are_refused(sharp):
    """A forgotten mask would move the global tokens; a window does not mind."""
    model = tiny_model("gpt2").double()
    ids, mask = prompt(2, 60, (0, 11))
    for rule, refused in (("first", True), ("none", False)):
        with he.patch_attention(model, "longformer", attention_window=4, global_tokens=rule):
            _, cache = decode(model, ids, mask, (59,))
            if refused:
                with pytest.raises(ValueError, match="rows start at other tokens"):
                    model(ids[:, 59:], past_key_values=cache)
            else:
                model(ids[:, 59:], past_key_values=cache)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_an_undone_model_is_stock_again(family: str, sharp):
    model = tiny_model(family).double()
    inputs = generation_inputs(model)
    options: dict[str, Any] = dict(max_new_tokens=9, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    before = model.generate(**inputs, **options)
    ids, mask = prompt(3, 41, (0, 0, 0))
    with he.patch_attention(model, "local", attention_window=4, side="decoder"):
        _, cache = decode(model, ids, mask, (40,))
        # over 40 tokens a window of 4 says something else
        assert not torch.equal(model.generate(**inputs, **options).sequences, before.sequences)
    after = model.generate(**inputs, **options)
    assert torch.equal(after.sequences, before.sequences)
    assert not any(isinstance(layer, BoundedLayer) for layer in layers_of(after.past_key_values))
    with pytest.raises(RuntimeError, match="start with a new cache"):
        decode(model, ids, mask, (41,), cache)


def test_no_cache_where_the_host_makes_none():
    model = tiny_model("gpt2")
    inputs = inputs_for(model, length=20)
    with he.patch_attention(model, "local", attention_window=4):
        assert model(**inputs, use_cache=False).past_key_values is None
        model.config.use_cache = False
        assert model(**inputs).past_key_values is None
        model.train()
        model.gradient_checkpointing_enable()
        out = model(**inputs, labels=inputs["input_ids"], use_cache=True)
        assert out.past_key_values is None
        out.loss.backward()


@pytest.mark.parametrize("name", ["local", "longformer", "image_local"])
def test_an_explicit_implementation_does_not_fall_back_while_decoding(name: str):
    model = tiny_model("gpt2")
    ids, _ = prompt(2, 20, (0, 0))
    with he.patch_attention(model, name):
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        he.set_implementation("flex")
        try:
            with pytest.raises(ValueError, match="implementation='flex' can't take this call: queries of new tokens"):
                model(ids[:, :1], past_key_values=cache)
        finally:
            he.set_implementation("auto")


# ---- the attention of decoding rows ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [Window(left=3, right=0, dilation=2), GlobalColumns(positions=(0, 2)) | Window(left=1, right=0)]
)
def test_rows_attention_against_the_definition(pattern):
    """Keys in any order, with gaps and spare entries; rows that start late; a row that sees nothing gives 0."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, new, old, width = 3, 2, 5, 12, 4
    length = old + new
    query, key, value = (
        torch.randn(batch, heads, n, width, generator=generator, dtype=torch.float64) for n in (new, length, length)
    )
    table = torch.randn(7, heads, generator=generator, dtype=torch.float64)
    bias = RelativeBias(table, lambda offsets: offsets.clamp(-3, 3) + 3, 3)
    start, keep = torch.tensor([0, 4, length - 2]), torch.ones(batch, length, dtype=torch.bool)
    keep[0, 7] = False
    keep &= torch.arange(length) >= start[:, None]
    columns = torch.zeros(batch, length, dtype=torch.bool)
    columns[:, 9] = True
    heads_of = PerHead(parts=(pattern, Strided(stride=5)))

    i, j = torch.arange(old, length)[:, None], torch.arange(length)
    rows, keys = i - start[:, None, None], j - start[:, None, None]
    seen = heads_of.visible_per_head(rows, keys) | (columns[:, None] & (i - j <= 5))[:, None]
    seen &= ((j <= i) & keep[:, None])[:, None]
    logits = 0.7 * query @ key.mT + bias.at(j - i)
    logits = logits.masked_fill(~seen, -torch.inf)
    expected = logits.softmax(-1).nan_to_num(0.0) @ value
    sums = logits.logsumexp(-1)

    order = torch.rand(batch, length, generator=generator).argsort(-1)
    where = order[:, None, :, None].expand_as(key)
    spare = torch.randn(batch, heads, 3, width, generator=generator, dtype=torch.float64)
    call = AttentionCall(is_causal=True, scaling=0.7, relative_bias=bias, query_offset=old, row_start=start)
    call = replace(call, return_lse=True)
    moved = replace(
        call,
        key_padding_mask=torch.cat([keep.gather(1, order), torch.ones(batch, 3, dtype=torch.bool)], 1),
        key_positions=torch.cat([order, torch.full((batch, 3), -1)], 1),
    )
    actual, lse = rows_attention(
        query,
        torch.cat([key.gather(2, where), spare], 2),
        torch.cat([value.gather(2, where), spare], 2),
        heads_of.visible_per_head,
        moved,
        columns=torch.cat([columns.gather(1, order), torch.ones(batch, 3, dtype=torch.bool)], 1),
        reach=5,
        chunk=2,
    )
    assert_close(actual, expected, 1e-12)
    assert (actual[2, :, :3] == 0).all()
    assert lse is not None
    assert_close(lse.exp(), sums.exp(), 1e-12)
    call = replace(call, key_padding_mask=keep)
    actual, _ = rows_attention(query, key, value, heads_of.visible_per_head, call, columns=columns, reach=5, chunk=2)
    assert_close(actual, expected, 1e-12)
