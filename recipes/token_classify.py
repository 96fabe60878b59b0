"""Finetune a checkpoint to label the words of long texts: names, terms, parts of speech.

    python recipes/token_classify.py --model google-bert/bert-base-cased --attention longformer --max-positions 2048 \\
        --output-dir out
    python recipes/token_classify.py --model converted-checkpoint --dataset annotated.jsonl --tokens-column words \\
        --tags-column entities --output-dir out

Rows hold a list of words and a list of as many tags, names or numbers. Without a dataset of yours it learns what Python's
language reference sets as code and in italics. A word's tag stands on its first sub-token, the others count for nothing;
rows longer than `--max-length` are cut into several, so that no word is lost. `--baseline` trains the unconverted model too.
Figures: entity-level F1 (seqeval) where tags are O, B-… and I-…, else macro F1 of words; and accuracy of words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, EvalPrediction, Trainer

from hf_efficient.corpus import text_use
from hf_efficient.training.data.offline_tasks import offline_task
from hf_efficient.training.data.texts import load_rows
from hf_efficient.training.finetuning import (
    FinetuningSettings,
    ensure_padding,
    first_rows,
    head_labels,
    input_length,
    label_options,
    require_filled,
    token_loss,
    with_baseline,
    with_label_ids,
)
from hf_efficient.training.loading import load_model
from hf_efficient.training.metrics import metric
from hf_efficient.training.recipe import run, start, train
from hf_efficient.training.results import RunRecord
from hf_efficient.training.settings import parse_settings

HEAD = "ForTokenClassification"


@dataclass(kw_only=True)
class Settings(FinetuningSettings):
    """Finetune a checkpoint to label the words of long texts."""

    tokens_column: str = "tokens"  # column of lists of words
    tags_column: str = "tags"  # column of lists of tags


def load_data(settings: Settings) -> tuple[Any, list[str]]:
    """Rows with `tokens` and `tags` (ids), and the names of the tags."""
    offline = settings.dataset == "offline"
    rows = load_rows(
        offline_task("token_classification", settings.seed) if offline else settings.dataset,
        {"tokens": settings.tokens_column, "tags": settings.tags_column},
        dataset_config=settings.dataset_config,
        seed=settings.seed,
    )
    require_filled(rows, "tokens", "tags")
    rows, names = with_label_ids(rows, "tags", listed=True, head=head_labels(settings.model, HEAD))
    rows = first_rows(rows, settings)
    for split in rows:
        for index, row in enumerate(rows[split]):
            if not isinstance(row["tokens"], list):
                raise ValueError(
                    f"row {index} of {split} has {row['tokens']!r:.60} in 'tokens': it must be a list of words."
                )
            if len(row["tokens"]) != len(row["tags"]):
                raise ValueError(
                    f"row {index} of {split} has {len(row['tokens'])} words, but {len(row['tags'])} tags: each word has one."
                )
    return rows, names


def encoder(tokenizer: Any, length: int) -> Callable[[dict[str, list]], dict[str, list]]:
    """Words to pieces of at most `length` tokens; the first token of each word has its tag, all others -100."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        # joined, so that every tokenizer sees words as it did in pretraining; a word is found by where it starts
        encoded = tokenizer(
            [" ".join(words) for words in batch["tokens"]],
            truncation=True,
            max_length=length,
            return_overflowing_tokens=True,
        )
        rows: list[int] = encoded.pop("overflow_to_sample_mapping")
        labels = []
        for piece, row in enumerate(rows):
            tags = [-100] * len(encoded["input_ids"][piece])
            start = 0
            for word, tag in zip(batch["tokens"][row], batch["tags"][row], strict=True):
                place = encoded.char_to_token(piece, start)
                if place is not None:
                    tags[place] = tag
                start += len(word) + 1
            labels.append(tags)
        return {**encoded, "labels": labels}

    return encode


def figures(predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
    """Of tags by name, row by row."""
    given, wanted = ([tag for row in rows for tag in row] for rows in (predictions, references))
    if not all(re.fullmatch("O|[BI]-.+", tag) for tag in {*given, *wanted}):
        return metric("accuracy")(*_ids(given, wanted)) | {"macro_f1": metric("f1")(*_ids(given, wanted))["f1"]}
    scores = metric("seqeval")(predictions, references)
    overall = {name.removeprefix("overall_"): scores.pop(name) for name in [*scores] if name.startswith("overall_")}
    return overall | {f"{kind}_f1": score["f1"] for kind, score in scores.items()}


def _ids(*rows: list[str]) -> list[list[int]]:
    names = sorted({name for row in rows for name in row})
    return [[names.index(name) for name in row] for row in rows]


def finetune(settings: Settings) -> RunRecord:
    record = start("token_classify", settings)
    rows, names = load_data(settings)
    options = label_options(names, settings.model, HEAD)
    # efficient attention: converted on the way, or as the checkpoint has it
    model, tokenizer = load_model(settings, AutoModelForTokenClassification, record=record, **options)
    ensure_padding(model, tokenizer)
    for split in rows:
        record.note_texts(split, text_use(tokenizer, map(" ".join, rows[split]["tokens"])))
    encode = encoder(tokenizer, input_length(model, tokenizer, settings.max_length))
    rows = rows.map(encode, batched=True, remove_columns=["tokens", "tags"], desc="Tokenising")

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        tags, labels = evaluated.predictions.argmax(-1), evaluated.label_ids
        real = labels != -100
        named = [
            [[names[tag] for tag in row[keep]] for row, keep in zip(array, real, strict=True)]
            for array in (tags, labels)
        ]
        return figures(*named) | token_loss(evaluated)

    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    # a fresh head knows nothing: there is nothing to evaluate before training
    train(trainer, settings, record, before=False)
    return record


def main(arguments: list[str] | None = None) -> None:
    with_baseline(finetune, parse_settings(Settings, arguments))


if __name__ == "__main__":
    run(main)
