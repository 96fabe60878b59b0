"""Finetune a checkpoint to classify long texts.

    python recipes/classify.py --model sentence-transformers/all-MiniLM-L6-v2 --max-positions 1024 --output-dir out \\
        --attention '{"mechanism": "longformer", "attention_window": 128, "global_tokens": "first"}'
    python recipes/classify.py --model converted-checkpoint --dataset reviews.csv --label-column stars --output-dir out

Without a dataset of yours it learns which package of Python's standard library a piece of source code comes from. Labels
may be names, numbers or a ClassLabel; their names go into the checkpoint. `--baseline` trains the unconverted model too.
Figures: accuracy and macro F1, beside those of always guessing the most frequent class.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction, Trainer

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

HEAD = "ForSequenceClassification"


@dataclass(kw_only=True)
class Settings(FinetuningSettings):
    """Finetune a checkpoint to classify long texts."""

    text_column: str = "text"  # column of texts
    label_column: str = "label"  # column of labels


def load_data(settings: Settings) -> tuple[Any, list[str]]:
    """Rows with `text` and `label` (an id), and the names of the labels."""
    offline = settings.dataset == "offline"
    rows = load_rows(
        offline_task("classification", settings.seed) if offline else settings.dataset,
        {"text": settings.text_column, "label": settings.label_column},
        dataset_config=settings.dataset_config,
        seed=settings.seed,
    )
    rows, names = with_label_ids(rows, "label", listed=False, head=head_labels(settings.model, HEAD))
    rows = first_rows(rows, settings)
    require_filled(rows, "text")
    return rows, names


def figures(predictions: Any, labels: Any) -> dict[str, float]:
    return metric("accuracy")(predictions, labels) | {
        "macro_f1": metric("f1")(predictions, labels, average="macro")["f1"]
    }


def finetune(settings: Settings) -> RunRecord:
    record = start("classify", settings)
    rows, names = load_data(settings)
    options = label_options(names, settings.model, HEAD)
    # efficient attention: converted on the way, or as the checkpoint has it
    model, tokenizer = load_model(settings, AutoModelForSequenceClassification, record=record, **options)
    ensure_padding(model, tokenizer)
    length = input_length(model, tokenizer, settings.max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        return {**tokenizer(batch["text"], truncation=True, max_length=length), "labels": batch["label"]}

    for split in rows:
        record.note_texts(split, text_use(tokenizer, rows[split]["text"], length))
    most_frequent = Counter(rows["train"]["label"]).most_common(1)[0][0]
    labels = list(rows["validation"]["label"])
    record.add("majority", figures([most_frequent] * len(labels), labels))
    rows = rows.map(encode, batched=True, remove_columns=["text", "label"], desc="Tokenising")

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        logits = evaluated.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits  # T5 gives more than logits
        return figures(logits.argmax(-1), evaluated.label_ids) | token_loss(evaluated)

    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
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
