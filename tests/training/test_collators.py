"""Collators against truth: every token is kept, labels are what is predicted, and randomness is that of the row alone."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from pretraining import SENTINELS, t5_tokenizer
from tiny import tiny_tokenizer, words

import hf_efficient as he
from hf_efficient.testing import tiny_model
from hf_efficient.training.data.collators import (
    IGNORED,
    LanguageModelCollator,
    SeededCollator,
    SpanCorruptionCollator,
    fixed_rows,
)
from hf_efficient.training.data.texts import token_blocks
from hf_efficient.training.pretraining import first_position


@pytest.mark.parametrize("density", [0.01, 0.15, 0.5, 0.99])
@pytest.mark.parametrize("mean_span", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("length", [2, 3, 13, 64, 97, 512])
def test_span_corruption_loses_nothing(length, density, mean_span):
    """Kept and taken tokens are the input again, in order; sentinels mark where, and both sides end with the end token."""
    collator = SpanCorruptionCollator(t5_tokenizer(), density, mean_span)
    names = {index: name for name, index in t5_tokenizer().get_vocab().items()}
    taken = min(max(round(length * density), 1), length - 1)
    if min(round(taken / mean_span), length - taken) > SENTINELS - 1:
        # with as many spans as there are sentinels for, they would be longer than asked for
        with pytest.raises(ValueError, match="block_length of at most") as refused:
            collator.corrupt([7] * length)
        most = int(re.search("at most ([0-9]+)", str(refused.value))[1])
        assert collator.counts(most)[1] == SENTINELS - 1 < len(collator.sentinels)
        return
    torch.manual_seed(length)
    for _ in range(5):
        ids = torch.randint(5, 90, (length,)).tolist()
        source, target = collator.corrupt(ids)
        assert source[-1] == target[-1] == collator.end
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token in collator.sentinels:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        marks = [token for token in source if token in collator.sentinels]
        assert [names[token] for token in spans] == [f"<extra_id_{i}>" for i in range(len(marks) + 1)]
        assert marks == list(spans)[:-1] and spans[list(spans)[-1]] == []
        rebuilt = []
        for token in source[:-1]:
            rebuilt += spans.get(token, [token])
        assert rebuilt == ids
        taken = sum(map(len, spans.values()))
        assert taken == min(max(round(length * density), 1), length - 1)
        assert len(marks) <= SENTINELS - 1 and all(spans[mark] for mark in marks)
        if 1 < round(taken / mean_span) <= length - taken:
            assert len(marks) == round(taken / mean_span)


def test_spans_fall_everywhere_and_follow_the_seed():
    collator = SpanCorruptionCollator(t5_tokenizer())
    rows = [{"input_ids": list(range(5, 90))}]
    torch.manual_seed(1)
    first = collator(rows)["input_ids"]
    second = collator(rows)["input_ids"]
    torch.manual_seed(1)
    assert torch.equal(collator(rows)["input_ids"], first) and not torch.equal(first, second)
    taken = Counter(i for _ in range(400) for i in collator.corrupt(rows[0]["input_ids"])[1] if 5 <= i < 90)
    # the first piece is kept, so the first token is never taken; from the fourth or so on each is, as often as any other
    assert taken[5] == 0
    assert all(0.08 < taken[i] / 400 < 0.25 for i in range(20, 80))


def test_span_corruption_batch():
    tokenizer = t5_tokenizer()
    rows = [{"input_ids": list(range(5, 45))}, {"input_ids": list(range(5, 15)), "labels": [9, 1]}]
    batch = SpanCorruptionCollator(tokenizer, pad_to=40)(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 40)
    assert batch["labels"].shape == (2, 6 + 2 + 2)  # 6 tokens in 2 spans, one more sentinel, the end
    assert batch["labels"][1].tolist() == [9, 1] + [IGNORED] * 8
    assert batch["input_ids"][1, :10].tolist() == rows[1]["input_ids"]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    model = tiny_model("t5", vocab_size=99 + SENTINELS)
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "between 0 and 1"),
        ({"density": 1.0}, "between 0 and 1"),
        ({"mean_span": 0.5}, "must be ≥ 1"),
    ],
)
def test_span_corruption_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SpanCorruptionCollator(t5_tokenizer(), **options)
    with pytest.raises(ValueError, match="has 0 sentinel tokens"):
        SpanCorruptionCollator(tiny_tokenizer("t5"))
    with pytest.raises(ValueError, match="a row of 1 tokens"):
        SpanCorruptionCollator(t5_tokenizer()).corrupt([7])


@pytest.mark.parametrize("pack", [False, True])
def test_causal_labels_equal_each_document_alone(pack):
    """The loss of a batch is the mean over the documents' predicted tokens, each computed on its own."""
    tokenizer, model = tiny_tokenizer("gpt2"), tiny_model("gpt2")
    texts = [words(n, start=n) for n in (20, 9, 5, 14, 30)]
    rows = token_blocks(texts, tokenizer, 40, special_tokens="end", pack=pack).rows
    batch = LanguageModelCollator(tokenizer, pad_to=40)(list(rows))
    assert ("attention_mask" in batch) != pack and (batch["input_ids"].shape[0] < len(texts)) == pack
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]])
        logits = model(ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum").detach())
        count += len(logits)
    # what a Trainer divides by
    assert int((batch["labels"] != IGNORED).sum()) == count
    # in eval mode the host would fill a cache, and with one it looks at no positions
    assert float(model(**batch, use_cache=False).loss.detach()) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("mechanism", ["local", "linformer"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_packed_masked_loss_equals_each_document_alone(family, mechanism):
    tokenizer, model = tiny_tokenizer(family), tiny_model(family)
    options = {"attention_window": 4} if mechanism == "local" else {"rank": 8}
    he.convert(model, mechanism, tokenizer=tokenizer, **options)
    first = first_position(model)
    rows = token_blocks(
        [words(n, start=n) for n in (20, 9, 5, 14, 30)], tokenizer, 40, pack=True, first_position=first
    ).rows
    torch.manual_seed(0)
    batch = LanguageModelCollator(tokenizer, 0.3)(list(rows))
    total = count = documents = 0.0
    for ids, positions, labels in zip(batch["input_ids"], batch["position_ids"], batch["labels"], strict=True):
        starts = [*(positions == first).nonzero().flatten().tolist(), len(ids)]
        for start, stop in itertools.pairwise(starts):
            if (labels[start:stop] != IGNORED).any():
                alone = model(ids[None, start:stop], position_ids=positions[None, start:stop])
                loss = F.cross_entropy(alone.logits[0], labels[start:stop], ignore_index=IGNORED, reduction="sum")
                total, count = total + float(loss.detach()), count + int((labels[start:stop] != IGNORED).sum())
                documents += 1
    assert documents > len(rows)
    assert float(model(**batch).loss.detach()) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("pack", [False, True])
def test_masking_leaves_special_tokens_and_padding_alone(pack):
    tokenizer = tiny_tokenizer("bert")
    rows = token_blocks([words(n) for n in (20, 9, 5, 14, 30)] * 8, tokenizer, 40, pack=pack).rows
    plain = LanguageModelCollator(tokenizer)(list(rows))
    torch.manual_seed(0)
    batch = LanguageModelCollator(tokenizer, 0.15)(list(rows))
    chosen = batch["labels"] != IGNORED
    text = plain["input_ids"] >= 5
    assert not (chosen & ~text).any() and 0.1 < chosen.sum() / text.sum() < 0.2
    assert torch.equal(batch["labels"][chosen], plain["input_ids"][chosen])
    changed = batch["input_ids"] != plain["input_ids"]
    assert not (changed & ~chosen).any()
    assert 0.65 < (batch["input_ids"] == tokenizer.mask_token_id).sum() / chosen.sum() < 0.95
    assert set(batch) == {"input_ids", "labels", "position_ids" if pack else "attention_mask"}


def test_short_row_always_has_something_to_predict():
    """Of two tokens 15 % is mostly none; the loss would be 0 / 0."""
    tokenizer = tiny_tokenizer("bert")
    collate = LanguageModelCollator(tokenizer, 0.15)
    rows = [{"input_ids": [2, 50, 51, 3], "special_tokens_mask": [1, 0, 0, 1]}]
    chosen = Counter()
    for _ in range(100):
        batch = collate(rows)
        chosen.update((batch["labels"][0] != IGNORED).nonzero().flatten().tolist())
        assert (batch["labels"] != IGNORED).any()
    assert chosen.keys() == {1, 2} and min(chosen.values()) > 25


def test_padding_of_packed_rows_is_a_document_of_its_own():
    rows = [{"input_ids": [7, 8, 9], "position_ids": [2, 3, 2]}, {"input_ids": [7], "position_ids": [2]}]
    batch = LanguageModelCollator(tiny_tokenizer("gpt2"), pad_to=5)(rows)
    assert batch["position_ids"].tolist() == [[2, 3, 2, 2, 3], [2, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[-100, 8, -100, -100, -100], [-100] * 5]


@pytest.mark.parametrize("objective", ["masks", "spans"])
def test_rows_are_masked_alike_however_they_are_grouped_and_filled_up(objective):
    """One process, two with half the batch each, and a compiled model that wants one shape see the same rows."""
    tokenizer = tiny_tokenizer("bert") if objective == "masks" else t5_tokenizer()
    rows = list(token_blocks([words(n, start=n) for n in (9, 33, 20, 14)], tokenizer, 48, special_tokens="none").rows)
    made = LanguageModelCollator if objective == "masks" else SpanCorruptionCollator
    seeded = SeededCollator(made(tokenizer, 0.3), seed=1)
    whole, filled = seeded(rows), SeededCollator(made(tokenizer, 0.3, pad_to=48), seed=1)(rows)
    fixed = fixed_rows(Dataset.from_list(rows), made(tokenizer, 0.3), seed=1)
    filled_later = made(tokenizer, 0.3, pad_to=48)(list(fixed))
    assert filled["input_ids"].shape == (4, 48) != whole["input_ids"].shape
    for name, batch in filled.items():
        assert torch.equal(batch[:, : whole[name].shape[1]], whole[name])
        assert torch.equal(filled_later[name], batch)
    assert filled["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in fixed]
    for halves in ([rows[:2], rows[2:]], [[rows[3], rows[1]], [rows[0]]]):
        for half in halves:
            for name, batch in seeded(half).items():
                for own, row in zip(batch, half, strict=True):
                    expected = whole[name][row["index"]]
                    length = min(len(own), len(expected))
                    assert torch.equal(own[:length], expected[:length])


def test_seeded_collator_depends_on_seed_epoch_and_rows_alone():
    tokenizer = tiny_tokenizer("bert")
    rows = list(token_blocks([words(60)] * 4, tokenizer, 32).rows)
    collator = SeededCollator(LanguageModelCollator(tokenizer, 0.3), seed=1)
    before = torch.random.get_rng_state()
    first = collator(rows[:2])["input_ids"]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    collator(rows[2:])
    assert torch.equal(collator(rows[:2])["input_ids"], first)
    assert not torch.equal(collator([rows[2], rows[3]])["input_ids"], first)  # the same texts at other places
    state = type("State", (), {"epoch": 1.0})()
    collator.on_epoch_begin(None, state, None)
    assert collator.epoch == 1 and not torch.equal(collator(rows[:2])["input_ids"], first)
    other = SeededCollator(collator.collate, seed=2)
    assert not torch.equal(other(rows[:2])["input_ids"], first)


def test_fixed_rows_are_the_same_in_every_batch():
    tokenizer = tiny_tokenizer("bert")
    collate = LanguageModelCollator(tokenizer, 0.3)
    rows = token_blocks([words(50), words(9), words(33)], tokenizer, 32).rows
    fixed = fixed_rows(rows, collate, seed=0)
    torch.manual_seed(7)
    assert fixed_rows(rows, collate, seed=0).to_list() == fixed.to_list()
    assert fixed_rows(rows, collate, seed=1).to_list() != fixed.to_list()
    batch = collate(list(fixed))
    for row, ids, labels in zip(fixed, batch["input_ids"], batch["labels"], strict=True):
        assert ids[: len(row["input_ids"])].tolist() == row["input_ids"]
        assert labels[: len(row["labels"])].tolist() == row["labels"]
        assert sum(label != IGNORED for label in row["labels"]) == int((labels != IGNORED).sum())
