"""The pretraining recipes on tiny checkpoints: sources, a dataset, and runs in this process."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
from paths import RECIPES
from tiny import tiny_tokenizer, words
from transformers import AutoTokenizer

from hf_efficient.testing import VOCABULARY, tiny_model

# datasets copies every file that it reads: not into the user's own cache
CACHE = tempfile.mkdtemp(prefix="datasets-")
datasets.config.HF_DATASETS_CACHE = Path(CACHE)
os.environ["HF_DATASETS_CACHE"] = CACHE  # of subprocesses
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

SENTINELS = 20
# recipe: (family, mechanism as JSON)
WINDOW = '{"mechanism": "longformer", "attention_window": 8}'
JOBS = {"mlm": ("bert", WINDOW), "clm": ("gpt2", WINDOW), "span_corruption": ("t5", WINDOW)}
DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "roberta": {"hidden_dropout_prob": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "t5": {"dropout_rate": 0.1},
}


def recipe(name: str) -> Any:
    """The module of a recipe."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def t5_tokenizer() -> Any:
    """The tiny T5 tokenizer with sentinels behind its words, highest first as in T5's own vocabulary."""
    tokenizer = tiny_tokenizer("t5")
    tokenizer.add_tokens([f"<extra_id_{i}>" for i in reversed(range(SENTINELS))])
    return tokenizer


def source(path: Path, family: str, **options: Any) -> Path:
    """A tiny checkpoint with dropout and tokenizer, which its recipe can train."""
    options = DROPOUT[family] | options
    if family == "t5":
        tiny_model("t5", vocab_size=VOCABULARY + SENTINELS, **options).save_pretrained(path)
        t5_tokenizer().save_pretrained(path)
    else:
        tiny_model(family, **options).save_pretrained(path)
        tiny_tokenizer(family).save_pretrained(path)
    return path


def dataset(path: Path, train: int = 10, validation: int = 3, length: int = 20) -> Path:
    """A folder with train.jsonl and validation.jsonl: texts of `length` … `length` + 9 words."""
    path.mkdir()
    for split, count in (("train", train), ("validation", validation)):
        texts = [words(length + i % 10, start=3 * i + len(split)) for i in range(count)]
        (path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def arguments(model: Path | str, data: Path | str, output: Path, **settings: Any) -> list[str]:
    """A command line: short, and every step logged."""
    settings = {"per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2} | settings
    given = {"model": model, "dataset": data, "output_dir": output} | settings
    return [f"--{name}={value}" for name, value in given.items()]


def result(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


def losses(output: Path) -> list[float]:
    """The training losses, step by step."""
    return [entry["loss"] for entry in result(output)["training"]["log"] if "loss" in entry]


def tokenizer_of(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path)
