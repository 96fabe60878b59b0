"""Finetune a checkpoint to classify long texts.

    python recipes/classify.py --model sentence-transformers/all-MiniLM-L6-v2 --max_positions 1024 --output_dir out \\
        --attention '{"mechanism": "longformer", "attention_window": 128, "global_tokens": "first"}'
    python recipes/classify.py --model converted-checkpoint --dataset reviews.csv --label_column stars --output_dir out

Without a dataset of yours it learns which package of Python's standard library a piece of source code comes from. Labels
may be names, numbers or a ClassLabel; their names go into the checkpoint. `--baseline` trains the unconverted model too.
Figures: accuracy and macro F1, beside those of always guessing the most frequent class.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction, Trainer

from hf_efficient.training.data.offline_tasks import offline_task
from hf_efficient.training.data.texts import load_rows
from hf_efficient.training.finetuning import (
    ensure_padding,
    first_rows,
    input_length,
    label_options,
    require_filled,
    token_loss,
    with_baseline,
    with_label_ids,
)
from hf_efficient.training.loading import load_model
from hf_efficient.training.metrics import metric
from hf_efficient.training.recipe import run, start, train, training_arguments
from hf_efficient.training.results import RunRecord
from hf_efficient.training.settings import parse_settings


@dataclass
class Settings:
    """Finetune a checkpoint to classify long texts."""

    model: str  # Hub id or folder: original, or converted
    output_dir: str  # an empty or new folder, unless --resume
    attention: str = ""  # mechanism to convert to on the way, or its JSON; none = revert a converted checkpoint
    max_positions: int = 0  # lengthen the converted model to so many positions; 0 = as is
    dataset: str = "offline"  # offline, files (.jsonl .json .csv .parquet), a folder, or a Hub id
    dataset_config: str = ""  # configuration of a Hub dataset
    text_column: str = "text"  # column of texts
    label_column: str = "label"  # column of labels
    max_length: int = 0  # tokens read of each text; 0 = all that the model can read
    max_train_rows: int = 0  # train on the first so many rows; 0 = all
    max_eval_rows: int = 0  # evaluate on the first so many rows; 0 = all
    max_steps: int = 0  # optimiser steps; 0 = by epochs
    epochs: float = 3.0  # passes over the training rows
    batch_size: int = 8  # training rows per device and step
    eval_batch_size: int = 8  # rows per device in evaluation
    accumulation_steps: int = 1  # batches per optimiser step
    learning_rate: float = 5e-5  # peak learning rate
    warmup_steps: float = 0.1  # steps of warm-up; below 1 = share of all
    schedule: str = "linear"  # learning-rate schedule
    weight_decay: float = 0.01  # of AdamW
    seed: int = 0  # of everything random
    eval_steps: int = 0  # evaluate every so many steps; 0 = at the end only
    save_steps: int = 0  # checkpoint every so many steps; 0 = at the end only
    logging_steps: int = 10  # log every so many steps
    bf16: bool = False  # mixed precision
    compile: bool = False  # torch.compile
    gradient_checkpointing: bool = False  # trade time for memory
    lora_rank: int = 0  # > 0 = train adapters of this rank, the mechanism and the head alone
    baseline: bool = False  # also train the unconverted model, for comparison
    resume: bool = False  # go on from the last complete checkpoint
    report_to: str = "none"  # tracker, e.g. tensorboard
    cpu: bool = False  # even if there is a GPU


def load_data(settings: Settings) -> tuple[Any, list[str]]:
    """Rows with `text` and `label` (an id), and the names of the labels."""
    offline = settings.dataset == "offline"
    rows = load_rows(
        offline_task("classification", settings.seed) if offline else settings.dataset,
        {"text": settings.text_column, "label": settings.label_column},
        dataset_config=settings.dataset_config,
        seed=settings.seed,
    )
    rows, names = with_label_ids(rows, "label", listed=False)
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
    options = label_options(names, settings.model, "ForSequenceClassification")
    # efficient attention: converted on the way, or as the checkpoint has it
    model, tokenizer = load_model(settings, AutoModelForSequenceClassification, record=record, **options)
    ensure_padding(model, tokenizer)
    length = input_length(model, tokenizer, settings.max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        return {**tokenizer(batch["text"], truncation=True, max_length=length), "labels": batch["label"]}

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
        args=training_arguments(settings, include_for_metrics=["loss"]),
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
