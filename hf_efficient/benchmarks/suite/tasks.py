"""Recall tasks: what is asked was shown before, and nothing but attention can fetch it.

Vocabulary: 0 padding, 1 mask, 2 start, 3 separator, 64 keys, 64 values, 60 tokens of filler, 16 slots. A *showing* is a key
followed by its value. Everything comes from the generator that is given.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

KEYS = VALUES = 64
FILLERS, SLOTS, MASK = 60, 16, 1
FIRST_KEY, FIRST_VALUE, FIRST_FILLER, FIRST_SLOT = 4, 68, 132, 192
VOCABULARY = FIRST_SLOT + SLOTS
FORMS = {"gpt2": "causal", "bert": "masked", "t5": "slots"}


class Batch(NamedTuple):
    """(B, n) tokens and answers, -100 where nothing is asked; labels are not shifted."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """One task at one length for one family.

    Args:
        name: `"mqar"`, `"needle"`, `"t5-recall"` or `"copy"`. family: `"gpt2"`, `"bert"` or `"t5"`.
        length: n, tokens of a row. pairs: P, showings; of `"copy"` the distance.
        depth: of `"needle"`: where one pair stands, from 0 to below 1; it is asked first. `None` = all stand anywhere.
    """

    name: str
    family: str
    length: int
    pairs: int
    depth: float | None = None

    @property
    def form(self) -> str:
        """Where answers are read: at the key, at a masked value, or at a slot by the decoder."""
        return FORMS[self.family]

    def draw(self, rows: int, generator: Generator) -> Batch:
        if self.name == "mqar":
            return associative_recall(rows, self.length, self.pairs, generator, self.form)
        if self.name == "copy":
            return copy_from(rows, self.length, self.pairs, generator)
        questions = SLOTS if self.form == "slots" else 8
        return needle(rows, self.length, self.pairs, questions, generator, self.form, self.depth)

    def evidence(self, batch: Batch) -> Tensor:
        """(B, n, n) bool: key j shows what is asked at i."""
        n, ids = self.length, batch.ids
        place = torch.arange(n)
        if self.name == "copy":
            return (batch.labels != -100)[..., None] & (place[:, None] - self.pairs == place)
        before = torch.nn.functional.pad(ids, (1, 0))[:, :-1]
        shown = is_in(ids, FIRST_VALUE, VALUES) & is_in(before, FIRST_KEY, KEYS)
        asked = ids if self.form == "causal" else before
        found = (asked[:, :, None] == before[:, None]) & shown[:, None] & (batch.labels != -100)[..., None]
        return found & (place < place[:, None]) if self.form == "causal" else found


def is_in(ids: Tensor, first: int, count: int) -> Tensor:
    return (ids >= first) & (ids < first + count)


def associative_recall(rows: int, n: int, pairs: int, generator: Generator, form: str) -> Batch:
    """Multi-query associative recall: P different keys with their values, then n / 2 - P questions about them.

    Causal: a question is its key, and the value that follows shows the pair once more. Masked: the value is hidden, and
    asked there, so that the first showing alone tells it.
    """
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs] + FIRST_KEY
    values = torch.randint(VALUES, (rows, pairs), generator=generator) + FIRST_VALUE
    which = torch.randint(pairs, (rows, n // 2 - pairs), generator=generator)
    which = torch.cat([torch.arange(pairs).expand(rows, -1), which], 1)
    ids = torch.stack([keys.gather(1, which), values.gather(1, which)], -1).flatten(1)
    return _asking(ids, 2 * pairs, form)


def needle(
    rows: int, n: int, pairs: int, questions: int, generator: Generator, form: str, depth: float | None = None
) -> Batch:
    """P pairs at random even places of a filler; the last tokens ask for some of them."""
    body = n - 2 * questions
    ids = torch.randint(FILLERS, (rows, n), generator=generator) + FIRST_FILLER
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs] + FIRST_KEY
    values = torch.randint(VALUES, (rows, pairs), generator=generator) + FIRST_VALUE
    order = torch.rand(rows, body // 2, generator=generator)
    which = torch.randint(pairs, (rows, questions), generator=generator)
    if depth is not None:
        order[:, int(depth * (body // 2))] = -1.0  # comes first
        which[:, 0] = 0
    places = order.argsort(1)[:, :pairs] * 2
    ids.scatter_(1, places, keys).scatter_(1, places + 1, values)
    ids[:, body::2], ids[:, body + 1 :: 2] = keys.gather(1, which), values.gather(1, which)
    return _asking(ids, body, form)


def copy_from(rows: int, n: int, distance: int, generator: Generator) -> Batch:
    """Every token asks for the one `distance` tokens before it: position alone solves this, so it measures reach."""
    ids = torch.randint(VALUES, (rows, n), generator=generator) + FIRST_VALUE
    labels = torch.full_like(ids, -100)
    labels[:, distance:] = ids[:, : n - distance]
    return Batch(ids, labels)


def _asking(ids: Tensor, first: int, form: str) -> Batch:
    """Rows whose tokens from `first` on are pairs of a key that is asked for and its value."""
    labels = torch.full_like(ids, -100)
    if form == "causal":
        labels[:, first::2] = ids[:, first + 1 :: 2]
        return Batch(ids, labels)
    labels[:, first + 1 :: 2] = ids[:, first + 1 :: 2]
    hidden = torch.tensor(MASK) if form == "masked" else torch.arange(FIRST_SLOT, FIRST_SLOT + SLOTS)
    ids[:, first + 1 :: 2] = hidden
    return Batch(ids, labels)


# ---- what needs no attention -------------------------------------------------------------------------------------


def rules(task: Task, batches: list[Batch]) -> dict[str, float]:
    """Accuracy of answers that look for no key: any value of the row, its most frequent value, the last one before."""
    right: dict[str, float] = defaultdict(float)
    count = 0
    for batch in batches:
        for ids, labels in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
            shown = [token for token in ids if FIRST_VALUE <= token < FIRST_VALUE + VALUES]
            common = Counter(shown).most_common(1)[0][0]
            last = shown[-1] if task.form != "causal" else 0
            for token, label in zip(ids, labels, strict=True):
                if label != -100:
                    count += 1
                    right["a value shown, at random"] += shown.count(label) / len(shown)
                    right["the value shown most often"] += label == common
                    right["the last value"] += label == last
                if task.form == "causal" and FIRST_VALUE <= token < FIRST_VALUE + VALUES:
                    last = token
    return {name: total / count for name, total in right.items()}


def reach(task: Task, batches: list[Batch], mask: Tensor) -> float:
    """Share of the questions that a (n, n) or (H, n, n) mask shows evidence for, in any head."""
    shown = mask.any(0) if mask.dim() == 3 else mask
    seen = torch.cat([(task.evidence(b) & shown).any(-1)[b.labels != -100] for b in batches])
    return float(seen.float().mean())


def distances(task: Task, batch: Batch) -> Tensor:
    """(questions,) distance of each question from its nearest evidence."""
    place = torch.arange(task.length)
    apart = (place[:, None] - place).abs().expand(len(batch.ids), -1, -1)
    return torch.where(task.evidence(batch), apart, task.length).amin(-1)[batch.labels != -100]
