"""Batches for pretraining: masked and packed rows, T5's span corruption, and randomness that a resumed run repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, TrainerCallback

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
Row = dict[str, Any]


class Collator(Protocol):
    """Rows to a batch, in two parts: what is random of each row by itself, and filling them up to one length."""

    def choose(self, row: Row) -> Row:
        """The row with `input_ids` and `labels`, not filled up; one that has labels as it is.

        Draws from PyTorch's global generator on the CPU.
        """

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """The batch of what `choose` makes of every row."""


class SeededCollator(TrainerCallback):
    """A collator whose random choices for a row depend on seed, epoch and that row's `index` alone.

    Loaders collate ahead of the step that is trained, so a checkpoint's random state is not that of the next batch, and a
    resumed run would mask other tokens; and batches of several processes are others than those of one. Here every row gets
    a state of its own, and the global one is left as it was: training resumes exactly, masks the same tokens however rows
    are grouped, and is not disturbed by evaluation. It is its own callback, which tells it the epoch:
    `Trainer(data_collator=c, callbacks=[c])`.
    """

    def __init__(self, collate: Collator, seed: int):
        self.collate, self.seed, self.epoch = collate, seed, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int((state.epoch or 0) + 1e-6)

    def choose(self, row: Row) -> Row:
        with torch.random.fork_rng(devices=[]):
            key = f"{self.seed} {self.epoch} {row['index']}"
            # torch.manual_seed would also seed the GPUs, whose dropout goes on
            torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))
            return self.collate.choose(row)

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        return self.collate([self.choose(row) for row in rows])


def fixed_rows(rows: Dataset, collate: Collator, seed: int) -> Dataset:
    """Rows with their random choices made once, each by its own number: what evaluation is repeated on.

    Returns:
        The rows with `input_ids` and `labels` as `collate` chooses them, not filled up.
    """
    return rows.map(SeededCollator(collate, seed).choose, desc="Fixing the evaluation rows")


def pad_token(tokenizer: Any) -> int:
    """What fills rows: the pad token, or where there is none (GPT-2) the end-of-text token, which no label sees."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


class LanguageModelCollator:
    """Batches of `token_blocks` for masked (`mlm_probability` > 0) or causal language modelling.

    Rows with `position_ids` are packed: they leave without attention mask, each document apart by its positions, padding
    as a document of its own. Rows that have `labels` keep them. Labels are -100 where nothing is predicted: padding, tokens
    that are not masked, and, causal, the first token of every row and of every document in it. Of a row so short that no
    token was chosen one is masked, or the loss of a batch of such rows would be 0 / 0.

    Args:
        mlm_probability: share of tokens to predict; of those 80 % become the mask token, 10 % a random one.
        pad_to: pad every batch to this length (compiled models); 0 = to its longest row.

    Raises:
        ValueError: masking with a tokenizer that has no mask token.
    """

    def __init__(self, tokenizer: Any, mlm_probability: float = 0.0, pad_to: int = 0):
        self.pad, self.pad_to = pad_token(tokenizer), pad_to
        self.masking: Any = None
        if mlm_probability:
            self.masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)

    def choose(self, row: Row) -> Row:
        """The row with `labels`, and with its masks where it is to be masked; one that has labels as it is."""
        if "labels" in row:
            return row
        ids = torch.tensor(row["input_ids"])
        if self.masking is not None:
            ids, labels = self._masked(ids, torch.tensor(row["special_tokens_mask"]))
        else:
            positions = torch.tensor(row.get("position_ids", range(len(ids))))
            labels = ids.masked_fill(positions.diff(prepend=positions[:1]) != 1, IGNORED)
        return row | {"input_ids": ids.tolist(), "labels": labels.tolist()}

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        rows = [self.choose(row) for row in rows]
        ids = padded([row["input_ids"] for row in rows], self.pad, self.pad_to)
        batch = {"input_ids": ids, "labels": padded([row["labels"] for row in rows], IGNORED, self.pad_to)}
        if "position_ids" in rows[0]:
            batch["position_ids"] = _positions([row["position_ids"] for row in rows], ids.shape[1])
        else:
            batch["attention_mask"] = padded([[1] * len(row["input_ids"]) for row in rows], 0, self.pad_to)
        return batch

    def _masked(self, ids: Tensor, special: Tensor) -> tuple[Tensor, Tensor]:
        """(input, labels) of a row of ids (N,)."""
        masked, labels = (
            x[0] for x in self.masking.torch_mask_tokens(ids[None].clone(), special_tokens_mask=special[None])
        )
        if not (labels != IGNORED).any():
            text = (special == 0).nonzero()[:, 0]
            place = text[torch.randint(len(text), ())]
            labels[place] = ids[place]
            masked[place] = self.masking.tokenizer.mask_token_id
        return masked, labels


def _positions(rows: Sequence[list[int]], length: int) -> Tensor:
    """(B, length) positions; what fills a row counts from the first position again."""
    return torch.tensor([row + [row[0] + i for i in range(length - len(row))] for row in rows])


def padded(rows: Sequence[list[int]], fill: int, pad_to: int = 0) -> Tensor:
    """(B, N) of rows filled up on the right."""
    length = max(pad_to, *(len(row) for row in rows), 0)
    return torch.tensor([list(row) + [fill] * (length - len(row)) for row in rows])


class SpanCorruptionCollator:
    """T5's denoising: spans of the input are replaced by sentinels, and the target says what stood there.

    Of n tokens k = round(n · density) are taken, in round(k / mean_span) spans between as many kept pieces; lengths of both
    are random compositions, the first piece is kept. Source: pieces with `<extra_id_0>`, `<extra_id_1>`, … for the spans,
    and the end token. Target: each sentinel with its span, one more sentinel, the end token. Draws from PyTorch's global
    generator. Rows that have `labels` keep them. Raffel et al. 2020 (arXiv 1910.10683), §3.1.4 and §3.3.4.

    Args:
        density: share of the tokens to take, in (0, 1). mean_span: mean length of a span, ≥ 1.
        pad_to: pad sources to this length and targets to that of a row so long (compiled models); 0 = to the longest of
            the batch.

    Raises:
        ValueError: an impossible setting, a tokenizer without sentinels or end token, a row of fewer than 2 tokens, or of
            more than there are sentinels for.
    """

    def __init__(self, tokenizer: Any, density: float = 0.15, mean_span: float = 3.0, pad_to: int = 0):
        if not 0 < density < 1:
            raise ValueError(f"density={density!r} is not possible; it must lie between 0 and 1.")
        if mean_span < 1:
            raise ValueError(f"mean_span={mean_span!r} is not possible; it must be ≥ 1.")
        self.density, self.mean_span, self.pad_to = density, mean_span, pad_to
        self.pad, self.end = pad_token(tokenizer), tokenizer.eos_token_id
        self.sentinels = sentinels(tokenizer)
        if len(self.sentinels) < 2 or self.end is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has {len(self.sentinels)} sentinel tokens <extra_id_0>, … and end token "
                f"{self.end}; span corruption needs at least 2 sentinels and an end: use a T5 tokenizer, or add them."
            )

    def counts(self, n: int) -> tuple[int, int]:
        """(tokens to take, spans) of a row of n tokens."""
        if n < 2:
            raise ValueError(f"a row of {n} tokens can't be corrupted: one must be kept and one taken.")
        taken, spans = self._counts(n)
        if spans >= len(self.sentinels):
            most = next(i for i in range(n, 1, -1) if self._counts(i)[1] < len(self.sentinels))
            raise ValueError(
                f"a row of {n} tokens has {spans} spans of mean_span={self.mean_span}, which need {spans + 1} sentinels of "
                f"the {len(self.sentinels)} that there are: use a block_length of at most {most}, or a larger mean_span."
            )
        return taken, spans

    def _counts(self, n: int) -> tuple[int, int]:
        taken = min(max(round(n * self.density), 1), n - 1)
        return taken, max(1, min(round(taken / self.mean_span), n - taken))

    def choose(self, row: Row) -> Row:
        """The row with the source as `input_ids` and the target as `labels`; one that has labels as it is."""
        if "labels" in row:
            return row
        source, target = self.corrupt(row["input_ids"])
        return row | {"input_ids": source, "labels": target}

    def corrupt(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """(source, target) of one row of tokens, without special ones."""
        taken, spans = self.counts(len(ids))
        source: list[int] = []
        target: list[int] = []
        start = 0
        for sentinel, kept, span in zip(
            self.sentinels, _composition(len(ids) - taken, spans), _composition(taken, spans), strict=False
        ):
            source += [*ids[start : start + kept], sentinel]
            start += kept
            target += [sentinel, *ids[start : start + span]]
            start += span
        return [*source, self.end], [*target, self.sentinels[spans], self.end]

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        rows = [self.choose(row) for row in rows]
        sources = [row["input_ids"] for row in rows]
        # a full row's target is the longest there is: its spans with their sentinels, one more, and the end
        target_length = sum(self.counts(self.pad_to)) + 2 if self.pad_to else 0
        return {
            "input_ids": padded(sources, self.pad, self.pad_to),
            "attention_mask": padded([[1] * len(source) for source in sources], 0, self.pad_to),
            "labels": padded([row["labels"] for row in rows], IGNORED, target_length),
        }


def sentinels(tokenizer: Any) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>`, …, by name: vocabularies number them in either direction."""
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    while (name := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[name])
    return found


def _composition(total: int, parts: int) -> list[int]:
    """A random way to write `total` as a sum of `parts` positive integers."""
    cuts = (torch.randperm(total - 1)[: parts - 1] + 1).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
