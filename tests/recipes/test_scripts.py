"""The conversion scripts, run as a user runs them, on tiny checkpoints."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import fresh
import pytest
import torch
from decoders import save_decoder
from paths import SCRIPTS
from tiny import save_source, tiny_tokenizer
from transformers import AutoConfig

from hf_efficient.conversion.loading import load_converted, load_stock
from hf_efficient.evaluation.verify import Check, FidelityReport
from hf_efficient.testing import tiny_model

# script: (family, its options, what the checkpoint must say, new tensors and how they are counted, positions)
RUNS = {
    "convert_bert_to_longformer.py": (
        "bert",
        ["--attention-window", "8", "--global-tokens", "question", "--max-positions", "256"],
        {"mechanism": "longformer", "attention_window": 8, "global_tokens": "question", "separator_token_id": 3},
        {"extended": 1, "initialised": 12, "random": 0},
        256,
    ),
    "convert_roberta_to_longformer.py": (
        "roberta",
        [
            "--attention-window",
            "8",
            "--global-tokens",
            "first",
            "--max-positions",
            "256",
            "--positions",
            "interpolate",
        ],
        {"mechanism": "longformer", "attention_window": 8, "global_tokens": "first"},
        {"extended": 1, "initialised": 12, "random": 0},
        256,
    ),
    "convert_bert_to_bigbird.py": (
        "bert",
        ["--block-size", "4", "--num-random-blocks", "2", "--seed", "7", "--max-positions", "200"],
        {"mechanism": "bigbird", "block_size": 4, "num_random_blocks": 2, "seed": 7},
        {"extended": 1, "initialised": 0, "random": 0},
        200,
    ),
    "convert_bert_to_linformer.py": (
        "bert",
        ["--rank", "16", "--sharing", "kv"],
        {"mechanism": "linformer", "rank": 16, "sharing": "kv"},
        {"extended": 0, "initialised": 2, "random": 0},
        128,
    ),
    "convert_bert_to_performer.py": (
        "bert",
        ["--num-features", "16", "--seed", "3"],
        {"mechanism": "performer", "num_features": 16, "seed": 3},
        {"extended": 0, "initialised": 4, "random": 0},
        128,
    ),
    "convert_gpt2_to_local.py": (
        "gpt2",
        ["--attention-window", "8", "--layers", "1", "--max-positions", "256"],
        {"mechanism": "local", "attention_window": 8, "layers": [1]},
        {"extended": 1, "initialised": 0, "random": 0},
        256,
    ),
    "convert_llama_to_local.py": (
        "llama",
        ["--attention-window", "8", "--sink-tokens", "1", "--exact-every", "2"],
        {"mechanism": "local", "attention_window": 8, "sink_tokens": 1, "layers": [0]},
        {"extended": 0, "initialised": 0, "random": 0},
        None,
    ),
    "convert_t5_to_longformer.py": (
        "t5",
        ["--attention-window", "8", "--global-tokens", "question"],
        {"mechanism": "longformer", "attention_window": 8, "side": "encoder", "separator_token_id": 1},
        {"extended": 0, "initialised": 6, "random": 0},
        None,
    ),
    "convert_bart_to_longformer.py": (
        "bart",
        ["--attention-window", "8", "--global-tokens", "first", "--max-positions", "256"],
        {"mechanism": "longformer", "attention_window": 8, "global_tokens": "first", "side": "encoder"},
        {"extended": 1, "initialised": 12, "random": 0},
        256,
    ),
}
TABLES = ("position_embeddings.weight", "wpe.weight", "encoder.embed_positions.weight")
ROWS_IN_FRONT = {"roberta": 2, "bart": 2}


def save_original(path: Path, family: str) -> Path:
    """A tiny checkpoint with its tokenizer."""
    if family == "llama":
        return save_decoder(path, family)
    if family != "bart":
        return save_source(path, family)
    tiny_model(family).save_pretrained(path)
    tiny_tokenizer("roberta").save_pretrained(path)
    return path


def run_here(monkeypatch, script: str, *arguments: str | Path) -> None:
    """The script in this process: what importing everything anew would cost is paid for one script below."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return fresh.python(SCRIPTS / script, *arguments)


def test_every_script_is_run_and_listed():
    assert sorted(RUNS) == sorted(path.name for path in SCRIPTS.glob("*.py"))
    listed = (SCRIPTS / "README.md").read_text()
    for name in RUNS:
        assert f"]({name})" in listed, f"{name} is not in the table"


def test_scripts_are_short_and_say_their_command():
    for path in SCRIPTS.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 80, path.name
        docstring = ast.get_docstring(ast.parse(text))
        assert docstring and f"python conversion_scripts/{path.name} " in docstring, path.name


@pytest.mark.parametrize("script", sorted(RUNS))
def test_script_converts(script, tmp_path, monkeypatch, capsys):
    family, options, expected, counts, positions = RUNS[script]
    source = save_original(tmp_path / "source", family)
    run_here(monkeypatch, script, source, tmp_path / "out", *options, "--no-verify")
    output = capsys.readouterr().out

    (group,) = AutoConfig.from_pretrained(tmp_path / "out").efficient_attention
    assert expected.items() <= group.items()
    printed = dict(line.split()[:2] for line in output.splitlines() if line.endswith(" tensors"))
    assert counts.items() <= {name: int(number) for name, number in printed.items()}.items()
    model = load_converted(tmp_path / "out")
    assert int(printed["copied"]) == len(model.state_dict()) - sum(counts.values())
    state, original = model.state_dict(), load_stock(str(source))[0].state_dict()
    differ = [
        n for n, tensor in original.items() if state[n].shape != tensor.shape or not torch.equal(state[n], tensor)
    ]
    assert len(differ) == counts["extended"]
    if positions is not None:
        table = next(t for n, t in state.items() if n.endswith(TABLES))
        assert len(table) == positions + ROWS_IN_FRONT.get(family, 0)


@pytest.mark.parametrize("status", ["passed", "failed"])
@pytest.mark.parametrize("script", sorted(RUNS))
def test_script_verifies_what_it_saved(script, status, tmp_path, monkeypatch, capsys):
    calls = []

    def verify(model, source, texts, progress):
        calls.append((str(model), str(source), texts))
        assert load_converted(model) is not None
        return FidelityReport([Check("copied tensors", status, {"tensors": 44}, "bit-equal")], {})

    monkeypatch.setattr("hf_efficient.evaluation.verify.verify", verify)
    monkeypatch.setattr("hf_efficient.corpus.offline_texts", lambda: ["w10 w11"])
    family, options, *_ = RUNS[script]
    source = save_original(tmp_path / "source", family)
    with pytest.raises(SystemExit) as done:
        run_here(monkeypatch, script, source, tmp_path / "out", *options)
    assert done.value.code == (0 if status == "passed" else 1)
    assert calls == [(str(tmp_path / "out"), str(source), ["w10 w11"])]
    assert f"{status:15} copied tensors: tensors 44" in capsys.readouterr().out


def test_fresh_process_from_conversion_to_checks(tmp_path):
    source = save_source(tmp_path / "source", "bert")
    done = run("convert_bert_to_bigbird.py", source, tmp_path / "out", "--block-size", "4", "--max-positions", "256")
    assert done.returncode == 0, done.stderr
    for check in ("copied tensors", "exact limit", "padding and batch", "fresh process"):
        assert f"passed          {check}:" in done.stdout


def test_existing_folder_is_left_alone(tmp_path, monkeypatch):
    source = save_source(tmp_path / "source", "bert")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="exists; choose another folder"):
        run_here(monkeypatch, "convert_bert_to_bigbird.py", source, tmp_path / "out", "--no-verify")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "config.json").write_text("{}")
    run_here(monkeypatch, "convert_bert_to_bigbird.py", source, tmp_path / "out", "--no-verify", "--overwrite")
    assert load_converted(tmp_path / "out").config.efficient_attention[0]["mechanism"] == "bigbird"
