"""Packed rows equal separate rows: logits and gradients, with every mechanism, whatever else the call asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from pairs import MAIN, VARIANTS, Pair, each
from torch import Tensor

import hf_efficient as he
from hf_efficient.families import family_of
from hf_efficient.ops.packing import PackedSequences, position_steps
from hf_efficient.patching import call_checks
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.testing import assert_close, inputs_for, tiny_model

ROWS = ((40, 1, 33, 23), (63, 34))
TOTAL = 97
TOLERANCE = 1e-9

ABSOLUTE = [pair for pair in MAIN + VARIANTS if pair.family != "t5"]
EXTRA = [pair for pair in ABSOLUTE if pair.config.attention_class.num_extra_tokens(pair.config)]
PACKABLE = [pair for pair in ABSOLUTE if pair not in EXTRA]


def first_position(model: Any) -> int:
    return family_of(model).positions.offset(model.config)


def packed_inputs(model: Any, rows: tuple[tuple[int, ...], ...] = ROWS) -> dict[str, Tensor]:
    """Rows of random tokens, without a mask, whose positions start again with each segment."""
    inputs = inputs_for(model, batch=len(rows), length=sum(rows[0]), padded=False)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    return {"input_ids": inputs["input_ids"], "position_ids": positions + first_position(model)}


def segments_of(rows: tuple[tuple[int, ...], ...] = ROWS) -> list[tuple[int, slice]]:
    found = []
    for row, lengths in enumerate(rows):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        found += [(row, slice(end - length, end)) for length, end in zip(lengths, ends, strict=True)]
    return found


def weighted(logits: Tensor) -> Tensor:
    """A scalar that depends on every logit in another way."""
    generator = torch.Generator().manual_seed(7)
    return (logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum()


def logits_and_gradients(model: Any, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    weighted(logits).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def separate(model: Any, inputs: dict[str, Tensor], rows: tuple[tuple[int, ...], ...] = ROWS) -> Tensor:
    """Logits of the packed rows' segments, each of which goes through the model alone, as it is."""
    parts: list[list[Tensor]] = [[] for _ in rows]
    for row, where in segments_of(rows):
        call = {k: v[row : row + 1, where] for k, v in inputs.items() if k not in ("position_ids", "attention_mask")}
        parts[row].append(model(**call, use_cache=False).logits[0])
    return torch.stack([torch.cat(part) for part in parts])


def assert_same(
    model: Any, actual: Tensor, expected: Tensor, where: Tensor | None = None, tolerance: float = TOLERANCE
) -> None:
    """Logits, and the gradients of all parameters."""
    if where is not None:
        actual, expected = (torch.where(where[..., None], x, 0.0) for x in (actual, expected))
    actual, gradients = logits_and_gradients(model, actual)
    expected, others = logits_and_gradients(model, expected)
    assert_close(actual, expected, tolerance, "logits", where)
    assert set(gradients) == set(others)
    largest = max(float(g.abs().max()) for g in others.values())
    for name, gradient in gradients.items():
        assert (gradient - others[name]).abs().max() <= tolerance * largest, name


def patched(pair: Pair, **overrides: Any) -> Any:
    model = pair.model(**overrides)
    pair.patch(model)
    return model.double()


def converted(model_type: str, mechanism: str = "local", **options: Any) -> Any:
    model = tiny_model(model_type)
    he.patch_attention(model, mechanism, **options)
    return model.double()


LONGFORMER = dict(mechanism="longformer", attention_window=8, global_tokens="first")


# ---- packed = separate -------------------------------------------------------------------------------------------


@each(PACKABLE)
def test_packed_rows_equal_separate_rows(pair: Pair) -> None:
    model = patched(pair)
    inputs = packed_inputs(model)
    packed = model(**inputs, use_cache=False).logits
    assert_same(model, packed, separate(model, inputs))
    one_row = inputs | {"position_ids": torch.arange(TOTAL).expand(2, -1) + first_position(model)}
    assert (model(**one_row).logits - packed).abs().max() > 1e-3, "packing changes nothing, so nothing was tested"


@each([pair for pair in PACKABLE if "variant" not in pair.label])
def test_padding_belongs_to_no_segment(pair: Pair) -> None:
    """At the end of a row, in front of it and between two segments."""
    model = patched(pair)
    inputs = packed_inputs(model)
    mask = torch.ones(2, TOTAL, dtype=torch.long)
    mask[0, 90:] = mask[1, 60:63] = 0
    # the same rows, with what is padding there as segments of their own
    expected = separate(model, inputs, ((40, 1, 33, 16, 7), (60, 3, 34)))
    assert_same(model, model(**inputs, attention_mask=mask).logits, expected, where=mask.bool())
    mask[1, :63] = 0
    positions = inputs["position_ids"].masked_fill(mask == 0, first_position(model))
    out = model(inputs["input_ids"], position_ids=positions, attention_mask=mask).logits
    assert_close(out, expected, TOLERANCE, where=mask.bool())


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("mask", ["none", "ones"])
def test_every_length_and_number_of_segments(model_type: str, mask: str) -> None:
    model = converted(model_type, **LONGFORMER)
    for rows in (((1,) * 8,), ((2, 1, 5), (8,)), ((7, 1), (1, 7)), ((8,), (4, 4)), ((3, 3, 2),)):
        inputs = packed_inputs(model, rows)
        expected = separate(model, inputs, rows)
        if mask == "ones":
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert_same(model, model(**inputs).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2"])
def test_gradient_checkpointing(model_type: str, reentrant: bool) -> None:
    model = converted(model_type, **LONGFORMER)
    inputs = packed_inputs(model)
    model.train()
    expected = separate(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(model, model(**inputs).logits, expected)


@torch.no_grad()
def test_one_row_of_positions_serves_the_whole_batch() -> None:
    for model_type in ("bert", "gpt2"):
        model = converted(model_type, attention_window=8)
        rows = ((5, 4, 3), (5, 4, 3))
        inputs = packed_inputs(model, rows)
        inputs["position_ids"] = inputs["position_ids"][:1]
        assert_close(model(**inputs).logits, separate(model, inputs, rows), TOLERANCE)
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        by_embeddings = model(inputs_embeds=embeds, **inputs).logits
        inputs = packed_inputs(model, rows)
        assert_close(by_embeddings, separate(model, inputs, rows), TOLERANCE)


# ---- against the unconverted model -------------------------------------------------------------------------------


@each([pair for pair in PACKABLE if "variant" not in pair.label])
def test_exact_settings_equal_the_unconverted_model(pair: Pair) -> None:
    model = pair.model()
    config = pair.exact_config(model, TOTAL)
    stock = pair.model().double()
    inputs = packed_inputs(model)
    expected = separate(stock, inputs).detach()
    if pair.family == "gpt2":
        assert stock.config._attn_implementation == "sdpa"
        assert_close(
            stock(**inputs, use_cache=False).logits, expected, TOLERANCE, "the unconverted model's own packing"
        )
    pair.patch(model, config)
    assert_close(model.double()(**inputs).logits, expected, TOLERANCE)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2"])
def test_layers_that_stay_exact_are_packed_too(model_type: str) -> None:
    model = tiny_model(model_type)
    he.patch_attention(model, "local", attention_window=4, layers=[1])
    model.double()
    inputs = packed_inputs(model)
    assert_same(model, model(**inputs).logits, separate(model, inputs))


# ---- transformers' own packing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2"])
def test_flattened_batches(model_type: str) -> None:
    """More tokens in a row than the model has positions, and the loss of separate rows."""
    model = converted(model_type, **LONGFORMER)
    lengths = (70, 1, 61, 35)
    documents = inputs_for(model, batch=1, length=sum(lengths), padded=False)["input_ids"][0].split(lengths)
    first = {"position_ids_start": 2} if model_type == "roberta" else {}
    collate = transformers.DataCollatorWithFlattening(**first)
    batch = collate([{"input_ids": document.tolist()} for document in documents])
    assert batch["input_ids"].shape == (1, 167)
    out = model(**batch)
    assert_same(model, out.logits, separate(model, {"input_ids": batch["input_ids"]}, (lengths,)))
    total = sum(
        torch.nn.functional.cross_entropy(
            *((x[0, :-1], d[1:]) if model_type == "gpt2" else (x[0, 1:], d[1:])), reduction="sum"
        )
        for d in documents
        for x in [model(d[None]).logits]
        if len(d) > 1
    )
    assert_close(out.loss, total / sum(n - 1 for n in lengths), 1e-6, "loss")


def test_positions_below_the_first_one_are_refused() -> None:
    """RoBERTa counts from 2; by default the collator does not."""
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": [7, 8, 9]}, {"input_ids": [10, 11]}])
    with pytest.raises(ValueError, match="position_ids_start=2"):
        converted("roberta", attention_window=4)(**batch)


# ---- what else a call may ask for --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_global_attention_mask_goes_with_its_tokens(model_type: str) -> None:
    """Segments with different numbers of global tokens, also none."""
    model = converted(model_type, **LONGFORMER | {"global_tokens": "none"})
    inputs = packed_inputs(model)
    marked = torch.zeros_like(inputs["input_ids"])
    marked[0, [0, 3, 39, 41, 96]] = 1
    marked[1, [70, 71]] = 1
    inputs["global_attention_mask"] = marked
    assert_same(model, model(**inputs).logits, separate(model, inputs))
    plain = {k: v for k, v in inputs.items() if k != "global_attention_mask"}
    assert (model(**inputs).logits - model(**plain).logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"global_attention_mask of shape \(2, 96\)"):
        model(**inputs | {"global_attention_mask": marked[:, 1:]})


def test_separators_are_looked_for_in_each_segment() -> None:
    model = converted("bert", **LONGFORMER | {"global_tokens": "question"}, separator_token_id=3)
    inputs = packed_inputs(model)
    inputs["input_ids"][0, [4, 9, 40, 80]] = 3
    inputs["input_ids"][0, 41] = 3  # the first token of a shorter segment than others of its group
    inputs["input_ids"][1, [5, 63]] = 3
    assert_same(model, model(**inputs).logits, separate(model, inputs))


@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("training", [False, True])
def test_no_cache_is_filled(use_cache: bool | None, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("gpt2", attention_window=8)
    assert model.config.use_cache
    inputs = packed_inputs(model)
    expected = separate(model, inputs)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a cache was made")

    monkeypatch.setattr(transformers.models.gpt2.modeling_gpt2, "DynamicCache", refuse)
    monkeypatch.setattr(call_checks, "bounded_cache", refuse)
    model.train(training)
    out = model(**inputs, use_cache=use_cache)
    assert out.past_key_values is None
    assert_close(out.logits, expected, TOLERANCE)


@pytest.mark.parametrize("filled", [False, True])
def test_a_given_cache_is_refused(filled: bool) -> None:
    model = converted("gpt2", attention_window=8)
    inputs = packed_inputs(model)
    cache = (
        model(inputs["input_ids"][:, :9], use_cache=True).past_key_values if filled else transformers.DynamicCache()
    )
    with pytest.raises(ValueError, match="past_key_values"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(**inputs, max_new_tokens=2)


# ---- refused -----------------------------------------------------------------------------------------------------


@each(EXTRA)
def test_extra_global_tokens_are_refused(pair: Pair) -> None:
    model = patched(pair)
    with pytest.raises(ValueError, match="extra global tokens stand once in front of each row"):
        model(**packed_inputs(model))


def test_positions_that_are_neither_one_sequence_nor_several_are_refused() -> None:
    for model_type in ("bert", "gpt2"):
        model = converted(model_type, attention_window=8)
        ids = torch.randint(5, 99, (1, 6))
        with pytest.raises(ValueError, match="jump ahead to 7 at token 2 of row 0"):
            model(ids, position_ids=torch.tensor([[0, 1, 7, 8, 0, 1]]))
        with pytest.raises(ValueError, match="go up to 128, but the model has 128 positions"):
            model(ids, position_ids=torch.tensor([[126, 127, 128, 0, 1, 2]]))
    with pytest.raises(ValueError, match="jump ahead"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 5, 6, 7]]))


def test_one_memory_for_several_sequences_is_refused() -> None:
    model = tiny_model("gpt2", add_cross_attention=True)
    he.patch_attention(model, "local", attention_window=8)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        model(**packed_inputs(model), encoder_hidden_states=torch.randn(2, 5, 32))


def test_models_without_position_ids_refuse_packed_ones() -> None:
    model = tiny_model("t5")
    he.patch_attention(model, "local", attention_window=4)
    inputs = {k: v for k, v in inputs_for(model, length=6).items() if not k.endswith("mask")}
    with pytest.raises(ValueError, match="this model has no position_ids"):
        model(**inputs, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


def test_other_ways_to_say_packed_are_refused() -> None:
    model = converted("gpt2", attention_window=8)
    documents = [{"input_ids": [7, 8, 9]}, {"input_ids": [10, 11]}]
    for option, name in (("return_seq_idx", "seq_idx"), ("return_flash_attn_kwargs", "cu_seq_lens_q")):
        batch = transformers.DataCollatorWithFlattening(**{option: True})(documents, return_tensors="pt")
        with pytest.raises(ValueError, match=name):
            model(**batch)


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_compiled_models_refuse_packed_rows(model_type: str) -> None:
    """At once where nothing else can be said; with a mask, when the values turn out to be packed."""
    model = converted(model_type, attention_window=8)
    inputs = packed_inputs(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="can't tell packed position_ids from plain ones"):
        compiled(**inputs)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    plain = inputs | {"position_ids": torch.arange(TOTAL).expand(2, -1)}
    assert_close(compiled(**plain).logits, model(**plain).logits, 1e-9)
    with pytest.raises(RuntimeError, match=r"without torch\.compile"):
        compiled(**inputs)
    torch.compiler.reset()


# ---- segments ----------------------------------------------------------------------------------------------------


def random_rows(seed: int) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Positions, mask and the tokens of each segment, of 3 rows of 200 with padding anywhere but inside a segment."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(1, high, (), generator=generator))

    positions, mask, found = torch.zeros(3, 200, dtype=torch.long), torch.zeros(3, 200, dtype=torch.long), []
    for row in range(3):
        token = draw(8) - 1
        while token < 200:
            length = min(draw(2) if draw(3) == 1 else draw(90), 200 - token)
            positions[row, token : token + length] = torch.arange(length)
            mask[row, token : token + length] = 1
            found.append(list(range(row * 200 + token, row * 200 + token + length)))
            token += length + (draw(5) if draw(4) == 1 else 0)
    return positions, mask, found


@pytest.mark.parametrize("seed", range(20))
def test_segments_are_found_split_and_joined(seed: int) -> None:
    positions, mask, expected = random_rows(seed)
    keep = mask.bool()
    segments = PackedSequences.find(position_steps(positions, keep), keep)
    numbers = torch.arange(600.0, dtype=torch.float64).view(3, 200, 1)
    pieces = [segments.split(numbers, group) for group in segments.groups]
    rows = []
    for group, piece in zip(segments.groups, pieces, strict=True):
        kept = torch.ones(piece.shape[:2], dtype=torch.bool) if group.token_mask is None else group.token_mask
        rows += [row[k].flatten().tolist() for row, k in zip(piece, kept, strict=True)]
    assert sorted(rows) == sorted(expected)
    assert torch.equal(segments.join(pieces).squeeze(-1), torch.where(keep, numbers.squeeze(-1), 0.0))
    assert sum(piece.shape[0] * piece.shape[1] for piece in pieces) < 2 * int(mask.sum())
    assert len(pieces) <= 1 + max(map(len, expected)).bit_length()


def test_steps_of_ordinary_calls_hold_no_segments() -> None:
    """Padding on either side and holes, with positions counted by tokens or by real tokens, as any host gives them."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1], [0] * 6])
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    generating = torch.tensor([[0, 1, 2, 0, 1, 2]])  # on a row padded on the right, after one step
    for positions, keep in (
        (torch.arange(6).expand(5, -1), mask),
        (counted, mask),
        (counted.masked_fill(mask == 0, 1), mask),
        (generating, torch.tensor([[1, 1, 1, 0, 1, 1]])),
        (torch.arange(6)[None], None),
    ):
        steps = position_steps(positions, None if keep is None else keep.bool())
        assert not steps.restart.any() and not steps.jump.any(), positions


def test_packing_costs_no_more_than_its_tokens() -> None:
    """One long segment beside many short ones is not padded to their number times its length."""
    model = tiny_model("gpt2", positions=512)
    he.patch_attention(model, "local", attention_window=8)
    rows = ((500,) + (1,) * 500,)
    inputs = packed_inputs(model, rows)
    with LargestTensor() as packed, torch.no_grad():
        model.transformer(**inputs)
    with LargestTensor() as separately, torch.no_grad():
        model.transformer(inputs["input_ids"].view(2, 500))
    assert packed.numel <= 2 * separately.numel, packed.shape
