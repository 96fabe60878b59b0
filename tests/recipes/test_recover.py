"""recipes/recover.py: what is there is read where it was made alike, gone on with where it broke off, else refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import RECIPES
from tiny import save_source
from transformers import AutoConfig

from hf_efficient.training.results import RunRecord
from hf_efficient.training.settings import parse_settings

RECIPE = RECIPES / "recover.py"
PIPELINES = {"local": {"mechanism": "local", "attention_window": 8}, "t2r": {"mechanism": "t2r"}}


class Commands:
    """Stands in for the recipes: notes their settings and leaves what they leave."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.stop_at = ""
        self.perplexity = 10.0

    def __call__(self, command: list[Any]) -> None:
        words = [str(word) for word in command]
        is_distill = "hf_efficient.cli" in words
        if is_distill:
            given = words[words.index("distill") + 1 :]
            source, out = given[0], Path(given[1])
            options = dict(zip(given[3::2], given[4::2], strict=True)) | {"--model": source}
            assert given[2] == "--resume"
        else:
            assert words[-1] == "--resume" and Path(words[1]).is_file()
            options = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
            out = Path(options.pop("--output_dir"))
        settings = {name.lstrip("-").replace("-", "_"): plain(value) for name, value in options.items()}
        self.ran.append(out.relative_to(out.parents[1]).as_posix() if out.parent.name in PIPELINES else out.name)
        record = RunRecord("distill" if is_distill else "clm", settings, training={"tokens": 7})
        record.write(out / "result.json")
        if self.ran[-1] == self.stop_at:
            raise KeyboardInterrupt
        if not (out / "model").exists():
            save_source(out / "model", "gpt2")
        record.metrics = {name: {"perplexity": self.perplexity} for name in ("control", "converted", "trained")}
        record.finished = True
        record.write(out / "result.json")


def plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("recover_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    monkeypatch.setattr(loaded, "call", Commands())
    monkeypatch.setattr(loaded, "PIPELINES", {"gpt2": PIPELINES, "t5": PIPELINES})
    return loaded


ALL = ["dense", "dense-continued", "local/continued", "t2r/continued", "t2r/transfer", "t2r/transferred-continued"]


def test_a_finished_measurement_is_read_and_not_made_again(recipe: Any, tmp_path: Path, capsys: Any):
    arguments = ["--output_dir", str(tmp_path / "out"), "--record", str(tmp_path / "record.json"), "--steps", "3"]
    recipe.main(arguments)
    assert recipe.call.ran == ALL
    first = (tmp_path / "record.json").read_text()
    assert first == (tmp_path / "out" / "perplexity.json").read_text()
    document = json.loads(first)
    assert set(document["results"]) == set(PIPELINES)
    assert "transferred, continued" in document["results"]["t2r"]
    assert "transferred" not in document["results"]["local"], "nothing to transfer there"
    # it names all that it was made with, and nothing of where it was put
    expected = set(vars(parse_settings(recipe.Settings, []))) - {"output_dir", "record", "only"}
    assert set(document["settings"]) == expected and document["settings"]["steps"] == 3
    assert document["versions"]["torch"] and document["results"]["t2r"]["attention"] == PIPELINES["t2r"]
    recipe.main(arguments)
    assert recipe.call.ran == ALL and (tmp_path / "record.json").read_text() == first
    assert "× dense" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ALL)
def test_what_broke_off_is_gone_on_with(stage: str, recipe: Any, tmp_path: Path):
    arguments = ["--output_dir", str(tmp_path / "out")]
    recipe.call.stop_at = stage
    with pytest.raises(KeyboardInterrupt):
        recipe.main(arguments)
    assert recipe.call.ran == ALL[: ALL.index(stage) + 1]
    recipe.call.ran, recipe.call.stop_at = [], ""
    recipe.main(arguments)
    assert recipe.call.ran == ALL[ALL.index(stage) :], "a run that was not finished passed for one that was"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "5"], r"perplexity.json was made otherwise \(steps 100 → 5\): give the former settings"),
        (["--seed", "5"], r"\(seed 0 → 5\)"),
        (["--family", "t5"], r"\(family 'gpt2' → 't5'\)"),
    ],
)
def test_other_settings_are_refused(more: list[str], message: str, recipe: Any, tmp_path: Path):
    arguments = ["--output_dir", str(tmp_path / "out")]
    recipe.main(arguments)
    before = (tmp_path / "out" / "perplexity.json").read_text()
    with pytest.raises(ValueError, match=message):
        recipe.main([*arguments, *more])
    assert recipe.call.ran == ALL and (tmp_path / "out" / "perplexity.json").read_text() == before


@pytest.mark.parametrize(
    ("more", "stage", "message"),
    [
        (["--seed", "5"], "dense", r"dense/result.json was made otherwise \(seed 0 → 5\)"),
        (["--family", "t5"], "dense", r"dense/result.json .*model 'scratch:gpt2' → 'scratch:t5'"),
        (["--steps", "5"], "local/continued", r"dense-continued/result.json .*max_steps 100 → 5"),
        (["--transfer_steps", "5"], "t2r/transferred-continued", r"transfer/result.json .*\(steps 100 → 5\)"),
    ],
)
def test_runs_with_other_settings_are_refused(more: list[str], stage: str, message: str, recipe: Any, tmp_path: Path):
    """Also before there is a table: finished stages and broken-off ones."""
    arguments = ["--output_dir", str(tmp_path / "out")]
    recipe.call.stop_at = stage
    with pytest.raises(KeyboardInterrupt):
        recipe.main(arguments)
    recipe.call.ran, recipe.call.stop_at = [], ""
    with pytest.raises(ValueError, match=message):
        recipe.main([*arguments, *more])
    assert recipe.call.ran == []


def test_a_pipeline_of_another_mechanism_is_refused(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ["--output_dir", str(tmp_path / "out")]
    recipe.main(arguments)
    there = AutoConfig.from_pretrained(tmp_path / "out" / "local" / "converted").efficient_attention
    other = {"local": {"mechanism": "local", "attention_window": 4}}
    monkeypatch.setattr(recipe, "PIPELINES", {"gpt2": other})
    with pytest.raises(ValueError, match=r"converted was made otherwise \(efficient_attention .*: 8.*: 4"):
        recipe.main(arguments)
    assert AutoConfig.from_pretrained(tmp_path / "out" / "local" / "converted").efficient_attention == there


def test_some_pipelines_leave_the_rows_of_others(recipe: Any, tmp_path: Path):
    arguments = ["--output_dir", str(tmp_path / "out"), "--record", str(tmp_path / "record.json")]
    recipe.main([*arguments, "--only", "t2r"])
    recipe.main([*arguments, "--only", "local"])
    for file in (tmp_path / "record.json", tmp_path / "out" / "perplexity.json"):
        assert set(json.loads(file.read_text())["results"]) == {"local", "t2r"}
    # rows of another dense model are no rows of this table
    recipe.call.perplexity = 11.0
    before = (tmp_path / "record.json").read_text()
    with pytest.raises(ValueError, match=r"record.json was made otherwise \(perplexity 10.0 → 11.0\)"):
        recipe.main(["--output_dir", str(tmp_path / "new"), *arguments[2:], "--only", "local"])
    assert (tmp_path / "record.json").read_text() == before


def test_families_have_folders_of_their_own(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    recipe.main(["--only", "local"])
    recipe.main(["--only", "local", "--family", "t5"])
    assert {path.name for path in Path("outputs").iterdir()} == {"recover-gpt2", "recover-t5"}


def test_what_there_is_no_pipeline_for_is_refused(recipe: Any, tmp_path: Path):
    for given, message in (
        (["--family", "bert"], "family='bert' is not possible; it must be one of gpt2, t5"),
        (["--only", "local; nowhere"], "there is no pipeline 'nowhere'; there are local; t2r"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.main(["--output_dir", str(tmp_path / "out"), *given])
    assert not (tmp_path / "out").exists()


def test_a_command_that_fails_is_shown(recipe: Any):
    spec: Any = recipe.__spec__
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with pytest.raises(ValueError, match=r"(?s)failed:\n.*ZeroDivisionError") as error:
        fresh.call([sys.executable, "-c", "1 / 0"])
    assert "-c 1 / 0" in str(error.value)
