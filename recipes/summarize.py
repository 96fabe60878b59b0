"""Finetune a T5 checkpoint to summarise long texts.

    python recipes/summarize.py --model google-t5/t5-small --attention longformer --max_length 2048 --output_dir out
    python recipes/summarize.py --model converted-checkpoint --dataset papers.parquet --document_column article \\
        --summary_column abstract --max_length 4096 --output_dir out

Without a dataset of yours it learns to say what a definition of Python's standard library does, as its docstring begins.
`--baseline` trains the unconverted model too. Figures: ROUGE of generated summaries, beside that of the document's first
words, as many as a summary has; before and after training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_efficient.training.data.offline_tasks import offline_task
from hf_efficient.training.data.texts import load_rows
from hf_efficient.training.finetuning import input_length, require_filled, token_loss, with_baseline
from hf_efficient.training.loading import load_model
from hf_efficient.training.metrics import metric
from hf_efficient.training.recipe import run, start, train, training_arguments
from hf_efficient.training.results import RESULT_NAME, RunRecord
from hf_efficient.training.settings import parse_settings


@dataclass
class Settings:
    """Finetune a T5 checkpoint to summarise long texts."""

    model: str  # Hub id or folder of a T5 checkpoint: original, or converted
    output_dir: str  # an empty or new folder, unless --resume
    attention: str = ""  # mechanism to convert to on the way, or its JSON; none = revert a converted checkpoint
    max_positions: int = 0  # longest input that the tokenizer of the converted model is told of; 0 = as is
    dataset: str = "offline"  # offline, files (.jsonl .json .csv .parquet), a folder, or a Hub id
    dataset_config: str = ""  # configuration of a Hub dataset
    document_column: str = "document"  # column of texts
    summary_column: str = "summary"  # column of summaries
    prefix: str = "summarize: "  # stands before every text
    max_length: int = 0  # tokens read of each text; 0 = as many as the tokenizer says
    max_summary_length: int = 64  # tokens of the longest summary
    beams: int = 1  # beams of the search for a summary
    max_train_rows: int = 0  # train on the first so many rows; 0 = all
    max_eval_rows: int = 0  # evaluate on the first so many rows; 0 = all
    max_steps: int = 0  # optimiser steps; 0 = by epochs
    epochs: float = 3.0  # passes over the training rows
    batch_size: int = 8  # training rows per device and step
    eval_batch_size: int = 8  # rows per device in evaluation
    accumulation_steps: int = 1  # batches per optimiser step
    learning_rate: float = 3e-4  # peak learning rate
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
    lora_rank: int = 0  # > 0 = train adapters of this rank and the mechanism alone
    baseline: bool = False  # also train the unconverted model, for comparison
    resume: bool = False  # go on from the last complete checkpoint
    report_to: str = "none"  # tracker, e.g. tensorboard
    cpu: bool = False  # even if there is a GPU


def load_data(settings: Settings) -> Any:
    """Rows with `document` and `summary`."""
    offline = settings.dataset == "offline"
    rows = load_rows(
        offline_task("summarisation", settings.seed) if offline else settings.dataset,
        {"document": settings.document_column, "summary": settings.summary_column},
        dataset_config=settings.dataset_config,
        seed=settings.seed,
        max_train_rows=settings.max_train_rows,
        max_eval_rows=settings.max_eval_rows,
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
        summaries = tokenizer(text_target=batch["summary"], truncation=True, max_length=settings.max_summary_length)
        return {**tokenizer(documents, truncation=True, max_length=length), "labels": summaries["input_ids"]}

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

    arguments = training_arguments(
        settings,
        Seq2SeqTrainingArguments,
        predict_with_generate=True,
        include_for_metrics=["loss"],
        generation_max_length=settings.max_summary_length,
        generation_num_beams=settings.beams,
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
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
