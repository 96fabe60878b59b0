"""distill: both stages, what they report and write, resuming exactly, and the recipe that does the same in a plain loop."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer, words
from transfers import pair_of
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

import hf_efficient as he
from hf_efficient.exact import Teacher
from hf_efficient.fidelity import compare, text_batches
from hf_efficient.testing import assert_close, tiny_model
from hf_efficient.training import distill as module
from hf_efficient.training import layer_errors
from hf_efficient.training.distill import distill

TEXTS = [words(150 + 11 * i, start=i) for i in range(12)]
HELD_OUT = [words(130, start=50 + i) for i in range(3)]
SMALL = dict(length=48, steps=8, eval_texts=3, cpu=True, logging_steps=4, learning_rate=3e-3)


def converted(family: str = "bert", mechanism: str = "linformer", **options: Any) -> Any:
    pair = pair_of(f"{mechanism}-{family}" + ("-encoder" if family == "t5" else ""))
    return he.convert(tiny_model(family), mechanism, **(pair.options | options)).model


def run(model: Any, folder: Path, **settings: Any) -> dict[str, Any]:
    tokenizer = tiny_tokenizer(model.stock_class.config_class.model_type)
    return distill(model, tokenizer, TEXTS, held_out=HELD_OUT, output_dir=folder, **(SMALL | settings))


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


LONGER = dict(length=120, learning_rate=1e-2)


@pytest.mark.parametrize(
    ("family", "mechanism", "more"),
    [("bert", "linformer", {}), ("gpt2", "hedgehog", {}), ("t5", "hedgehog", LONGER)],
    ids=["bert", "gpt2", "t5"],
)
def test_both_stages_bring_the_model_closer(family: str, mechanism: str, more: dict[str, Any], tmp_path: Path):
    model = converted(family, mechanism)
    before = parameters(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    report = run(model, tmp_path / "out", end_to_end_steps=8, end_to_end_learning_rate=2e-3, **more)
    figures, errors = report["metrics"], report["layer_errors"]
    assert figures["transferred"]["hidden_error"] < figures["converted"]["hidden_error"]
    assert figures["trained"]["hidden_error"] < figures["transferred"]["hidden_error"]
    assert sum(errors["transferred"]["mechanism"]) < sum(errors["before"]["mechanism"])
    assert "mean of values" in errors["before"] and figures["control"]["hidden_error"] > 0
    assert ("window only" in errors["before"]) == (mechanism == "hedgehog")
    assert report == json.loads((tmp_path / "out" / "result.json").read_text()) | {"settings": report["settings"]}
    assert report["finished"] and {entry["stage"] for entry in report["training"]["log"]} == {"transfer", "end_to_end"}
    changed = {name for name, p in parameters(model).items() if not torch.equal(p, before[name])}
    assert any(".efficient." in name for name in changed)
    allowed = (".efficient.", "attention.self.", "attention.output.dense", ".attn.c_", "SelfAttention.")
    assert all(any(part in name for part in allowed) for name in changed), changed
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    folder = tmp_path / "out" / "model"
    loaded = AutoModel.from_pretrained(folder)
    state = loaded.state_dict()
    trained = {
        name: p for name, p in model.state_dict().items() if name.removeprefix(f"{model.base_model_prefix}.") in state
    }
    assert len(trained) >= len(changed)
    for name, value in trained.items():
        assert torch.equal(value, state[name.removeprefix(f"{model.base_model_prefix}.")]), name
    assert AutoTokenizer.from_pretrained(folder)("w7")["input_ids"]


def test_the_report_says_what_was_measured(tmp_path: Path):
    model = converted()
    batches = text_batches(tiny_tokenizer("bert"), HELD_OUT, 48, 2, model)
    teacher = Teacher(model)
    before = compare(model, teacher, batches), layer_errors(model, batches)
    source = compare(model, tiny_model("bert"), batches)
    report = run(model, tmp_path / "out")
    assert report["metrics"]["converted"] == before[0] == source
    assert report["layer_errors"] == {"before": before[1], "after": layer_errors(model, batches)}
    assert report["metrics"]["trained"] == compare(model, tiny_model("bert"), batches), (
        "the teacher is not the original"
    )
    assert "transferred" not in report["metrics"]


def test_mechanisms_without_parameters_learn_end_to_end_alone(tmp_path: Path):
    with pytest.raises(ValueError, match="give end_to_end_steps"):
        run(converted("bert", "performer"), tmp_path / "none")
    report = run(converted("bert", "performer"), tmp_path / "out", end_to_end_steps=8, end_to_end_learning_rate=2e-3)
    assert any("skipped" in note for note in report["training"]["notes"])
    assert report["metrics"]["trained"]["hidden_error"] < report["metrics"]["converted"]["hidden_error"]
    assert not (tmp_path / "out" / "transfer").exists()


def test_blocks_of_layers(tmp_path: Path):
    """One block of all layers, or a block per layer: every layer learns the same, up to Adam's ε and the clipping."""
    whole, blocks = converted(), converted()
    run(whole, tmp_path / "whole")
    run(blocks, tmp_path / "blocks", layers_per_block=1)
    assert {path.name for path in (tmp_path / "blocks").iterdir()} == {
        "transfer-0",
        "transfer-1",
        "model",
        "result.json",
    }
    expected = parameters(whole)
    for name, value in parameters(blocks).items():
        assert_close(value, expected[name], 2e-3, name)


class _Interrupt(TrainerCallback):
    def __init__(self, stage: str, step: int):
        self.stage, self.step = stage, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("stage", "step"), [("transfer", 6), ("end_to_end", 5)])
def test_an_interrupted_run_resumes_exactly(stage: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings: dict[str, Any] = dict(end_to_end_steps=8, save_steps=4)
    expected = converted()
    report = run(expected, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        trainer = module.Trainer

        def interrupted(*args: Any, callbacks: list[Any], **kwargs: Any) -> Any:
            return trainer(*args, callbacks=[*callbacks, _Interrupt(stage, step)], **kwargs)

        patch.setattr(module, "Trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(converted(), tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "model").exists()
    with pytest.raises(ValueError, match="resume"):
        run(converted(), tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="other settings"):
        run(converted(), tmp_path / "out", **(settings | {"seed": 1}), resume=True)
    model = converted()
    resumed = run(model, tmp_path / "out", **settings, resume=True)
    for name, value in parameters(model).items():
        assert torch.equal(value, dict(expected.named_parameters())[name]), name
    assert resumed["metrics"] == report["metrics"] and resumed["layer_errors"] == report["layer_errors"]


def test_impossible_settings_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="convert it with"):
        distill(tiny_model("bert"), tiny_tokenizer("bert"), TEXTS, output_dir=tmp_path)
    for wrong in (dict(length=0), dict(steps=-1), dict(batch_size=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            run(converted(), tmp_path / "x", **wrong)
    with pytest.raises(ValueError, match="held out"):
        distill(converted(), tiny_tokenizer("bert"), TEXTS[:1], output_dir=tmp_path / "x")
    with pytest.raises(ValueError, match="at least 2"):
        distill(
            converted(), tiny_tokenizer("bert"), TEXTS[:1], held_out=HELD_OUT, output_dir=tmp_path / "x", length=120
        )
    assert not list(tmp_path.iterdir())


# ---- the recipe --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "distill_recipe", Path(__file__).parent.parent / "recipes" / "distill.py"
    )
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny_model("bert").save_pretrained(folder)
    tiny_tokenizer("bert").save_pretrained(folder)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS + HELD_OUT))
    return folder


def arguments(source: Path, output: Path, *more: str) -> list[str]:
    fixed = (
        f"--model {source} --output_dir {output} --dataset {source.parent / 'texts.jsonl'} --length 48 --steps 6 --cpu"
    )
    return [*fixed.split(), "--attention", '{"mechanism": "linformer", "rank": 8}', *more]


def test_the_recipe_runs_both_stages_and_resumes_exactly(recipe: ModuleType, source: Path, monkeypatch: Any):
    more = ("--end_to_end_steps", "6", "--save_steps", "2", "--accumulation_steps", "2", "--learning_rate", "3e-3")
    whole, out = source.parent / "whole", source.parent / "out"
    recipe.main(arguments(source, whole, *more))
    figures = json.loads((whole / "result.json").read_text())["metrics"]
    assert figures["transferred"]["hidden_error"] < figures["converted"]["hidden_error"]
    assert figures["trained"]["hidden_error"] < figures["transferred"]["hidden_error"]
    with monkeypatch.context() as patch:
        save = recipe.save_state

        def interrupted(accelerator: Any, folder: Path, step: int, model: Any) -> None:
            save(accelerator, folder, step, model)
            if folder.name == "end_to_end" and step == 4:
                raise KeyboardInterrupt

        patch.setattr(recipe, "save_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(arguments(source, out, *more))
    recipe.main(arguments(source, out, *more, "--resume"))
    expected = AutoModelForMaskedLM.from_pretrained(whole / "model").state_dict()
    for name, value in AutoModelForMaskedLM.from_pretrained(out / "model").state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_recipe_trains_adapters(recipe: ModuleType, source: Path):
    out = source.parent / "lora"
    recipe.main(arguments(source, out, "--end_to_end_steps", "6", "--lora_rank", "2", "--learning_rate", "3e-3"))
    record = json.loads((out / "result.json").read_text())
    assert record["finished"] and set(record["metrics"]) == {"converted", "transferred", "trained"}
    model = AutoModelForMaskedLM.from_pretrained(out / "model")
    assert type(model).__name__ == "EfficientBertForMaskedLM"
    state, original = model.state_dict(), tiny_model("bert").state_dict()
    changed = {name for name, value in original.items() if not torch.equal(value, state[name])}
    assert changed and all(name.endswith("weight") and ".attention." in name for name in changed)
