"""Where training data comes from: nothing is trained on what it is evaluated on, and no setting is passed over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from hf_efficient.training.data.texts import load_rows, load_texts

QUESTIONS = [{"question": f"q{i}", "context": f"text {i // 5}", "unused": i} for i in range(200)]
COLUMNS = {"question": "question", "context": "context"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("splits", [["validation"], ["test"], ["validation", "test"]])
def test_data_without_training_rows_is_refused(splits: list[str], tmp_path: Path):
    for split in splits:
        write(tmp_path / f"{split}.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(ValueError, match=r"has no train split, but .*: call what is to be trained on train") as error:
        load_texts(str(tmp_path))
    assert all(split in str(error.value) for split in splits)
    given = DatasetDict({split: Dataset.from_list(QUESTIONS) for split in splits})
    with pytest.raises(ValueError, match="dataset given has no train split"):
        load_rows(given, COLUMNS)
    # the remedy: one file alone is what is trained on, and some of its rows are held out
    loaded = load_texts(str(tmp_path / f"{splits[0]}.jsonl"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 1, "validation": 1}


@pytest.mark.parametrize("dataset", ["offline", "rows.jsonl", "folder", "folder/*.jsonl", "missing.jsonl", "given"])
def test_a_configuration_of_no_hub_dataset_is_refused(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for path in (Path("rows.jsonl"), Path("folder/train.jsonl")):
        write(path, [{"text": "a"}, {"text": "b"}])
    message = re.escape(f"dataset_config='en' chooses a part of a Hub dataset, but dataset {dataset} is none")
    with pytest.raises(ValueError, match=message):
        if dataset == "given":
            load_rows(DatasetDict({"train": Dataset.from_list(QUESTIONS)}), COLUMNS, dataset_config="en")
        else:
            load_texts(dataset, dataset_config="en")


def test_rows_that_share_a_text_stay_together(tmp_path: Path):
    file = write(tmp_path / "rows.jsonl", QUESTIONS)
    loaded = load_rows(file, COLUMNS, together="context", seed=3)
    trained, held_out = (set(loaded[split]["context"]) for split in ("train", "validation"))
    assert not trained & held_out and len(held_out) == 2, "a twentieth of 40 texts"
    found = [row["question"] for rows in loaded.values() for row in rows]
    assert sorted(found) == sorted(row["question"] for row in QUESTIONS)
    assert set(load_rows(file, COLUMNS, together="context", seed=3)["validation"]["context"]) == held_out
    assert set(load_rows(file, COLUMNS, together="context", seed=4)["validation"]["context"]) != held_out
    # row by row they fall on both sides
    alone = load_rows(file, COLUMNS, seed=3)
    assert set(alone["train"]["context"]) & set(alone["validation"]["context"])
    with pytest.raises(ValueError, match="has a single context in its training rows and no validation split"):
        load_rows(write(tmp_path / "one.jsonl", QUESTIONS[:5]), COLUMNS, together="context")
