"""The chain of steps behind a checkpoint: every writer extends it, and the card tells it as it was."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fresh
import pytest
import torch
import transformers
from command_line import document, run
from pretraining import arguments, dataset, recipe
from tiny import save_source, words
from transformers import AutoModelForMaskedLM

import hf_efficient as he
from hf_efficient.cards.checkpoint import checkpoint_card
from hf_efficient.cards.facts import gather
from hf_efficient.conversion.loading import load_as_it_is
from hf_efficient.evaluation import verify as verification
from hf_efficient.models.provenance import CHANGED, EQUAL, TRAINED, Provenance, runs
from hf_efficient.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer")
DISTILLED, RECIPE = "2 steps of distillation", "2 steps of the recipe mlm"
# what is done, one after the other: the state in which the card says that the figures were measured
ORDERS = {
    "recipe convert verify distill upcycle": f"As converted, before {DISTILLED}, compared",
    "upcycle convert recipe verify": f"After {RECIPE}, compared",
    "convert recipe revert convert verify distill": f"After {RECIPE}, before {DISTILLED}, compared",
}


@pytest.fixture(autouse=True)
def quick_process(monkeypatch):
    monkeypatch.setattr(verification, "fresh_python", fresh.python)


def world(path: Path) -> Path:
    """A folder with everything that the commands read."""
    path.mkdir()
    save_source(path / "source", "bert")
    dataset(path / "data")
    (path / "texts.txt").write_text("\n".join(words(30 + i, i) for i in range(6)))
    return path


def take(step: str, at: str, to: str, compared: str) -> str:
    """One step with the folder `at`; returns the folder of what it made."""
    if step == "verify":
        run("verify", at, compared, "--texts", "texts.txt")
        return at
    if step == "recipe":
        recipe("mlm").main(arguments(at, "data", Path(to), max_steps=2))
        return f"{to}/model"
    options: dict[str, list[Any]] = {
        "convert": ["--attention", "linformer", "--rank", 16, "--max-positions", 128],
        "distill": ["--texts", "texts.txt", "--steps", 2, "--length", 16, "--learning-rate", 0.01],
        "upcycle": ["--num-experts", 2],
        "revert": [],
    }
    run(step, at, to, *options[step])
    return f"{to}/model" if step == "distill" else to


def commands_of(folder: str) -> list[str]:
    return checkpoint_card(folder).text.split("## Reproduce\n\n```bash\n")[1].split("\n```")[0].splitlines()


@pytest.mark.parametrize("order", ORDERS)
def test_the_card_tells_every_step_and_its_commands_make_the_checkpoint_again(order, tmp_path, monkeypatch):
    monkeypatch.chdir(world(tmp_path / "first"))
    at = compared = "source"
    done = []
    for index, step in enumerate(order.split()):
        if step == "convert" and (done[-1:] != ["upcycle"]):
            compared = at
        at = take(step, at, f"{index}-{step}", compared)
        done.append(step)
    card = checkpoint_card(at)
    assert ORDERS[order] in card.text
    steps = [{"recipe": "mlm"}.get(step, step) for step in done if step != "verify"]
    assert [step["what"] for step in Provenance.read(at).history] == steps
    trained = [step for step in steps if step in ("mlm", "distill")]
    assert [line.removeprefix("### ") for line in card.text.splitlines() if line.startswith("### ")] == trained
    report = json.loads((Path(at) / "conversion_report.json").read_text())
    assert report["fidelity"]["passed"] and len(report["history"]) == len(steps)

    lines = commands_of(at)
    measured = lines.index(report["fidelity"]["command"])
    assert len([line for line in lines[:measured] if " verify " not in line]) == report["fidelity"]["weights"]["steps"]
    monkeypatch.chdir(world(tmp_path / "second"))
    for line in lines:
        program, *rest = shlex.split(line)
        if program == "python":
            recipe("mlm").main(rest[1:])
        elif rest[0] != "verify":
            run(*rest)
    again = load_as_it_is(at if Path(at).exists() else "converted")[0].state_dict()
    expected = load_as_it_is(str(tmp_path / "first" / at))[0].state_dict()
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)


def test_a_reverted_checkpoint_says_what_it_went_through(tmp_path, monkeypatch):
    monkeypatch.chdir(world(tmp_path / "first"))
    converted = take("convert", "source", "a", "")
    back = take("revert", converted, "b", "")
    assert "not converted, or reverted" in checkpoint_card(back).text and not gather(Path(back), []).history
    back = take("revert", take("recipe", converted, "c", ""), "d", "")
    assert f"reverted, after {RECIPE}" in checkpoint_card(back).text
    assert [line.split()[1] for line in commands_of(back)] == ["convert", "verify", "recipes/mlm.py", "revert"]


# ---- whoever trains ----------------------------------------------------------------------------------------------


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(5, 99, (2, 20))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_loop_of_ones_own_is_noted_and_the_report_stays_with_the_model(tmp_path):
    source = save_source(tmp_path / "source", "bert")
    result = he.convert(source, "local", attention_window=8)
    result.save(tmp_path / "converted")
    model: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "converted")
    train(model)
    model.save_pretrained(tmp_path / "tuned")
    report = json.loads((tmp_path / "tuned" / "conversion_report.json").read_text())
    assert report["tensors"] and report["source"] == str(source)
    (step,) = runs(report["history"])
    assert (step["what"], step["steps"], step["settings"]) == ("training", 3, {"optimizer": "AdamW"})
    # a second time, from what was saved
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "tuned")
    assert Provenance.of(again).history == report["history"]
    card = checkpoint_card(tmp_path / "tuned").text
    assert "3 steps of training with AdamW; nothing else is recorded" in card
    assert "# 3 steps of training with AdamW, of which no command is recorded" in card
    # in memory likewise, where the result is saved as a whole
    train(result.model, 1)
    assert [step["what"] for step in Provenance.read(result.save(tmp_path / "other")).history] == [
        "convert",
        "training",
    ]


def test_reports_are_uploaded_with_the_model(tmp_path, monkeypatch):
    """By `save_pretrained(push_to_hub=True)`, which uploads what changed since it began, and by `push_to_hub`."""
    uploaded = []

    def upload(self: Any, folder: Any, repository: str, files_timestamps: dict[str, float], **options: Any) -> None:
        uploaded.append({path.name for path in Path(folder).iterdir() if path.name not in files_timestamps})

    hub = SimpleNamespace(create_repo=lambda name, **options: SimpleNamespace(repo_id=name))
    card = SimpleNamespace(save=lambda path: Path(path).write_text("a card"))
    for module in (transformers.modeling_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **options: card)
    monkeypatch.setattr(transformers.utils.hub.PushToHubMixin, "_upload_modified_files", upload)
    model = he.convert(tiny_model("bert"), "local", attention_window=8).model
    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/out")
    model.push_to_hub("me/out")
    assert len(uploaded) == 2 and all({"conversion_report.json", "model.safetensors"} <= files for files in uploaded)


@pytest.mark.parametrize("how", ["trained", "damaged", "damaged on disk", "mechanism only", "untouched"])
def test_trained_weights_pass_and_damaged_ones_fail(how, tmp_path, monkeypatch):
    source = save_source(tmp_path / "source", "bert")
    model = he.convert(source, "linformer", rank=16).model
    if how == "trained":
        train(model)
    elif how == "damaged":
        model.bert.encoder.layer[0].output.dense.weight.data[0, 0] += 1e-3
    elif how == "mechanism only":
        # what was recorded to have trained mechanisms alone explains no change of the host
        Provenance.of(model).add("distill", "converted", {}, steps=2, finished=True, trained="mechanism")
        model.bert.encoder.layer[0].output.dense.weight.data[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "made")
    if how == "damaged on disk":
        from safetensors.torch import load_file, save_file

        tensors = load_file(tmp_path / "made" / "model.safetensors")
        tensors["bert.encoder.layer.0.output.dense.weight"][0, 0] += 1e-3
        save_file(tensors, tmp_path / "made" / "model.safetensors", {"format": "pt"})
    (tmp_path / "texts.txt").write_text("\n".join(words(30 + i, i) for i in range(3)))
    is_right = how in ("trained", "untouched")
    monkeypatch.setattr(verification, "_fresh_process", lambda *_: verification.Check("fresh", "passed", {}, ""))
    found = document("verify", tmp_path / "made", source, "--texts", tmp_path / "texts.txt", code=0 if is_right else 1)
    assert found["weights"]["state"] == {"trained": TRAINED, "untouched": EQUAL}.get(how, CHANGED)
    assert found["weights"]["runs"] == {
        "trained": ["3 steps of training with AdamW"],
        "mechanism only": [DISTILLED],
    }.get(how, [])
    text = checkpoint_card(tmp_path / "made").text
    said = {"trained": "After 3 steps of training with AdamW", "untouched": "As converted, compared"}
    assert (
        said.get(how, "of weights that differ from the source's though no run that changed them is recorded") in text
    )


def test_reports_without_a_chain_are_told_by_following_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(world(tmp_path / "first"))
    at = take("distill", take("convert", "source", "a", ""), "b", "")
    take("verify", at, "", "source")
    at = take("upcycle", at, "c", "")
    expected = commands_of(at)
    for path in Path().rglob("*_report.json"):
        report = json.loads(path.read_text())
        del report["history"]
        for name in ("weights", "command"):
            (report["fidelity"] or {}).pop(name, None)
        path.write_text(json.dumps(report))
    assert [step["what"] for step in Provenance.read(at).history] == ["convert", "distill", "upcycle"]
    assert [line for line in commands_of(at) if " verify " not in line] == [
        line for line in expected if " verify " not in line
    ]
    text = checkpoint_card(at).text
    assert "It is not recorded whether these figures" in text and "As converted, before" not in text
    shutil.rmtree("a")
    assert [step["what"] for step in Provenance.read("b/model").history] == ["convert", "distill"]
