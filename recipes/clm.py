"""Continue pretraining a decoder (GPT-2, Llama, …) by causal language modelling, converted to efficient attention or not.

    python recipes/clm.py --model openai-community/gpt2 --attention local --max-positions 4096 --pack --output-dir clm
    python recipes/clm.py --model clm/model --dataset corpus.jsonl --pack --bf16 --save-steps 500 --output-dir clm-2
    python recipes/clm.py --model scratch:gpt2 --block-length 512 --pack --max-steps 1000 --output-dir small-gpt2
    python recipes/clm.py --config clm.yaml --resume

Every document ends with the end-of-text token. Rows never mix documents; with --pack short ones share a row and stay apart
in attention. `output_dir` gets model/ (for the Auto classes), result.json, loss.png, layers.png and complete checkpoints;
an interrupted run goes on exactly where it was with the same command and --resume.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoModelForCausalLM, Trainer

from hf_efficient.training.data.collators import LanguageModelCollator
from hf_efficient.training.data.texts import token_blocks
from hf_efficient.training.pretraining import (
    PretrainingSettings,
    TokenScores,
    block_length,
    load_or_start,
    refuse_packing,
    text_size,
)
from hf_efficient.training.recipe import run, start, train
from hf_efficient.training.settings import parse_settings


@dataclass(kw_only=True)
class Settings(PretrainingSettings):
    """Continue pretraining a decoder by causal language modelling."""

    pack: bool = False  # let short documents share a row, without seeing each other
    drop_short: bool = False  # leave out rows that are not full


def main(arguments: list[str] | None = None) -> None:
    settings = parse_settings(Settings, arguments)
    record = start("clm", settings)
    texts = settings.texts()
    model, tokenizer = load_or_start(settings, AutoModelForCausalLM, "gpt2", texts["train"], record)
    refuse_packing(settings, model)

    length = block_length(settings, model, tokenizer)
    blocks = {
        split: token_blocks(
            texts[split],
            tokenizer,
            length,
            pack=settings.pack,
            drop_short=settings.drop_short,
            special_tokens="end",
        )
        for split in ("train", "validation")
    }
    for split, made in blocks.items():
        record.note_texts(split, made.use)
    rows = {split: made.rows for split, made in blocks.items()}
    scores = TokenScores(True, *text_size(rows["validation"]))
    trainer = Trainer(
        model,
        settings,
        # compiled models want one shape
        data_collator=LanguageModelCollator(tokenizer, pad_to=length if settings.torch_compile else 0),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        compute_metrics=scores,
        preprocess_logits_for_metrics=scores.losses,
    )
    train(trainer, settings, record)


if __name__ == "__main__":
    run(main)
