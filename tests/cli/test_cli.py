"""The command line as a user meets it: every command with and without --json, the whole way there and back, errors."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import document, error, run
from tiny import SPECIALS, converted, save_source, tiny_tokenizer, words
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.main import get_command

import hf_efficient as he
from hf_efficient.attention.base.pattern import SHARED_OPTIONS
from hf_efficient.attention.base.registry import training_words
from hf_efficient.benchmarks.suites import SUITES
from hf_efficient.cli import catalogue
from hf_efficient.cli.app import app
from hf_efficient.cli.options import as_text, parse_layers, parse_option, read_texts
from hf_efficient.conversion.loading import load_converted, load_stock
from hf_efficient.evaluation.verify import Check, FidelityReport
from hf_efficient.profiling.memory import fresh_python
from hf_efficient.visualize.visibility import drawable_mechanisms

FAMILIES = sorted(SPECIALS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {family: save_source(root / family, family) for family in FAMILIES}


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(words(20 + 15 * i, i) for i in range(4)) + "\n")
    return path


def same_weights(actual: Path, expected: Path) -> None:
    ours, theirs = (load_stock(str(path))[0] for path in (actual, expected))
    assert type(ours) is type(theirs)
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{different} differ"


# ---- convert -----------------------------------------------------------------------------------------------------


def test_convert_prints_where_tensors_came_from(sources, tmp_path):
    out = tmp_path / "out"
    result = run(
        "convert", sources["bert"], out, "--attention", "longformer", "--attention-window", 8, "--max-positions", 256
    )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert ["extended", "1", "bert.embeddings.position_embeddings.weight"] in rows
    assert ["random", "0", ""] in rows
    assert ["initialised", "12", "copy of the query weight"] in rows
    model = load_converted(out)
    assert rows[0][:2] == ["copied", str(len(model.state_dict()) - 13)]
    assert model.config.max_position_embeddings == 256
    assert AutoTokenizer.from_pretrained(out).model_max_length == 256


def test_convert_json_holds_the_report(sources, tmp_path):
    out = tmp_path / "out"
    given = document("convert", sources["gpt2"], out, "--attention", "local", "--attention-window", 8, "--layers", "1")
    saved = json.loads((out / "conversion_report.json").read_text())
    assert given.pop("out") == str(out)
    assert given.pop("counts") == {"copied": len(saved["tensors"]), "extended": 0, "initialised": 0, "random": 0}
    assert given.pop("training") == {"local": "works without training; training restores long range"}
    assert "unknown to the tokenizer" in given.pop("verdict")["text"]
    assert given == saved


@pytest.mark.usefixtures("logged")
def test_convert_names_random_tensors(sources, tmp_path):
    # a classifier whose head was lost: transformers draws a new one
    source = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_pretrained(sources["bert"]).save_pretrained(source)
    settings = json.loads((source / "config.json").read_text())
    settings["architectures"] = ["BertForTokenClassification"]
    (source / "config.json").write_text(json.dumps(settings))
    from safetensors.torch import load_file, save_file

    state = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    result = run("convert", source, tmp_path / "out", "--attention", "local", "--attention-window", 8)
    assert "warning:" in result.stderr and "no tokenizer" in result.stderr
    random = [line for line in result.stdout.splitlines() if "classifier." in line]
    assert len(random) == 2 and "random" in random[0] and "2" in random[0]
    assert any("not used" in line and "bert.pooler" in line for line in result.stdout.splitlines())


@pytest.mark.parametrize("name", he.list_mechanisms())
def test_every_option_of_every_mechanism_has_its_name(name):
    command = get_command(app).commands["convert"]  # type: ignore[attr-defined]
    flags = {flag for parameter in (*command.params, *command.mechanism_options()) for flag in parameter.opts}
    own = {"attention", "config", "max_positions", "positions", "revision", "option", "overwrite", "as_json"}
    fields = [field.name for field in dataclasses.fields(he.get_mechanism(name).Config)]
    missing = [field for field in fields if "--" + field.replace("_", "-") not in flags]
    assert not missing
    assert not own & set(fields), "these would only be reachable through --option"


@pytest.mark.parametrize(
    "attention, options, expected",
    [
        ("longformer", ["--attention-window", "4,8"], {"attention_window": [4, 8]}),
        ("longformer", ["--attention-window", "8", "--global-tokens", "0,5"], {"global_tokens": [0, 5]}),
        ("longformer", ["--attention-window=8", "--global-tokens", "first"], {"global_tokens": "first"}),
        ("bigbird", ["--block-size", "4", "--num-random-blocks", "1"], {"block_size": 4, "num_random_blocks": 1}),
        ("linformer", ["--rank", "16", "--max-length", "none"], {"rank": 16, "max_length": None}),
        ("performer", ["--option", "num_features=16", "--option", "seed=3"], {"num_features": 16, "seed": 3}),
        ("performer", ["--num-features", "16", "--layers", "0-1"], {"num_features": 16, "layers": [0, 1]}),
        ("local", ["--attention-window", "8", "--side", "encoder"], {"side": "encoder"}),
    ],
)
def test_options_are_read_by_their_type(attention, options, expected, sources, tmp_path):
    # options may stand before the arguments as well
    given = document("convert", *options, sources["bert"], tmp_path / "out", "--attention", attention)
    (group,) = given["efficient_attention"]
    assert expected.items() <= group.items()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exotic(he.EfficientAttentionConfig):
    mechanism = "exotic"
    rate: float = 0.5
    shared: bool = False
    pairs: dict | None = None
    mode: str | None = None


def test_option_types_that_no_mechanism_may_have_yet():
    assert parse_option(Exotic, "rate", "0.25") == 0.25
    assert parse_option(Exotic, "shared", "true") is True and parse_option(Exotic, "shared", "False") is False
    assert parse_option(Exotic, "pairs", '{"a": [1]}') == {"a": [1]} and parse_option(Exotic, "pairs", "none") is None
    assert parse_option(Exotic, "mode", "none") is None and parse_option(Exotic, "mode", "7") == "7"
    with pytest.raises(ValueError, match=r"--shared 'yes' can't be read: exotic wants bool"):
        parse_option(Exotic, "shared", "yes")
    with pytest.raises(ValueError, match=r"exotic has no option --size .*; its options are --layers, --side, --rate"):
        parse_option(Exotic, "size", "3")


def test_layers():
    assert parse_layers("0,1,2") == (0, 1, 2)
    assert parse_layers("0-2, 7") == (0, 1, 2, 7)
    for text in ("", "a", "3-1", "0-", "-1", "0,,1"):
        with pytest.raises(ValueError, match=r"write 0,1,2 or 0-5"):
            parse_layers(text)


def test_hybrid_from_a_file(sources, tmp_path):
    groups = [
        {"mechanism": "local", "attention_window": 8, "layers": [0]},
        {"mechanism": "bigbird", "block_size": 4, "layers": [1]},
    ]
    (tmp_path / "hybrid.json").write_text(json.dumps(groups))
    given = document("convert", sources["roberta"], tmp_path / "out", "--config", tmp_path / "hybrid.json")
    assert [group["mechanism"] for group in given["efficient_attention"]] == ["local", "bigbird"]
    layers = document("inspect", tmp_path / "out")["layers"]
    assert [(layer["layer"], layer["mechanism"]) for layer in layers] == [(0, "local"), (1, "bigbird")]
    assert layers[1]["options"]["block_size"] == 4


def test_overwrite_replaces_a_checkpoint_and_nothing_else(sources, tmp_path):
    out, other = tmp_path / "out", tmp_path / "documents"
    options = ["--attention", "local", "--attention-window", 8]
    run("convert", sources["bert"], out, *options)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "exists" in error("convert", sources["bert"], out, *options)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    run("convert", sources["gpt2"], out, *options, "--overwrite")
    assert load_converted(out).config.model_type == "efficient_gpt2"
    assert "is the source itself" in error("convert", sources["bert"], sources["bert"], *options, "--overwrite")

    other.mkdir()
    (other / "thesis").write_text("years of work")
    assert "is not a checkpoint folder" in error("convert", sources["bert"], other, *options, "--overwrite")
    assert (other / "thesis").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "out"]


CONVERT_ERRORS: dict[str, tuple[str, list[str], str]] = {
    "unknown mechanism": (
        "bert",
        ["--attention", "flash"],
        "unknown mechanism 'flash'; the registered ones are axial, bigbird",
    ),
    "no mechanism": ("bert", [], "give either --attention (one of axial, bigbird"),
    "unknown option": (
        "bert",
        ["--attention", "longformer", "--bananas", "3"],
        "no option --bananas; the options of longformer are --attention-window, --dilation, --global-tokens",
    ),
    "mistyped option of the command": ("bert", ["--max-position", "300"], "(did you mean '--max-positions' or"),
    "unknown option of no mechanism": ("bert", ["--bananas"], "the options of all mechanisms together are"),
    "option of another mechanism": (
        "bert",
        ["--attention", "longformer", "--rank", "3"],
        "longformer has no option --rank; its options are --layers, --side, --implementation, --attention-window",
    ),
    "unknown NAME=VALUE": ("bert", ["--attention", "local", "--option", "rank=3"], "local has no option --rank"),
    "NAME without VALUE": ("bert", ["--attention", "local", "--option", "dilation"], "write --option NAME=VALUE"),
    "given twice": (
        "bert",
        ["--attention", "local", "--dilation", "1", "--option", "dilation=2"],
        "--dilation is given twice",
    ),
    "odd window": ("bert", ["--attention", "local", "--attention-window", "7"], "attention_window=7 is not possible"),
    "window of letters": (
        "bert",
        ["--attention", "longformer", "--attention-window", "wide"],
        "--attention-window 'wide' can't be read: longformer wants int",
    ),
    "layers": ("bert", ["--attention", "local", "--layers", "a-b"], "--layers 'a-b' can't be read"),
    "missing layer": ("bert", ["--attention", "local", "--layers", "0-5"], "layers [2, 3, 4, 5] do not exist"),
    "side": ("bert", ["--attention", "local", "--side", "decoder"], "side='decoder': this bert model has encoder"),
    "positions": ("bert", ["--attention", "local", "--positions", "guess"], "it must be one of tile, interpolate"),
    "fewer positions": ("bert", ["--attention", "local", "--max-positions", "64"], "would drop positions"),
    "causal": ("gpt2", ["--attention", "linformer", "--rank", "16"], "linformer can't be causal"),
    "third argument": ("bert", ["more", "--attention", "local"], "unexpected argument 'more'"),
    "missing file": ("bert", ["--config", "nowhere.json"], "nowhere.json"),
}


@pytest.mark.parametrize("case", CONVERT_ERRORS)
def test_convert_errors(case, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family, options, message = CONVERT_ERRORS[case]
    assert message in error("convert", sources[family], tmp_path / "out", *options)
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_unknown_options_are_named_wherever_they_stand(sources, tmp_path):
    message = error("convert", "--ranks", "3", sources["bert"], tmp_path / "out", "--attention", "linformer")
    assert "no option --ranks (did you mean '--rank'?); the options of linformer are" in message


@pytest.mark.parametrize(
    "content, message",
    [
        ("[", "Expecting value"),
        ("[]", "an empty list converts nothing"),
        ("[1]", "1 is no mechanism"),
        ('{"attention_window": 8}', "names no mechanism"),
        ('{"mechanism": "local", "rank": 8}', "local has no option 'rank'"),
        ('{"mechanism": "local", "layers": 3}', "layers"),
    ],
)
def test_config_file_errors_name_the_file(content, message, sources, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    given = error("convert", sources["bert"], tmp_path / "out", "--config", path)
    assert given.startswith(str(path)) and message in given


def test_options_go_into_the_config_file(sources, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"mechanism": "local", "attention_window": 8}')
    for option in (["--attention-window", 8], ["--layers", "0"], ["--option", "dilation=2"]):
        message = error("convert", sources["bert"], tmp_path / "out", "--config", path, *option)
        assert "not beside --config" in message
    message = error("convert", sources["bert"], tmp_path / "out", "--config", path, "--attention", "local")
    assert "give either" in message


def test_sources_that_are_not_there(tmp_path):
    for command in (
        ["convert", tmp_path / "missing", tmp_path / "out", "--attention", "local"],
        ["verify", tmp_path / "missing", tmp_path / "missing"],
        ["revert", tmp_path / "missing", tmp_path / "out"],
        ["inspect", tmp_path / "missing"],
    ):
        assert error(*command) == f"{tmp_path / 'missing'} does not exist."
    assert "no-such-model" in error("inspect", "nobody/no-such-model") or "connect" in error(
        "inspect", "nobody/nothing"
    )


def test_damaged_weights(sources, tmp_path):
    source = save_source(tmp_path / "source", "bert")
    out = converted(tmp_path / "converted", "bert")
    for path in (source, out):
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    message = error("convert", source, tmp_path / "out", "--attention", "local")
    assert f"the weights of {source} can't be read" in message
    assert f"the weights of {out} can't be read" in error("revert", out, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_inspect_revert_gives_the_original_back(family, sources, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    run("convert", sources[family], out, "--attention", "longformer", "--attention-window", 8, "--max-positions", 256)
    facts = document("inspect", out)
    assert facts["converted"] and facts["family"] == family and facts["source"] == str(sources[family])
    assert facts["max_positions"] == (None if family == "t5" else 256)
    used = [(layer["side"], layer["mechanism"]) for layer in facts["layers"]]
    side = "decoder" if family == "gpt2" else "encoder"
    assert used == [(side, "longformer")] * 2 + ([("decoder", "full attention")] * 2 if family == "t5" else [])
    assert facts["layers"][0]["options"]["attention_window"] == 8

    told = document("revert", out, back)
    assert told["max_positions"] == (None if family == "t5" else 128)
    same_weights(back, sources[family])
    original, reverted = (json.loads((path / "config.json").read_text()) for path in (sources[family], back))
    assert original == reverted
    assert AutoTokenizer.from_pretrained(out).model_max_length == 256
    assert AutoTokenizer.from_pretrained(back).model_max_length == 128
    assert AutoTokenizer.from_pretrained(back).get_vocab() == tiny_tokenizer(family).get_vocab()
    assert not (back / "conversion_report.json").exists()


def test_revert_prints_a_table_and_keeps_what_exists(sources, tmp_path):
    out, back = converted(tmp_path / "out", "bert"), tmp_path / "back"
    result = run("revert", out, back)
    assert "BertForMaskedLM" in result.stdout
    before = (back / "config.json").read_bytes()
    assert "exists" in error("revert", out, back)
    assert (back / "config.json").read_bytes() == before
    run("revert", out, back, "--overwrite")
    assert "without efficient attention" in error("revert", back, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_sentence_transformers_settings_go_there_and_back(sources, tmp_path):
    source = save_source(tmp_path / "source", "bert")
    (source / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")

    def length(path: Path) -> int:
        return json.loads((path / "sentence_bert_config.json").read_text())["max_seq_length"]

    options = ["--attention", "local", "--attention-window", 8]
    run("convert", source, tmp_path / "same", *options)
    assert length(tmp_path / "same") == 32, "nobody asked for longer texts"
    run("convert", source, tmp_path / "longer", *options, "--max-positions", 256)
    assert length(tmp_path / "longer") == 256
    run("revert", tmp_path / "longer", tmp_path / "back")
    assert length(tmp_path / "back") == 32
    assert (tmp_path / "back" / "1_Pooling" / "config.json").is_file()


def test_json_is_alone_on_stdout(sources, tmp_path, monkeypatch):
    def noisy(*arguments: Any, **options: Any) -> Any:
        print("noise")
        return he.conversion.revert(*arguments, **options)

    monkeypatch.setattr(importlib.import_module("hf_efficient.conversion.revert"), "revert", noisy)
    result = run("revert", converted(tmp_path / "out", "bert"), tmp_path / "back", "--json")
    assert json.loads(result.stdout)["model_class"] == "BertForMaskedLM"
    assert "noise" in result.stderr


# ---- verify ------------------------------------------------------------------------------------------------------


def test_verify_checks_prints_and_records(sources, texts, tmp_path):
    out = tmp_path / "out"
    run("convert", sources["bert"], out, "--attention", "longformer", "--attention-window", 8, "--max-positions", 256)
    before = json.loads((out / "conversion_report.json").read_text())
    given = document("verify", out, sources["bert"], "--texts", texts, "--max-length", 48)
    assert given["passed"] is True
    status = {check["name"]: check["status"] for check in given["checks"]}
    for name in ("copied tensors", "exact limit", "padding and batch", "fresh process"):
        assert status[name] == "passed"
    assert given["settings"]["texts"] == 4 and given["settings"]["max_length"] == 48
    after = json.loads((out / "conversion_report.json").read_text())
    assert before["fidelity"] is None and after == before | {"fidelity": given}
    assert not list(out.glob(".*")), "a temporary file was left behind"


@pytest.mark.usefixtures("logged")
def test_verify_fails_on_changed_weights(sources, texts, tmp_path, monkeypatch):
    # the process of its own is covered above
    monkeypatch.setattr("hf_efficient.evaluation.verify._fresh_process", lambda *_: Check("fresh", "passed", {}, ""))
    source = save_source(tmp_path / "source", "gpt2", seed=1)
    out = tmp_path / "out"
    run("convert", sources["gpt2"], out, "--attention", "local", "--attention-window", 8)
    result = run("verify", out, source, "--texts", texts, code=1)
    assert "FAILED" in result.stdout.splitlines()[0]
    row = next(line for line in result.stdout.splitlines() if "copied tensors" in line)
    assert "failed" in row
    assert json.loads((out / "conversion_report.json").read_text())["fidelity"]["passed"] is False
    (out / "conversion_report.json").unlink()
    result = run("verify", out, sources["gpt2"], "--texts", texts)
    assert "passed" in result.stdout.splitlines()[0]
    assert "warning:" in result.stderr and "not recorded" in result.stderr
    assert not (out / "conversion_report.json").exists()


def test_verify_passes_its_options_on(sources, tmp_path, monkeypatch):
    calls: list[Any] = []

    def record(*arguments: Any, **options: Any) -> FidelityReport:
        calls.append((arguments, options))
        return FidelityReport([], {})

    monkeypatch.setattr("hf_efficient.evaluation.verify.verify", record)
    out = converted(tmp_path / "out", "bert")
    run("verify", out, sources["bert"], "--speed", "64,128")
    run("verify", out, sources["bert"], "--max-length", 32)
    arguments, options = calls[0]
    assert arguments == (str(out), str(sources["bert"]), None)
    assert options["speed_lengths"] == [64, 128] and options["max_length"] is None
    assert calls[1][1]["speed_lengths"] == [] and calls[1][1]["max_length"] == 32


def test_verify_errors(sources, texts, tmp_path):
    out = converted(tmp_path / "out", "bert")
    bert = sources["bert"]
    assert "without efficient attention" in error("verify", bert, bert, "--texts", texts)
    assert "write lengths as 512,1024" in error("verify", out, bert, "--speed", "long")
    assert "give at least 2" in error("verify", out, bert, "--max-length", 1)
    assert "No such file" in error("verify", out, bert, "--texts", tmp_path / "none.txt")
    (tmp_path / "texts.csv").write_text("a")
    assert "texts come from .txt" in error("verify", out, bert, "--texts", tmp_path / "texts.csv")


def test_texts_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read_texts(tmp_path / "a.txt") == ["one", " two "]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\ntwo", "id": 1}\n"three"\n\n')
    assert read_texts(path) == ["one\ntwo", "three"]
    for content, message in (
        ('"one"\n{', "line 2"),
        ('{"body": "one"}', "line 1: no text there"),
        ("7", "line 1: no text there"),
        ("\n", "has no text in it"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_texts(path)


# ---- list and inspect --------------------------------------------------------------------------------------------


def test_list_shows_every_mechanism():
    cards = {card["mechanism"]: card for card in document("list")}
    assert sorted(cards) == he.list_mechanisms()
    assert cards["linformer"]["causal"] is False and cards["performer"]["relative_bias"] is False
    assert cards["longformer"]["options"]["attention_window"] == 512
    lines = run("list").stdout.splitlines()
    for name, card in cards.items():
        row = next(line for line in lines if line.startswith(f"  {name} "))
        assert card["time"].split(";")[0] in row and ("causal too" in row) == card["causal"]
        assert card["kind"] in lines
        shown = " ".join(run("list", name).stdout.split())
        assert all(card[fact] in shown for fact in ("title", "paper", "kind", "time", "memory", "exact_when"))


def test_inspect_says_what_an_original_could_take(sources):
    facts = document("inspect", sources["t5"])
    assert not facts["converted"] and facts["source"] is None and facts["max_positions"] is None
    assert {layer["mechanism"] for layer in facts["layers"]} == {"full attention"} and len(facts["layers"]) == 4
    fits = {(fit["side"], fit["mechanism"]): fit for fit in facts["mechanisms"]}
    assert len(fits) == 2 * len(he.list_mechanisms())
    local = fits["decoder", "local"]
    assert local.pop("training").startswith("works without training")
    assert local == {"mechanism": "local", "side": "decoder", "possible": True, "reasons": []}
    assert not fits["decoder", "linformer"]["possible"]
    assert any("can't be causal" in reason for reason in fits["decoder", "linformer"]["reasons"])
    assert not any("causal" in reason for reason in fits["encoder", "linformer"]["reasons"])
    assert any("relative bias" in reason for reason in fits["encoder", "performer"]["reasons"])

    shown = run("inspect", sources["gpt2"]).stdout
    assert "GPT2LMHeadModel, 2 layers, 128 positions" in shown
    row = next(line for line in shown.splitlines() if " linformer " in line)
    assert " no " in row and "can't be causal" in row


def test_inspect_loads_no_weights(sources, tmp_path):
    for name, path in (("bert", sources["bert"]), ("efficient_bert", converted(tmp_path / "out", "bert"))):
        bare = tmp_path / f"bare-{name}"
        bare.mkdir()
        (bare / "config.json").write_bytes((path / "config.json").read_bytes())
        facts = document("inspect", bare)
        assert facts["model_type"] == name and len(facts["layers"]) == 2
        assert name in ("bert",) or "longformer" in run("inspect", bare).stdout


def test_inspect_refuses_other_architectures(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    assert "no model family for model_type 'bloom'" in error("inspect", tmp_path)


# ---- the program -------------------------------------------------------------------------------------------------


def test_values_for_people():
    assert as_text({"a": 0.123456, "b": [1, None], "c": True}) == "a=0.1235, b=1 –, c=yes"
    assert as_text([]) == "none"


def test_program_in_a_fresh_process(sources, tmp_path):
    """Only a real process shows that nothing but the document reaches stdout, progress bars and warnings included."""
    script = (
        "import sys, hf_efficient.cli as cli\n"
        "assert 'typer' in sys.modules and 'rich' not in sys.modules\n"
        "assert 'hf_efficient.evaluation.verify' not in sys.modules\n"
        "cli.main()"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS_")} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, "convert", str(sources["bert"]), str(tmp_path / "out"), "--attention"]
    done = subprocess.run([*command, "performer", "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["random"] == 0
    assert "Loading weights" in done.stderr, "the bars went elsewhere, so this test shows nothing"


def test_help_names_commands_and_options():
    shown = run("--help").stdout
    for command in ("convert", "verify", "revert", "list", "inspect"):
        assert command in shown
    shown = run("bench", "--help").stdout
    assert all(re.search(rf"\b{suite}\b", shown) for suite in SUITES)
    shown = run("convert", "--help").stdout
    assert "--attention" in shown and "--attention-window" not in shown
    lines = run("list", "longformer").stdout.splitlines()
    row = next(index for index, line in enumerate(lines) if line.startswith("  --attention-window "))
    assert lines[row].endswith("default 512") and "in tokens" in lines[row + 1]
    assert document("list", "longformer") == next(c for c in document("list") if c["mechanism"] == "longformer")
    assert "unknown mechanism 'flash'" in error("list", "flash")
    assert "the suite attention has its own" in error("bench", "attention", "--lengths", "512")
    assert "numbers of tokens with commas" in error("bench", "encoder", "--lengths", "512,many")


def test_what_needs_no_model_imports_no_torch():
    """Help of every command, the catalogue, and what shells ask for completion: in one process, which has the names."""
    completions = {
        "hf-efficient li": "list",
        "hf-efficient convert source out --attention longf": "longformer",
        "hf-efficient list perf": "performer",
        "hf-efficient show axi": "axial",
        "hf-efficient show perf": "",
    }
    program = f"""
import contextlib, io, json, os, sys
import hf_efficient_command as program
said = {{}}
def run(*words):
    sys.argv = ["hf-efficient", *words]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        program.main()
    return out.getvalue()
for words in {[["--help"], ["--version"], ["list"], ["list", "--json"], ["list", "local"]]!r}:
    said[" ".join(words)] = run(*words)
for command in {sorted(get_command(app).commands)!r}:
    said[command + " --help"] = run(command, "--help")
os.environ |= dict(_HF_EFFICIENT_COMPLETE="complete_bash")
for line in {list(completions)!r}:
    os.environ |= dict(COMP_WORDS=line, COMP_CWORD=str(line.count(" ")))
    said[line] = run()
print(json.dumps([said, [name for name in ("torch", "transformers", "numpy") if name in sys.modules]]))
"""
    done = fresh_python("-c", program)
    assert done.returncode == 0, done.stderr
    said, imported = json.loads(done.stdout)
    assert imported == []
    assert "convert" in said["--help"] and "--install-completion" in said["--help"]
    assert "--attention-window" in said["list local"] and "longformer" in said["list"]
    assert all("Usage" in said[f"{command} --help"] for command in get_command(app).commands)
    assert {line: said[line].strip() for line in completions} == completions


def test_the_catalogue_is_what_the_registry_says():
    """Read from the source text, of which nothing is imported, with the order of JSON documents."""
    cards = catalogue.cards()
    assert list(cards) == he.list_mechanisms()
    for name, card in cards.items():
        told = catalogue._of_class(he.get_mechanism(name))
        assert card == told
        assert list(card.facts) == list(told.facts) and list(card.types) == list(told.types)
        assert card.training == training_words(name)
    assert catalogue.shared_options() == set(SHARED_OPTIONS)
    assert [name for name, card in cards.items() if card.is_pattern] == drawable_mechanisms()


def test_mechanisms_of_installed_packages_are_in_the_catalogue(monkeypatch):
    monkeypatch.setattr(catalogue, "_classes", lambda: {})  # as if all were brought by others
    monkeypatch.setattr(catalogue.metadata, "entry_points", lambda group: ["one"])
    catalogue.cards.cache_clear()
    try:
        assert list(catalogue.cards()) == he.list_mechanisms()
    finally:
        catalogue.cards.cache_clear()


@pytest.mark.parametrize("name", sorted(get_command(app).commands))
def test_every_help_has_an_example_that_can_be_typed(name):
    lines = run(name, "--help", columns=80).stdout.splitlines()
    assert len(lines) <= 65 and max(map(len, lines)) <= 80
    said = " ".join(" ".join(lines).split())
    words = shlex.split(said[said.index("Example: ") :])
    assert words[1:3] == ["hf-efficient", name]
    get_command(app).commands[name].make_context(name, words[3:])  # raises where an option is unknown or missing


def test_quiet_leaves_the_result_and_errors(sources, tmp_path):
    out = converted(tmp_path / "out", "bert")
    (out / "conversion_report.json").unlink()
    result = run("--quiet", "verify", out, sources["bert"], "--max-length", 32)
    assert result.stderr == "" and "passed" in result.stdout.splitlines()[0]
    assert "does not exist" in run("--quiet", "inspect", tmp_path / "none", code=1).stderr


def test_a_narrow_window_breaks_no_words():
    assert max(map(len, run("list", columns=80).stdout.splitlines())) <= 80
    for card in document("list"):
        shown = run("list", card["mechanism"], columns=80).stdout
        assert max(map(len, shown.splitlines())) <= 80
        assert set(card["exact_when"].split()) <= set(shown.split())


@pytest.mark.parametrize("arguments", [["list"], ["list", "synthesizer"], ["inspect", "bert"]], ids=" ".join)
def test_tables_fit_a_window_of_80_columns(arguments, sources):
    lines = run(*(sources.get(word, word) for word in arguments), columns=80).stdout.splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= 80
