"""Batches for pretraining: masked and packed rows, T5's span corruption, and randomness that a resumed run repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, TrainerCallback

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
Row = dict[str, Any]


class SeededCollator(TrainerCallback):
    """A collator whose random choices depend on seed, epoch and the rows of the batch alone.

    Loaders collate ahead of the step that is trained, so a checkpoint's random state is not that of the next batch, and a
    resumed run would mask other tokens. Here every batch gets a state of its own, taken from (seed, epoch, the rows'
    `index`), and the global one is left as it was: training resumes exactly, and is not disturbed by evaluation. It is its
    own callback, which tells it the epoch: `Trainer(data_collator=c, callbacks=[c])`.

    Args:
        collate: rows to batch; draws from PyTorch's global generator on the CPU.
    """

    def __init__(self, collate: Callable[[list[Row]], dict[str, Tensor]], seed: int):
        self.collate, self.seed, self.epoch = collate, seed, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int((state.epoch or 0) + 1e-6)

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            key = f"{self.seed} {self.epoch} {[row['index'] for row in rows]}"
            # torch.manual_seed would also seed the GPUs, whose dropout goes on
            torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))
            return self.collate(rows)


def fixed_rows(rows: Dataset, collate: Callable[[list[Row]], dict[str, Tensor]], seed: int) -> Dataset:
    """Rows with their random choices made once, each by its own number: what evaluation is repeated on.

    Returns:
        The rows with `input_ids` and `labels` as `collate` makes them of each row alone.
    """
    seeded = SeededCollator(collate, seed)

    def fix(row: Row) -> Row:
        batch = seeded([row])
        return {name: batch[name][0].tolist() for name in ("input_ids", "labels")}

    return rows.map(fix, desc="Fixing the evaluation rows")


def pad_token(tokenizer: Any) -> int:
    """What fills rows: the pad token, or where there is none (GPT-2) the end-of-text token, which no label sees."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


class LanguageModelCollator:
    """Batches of `token_blocks` for masked (`mlm_probability` > 0) or causal language modelling.

    Rows with `position_ids` are packed: they leave without attention mask, each document apart by its positions, padding
    as a document of its own. Rows that have `labels` keep them. Labels are -100 where nothing is predicted: padding, tokens
    that are not masked, and, causal, the first token of every document.

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

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        ids = padded([row["input_ids"] for row in rows], self.pad, self.pad_to)
        keep = padded([[1] * len(row["input_ids"]) for row in rows], 0, self.pad_to)
        batch = {"input_ids": ids, "attention_mask": keep}
        if "position_ids" in rows[0]:
            del batch["attention_mask"]
            batch["position_ids"] = _positions([row["position_ids"] for row in rows], ids.shape[1])
        if "labels" in rows[0]:
            batch["labels"] = padded([row["labels"] for row in rows], IGNORED, self.pad_to)
        elif self.masking is not None:
            special = padded([row["special_tokens_mask"] for row in rows], 1, self.pad_to)
            batch["input_ids"], batch["labels"] = self._masked(ids, special)
        else:
            labels = ids.masked_fill(keep == 0, IGNORED)
            if "position_ids" in batch:
                starts = batch["position_ids"].diff(dim=1, prepend=batch["position_ids"][:, :1] - 2) != 1
                labels = labels.masked_fill(starts, IGNORED)
            batch["labels"] = labels
        return batch

    def _masked(self, ids: Tensor, special: Tensor) -> tuple[Tensor, Tensor]:
        """(input, labels); of a batch so short that none was chosen, one token is, or its loss would be 0 / 0."""
        masked, labels = self.masking.torch_mask_tokens(ids.clone(), special_tokens_mask=special)
        if not (labels != IGNORED).any():
            text = (special == 0).nonzero()
            row, column = text[torch.randint(len(text), ())]
            labels[row, column] = ids[row, column]
            masked[row, column] = self.masking.tokenizer.mask_token_id
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
        ValueError: an impossible setting, a tokenizer without sentinels or end token, a row of fewer than 2 tokens.
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
        taken = min(max(round(n * self.density), 1), n - 1)
        return taken, max(1, min(round(taken / self.mean_span), taken, n - taken, len(self.sentinels) - 1))

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
        pairs = [
            (row["input_ids"], row["labels"]) if "labels" in row else self.corrupt(row["input_ids"]) for row in rows
        ]
        # a full row's target is the longest there is: its spans with their sentinels, one more, and the end
        target_length = sum(self.counts(self.pad_to)) + 2 if self.pad_to else 0
        return {
            "input_ids": padded([source for source, _ in pairs], self.pad, self.pad_to),
            "attention_mask": padded([[1] * len(source) for source, _ in pairs], 0, self.pad_to),
            "labels": padded([target for _, target in pairs], IGNORED, target_length),
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
