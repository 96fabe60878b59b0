"""Finetune a T5 checkpoint to summarise long texts.

    python recipes/summarize.py --model google-t5/t5-small --attention longformer --max-length 2048 --output-dir out
    python recipes/summarize.py --model converted-checkpoint --dataset papers.parquet --document-column article \\
        --summary-column abstract --max-length 4096 --output-dir out

Without a dataset of yours it learns to say what a definition of Python's standard library does, as its docstring begins.
`--baseline` trains the unconverted model too. Figures: ROUGE of generated summaries, beside that of the document's first
words, as many as a summary has; before and after training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_efficient.corpus import text_use
from hf_efficient.training.data.offline_tasks import offline_task
from hf_efficient.training.data.texts import load_rows
from hf_efficient.training.finetuning import (
    FinetuningSettings,
    input_length,
    require_filled,
    token_loss,
    with_baseline,
)
from hf_efficient.training.loading import load_model
from hf_efficient.training.metrics import metric
from hf_efficient.training.recipe import run, start, train
from hf_efficient.training.results import RESULT_NAME, RunRecord
from hf_efficient.training.settings import parse_settings


@dataclass(kw_only=True)
class Settings(FinetuningSettings, Seq2SeqTrainingArguments):
    """Finetune a T5 checkpoint to summarise long texts."""

    REFUSED: ClassVar = FinetuningSettings.REFUSED | {
        "predict_with_generate": "figures are those of generated summaries"
    }

    document_column: str = "document"  # column of texts
    summary_column: str = "summary"  # column of summaries
    prefix: str = "summarize: "  # stands before every text
    generation_max_length: int = 64  # tokens of the longest summary, in training too
    generation_num_beams: int = 1
    predict_with_generate: bool = True
    learning_rate: float = 3e-4


def load_data(settings: Settings) -> Any:
    """Rows with `document` and `summary`."""
    offline = settings.dataset == "offline"
    rows = load_rows(
        offline_task("summarisation", settings.seed) if offline else settings.dataset,
        {"document": settings.document_column, "summary": settings.summary_column},
        **settings.data_options(),
    )
    require_filled(rows, "document", "summary")
    return rows


def lead(rows: Any) -> list[str]:
    """The control: the first words of every document that is evaluated, as many as summaries have in training."""
    words = round(np.mean([len(text.split()) for text in rows["train"]["summary"]]))
    return [" ".join(text.split()[:words]) for text in rows["validation"]["document"]]


def finetune(settings: Settings) -> RunRecord:
    record = start("summarize", settings)
    rows = load_data(settings)
    # efficient attention: converted on the way, or as the checkpoint has it
    model, tokenizer = load_model(settings, AutoModelForSeq2SeqLM, record=record)
    length = input_length(model, tokenizer, settings.max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        documents = [settings.prefix + text for text in batch["document"]]
        summaries = tokenizer(text_target=batch["summary"], truncation=True, max_length=settings.generation_max_length)
        return {**tokenizer(documents, truncation=True, max_length=length), "labels": summaries["input_ids"]}

    for split in rows:
        record.note_texts(f"{split} documents", text_use(tokenizer, rows[split]["document"], length))
        used = text_use(tokenizer, rows[split]["summary"], settings.generation_max_length)
        record.note_texts(f"{split} summaries", used)
    summaries = list(rows["validation"]["summary"])
    control = metric("rouge")(lead(rows), summaries)
    rows = rows.map(encode, batched=True, remove_columns=["document", "summary"], desc="Tokenising")

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        # rows are padded with -100 where processes or batches differ in length
        tokens = np.where(evaluated.predictions >= 0, evaluated.predictions, tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        words = float(np.mean([len(text.split()) for text in texts]))
        loss = token_loss(evaluated, tokenizer.pad_token_id)
        return metric("rouge")(texts, summaries) | {"generated_words": words} | loss

    trainer = Seq2SeqTrainer(
        model=model,
        args=settings,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    train(trainer, settings, record)
    record.add("lead", control)
    if trainer.is_world_process_zero():
        record.write(Path(settings.output_dir) / RESULT_NAME)
    return record


def main(arguments: list[str] | None = None) -> None:
    with_baseline(finetune, parse_settings(Settings, arguments))


if __name__ == "__main__":
    run(main)
