"""Continue pretraining T5 by span corruption, converted to efficient attention or not.

    python recipes/span_corruption.py --model google-t5/t5-small --attention longformer --max-positions 1984 --output-dir t5
    python recipes/span_corruption.py --model t5/model --dataset corpus.jsonl --bf16 --save-steps 500 --output-dir t5-2
    python recipes/span_corruption.py --model scratch:t5 --block-length 512 --max-steps 1000 --output-dir small-t5
    python recipes/span_corruption.py --config t5.yaml --resume

Spans of a row are replaced by sentinels, the decoder writes what stood there; rows never mix documents, and the spans of the
evaluation rows are chosen once. Every span needs a sentinel of its own: T5's 100 are enough for the length of the first
command, longer rows need a larger --mean-span. T5 has no position_ids, so rows can't be packed. `output_dir` gets model/
(for the Auto classes), result.json, loss.png, layers.png and complete checkpoints; an interrupted run goes on exactly where
it was with the same command and --resume.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoModelForSeq2SeqLM, Trainer

from hf_efficient.training.data.collators import SeededCollator, SpanCorruptionCollator, fixed_rows
from hf_efficient.training.data.texts import token_blocks
from hf_efficient.training.pretraining import (
    PretrainingSettings,
    TokenScores,
    block_length,
    load_or_start,
    target_size,
)
from hf_efficient.training.recipe import run, start, train
from hf_efficient.training.settings import parse_settings


@dataclass(kw_only=True)
class Settings(PretrainingSettings):
    """Continue pretraining T5 by span corruption."""

    drop_short: bool = False  # leave out rows that are not full
    density: float = 0.15  # share of tokens to take away
    mean_span: float = 3.0  # mean length of a span
    learning_rate: float = 1e-4


def main(arguments: list[str] | None = None) -> None:
    settings = parse_settings(Settings, arguments)
    record = start("span_corruption", settings)
    texts = settings.texts()
    model, tokenizer = load_or_start(settings, AutoModelForSeq2SeqLM, "t5", texts["train"], record)

    length = block_length(settings, model, tokenizer)
    collate = SpanCorruptionCollator(
        tokenizer,
        settings.density,
        settings.mean_span,
        pad_to=length if settings.torch_compile else 0,  # compiled models want one shape
    )
    collate.counts(length)  # refuses now what would be refused at the first full row
    blocks = {
        split: token_blocks(
            texts[split],
            tokenizer,
            length,
            drop_short=settings.drop_short,
            special_tokens="none",
        )
        for split in ("train", "validation")
    }
    for split, made in blocks.items():
        record.note_texts(split, made.use)
    rows = {split: made.rows for split, made in blocks.items()}
    evaluation = fixed_rows(rows["validation"], collate, settings.seed)
    scores = TokenScores(False, *target_size(evaluation, tokenizer.decode))
    trainer = Trainer(
        model,
        settings,
        data_collator=SeededCollator(collate, settings.seed),
        train_dataset=rows["train"],
        eval_dataset=evaluation,
        processing_class=tokenizer,
        compute_metrics=scores,
        preprocess_logits_for_metrics=scores.losses,
    )
    train(trainer, settings, record)


if __name__ == "__main__":
    run(main)
