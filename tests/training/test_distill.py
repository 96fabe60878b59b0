"""distill: both stages, what they report and write, resuming exactly, and the recipe that does the same in a plain loop."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from paths import RECIPES
from safetensors.torch import load_file
from tiny import tiny_tokenizer, words
from transfers import pair_of
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

import hf_efficient as he
from hf_efficient.cards.checkpoint import checkpoint_card
from hf_efficient.conversion.loading import load_converted
from hf_efficient.corpus import TextUse, text_batches
from hf_efficient.evaluation.fidelity import compare
from hf_efficient.patching.exact import Teacher, converted_layers
from hf_efficient.testing import assert_close, tiny_model
from hf_efficient.training import distill as module
from hf_efficient.training import layer_errors
from hf_efficient.training.callbacks import NonFiniteLoss
from hf_efficient.training.data.distillation import DistillationData, distillation_data, head_loss
from hf_efficient.training.distill import distill
from hf_efficient.training.settings import parse_settings

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
    training = report["training"]
    assert training["steps"] == 16 and training["tokens_per_second"] == training["tokens"] / training["seconds"]
    assert training["tokens"] <= 2 * 8 * 2 * (SMALL | more)["length"] and training["peak_memory_mb"] > 0
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
    model = converted("gpt2", "hedgehog")
    batches = text_batches(tiny_tokenizer("gpt2"), HELD_OUT, 48, 2, model)
    teacher = Teacher(model)
    before = compare(model, teacher, batches), layer_errors(model, batches)
    source = compare(model, tiny_model("gpt2"), batches)
    report = run(model, tmp_path / "out")
    losses = {name: {k: v.pop(k) for k in ("loss", "source_loss")} for name, v in report["metrics"].items()}
    assert len({figures["source_loss"] for figures in losses.values()}) == 1
    assert len({figures["loss"] for figures in losses.values()}) == 3
    assert report["metrics"]["converted"] == before[0] == source
    assert report["layer_errors"] == {"before": before[1], "after": layer_errors(model, batches)}
    assert report["metrics"]["trained"] == compare(model, tiny_model("gpt2"), batches), (
        "the teacher is not the original"
    )
    assert "transferred" not in report["metrics"]


SHORT = [words(n, start=n) for n in (3, 5, 9, 14) * 6]


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5"])
@pytest.mark.parametrize("long", [[], [words(100)]], ids=["short", "one-long"])
def test_every_text_is_trained_on(family: str, long: list[str], tmp_path: Path):
    """However many rows others fill; and the result says how much that is."""
    tokenizer, texts = tiny_tokenizer(family), SHORT + long
    data = distillation_data(
        tiny_model(family), tokenizer, texts, [words(90), words(7)], length=48, batch_size=2, eval_texts=1, seed=0
    )
    special = set(tokenizer.all_special_ids)
    given = Counter(i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"])
    read = Counter(i for row in data.rows + data.guard for i in row if i not in special)
    assert read.total() + read_masked(data, tokenizer) == given.total()
    assert data.use["train"] == TextUse(len(texts), len(texts), given.total(), given.total())
    measured = 48 - tokenizer.num_special_tokens_to_add()
    assert data.use["held-out"] == TextUse(2, 1, 97, measured)
    if family in ("gpt2", "t5"):
        assert read == given


def read_masked(data: DistillationData, tokenizer: Any) -> int:
    return sum(row.count(tokenizer.mask_token_id) for row in data.rows + data.guard)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5"])
def test_a_head_is_measured_on_what_it_was_trained_for(family: str):
    model, tokenizer = tiny_model(family), tiny_tokenizer(family)
    settings: dict[str, Any] = dict(length=48, batch_size=2, eval_texts=3, seed=3)
    data = distillation_data(model, tokenizer, TEXTS, [*HELD_OUT[:2], words(20)], **settings)
    again = distillation_data(model, tokenizer, TEXTS, [*HELD_OUT[:2], words(20)], **settings)
    assert data.rows == again.rows and all(map(torch.equal, data.labels or [], again.labels or []))
    if family == "t5":
        assert data.labels is None and head_loss(model, model, data) == {}
        return
    is_masked, total, count = family != "gpt2", 0.0, 0
    assert (read_masked(data, tokenizer) > 0) == is_masked
    for batch, labels, plain in zip(
        data.batches, data.labels or [], text_batches(tokenizer, [*HELD_OUT[:2], words(20)], 48, 2, model), strict=True
    ):
        wanted = labels != -100
        assert (
            torch.equal(labels[wanted], plain["input_ids"][wanted])
            and not (wanted & (batch["attention_mask"] == 0)).any()
        )
        assert not ((batch["input_ids"] != plain["input_ids"]) & ~wanted).any()
        assert (wanted.float().mean() < 0.4) == is_masked
        logits = model.eval()(**batch).logits
        logits, labels = (logits, labels) if is_masked else (logits[:, :-1], labels[:, 1:])
        total += torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").item()
        count += int((labels != -100).sum())
    found = head_loss(model, model, data)
    assert found == {"loss": pytest.approx(total / count, rel=1e-5), "source_loss": found["loss"]}


def test_mechanisms_without_parameters_learn_end_to_end_alone(tmp_path: Path):
    with pytest.raises(ValueError, match="give end_to_end_steps"):
        run(converted("bert", "performer"), tmp_path / "none")
    report = run(converted("bert", "performer"), tmp_path / "out", end_to_end_steps=8, end_to_end_learning_rate=2e-3)
    assert any("skipped" in note for note in report["training"]["notes"])
    assert report["metrics"]["trained"]["hidden_error"] < report["metrics"]["converted"]["hidden_error"]
    assert not (tmp_path / "out" / "transfer").exists()


def test_blocks_of_layers(tmp_path: Path):
    """One block of all layers, or a block per layer: every layer learns the same, up to Adam's ε.

    The layers' errors differ by orders of magnitude, so that one gradient norm over all of them would be felt.
    """
    whole, blocks = converted(), converted()
    for model in (whole, blocks):
        with torch.no_grad():
            for parameter in converted_layers(model)["bert.encoder.layer.0.attention.self"].efficient.parameters():
                parameter.mul_(10)
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
        assert_close(value, expected[name], 1e-4, name)


class _Interrupt(TrainerCallback):
    def __init__(self, stage: str, step: int):
        self.stage, self.step = stage, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step == self.step < state.max_steps:
            raise KeyboardInterrupt

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("stage", "step"), [("transfer", 6), ("end_to_end", 5), ("end_to_end", 8)])
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
    for name in ("steps", "tokens"):
        assert resumed["training"][name] == report["training"][name] > 0
    stages = [entry["stage"] for entry in resumed["training"]["log"]]
    assert stages == [entry["stage"] for entry in report["training"]["log"]], "a stage's log was lost"
    # nothing is left to do, so nothing is made worse: figures stay those of training
    again = run(converted(), tmp_path / "out", **settings, resume=True)
    assert again["training"]["seconds"] == resumed["training"]["seconds"]


def test_impossible_settings_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="convert it with"):
        distill(tiny_model("bert"), tiny_tokenizer("bert"), TEXTS, output_dir=tmp_path)
    rates = [dict(end_to_end_learning_rate=rate) for rate in (0.0, -1.0, float("nan"))]
    for wrong in (dict(length=0), dict(steps=-1), dict(batch_size=0), *rates):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            run(converted(), tmp_path / "x", **wrong)
    with pytest.raises(ValueError, match="held out"):
        distill(converted(), tiny_tokenizer("bert"), TEXTS[:1], output_dir=tmp_path / "x")
    with pytest.raises(ValueError, match="at least 2"):
        distill(
            converted(), tiny_tokenizer("bert"), [words(50)], held_out=HELD_OUT, output_dir=tmp_path / "x", length=120
        )
    assert not list(tmp_path.iterdir())


# ---- the recipe --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distill_recipe", RECIPES / "distill.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """With dropout, which must be the same after a run was resumed."""
    folder = tmp_path / "source"
    model = tiny_model("bert")
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1
    model.save_pretrained(folder)
    tiny_tokenizer("bert").save_pretrained(folder)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS + HELD_OUT))
    return folder


def arguments(source: Path, output: Path, *more: str) -> list[str]:
    fixed = f"--model {source} --output_dir {output} --dataset {source.parent / 'texts.jsonl'} --length 48 --steps 6"
    return [*fixed.split(), "--use_cpu", "--attention", '{"mechanism": "linformer", "rank": 8}', *more]


def test_the_recipe_runs_both_stages_and_resumes_exactly(recipe: ModuleType, source: Path, monkeypatch: Any):
    more = (
        "--end_to_end_steps",
        "6",
        "--save_steps",
        "2",
        "--gradient_accumulation_steps",
        "2",
        "--learning_rate",
        "3e-3",
    )
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
    for folder in (whole, out):
        training = json.loads((folder / "result.json").read_text())["training"]
        assert training["steps"] == 12 and 12 * 2 * 2 * 24 < training["tokens"] < 12 * 2 * 2 * 48, (
            "not every row is full"
        )
        assert training["tokens_per_second"] == training["tokens"] / training["seconds"]
    # the card's command is one that this file reads
    command = shlex.split(str(checkpoint_card(out / "model")).split("```bash\n")[1].split("\n```")[0])
    assert command[:2] == ["python", "recipes/distill.py"]
    assert parse_settings(recipe.Settings, command[2:]).end_to_end_steps == 6
    # what it ended with, whatever of it was the best
    last = Path("end_to_end", "checkpoint-6", "model.safetensors")
    ended = load_file(out / last)
    assert all(torch.equal(ended[name], value) for name, value in load_file(whole / last).items())
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


def test_the_report_of_a_conversion_stays_with_the_weights(recipe: ModuleType, source: Path):
    checkpoint = source.parent / "checkpoint"
    he.convert(source, "linformer", rank=8).save(checkpoint)
    report = json.loads((checkpoint / "conversion_report.json").read_text())
    recipe.main([*arguments(checkpoint, source.parent / "loop")[:-2], "--steps", "1"])
    model = load_converted(checkpoint)
    distill(model, tiny_tokenizer("bert"), TEXTS, output_dir=source.parent / "call", length=48, steps=1, cpu=True)
    for out in ("loop", "call"):
        kept = json.loads((source.parent / out / "model" / "conversion_report.json").read_text())
        assert [step["what"] for step in kept["history"]] == ["convert", "distill"]
        assert kept | {"history": report["history"]} == report, out
        assert str(source) in str(checkpoint_card(source.parent / out / "model")), out


def test_the_recipe_refuses(recipe: ModuleType, source: Path, monkeypatch: Any):
    out = source.parent / "out"
    with pytest.raises(ValueError, match=r"end_to_end_learning_rate=0.0 is not possible; it must be above 0"):
        recipe.main(arguments(source, out, "--end_to_end_steps", "2", "--end_to_end_learning_rate", "0"))
    texts = source.parent / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in (words(50), words(60))))
    with pytest.raises(ValueError, match="1 texts give 1 row of 120 tokens; at least 2 are needed"):
        recipe.main(arguments(source, out, "--length", "120"))
    assert not out.exists()
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    with pytest.raises(
        NonFiniteLoss, match=r"transfer, step 2: the loss is (nan|inf).*Start anew in another --output_dir"
    ):
        recipe.main(arguments(source, out, "--learning_rate", "1e30"))
