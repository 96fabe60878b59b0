"""Finetune a checkpoint to classify long texts, or pictures.

    python recipes/classify.py --model sentence-transformers/all-MiniLM-L6-v2 --max-positions 1024 --output-dir out \\
        --attention '{"mechanism": "longformer", "attention_window": 128, "global_tokens": "first"}'
    python recipes/classify.py --model converted-checkpoint --dataset reviews.csv --label-column stars --output-dir out

Without a dataset of yours it learns which package of Python's standard library a piece of source code comes from, or which
shape is drawn in a picture, where the checkpoint reads pictures (`--model google/vit-base-patch16-224-in21k --attention
axial`). Labels
may be names, numbers or a ClassLabel; their names go into the checkpoint. `--baseline` trains the unconverted model too.
Figures: accuracy and macro F1, beside those of always guessing the most frequent class.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
    EvalPrediction,
    Trainer,
)

from hf_efficient.corpus import text_use
from hf_efficient.models.loading import read_config
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


class Inputs(NamedTuple):
    """What is classified: how it is called in rows, the offline task, and the models that do it."""

    column: str
    task: str
    head: str
    models: Any


TEXTS = Inputs("text", "classification", "ForSequenceClassification", AutoModelForSequenceClassification)
PICTURES = Inputs("image", "pictures", "ForImageClassification", AutoModelForImageClassification)


@dataclass(kw_only=True)
class Settings(FinetuningSettings):
    """Finetune a checkpoint to classify long texts, or pictures."""

    text_column: str = "text"  # column of texts
    image_column: str = "image"  # column of pictures
    label_column: str = "label"  # column of labels


def inputs_of(settings: Settings) -> Inputs:
    """What the checkpoint reads.

    Raises:
        ValueError: a number of tokens, of pictures.
    """
    if type(read_config(settings.model)) not in PICTURES.models._model_mapping:
        return TEXTS
    if settings.max_length:
        raise ValueError(
            f"max_length={settings.max_length} cuts texts, and {settings.model} reads pictures: leave it out."
        )
    return PICTURES


def load_data(settings: Settings, inputs: Inputs) -> tuple[Any, list[str]]:
    """Rows with `text` or `image` and `label` (an id), and the names of the labels."""
    offline = settings.dataset == "offline"
    rows = load_rows(
        offline_task(inputs.task, settings.seed) if offline else settings.dataset,
        {inputs.column: getattr(settings, f"{inputs.column}_column"), "label": settings.label_column},
        dataset_config=settings.dataset_config,
        seed=settings.seed,
    )
    rows, names = with_label_ids(rows, "label", listed=False, head=head_labels(settings.model, inputs.head))
    rows = first_rows(rows, settings)
    require_filled(rows, inputs.column)
    return rows, names


def encoded_texts(rows: Any, model: Any, tokenizer: Any, settings: Settings, record: RunRecord) -> tuple[Any, Any]:
    """Rows of ids, and what makes batches of them."""
    ensure_padding(model, tokenizer)
    length = input_length(model, tokenizer, settings.max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        return {**tokenizer(batch["text"], truncation=True, max_length=length), "labels": batch["label"]}

    for split in rows:
        record.note_texts(split, text_use(tokenizer, rows[split]["text"], length))
    rows = rows.map(encode, batched=True, remove_columns=["text", "label"], desc="Tokenising")
    return rows, DataCollatorWithPadding(tokenizer)


def encoded_pictures(rows: Any, model: Any, processor: Any, settings: Settings, record: RunRecord) -> tuple[Any, Any]:
    """Rows that become pixels when they are read, and what makes batches of them."""

    def encode(batch: dict[str, list]) -> dict[str, Any]:
        pictures = [picture.convert("RGB" if model.config.num_channels == 3 else "L") for picture in batch["image"]]
        return {**processor(pictures, return_tensors="pt"), "labels": batch["label"]}

    return rows.with_transform(encode), DefaultDataCollator()


def figures(predictions: Any, labels: Any) -> dict[str, float]:
    return metric("accuracy")(predictions, labels) | {
        "macro_f1": metric("f1")(predictions, labels, average="macro")["f1"]
    }


def finetune(settings: Settings) -> RunRecord:
    record = start("classify", settings)
    inputs = inputs_of(settings)
    rows, names = load_data(settings, inputs)
    options = label_options(names, settings.model, inputs.head)
    # efficient attention: converted on the way, or as the checkpoint has it
    model, processing = load_model(settings, inputs.models, record=record, **options)
    most_frequent = Counter(rows["train"]["label"]).most_common(1)[0][0]
    labels = list(rows["validation"]["label"])
    record.add("majority", figures([most_frequent] * len(labels), labels))
    rows, collator = (encoded_texts if inputs is TEXTS else encoded_pictures)(
        rows, model, processing, settings, record
    )

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        logits = evaluated.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits  # T5 gives more than logits
        return figures(logits.argmax(-1), evaluated.label_ids) | token_loss(evaluated)

    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=collator,
        processing_class=processing,
        compute_metrics=compute_metrics,
    )
    # a fresh head knows nothing: there is nothing to evaluate before training
    train(trainer, settings, record, before=False)
    return record


def main(arguments: list[str] | None = None) -> None:
    with_baseline(finetune, parse_settings(Settings, arguments))


if __name__ == "__main__":
    run(main)
