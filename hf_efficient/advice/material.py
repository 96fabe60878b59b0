"""The texts that advice is measured on: rows of one text each, which fill the length where they can."""

from __future__ import annotations

import hashlib
import logging
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efficient.corpus import offline_texts, text_batches
from hf_efficient.evaluation.heads import is_multiple_choice
from hf_efficient.families import HostModel

logger = logging.getLogger(f"transformers.{__name__}")
TEXTS = 16
FEWEST = 4
CHOICES = 4
Batch = dict[str, Tensor]


def rows_of(
    host: HostModel, tokenizer: Any, texts: Any, length: int, seed: int, ignored: Sequence[int]
) -> list[Batch]:
    """Batches of one row each: at most 16 texts, tokenised and cut at `length`; in an order that the seed alone decides.

    Args:
        texts: texts, batches of inputs, or `None`: the corpus, or what a causal language model without a tokenizer writes.

    Raises:
        ValueError: nothing to read, fewer than two texts, or neither texts nor batches.
    """
    size = CHOICES if is_multiple_choice(host.model) else 1
    rows = [
        row for batch in _batches(host, tokenizer, texts, length, size, seed, ignored) for row in _single(batch, size)
    ]
    if len(rows) < 2:
        raise ValueError(
            f"{len(rows)} text is too little: one is to choose by, and another to confirm by; give more texts=."
        )
    if any(not row["input_ids"].numel() for row in rows):
        raise ValueError("one of the texts has no tokens: leave it out.")
    random.Random(seed).shuffle(rows)
    rows = rows[:TEXTS]
    _warn_of_short(rows, length)
    return rows


def _batches(
    host: HostModel, tokenizer: Any, texts: Any, length: int, size: int, seed: int, ignored: Sequence[int]
) -> list[Batch]:
    name = type(host.model).__name__
    if texts is None and tokenizer is None:
        if not _writes(host):
            raise ValueError(
                f"{name} has no tokenizer: give texts= as batches such as {{'input_ids': …}}, or tokenizer=."
            )
        return own_samples(host.model, length, seed, ignored)
    if texts is None:
        return text_batches(tokenizer, _that_fill(offline_texts(), tokenizer, length), length, size, host.model)
    given: list[Any] = [texts] if isinstance(texts, (str, Mapping)) else list(texts)
    if given and all(isinstance(one, Mapping) for one in given):
        return [_checked(dict(one), length) for one in given]
    if not given or not all(isinstance(one, str) for one in given):
        raise ValueError("texts= is a list of texts, or of batches such as {'input_ids': …, 'attention_mask': …}.")
    if tokenizer is None:
        raise ValueError(
            f"{name} has no tokenizer for these texts: give tokenizer=, or batches of input_ids as texts=."
        )
    return text_batches(tokenizer, given, length, size, host.model)


def _checked(batch: Batch, length: int) -> Batch:
    if not isinstance(batch.get("input_ids"), Tensor):
        raise ValueError(
            f"a batch with {', '.join(batch) or 'nothing'} has no tensor input_ids, which advice is measured on."
        )
    if batch["input_ids"].dim() != 2 or batch["input_ids"].shape[1] > length:
        raise ValueError(
            f"input_ids of shape {tuple(batch['input_ids'].shape)} are not (rows, tokens) of at most length={length} tokens."
        )
    count = len(batch["input_ids"])
    odd = [
        name
        for name, value in batch.items()
        if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != count
    ]
    if odd:
        raise ValueError(f"{', '.join(odd)} of a batch must be tensors of {count} rows, as input_ids: leave them out.")
    return {name: value.cpu() for name, value in batch.items() if name != "labels"}


def _single(batch: Batch, size: int) -> list[Batch]:
    count = len(batch["input_ids"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, count, size)]


def _that_fill(documents: Sequence[str], tokenizer: Any, length: int) -> list[str]:
    """Documents of at least so many tokens; shorter ones are joined until they are."""
    full, pieces, tokens = list[str](), list[str](), 0
    for text in documents:
        count = len(tokenizer(text, verbose=False)["input_ids"])
        if count >= length:
            full.append(text)
            continue
        pieces, tokens = [*pieces, text], tokens + count
        # special tokens were counted with every piece
        if tokens >= length + 2 * len(pieces):
            full.append("\n\n".join(pieces))
            pieces, tokens = [], 0
    return full or list(documents)


def _writes(host: HostModel) -> bool:
    is_decoder = [stack.side for stack in host.stacks] == ["decoder"]
    return bool(is_decoder and host.model.can_generate() and not host.model.config.is_encoder_decoder)


@torch.no_grad()
def own_samples(model: Any, length: int, seed: int, ignored: Sequence[int]) -> list[Batch]:
    """What a causal language model writes by itself: up to 8 rows, back to back where it has fewer positions."""
    start = next((i for i in (model.config.bos_token_id, model.config.eos_token_id) if isinstance(i, int)), 0)
    known = HostModel.of(model).made_for["decoder"] or length
    part = min(length, known)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = model.generate(
            torch.full((8, 1), start, device=model.device),
            attention_mask=torch.ones(8, 1, dtype=torch.long, device=model.device),
            do_sample=True,
            top_k=0,
            min_length=part,
            max_length=part,
            pad_token_id=0,
            eos_token_id=None,
            suppress_tokens=list(ignored) or None,
        ).cpu()
    rows = [torch.cat([written[(i + j) % 8] for j in range(-(-length // part))])[:length] for i in range(8)]
    return [{"input_ids": row[None]} for row in rows]


def longest(rows: Sequence[Batch]) -> int:
    """Tokens of the longest row."""
    return max(row["input_ids"].shape[1] for row in rows)


def digest(rows: Sequence[Batch]) -> str:
    """SHA-256 of all rows."""
    found = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            found.update(f"{name}{tuple(row[name].shape)}".encode() + row[name].cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _warn_of_short(rows: Sequence[Batch], length: int) -> None:
    sizes = [row["input_ids"].shape[1] for row in rows]
    full = sum(size == length for size in sizes)
    if full < FEWEST:
        logger.warning(
            f"{full} of {len(rows)} texts fill {length} tokens (their median is {statistics.median(sizes):.0f}): what is "
            "found holds for texts like these; give longer or more texts for longer ones."
        )
