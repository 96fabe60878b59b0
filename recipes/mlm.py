"""Continue pretraining an encoder (BERT, RoBERTa) by masked language modelling, converted to efficient attention or not.

    python recipes/mlm.py --model google-bert/bert-base-uncased --attention longformer --max-positions 4096 --output-dir mlm
    python recipes/mlm.py --model mlm/model --dataset corpus.jsonl --pack --bf16 --save-steps 500 --output-dir mlm-2
    python recipes/mlm.py --model scratch:bert --block-length 512 --max-steps 1000 --output-dir small-bert
    python recipes/mlm.py --config mlm.yaml --resume

Rows never mix documents; with --pack short ones share a row and stay apart in attention. Evaluation masks are chosen once.
`output_dir` gets model/ (for the Auto classes), result.json, loss.png, layers.png and complete checkpoints; an interrupted
run goes on exactly where it was with the same command and --resume.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoModelForMaskedLM, Trainer

from hf_efficient.training.data.collators import LanguageModelCollator, SeededCollator, fixed_rows
from hf_efficient.training.data.texts import token_blocks
from hf_efficient.training.pretraining import (
    PretrainingSettings,
    TokenScores,
    block_length,
    first_position,
    load_or_start,
    refuse_packing,
    text_size,
)
from hf_efficient.training.recipe import run, start, train
from hf_efficient.training.settings import parse_settings


@dataclass(kw_only=True)
class Settings(PretrainingSettings):
    """Continue pretraining an encoder by masked language modelling."""

    pack: bool = False  # let short documents share a row, without seeing each other
    drop_short: bool = False  # leave out rows that are not full
    mlm_probability: float = 0.15  # share of tokens to predict


def main(arguments: list[str] | None = None) -> None:
    settings = parse_settings(Settings, arguments)
    if not 0 < settings.mlm_probability <= 1:
        raise ValueError(f"mlm_probability={settings.mlm_probability} is not possible; it must be > 0 and ≤ 1.")
    record = start("mlm", settings)
    texts = settings.texts()
    model, tokenizer = load_or_start(settings, AutoModelForMaskedLM, "bert", texts["train"], record)
    refuse_packing(settings, model)

    length = block_length(settings, model, tokenizer)
    blocks = {
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
    for split, made in blocks.items():
        record.note_texts(split, made.use)
    rows = {split: made.rows for split, made in blocks.items()}
    # compiled models want one shape
    collate = LanguageModelCollator(
        tokenizer, settings.mlm_probability, pad_to=length if settings.torch_compile else 0
    )
    scores = TokenScores(False, *text_size(rows["validation"]))
    trainer = Trainer(
        model,
        settings,
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
