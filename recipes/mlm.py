"""Continue pretraining an encoder (BERT, RoBERTa) by masked language modelling, converted to efficient attention or not.

    python recipes/mlm.py --model google-bert/bert-base-uncased --attention longformer --max_positions 4096 --output_dir mlm
    python recipes/mlm.py --model mlm/model --dataset corpus.jsonl --pack --bf16 --save_steps 500 --output_dir mlm-2
    python recipes/mlm.py --model scratch:bert --block_length 512 --max_steps 1000 --output_dir small-bert
    python recipes/mlm.py --config mlm.yaml --resume

Rows never mix documents; with --pack short ones share a row and stay apart in attention. Evaluation masks are chosen once.
`output_dir` gets model/ (for the Auto classes), result.json, loss.png, layers.png and complete checkpoints; an interrupted
run goes on exactly where it was with the same command and --resume.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoModelForMaskedLM, Trainer

from hf_efficient.training.data.collators import LanguageModelCollator, SeededCollator, fixed_rows
from hf_efficient.training.data.texts import load_texts, token_blocks
from hf_efficient.training.pretraining import (
    TokenScores,
    block_length,
    first_position,
    load_or_start,
    refuse_packing,
    text_size,
)
from hf_efficient.training.recipe import run, start, train, training_arguments
from hf_efficient.training.settings import parse_settings


@dataclass
class Settings:
    """Continue pretraining an encoder by masked language modelling."""

    # ---- what is trained ----
    model: str  # Hub id, checkpoint folder, or scratch:bert
    output_dir: str  # where everything goes
    attention: str = ""  # mechanism to convert to, or its JSON with options; none = back to full attention
    max_positions: int = 0  # longest input after the conversion; 0 = as is
    lora_rank: int = 0  # train low-rank adapters of this rank, and the mechanisms, alone; 0 = train everything
    # ---- on what ----
    dataset: str = "offline"  # offline, a Hub id, or files (.jsonl, .json, .csv, .parquet, .txt)
    dataset_config: str = ""  # configuration of a Hub dataset
    text_column: str = "text"  # column that the text stands in
    max_train_rows: int = 0  # use so many documents; 0 = all
    max_eval_rows: int = 0  # evaluate on so many documents; 0 = all
    block_length: int = 0  # tokens of a row; 0 = all positions of the model
    pack: bool = False  # let short documents share a row, without seeing each other
    drop_short: bool = False  # leave out rows that are not full
    mlm_probability: float = 0.15  # share of tokens to predict
    # ---- how ----
    epochs: float = 1.0  # passes over the data
    max_steps: int = 0  # optimiser steps; 0 = by epochs
    batch_size: int = 8  # rows per step and device
    eval_batch_size: int = 8  # rows per evaluation step and device
    accumulation_steps: int = 1  # batches per optimiser step
    learning_rate: float = 5e-5  # highest learning rate
    warmup_steps: float = 0.0  # steps of linear warm-up; below 1 a share of all
    schedule: str = "linear"  # what the learning rate does after the warm-up
    weight_decay: float = 0.0  # of AdamW
    seed: int = 0  # of masks, order, dropout and new parameters
    bf16: bool = False  # mixed precision
    compile: bool = False  # torch.compile
    gradient_checkpointing: bool = False  # less memory, more time
    cpu: bool = False  # even where there is a GPU
    # ---- what is kept and shown ----
    resume: bool = False  # go on from the last complete checkpoint
    eval_steps: int = 0  # evaluate every so many steps; 0 = before and after
    save_steps: int = 0  # checkpoint every so many steps; 0 = at the end
    logging_steps: int = 10  # log every so many steps
    report_to: str = "none"  # tensorboard, trackio
    # ---- from scratch only ----
    hidden_size: int = 256  # width
    layers: int = 4  # number of layers
    heads: int = 4  # attention heads
    vocabulary_size: int = 8000  # entries of the new tokenizer


def main(arguments: list[str] | None = None) -> None:
    settings = parse_settings(Settings, arguments)
    if not 0 < settings.mlm_probability <= 1:
        raise ValueError(f"mlm_probability={settings.mlm_probability} is not possible; it must be > 0 and ≤ 1.")
    record = start("mlm", settings)
    args = training_arguments(settings)
    texts = load_texts(
        settings.dataset,
        dataset_config=settings.dataset_config,
        text_column=settings.text_column,
        seed=settings.seed,
        max_train_rows=settings.max_train_rows,
        max_eval_rows=settings.max_eval_rows,
    )
    model, tokenizer = load_or_start(settings, AutoModelForMaskedLM, "bert", texts["train"], args, record)
    refuse_packing(settings, model)

    length = block_length(settings, model, tokenizer)
    rows = {
        split: token_blocks(
            texts[split],
            tokenizer,
            length,
            pack=settings.pack,
            drop_short=settings.drop_short,
            first_position=first_position(model),
        )
        for split in ("train", "validation")
    }
    # compiled models want one shape
    collate = LanguageModelCollator(tokenizer, settings.mlm_probability, pad_to=length if settings.compile else 0)
    scores = TokenScores(False, *text_size(rows["validation"]))
    trainer = Trainer(
        model,
        args,
        data_collator=SeededCollator(collate, settings.seed),
        train_dataset=rows["train"],
        eval_dataset=fixed_rows(rows["validation"], collate, settings.seed),
        processing_class=tokenizer,
        compute_metrics=scores,
        preprocess_logits_for_metrics=scores.losses,
    )
    train(trainer, settings, record)


if __name__ == "__main__":
    run(main)
