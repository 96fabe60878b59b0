"""Tiny models and tasks for the finetuning recipes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import RECIPES
from tiny import converted, save_source, words
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

SMALL = ["--use_cpu", "--per_device_train_batch_size", "2", "--max_train_rows", "8", "--max_eval_rows", "6"]


AUTO: dict[str, Any] = {
    "classify": AutoModelForSequenceClassification,
    "token_classify": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "summarize": AutoModelForSeq2SeqLM,
    "embed": AutoModel,
}


def recipe(name: str) -> Any:
    """The recipe as a module."""
    module = sys.modules.get(f"recipe_{name}")
    if module is None:
        spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[f"recipe_{name}"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def rows_of(task: str, count: int = 24) -> list[dict[str, Any]]:
    """Rows of a task in words that the tiny tokenizers know; short and long ones."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        text = words(23 + 17 * (i % 4), start=11 * i).split()
        if task == "classify":
            # the class of a text is the set that its words are from
            rows.append(
                {"text": " ".join(f"w{10 + 40 * (i % 2) + int(w[1:]) % 40}" for w in text), "label": ["a", "b"][i % 2]}
            )
        elif task == "token_classify":
            tags = ["B-X" if int(w[1:]) % 4 == 0 else "O" for w in text]
            rows.append({"tokens": text, "tags": tags})
        elif task == "question_answering":
            place = (7 * i) % (len(text) - 2)
            text[place : place + 2] = [f"w{91 + i % 4}", "w97"]
            start = len(" ".join([*text[:place], ""]))
            answers = {"text": [f"w{91 + i % 4} w97"], "answer_start": [start]}
            rows.append({"question": "w5 w6 w7", "context": " ".join(text), "answers": answers})
        elif task == "summarize":
            rows.append({"document": " ".join(text), "summary": " ".join(text[:3])})
        else:
            document = " ".join([*text, *words(100, start=5 * i + 1).split()])
            places = (0, 110)[i % 2]
            rows.append({"anchor": " ".join(document.split()[places : places + 6]), "positive": document})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """Tiny checkpoints: one original per family, and converted ones."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {family: str(save_source(folder / family, family)) for family in ("bert", "roberta", "gpt2", "t5")}
    for family in ("bert", "t5"):
        paths[f"{family}-longformer"] = str(converted(folder / f"{family}-longformer", family))
    return paths


@pytest.fixture(scope="module")
def datasets_of(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    # a twentieth is held out: of pairs that must be several
    return {task: write(folder / f"{task}.jsonl", rows_of(task, 80 if task == "embed" else 24)) for task in AUTO}
