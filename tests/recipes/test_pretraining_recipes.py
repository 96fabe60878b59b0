"""The pretraining recipes: the commands of the README, every way to load and train a model, and what they refuse."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fresh
import pytest
import torch
from pretraining import DROPOUT, JOBS, RECIPES, WINDOW, arguments, dataset, losses, recipe, result, source
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Trainer,
)

import hf_efficient as he
from hf_efficient.corpus import TextUse
from hf_efficient.testing import tiny_model
from hf_efficient.training import recipe as recipe_parts
from hf_efficient.training.loading import load_model

GLOBAL = '{"mechanism": "longformer", "attention_window": 8, "global_tokens": "first"}'
README = RECIPES / "README.md"
COMMANDS = [line for line in README.read_text().splitlines() if line.startswith("python recipes/")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sources of three families and a dataset."""
    root = tmp_path_factory.mktemp("sources")
    for family in ("bert", "roberta", "gpt2", "t5"):
        source(root / family, family)
    dataset(root / "data")
    return root


def go(name: str, folder: Path, output: Path, model: Any = None, **settings: Any) -> dict[str, Any]:
    """Run a recipe here on its tiny source; returns its result.json."""
    model = folder / JOBS[name][0] if model is None else model
    recipe(name).main(arguments(model, folder / "data", output, **settings))
    return result(output)


@pytest.fixture(scope="module")
def plain(folder) -> Any:
    """plain(name): output folder of the recipe's run with a window and no other settings; made once."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = folder / f"plain-{name}"
            go(name, folder, made[name], attention=WINDOW)
        return made[name]

    return run


# ---- as the README types them ------------------------------------------------------------------------------------


def test_readme_lists_every_recipe():
    listed = set(re.findall(r"^\| \[(\w+\.py)\]", README.read_text(), flags=re.MULTILINE))
    assert listed == {path.name for path in RECIPES.glob("*.py")}
    for command in COMMANDS:
        module = ast.parse((RECIPES / command.split()[1].partition("/")[2]).read_text())
        assert command in (ast.get_docstring(module) or ""), command
    assert {command.split()[1] for command in COMMANDS} >= {f"recipes/{name}.py" for name in JOBS}


@pytest.mark.parametrize("name", sorted(JOBS))
@pytest.mark.usefixtures("logged")
def test_readme_command(name, folder, tmp_path, monkeypatch, capsys):
    """As a script, with a tiny checkpoint for the one it names, and two steps; one of them in a fresh process."""
    command = next(line for line in COMMANDS if line.startswith(f"python recipes/{name}.py --model"))
    given = shlex.split(command)[2:]
    given[given.index("--model") + 1] = str(folder / JOBS[name][0])
    given[given.index("--output-dir") + 1] = str(tmp_path / "out")
    more = [f"--dataset={folder / 'data'}", "--max_steps=2", "--per_device_train_batch_size=2", "--block_length=64"]
    words = [f"recipes/{name}.py", *given, *more]
    if name == "mlm":
        done = fresh.python(*words, cwd=RECIPES.parent)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr().out
    record = result(tmp_path / "out")
    assert record["finished"] and list(record["metrics"]) == ["exact", "converted", "control", "trained"]
    for row in record["metrics"]:
        assert f"{row}: loss " in printed
    assert "tokens/s, peak memory" in printed
    for split in ("train", "validation"):
        assert f"{split:>10}: {TextUse(**record['data'][split])}" in printed
    assert record["training"]["epochs"] > 0
    for file in ("loss.png", "layers.png", "model/config.json", "checkpoint-2/complete.json"):
        assert (tmp_path / "out" / file).is_file()
    config = AutoConfig.from_pretrained(tmp_path / "out/model")
    assert config.efficient_attention[0]["mechanism"] == given[given.index("--attention") + 1]
    told = AutoTokenizer.from_pretrained(tmp_path / "out/model").model_max_length
    positions = he.families.family_of(config.model_type).positions.limit(config)  # T5 has none
    assert told == (positions or told) == int(given[given.index("--max-positions") + 1])


def test_refusal_is_one_sentence(folder, tmp_path):
    words = arguments(folder / "bert", folder / "data", tmp_path / "out", learning_rat=1)
    with pytest.raises(SystemExit) as stopped:
        recipe_parts.run(lambda: recipe("mlm").main(words))
    assert str(stopped.value).startswith("error: there is no setting --learning_rat. Did you mean learning_rate?")
    assert not (tmp_path / "out").exists()


# ---- what is measured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(JOBS))
def test_result(name, folder, plain, tmp_path):
    output = plain(name)
    record = result(output)
    stock = go(name, folder, tmp_path / "stock")
    metrics = record["metrics"]
    assert list(metrics) == ["exact", "converted", "control", "trained"] and list(stock["metrics"]) == [
        "exact",
        "trained",
    ]
    # full attention in the converted model is the unconverted model
    assert metrics["exact"]["loss"] == pytest.approx(stock["metrics"]["exact"]["loss"], rel=1e-5)
    assert len({metrics[row]["loss"] for row in metrics}) == 4
    assert metrics["trained"]["loss"] < metrics["converted"]["loss"]
    for row in metrics.values():
        assert row["perplexity"] == pytest.approx(float(torch.tensor(row["loss"]).exp()), rel=1e-5)
        assert row["bits_per_character"] > 0
    before, after = record["layer_errors"]["before"], record["layer_errors"]["after"]
    assert len(before["layers"]) == 2 and before["mechanism"] != after["mechanism"]
    training = record["training"]
    assert training["steps"] == 3 and training["tokens"] > 50 and training["peak_memory_mb"] > 50
    assert training["tokens_per_second"] == pytest.approx(training["tokens"] / training["seconds"])
    assert training["trained_parameters"] == training["parameters"] == record_parameters(output / "model")
    assert record["settings"]["attention"] == WINDOW and record["seed"] == 0
    report = json.loads((output / "model/conversion_report.json").read_text())
    assert report["source"] == str(folder / JOBS[name][0]) and report["tensors"]
    assert stock["layer_errors"] == {} and not (tmp_path / "stock/layers.png").exists()
    config = AutoConfig.from_pretrained(output / "model")
    assert config.use_cache is True


def record_parameters(path: Path) -> int:
    return sum(p.numel() for p in he.conversion.load_converted(path).parameters())


def test_bits_per_character_of_a_known_text(folder, tmp_path):
    """Words of three characters and a space: 4 characters a token, but for the ends. No token of GPT-2's says padding."""
    shutil.copytree(folder / "gpt2", tmp_path / "gpt2")
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "gpt2")
    assert AutoTokenizer.from_pretrained(tmp_path / "gpt2").pad_token_id is None
    record = go("clm", folder, tmp_path / "out", model=tmp_path / "gpt2", max_steps=5)
    exact = record["metrics"]["exact"]
    texts = [json.loads(line)["text"] for line in (folder / "data/validation.jsonl").read_text().splitlines()]
    tokens, characters = sum(len(text.split()) for text in texts), sum(map(len, texts))
    expected = exact["loss"] / torch.log(torch.tensor(2.0)).item() * tokens / characters
    assert exact["bits_per_character"] == pytest.approx(expected, rel=1e-5)
    # one epoch: every word of every text and its end, without what fills them up
    texts = [json.loads(line)["text"] for line in (folder / "data/train.jsonl").read_text().splitlines()]
    assert record["training"]["tokens"] == sum(len(text.split()) + 1 for text in texts)


def test_final_evaluation_is_that_of_the_saved_model(folder, tmp_path):
    """What model/ holds is what was measured: trained on nothing more, it starts where the run ended."""
    record = go("mlm", folder, tmp_path / "first", attention=GLOBAL, max_positions=256, block_length=64)
    again = go("mlm", folder, tmp_path / "second", model=tmp_path / "first/model", block_length=64)
    assert again["metrics"]["converted"]["loss"] == record["metrics"]["trained"]["loss"]
    assert again["conversion"] is None
    assert (tmp_path / "second/model/conversion_report.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "second/model")
    assert tokenizer.model_max_length == 256


# ---- ways to load ------------------------------------------------------------------------------------------------


def test_converted_checkpoint_as_it_is_and_reverted(folder, tmp_path):
    he.convert(str(folder / "bert"), "longformer", attention_window=8, max_positions=256).save(tmp_path / "converted")
    one = go("mlm", folder, tmp_path / "a", model=tmp_path / "converted", block_length=64)
    same = go("mlm", folder, tmp_path / "b", model=tmp_path / "converted", attention=WINDOW, block_length=64)
    assert one["metrics"]["trained"]["loss"] == same["metrics"]["trained"]["loss"]
    back = go("mlm", folder, tmp_path / "c", model=tmp_path / "converted", attention="none", block_length=64)
    assert list(back["metrics"]) == ["exact", "trained"]
    assert back["metrics"]["exact"]["loss"] == pytest.approx(one["metrics"]["exact"]["loss"], rel=1e-5)
    config = AutoConfig.from_pretrained(tmp_path / "c/model")
    assert (config.model_type, config.max_position_embeddings) == ("bert", 128)
    assert AutoTokenizer.from_pretrained(tmp_path / "c/model").model_max_length == 128
    assert not (tmp_path / "c/model/conversion_report.json").exists()


def test_fresh_head_is_announced(folder, tmp_path, logged):
    AutoModel.from_pretrained(folder / "bert").save_pretrained(tmp_path / "headless")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "headless")
    go("mlm", folder, tmp_path / "out", model=tmp_path / "headless", attention=WINDOW)
    head = r"so they start fresh and must be trained: .*cls\.predictions\.transform\.dense\.weight"
    assert any(re.search(head, line) for line in logged)


@pytest.mark.parametrize("name", sorted(JOBS))
def test_from_scratch(name, folder, tmp_path):
    family, attention = JOBS[name]
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "vocabulary_size": 300, "block_length": 32}
    pack = {} if family == "t5" else {"pack": True}
    record = go(name, folder, tmp_path / "out", model=f"scratch:{family}", attention=attention, **sizes, **pack)
    model = he.conversion.load_converted(tmp_path / "out/model")
    assert model.config.hidden_size == 16 and type(model).__name__.startswith("Efficient")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/model")
    assert len(tokenizer) == model.config.vocab_size <= 300 and tokenizer.model_max_length == 32
    assert len({record["metrics"][row]["loss"] for row in ("converted", "trained")}) == 2
    kept = tmp_path / "out/tokenizer/tokenizer.json"
    assert json.loads(kept.read_text())["model"]["vocab"] == tokenizer_vocabulary(tmp_path / "out/model")


def tokenizer_vocabulary(path: Path) -> Any:
    return json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]


# ---- ways to train -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), [("mlm", "bert"), ("mlm", "roberta"), ("clm", "gpt2")])
def test_packed_training(name, family, folder, tmp_path):
    """Packing changes which rows share a batch, not what a document sees: the evaluation is the same."""
    settings = {"model": folder / family, "attention": WINDOW, "block_length": 100}
    packed = go(name, folder, tmp_path / "packed", pack=True, **settings)
    if name == "clm":  # masks are chosen by row, so those of packed rows are others
        plain = go(name, folder, tmp_path / "plain", **settings)
        for row in ("exact", "converted", "control"):
            assert packed["metrics"][row]["loss"] == pytest.approx(plain["metrics"][row]["loss"], rel=1e-5), row
    assert len({packed["metrics"][row]["loss"] for row in ("exact", "converted", "control", "trained")}) == 4
    assert packed["training"]["tokens"] > 200


@pytest.mark.parametrize(("name", "attention"), [("mlm", ""), ("clm", WINDOW), ("span_corruption", WINDOW)])
def test_accumulation_equals_a_larger_batch(name, attention, folder, tmp_path):
    """Not four times the loss and gradient of one; rows have the same masks in either, and as many labels each."""
    still = source(tmp_path / "still", JOBS[name][0], **dict.fromkeys(DROPOUT[JOBS[name][0]], 0.0))
    same = dict(attention=attention, drop_short=True, block_length=16, max_steps=1)
    same |= {"mlm_probability": 1} if name == "mlm" else {}
    logs = []
    for size, steps in ((4, 1), (1, 4)):
        output = tmp_path / f"{size}"
        record = go(
            name,
            folder,
            output,
            model=still,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **same,
        )
        logs.append(record["training"]["log"][0])
    for figure in ("loss", "grad_norm"):
        assert logs[0][figure] == pytest.approx(logs[1][figure], rel=1e-5)


@pytest.mark.parametrize("name", sorted(JOBS))
def test_bf16_and_gradient_checkpointing(name, folder, plain, tmp_path):
    expected = losses(plain(name))
    go(name, folder, tmp_path / "checkpointed", attention=WINDOW, activation_checkpointing=True)
    assert losses(tmp_path / "checkpointed") == pytest.approx(expected, rel=1e-5)
    lower = go(name, folder, tmp_path / "bf16", attention=WINDOW, bf16=True)
    assert losses(tmp_path / "bf16") != expected
    assert losses(tmp_path / "bf16") == pytest.approx(expected, rel=0.05)
    assert lower["metrics"]["trained"]["loss"] < lower["metrics"]["converted"]["loss"]
    weights = load_file(tmp_path / "bf16/model/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("name", sorted(JOBS))
def test_lora_is_merged(name, folder, tmp_path):
    """The saved model is a plain converted one; projections and mechanisms changed, nothing else did."""
    record = go(name, folder, tmp_path / "out", attention=GLOBAL if name != "clm" else WINDOW, lora_rank=2)
    assert record["training"]["trained_parameters"] < record["training"]["parameters"] / 3
    model = he.conversion.load_converted(tmp_path / "out/model")
    before = tiny_state(folder / JOBS[name][0])
    changed = {
        key for key, tensor in model.state_dict().items() if key in before and not torch.equal(tensor, before[key])
    }
    attention = ("query.weight", "key.weight", "value.weight", "attention.output.dense.weight", "c_attn.weight")
    attention += ("attn.c_proj.weight", ".q.weight", ".k.weight", ".v.weight", ".o.weight")
    assert changed and all(key.endswith(attention) for key in changed), changed
    if name == "mlm":
        untrained = he.convert(str(folder / "bert"), GLOBAL).model.state_dict()
        own = [key for key in untrained if ".efficient." in key]
        assert own and any(not torch.equal(untrained[key], model.state_dict()[key]) for key in own)
    again = go(name, folder, tmp_path / "again", model=tmp_path / "out/model")
    assert again["metrics"]["converted"]["loss"] == pytest.approx(record["metrics"]["trained"]["loss"], rel=1e-5)


def tiny_state(path: Path) -> dict[str, torch.Tensor]:
    return he.conversion.load_stock(str(path))[0].state_dict()


def test_fresh_head_is_trained_beside_adapters(folder, tmp_path):
    AutoModel.from_pretrained(folder / "bert").save_pretrained(tmp_path / "headless")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "headless")
    go("mlm", folder, tmp_path / "out", model=tmp_path / "headless", lora_rank=2)
    torch.manual_seed(0)
    head = AutoModelForMaskedLM.from_pretrained(tmp_path / "out/model").cls.predictions.transform.dense
    assert head.bias.abs().max() > 0  # fresh biases are zero


COMPILED = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import clm, mlm, span_corruption
from torch._dynamo.utils import counters

for recipe, words in zip((clm, mlm, span_corruption), sys.argv[2:]):
    torch._dynamo.reset()
    recipe.main(words.split())
    print("graphs", counters["stats"].pop("unique_graphs"))
"""


@pytest.mark.slow
def test_compiled(folder, tmp_path):
    settings = {"attention": '{"mechanism":"longformer","attention_window":8}', "block_length": 32, "max_steps": 2}
    commands = []
    layers = {"gpt2": "n_layer", "bert": "num_hidden_layers", "t5": "num_layers"}
    for name in ("clm", "mlm", "span_corruption"):
        family = JOBS[name][0]
        model = source(tmp_path / family, family, **{layers[family]: 1})
        go(name, folder, tmp_path / f"plain-{name}", model=model, **settings)
        words = arguments(model, folder / "data", tmp_path / name, **settings)
        # traced and differentiated as for the default backend, without generating code
        commands.append(" ".join([*words, "--torch_compile_backend=aot_eager", "--save_steps=1"]))
    done = fresh.python("-c", COMPILED, RECIPES, *commands)
    assert done.returncode == 0, done.stderr
    # the evaluations are not compiled, and every batch has the same shape
    graphs = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("graphs")]
    assert len(graphs) == 3 and all(1 <= count <= 4 for count in graphs), graphs
    for name in ("clm", "mlm", "span_corruption"):
        # the same rows, filled up to one length: padding is no text
        compiled, plain = result(tmp_path / name), result(tmp_path / f"plain-{name}")
        for row in ("exact", "converted", "control"):
            assert compiled["metrics"][row]["loss"] == pytest.approx(plain["metrics"][row]["loss"], rel=1e-5), (
                name,
                row,
            )
        assert compiled["training"]["tokens"] == plain["training"]["tokens"]
        # dropout draws other numbers in compiled code
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / f"plain-{name}"), rel=0.2)
        assert he.conversion.load_converted(tmp_path / name / "model") is not None


def test_reports_and_evaluations_on_the_way(folder, tmp_path):
    go(
        "clm",
        folder,
        tmp_path / "out",
        eval_strategy="steps",
        eval_steps=2,
        report_to="tensorboard",
        max_eval_rows=2,
        max_train_rows=6,
    )
    log = result(tmp_path / "out")["training"]["log"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 3]
    assert list((tmp_path / "out/runs").rglob("events.out.tfevents.*"))


# ---- what is refused ---------------------------------------------------------------------------------------------


def refusals(folder: Path) -> list[tuple[str, dict[str, Any], str]]:
    headless = folder / "no-tokenizer"
    if not headless.exists():
        tiny_model("bert").save_pretrained(headless)
        tiny_model("t5").save_pretrained(folder / "no-sentinels")
        tiny_tokenizer("t5").save_pretrained(folder / "no-sentinels")
        he.convert(str(folder / "bert"), "longformer", attention_window=8).save(folder / "converted")
    sharing = '{"mechanism": "linformer", "rank": 8, "sharing": "layerwise"}'
    return [
        ("mlm", {"text_column": "body"}, r"no column 'body' in train; its columns are text"),
        ("mlm", {"drop_short": True, "block_length": 100}, "none has 100 tokens. Lower the block length"),
        ("mlm", {"pack": True}, "unconverted bert models let the documents of a row see each other"),
        ("mlm", {"pack": True, "torch_compile": True, "attention": "local"}, "pack and torch_compile"),
        ("span_corruption", {"pack": True}, "there is no setting --pack"),
        ("mlm", {"block_length": 200}, "block_length=200, but the model has 128 positions.*--max_positions 200"),
        ("mlm", {"max_positions": 256}, "max_positions=256 lengthens a checkpoint while it is converted"),
        ("mlm", {"positions": "tile"}, "positions=tile lengthens a checkpoint while it is converted"),
        ("mlm", {"model": folder / "converted", "positions": "interpolate"}, "with positions=tile, not interpolate"),
        ("clm", {"model": "scratch:gpt2", "positions": "tile"}, "as many as max_positions says; leave it out"),
        ("mlm", {"model": headless}, "no-tokenizer has no tokenizer"),
        ("span_corruption", {"model": folder / "no-sentinels"}, "has 0 sentinel tokens"),
        ("mlm", {"attention": sharing, "lora_rank": 2}, "its own copy of .*, which the layers share"),
        ("mlm", {"attention": "longfomer"}, "unknown mechanism 'longfomer'"),
        ("clm", {"attention": "linformer"}, "linformer can't be causal"),
        (
            "mlm",
            {"model": folder / "converted", "attention": "local"},
            "already converted, to .* asks for something else",
        ),
        ("mlm", {"model": folder / "converted", "max_positions": 512}, "has 128 positions, not max_positions=512"),
        ("mlm", {"lr_scheduler_type": "zigzag"}, "zigzag"),
        ("mlm", {"report_to": "carrier-pigeon"}, "carrier-pigeon"),
        ("clm", {"model": "scratch:bert"}, "this recipe starts scratch:gpt2 from scratch"),
        (
            "clm",
            {"model": "scratch:gpt2", "hidden_size": 30, "heads": 4},
            "hidden_size=30 can't be shared out to heads=4",
        ),
        ("clm", {"model": "scratch:gpt2", "vocabulary_size": 10}, "vocabulary_size=10 is too small"),
        ("mlm", {"mlm_probability": 0}, "mlm_probability=0.0 is not possible; it must be > 0"),
        ("span_corruption", {"block_length": 500}, "25 spans .* 26 sentinels of the 20.* block_length of at most 390"),
    ]


@pytest.mark.parametrize("number", range(24))
def test_refused_before_any_training(number, folder, tmp_path, monkeypatch):
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(Trainer, "train", never)
    monkeypatch.setattr(Trainer, "evaluate", never)
    cases = refusals(folder)
    assert len(cases) == 24
    name, settings, message = cases[number]
    with pytest.raises(ValueError, match=message) as caught:
        go(name, folder, tmp_path / "out", **settings)
    assert "\n\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "head", "expected"), [
    ("bert", AutoModelForMaskedLM, False), ("t5", AutoModelForSeq2SeqLM, False), ("gpt2", AutoModelForCausalLM, True),
])  # fmt: skip
def test_stock_heads_are_told_about_loss_keywords(family, head, expected, folder):
    """BERT's and T5's ignore num_items_in_batch, GPT-2's honours it."""
    model, _ = load_model(SimpleNamespace(model=str(folder / family)), head)
    assert model.accepts_loss_kwargs is expected
