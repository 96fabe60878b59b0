"""Runs that are killed, interrupted or broken: what is on disk is whole, and a resumed run equals the uninterrupted one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from pretraining import JOBS, RECIPES, WINDOW, arguments, dataset, losses, recipe, result, source
from safetensors.torch import load_file
from transformers import Trainer

from hf_efficient.training.callbacks import NonFiniteLoss
from hf_efficient.training.checkpoints import MARKER, last_complete_checkpoint
from hf_efficient.training.recipe import run

STEPS, SAVE_STEPS = 8, 3  # 5 steps an epoch: the first checkpoint in the first one, the second in the second

DRIVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from transformers import Trainer
import mlm

training_step, save = Trainer.training_step, torch.save

def killed_step(self, *args, **kwargs):
    loss = training_step(self, *args, **kwargs)  # gradients are there, the update is not
    if self.state.global_step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss

def killed_save(what, path, *args, **kwargs):
    save(what, path, *args, **kwargs)
    if f"checkpoint-{at}" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
for word in sys.argv[2].split(","):  # a process each; what is imported is shared
    moment, at, output = word.split(":")
    at, child = int(at), os.fork()
    if not child:
        if moment == "step":
            Trainer.training_step = killed_step
        else:
            torch.save = killed_save
        mlm.main([*sys.argv[3:], f"--output_dir={output}"])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else status)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Any]:
    """Sources, a dataset and an uninterrupted run of every recipe, evaluated on the way."""
    root = tmp_path_factory.mktemp("resume")
    data = dataset(root / "data")
    found: dict[str, Any] = {"data": data}
    for name, (family, attention) in JOBS.items():
        model = source(root / family, family)
        settings = {
            "attention": attention,
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "eval_strategy": "steps",
            "eval_steps": 2,
        }
        settings |= {"lr_scheduler_type": "constant"} if name == "clm" else {}
        recipe(name).main(arguments(model, data, root / f"{name}-whole", **settings))
        found[name] = {"model": model, "settings": settings, "whole": root / f"{name}-whole"}
    return found


def command(runs: dict[str, Any], name: str, output: Path, **more: Any) -> list[str]:
    return arguments(runs[name]["model"], runs["data"], output, **runs[name]["settings"] | more)


def assert_same_run(output: Path, whole: Path) -> None:
    assert losses(output) == losses(whole)
    assert len(losses(output)) == STEPS
    actual, expected = load_file(output / "model/model.safetensors"), load_file(whole / "model/model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert result(output)["metrics"]["trained"]["loss"] == result(whole)["metrics"]["trained"]["loss"]
    assert result(output)["training"]["tokens"] == result(whole)["training"]["tokens"] > 0
    assert result(output)["finished"] is True


KILLED = {"step": (7, 6), "save": (6, 3)}  # moment: (step, last whole checkpoint)


@pytest.fixture(scope="module")
def killed(runs, tmp_path_factory) -> dict[str, Path]:
    """{moment: folder of a run that was killed there}."""
    root = tmp_path_factory.mktemp("killed")
    moments = ",".join(f"{moment}:{at}:{root / moment}" for moment, (at, _) in KILLED.items())
    words = [word for word in command(runs, "mlm", root) if not word.startswith("--output_dir")]
    done = fresh.python("-c", DRIVER, RECIPES, moments, *words)
    assert [line for line in done.stdout.splitlines() if line == "killed"] == ["killed"] * 2, done.stderr
    return {moment: root / moment for moment in KILLED}


@pytest.mark.parametrize("moment", KILLED)
def test_killed_run_resumes_exactly(moment, killed, runs, logged):
    """kill -9 between backward and update of a step, and with half a file of a checkpoint written."""
    output, left = killed[moment], KILLED[moment][1]
    assert result(output)["finished"] is False
    if moment == "save":
        assert (output / "checkpoint-6/model.safetensors").is_file()
        assert not (output / "checkpoint-6" / MARKER).exists()
    assert last_complete_checkpoint(output) == output / f"checkpoint-{left}"
    logged.clear()
    recipe("mlm").main([*command(runs, "mlm", output), "--resume"])
    printed = "\n".join(logged)
    assert f"resuming from {output / f'checkpoint-{left}'}." in printed
    assert ("checkpoint-6 is left out: it has no complete.json" in printed) == (moment == "save")
    assert_same_run(output, runs["mlm"]["whole"])
    assert result(output)["training"]["resumed_from"] == left


def interrupt(monkeypatch, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Raise in the middle of step `at` + 1, once."""
    training_step = Trainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(self, *args, **kwargs)
        if self.state.global_step == at:
            monkeypatch.setattr(Trainer, "training_step", training_step)
            raise error
        return loss

    monkeypatch.setattr(Trainer, "training_step", step)


@pytest.mark.parametrize(
    ("name", "save_steps", "at", "more"),
    [
        ("mlm", 5, 6, {}),  # the checkpoint stands at the end of an epoch
        ("clm", 3, 4, {"pack": True}),
        ("span_corruption", 3, 7, {}),
        ("mlm", 2, 3, {"lora_rank": 2, "gradient_accumulation_steps": 2, "max_steps": 4}),
    ],
)
def test_interrupted_run_says_how_to_go_on_and_does(name, save_steps, at, more, runs, tmp_path, monkeypatch, capsys):
    output, whole = tmp_path / "out", runs[name]["whole"]
    if more:
        whole = tmp_path / "whole"
        recipe(name).main(command(runs, name, whole, **more))
    words = command(runs, name, output, save_steps=save_steps, **more)
    interrupt(monkeypatch, at)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(lambda: recipe(name).main(words))
    assert stopped.value.code == 130
    last = output / f"checkpoint-{at // save_steps * save_steps}"
    said = f"interrupted after step {at}; {last} is complete: go on with the same command and --resume."
    assert said in capsys.readouterr().err
    recipe(name).main([*words, "--resume"])
    assert losses(output) == losses(whole)
    actual, expected = (load_file(folder / "model/model.safetensors") for folder in (output, whole))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("moment", ["exact", "control", "trained"])
def test_interrupted_evaluation_is_one_line(moment, runs, tmp_path, monkeypatch, capsys):
    """Before the first step and after the last one, as in between."""
    evaluate = Trainer.evaluate

    def stopped(self: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        if metric_key_prefix == moment:
            raise KeyboardInterrupt
        return evaluate(self, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    monkeypatch.setattr(Trainer, "evaluate", stopped)
    words = command(runs, "clm", tmp_path / "out", max_steps=2, save_steps=1)
    with pytest.raises(SystemExit) as done:
        run(lambda: recipe("clm").main(words))
    assert done.value.code == 130
    last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interrupted")]
    assert len(last) == 1 and ("checkpoint-2 is complete" in last[0]) == (moment == "trained")


def test_interrupted_before_any_checkpoint(runs, tmp_path, monkeypatch, logged):
    output = tmp_path / "out"
    words = command(runs, "clm", output, save_steps=100)
    interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt, match="no checkpoint was complete yet"):
        recipe("clm").main(words)
    recipe("clm").main([*words, "--resume"])
    assert f"no complete checkpoint in {output}: from the beginning." in logged
    assert_same_run(output, runs["clm"]["whole"])


def test_evaluation_does_not_disturb_training(runs, tmp_path):
    recipe("mlm").main(command(runs, "mlm", tmp_path / "out", eval_strategy="no", eval_steps=0))
    assert losses(tmp_path / "out") == losses(runs["mlm"]["whole"])
    evaluated = [entry for entry in result(runs["mlm"]["whole"])["training"]["log"] if "eval_loss" in entry]
    assert len(evaluated) == STEPS / 2


def test_finished_run_trains_no_further_and_may_be_longer(runs, tmp_path):
    output, whole = tmp_path / "out", runs["clm"]["whole"]
    shutil.copytree(whole, output)
    recipe("clm").main([*command(runs, "clm", output), "--resume"])
    assert_same_run(output, whole)
    # nothing was trained, so what was measured then still holds
    first = result(output)["training"]
    assert first == result(whole)["training"] and first["steps"] == STEPS and first["tokens"] > 0

    recipe("clm").main([*command(runs, "clm", output, max_steps=STEPS + 2), "--resume"])
    longer = result(output)["training"]
    assert (longer["steps"], longer["resumed_from"]) == (STEPS + 2, STEPS)
    assert losses(output)[:STEPS] == losses(whole) and len(losses(output)) == STEPS + 2
    # both parts together
    assert first["tokens"] < longer["tokens"] and 0.9 * first["seconds"] < longer["seconds"]
    assert longer["tokens_per_second"] == pytest.approx(longer["tokens"] / longer["seconds"])


# ---- what is refused ---------------------------------------------------------------------------------------------


def forbid_training(monkeypatch) -> None:
    def train(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(Trainer, "train", train)


def test_folder_with_something_in_it_is_left_alone(runs, tmp_path, monkeypatch):
    forbid_training(monkeypatch)
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ValueError, match=r"already holds something: choose another --output_dir, or .* --resume"):
        recipe("mlm").main(command(runs, "mlm", tmp_path))
    with pytest.raises(ValueError, match="holds no run to resume"):
        recipe("mlm").main([*command(runs, "mlm", tmp_path), "--resume"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attention": "local"}, "attention .* → 'local'"),
        ({"learning_rate": 0.5}, r"learning_rate 0\.01 → 0\.5"),
        ({"seed": 1}, "seed 0 → 1"),
        ({"max_steps": STEPS + 2}, f"max_steps {STEPS} → {STEPS + 2}"),  # the learning rate falls until then
    ],
)
def test_resume_with_other_settings(more, message, runs, tmp_path, monkeypatch):
    forbid_training(monkeypatch)
    shutil.copytree(runs["mlm"]["whole"], tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        recipe("mlm").main([*command(runs, "mlm", tmp_path / "out", **more), "--resume"])
    with pytest.raises(ValueError, match="a run of mlm, not of clm"):
        recipe("clm").main([*command(runs, "clm", tmp_path / "out"), "--resume"])


@pytest.mark.parametrize(
    ("attention", "sizes", "message"),
    [
        ('{"mechanism": "longformer", "attention_window": 16}', {}, "attention_window': 8.*attention_window': 16"),
        (WINDOW, {"intermediate_size": 40}, r"intermediate\.dense\.bias has shape \[48\] there and \[40\] here"),
    ],
)
def test_resume_from_a_checkpoint_of_another_model(attention, sizes, message, runs, tmp_path, monkeypatch):
    """The settings are the same, but the source behind them changed."""
    forbid_training(monkeypatch)
    output, words = tmp_path / "out", command(runs, "mlm", tmp_path / "out", attention=attention)
    shutil.copytree(runs["mlm"]["whole"], output)
    record = result(output)
    record["settings"]["attention"] = attention
    (output / "result.json").write_text(json.dumps(record))
    if sizes:
        model = source(tmp_path / "other", "bert", **sizes)
        record["settings"]["model"] = str(model)
        (output / "result.json").write_text(json.dumps(record))
        words[0] = f"--model={model}"
    with pytest.raises(ValueError, match=message):
        recipe("mlm").main([*words, "--resume"])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_step_that_is_no_number_is_stopped_before_anything_of_it_is_kept(what, runs, tmp_path, monkeypatch):
    training_step = Trainer.training_step

    def step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5 and what == "loss":  # the step that would be saved as checkpoint-6
            hook = model.register_forward_hook(_infinite_loss, prepend=True)
            try:
                return training_step(self, model, inputs, *args, **kwargs)
            finally:
                hook.remove()
        loss = training_step(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 5:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        return loss

    monkeypatch.setattr(Trainer, "training_step", step)
    with pytest.raises(NonFiniteLoss, match=r"step 6: the loss is .*lower --learning_rate"):
        recipe("mlm").main(command(runs, "mlm", tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3"]
    assert last_complete_checkpoint(tmp_path / "out") is not None
    weights = load_file(tmp_path / "out/checkpoint-3/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not (tmp_path / "out/model").exists()


def _infinite_loss(model: Any, inputs: Any, output: Any) -> Any:
    """As from a label whose logit is -∞: the loss is infinite, its gradient is not."""
    output["loss"] = output["loss"] + float("inf")
    return output
