"""Train a decoder (GPT-2) on long texts a segment at a time, with the memory of Transformer-XL or a compressive one.

    python recipes/segments.py --model openai-community/gpt2 --max-positions 4096 --output-dir xl
    python recipes/segments.py --model scratch:gpt2 --block-length 512 --max-steps 300 --output-dir small-xl
    python recipes/segments.py --block-length 512 --per-device-train-batch-size 4 --max-steps 300 --record figures.json

Row b of a batch goes on where row b of the batch before ended; what the layers keep of it takes no gradient. Evaluation
reads held-out texts in the same way. `output_dir` gets what recipes/clm.py leaves there, its checkpoints with the memory in
them; an interrupted run goes on exactly where it was with the same command and --resume.

With --record the same small model is also trained by recipes/clm.py on whole texts with full attention, with as many texts
in every step (a stream of segments each, accumulated over a text's length) and the same held-out tokens to predict; and
that model, converted, reads them in segments. The figures are written there, the runs to memory/, dense/ and read/.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, Trainer

from hf_efficient.patching.exact import converted_layers, mechanism_of
from hf_efficient.profiling.json_files import write_json
from hf_efficient.training.data.segments import SegmentCollator, SegmentMemory, segment_rows
from hf_efficient.training.data.texts import token_blocks
from hf_efficient.training.pretraining import PretrainingSettings, TokenScores, block_length, load_or_start, text_size
from hf_efficient.training.recipe import run, start, train
from hf_efficient.training.results import RESULT_NAME
from hf_efficient.training.settings import parse_settings

MEMORY = '{"mechanism": "transformer_xl", "segment_length": 128, "memory_length": 384}'


@dataclass(kw_only=True)
class Settings(PretrainingSettings):
    """Train a decoder on long texts a segment at a time, with memory."""

    REFUSED: ClassVar = PretrainingSettings.REFUSED | {"lora_rank": "adapters are not trained with a memory"}

    model: str = "scratch:gpt2"
    output_dir: str = "outputs/segments"
    attention: str = MEMORY  # transformer_xl or compressive as JSON; empty = as the checkpoint is
    record: str = ""  # also train with full attention on whole texts, and write the figures of both here
    per_device_train_batch_size: int = 16  # streams of text per device; a step reads one segment of each
    per_device_eval_batch_size: int = 16
    gradient_accumulation_steps: int = 1  # segments of a stream per optimiser step
    train_sampling_strategy: str = "sequential"
    hidden_size: int = 128
    layers: int = 3
    vocabulary_size: int = 2000


def main(arguments: list[str] | None = None) -> None:
    settings = parse_settings(Settings, arguments)
    if settings.record:
        compare(settings)
        return
    record = start("segments", settings)
    texts = settings.texts()
    model, tokenizer = load_or_start(settings, AutoModelForCausalLM, "gpt2", texts["train"], record)
    memory = SegmentMemory(model)
    size = segment_length(model)
    # a text is a whole number of segments, so that its last one does not reach beyond the table of positions
    length = block_length(settings, model, tokenizer) // size * size
    streams = {
        "train": (settings.train_batch_size * settings.world_size, settings.seed),
        "validation": (settings.eval_batch_size * settings.world_size, None),
    }
    rows = {}
    for split in streams:
        blocks = token_blocks(texts[split], tokenizer, length, special_tokens="end")
        record.note_texts(split, blocks.use)
        rows[split] = segment_rows(blocks.rows, size, *streams[split])
    # labels are those of the next token: nothing is shifted any more
    scores = TokenScores(False, *text_size(rows["validation"]))
    trainer = Trainer(
        model,
        settings,
        data_collator=SegmentCollator(tokenizer, size),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        callbacks=[memory],
        compute_metrics=scores,
        preprocess_logits_for_metrics=scores.losses,
    )
    train(trainer, settings, record, before=False)


def segment_length(model: Any) -> int:
    """The one segment length of all layers.

    Raises:
        ValueError: layers with different ones, or texts shorter than it.
    """
    sizes = {mechanism_of(layer).config.segment_length for layer in converted_layers(model).values()}
    positions = model.config.max_position_embeddings
    if len(sizes) > 1 or max(sizes) > positions:
        raise ValueError(
            f"segment_length={sorted(sizes)} with {positions} positions: training with memory needs one segment length for "
            "all layers, and room for a segment."
        )
    return int(sizes.pop())


def compare(settings: Settings) -> None:
    """The same model with a memory and with full attention: equal texts per step, equal held-out tokens to predict."""
    if not settings.model.startswith("scratch:") or not settings.block_length:
        raise ValueError("record needs --model scratch:gpt2 and a --block_length, which both models are trained on.")
    size = json.loads(settings.attention)["segment_length"]
    if settings.block_length % size:
        raise ValueError(
            f"block_length={settings.block_length} is no whole number of segments of {size} tokens: a step of both models "
            "must have as many texts."
        )
    pieces = settings.gradient_accumulation_steps * (settings.block_length // size)
    values = settings.recorded() | {"record": "", "resume": True}
    folder = Path(settings.output_dir)
    figures = {}
    for name, recipe, changes in (
        ("dense", "clm.py", {"attention": "", "train_sampling_strategy": ""}),
        # one step of no length: the dense model itself, read in segments
        ("read", "segments.py", {"model": str(folder / "dense/model"), "learning_rate": 0.0, "max_steps": 1}),
        ("memory", "segments.py", {"gradient_accumulation_steps": pieces}),
    ):
        given = (values | changes).items()
        options = {key: value for key, value in given if value not in ("", None) and value is not False}
        options["output_dir"] = str(folder / name)
        words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]
        done = subprocess.run([sys.executable, str(Path(__file__).with_name(recipe)), *words], check=False)
        if done.returncode:
            raise ValueError(f"{recipe} failed: see above.")
        figures[name] = json.loads((folder / name / RESULT_NAME).read_text(encoding="utf-8"))
    perplexity = {name: f["metrics"]["trained"]["perplexity"] for name, f in figures.items()}
    ratios = {name: perplexity[name] / perplexity["dense"] for name in ("read", "memory")}
    document = {
        "suite": "segments",
        "settings": {key: value for key, value in values.items() if key not in ("output_dir", "record", "resume")},
        **{name: f["metrics"]["trained"] | {"tokens": f["training"]["tokens"]} for name, f in figures.items()},
        "ratios": ratios,
        "hardware": figures["memory"]["hardware"],
        "versions": figures["memory"]["versions"],
    }
    write_json(Path(settings.record), document)
    print(f"held-out perplexity over that of full attention: read in segments {ratios['read']:.4f}")
    print(f"trained in segments {ratios['memory']:.4f}")


if __name__ == "__main__":
    run(main)
