"""Checkpoint cards say what was recorded and nothing else; the commands `card` and `distill`."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import document, error, run
from huggingface_hub import ModelCard
from paths import ROOT
from tiny import converted, save_source, words
from transformers import AutoModelForMaskedLM

import hf_efficient as he
from hf_efficient.cards.checkpoint import NOT_MEASURED, NOT_RECORDED, STAGES, checkpoint_card, write_card
from hf_efficient.cli.verify import record_fidelity
from hf_efficient.conversion.loading import load_converted
from hf_efficient.models.card import is_first_card
from hf_efficient.training.results import RunRecord
from hf_efficient.training.settings import parse_settings

TEXTS = [words(40 + 5 * i, i) for i in range(6)]
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)*(?:e[+-]?\d+)?")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Converted from a folder with a licence, and verified."""
    source = save_source(tmp_path / "source", "bert")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\ntags: [theirs]\n---\n# Source\n")
    out = tmp_path / "checkpoint"
    he.convert(source, "longformer", attention_window=8, global_tokens="first", max_positions=256).save(out)
    report = json.loads((out / "conversion_report.json").read_text())
    report["fidelity"] = {
        "passed": True,
        "rungs": [
            check("fidelity", embedding_cosine=0.987654321, hidden_error=0.3125, hidden_error_by_layer=[0.777]),
            check("control: mean of values", embedding_cosine=0.4711, hidden_error=0.919),
            check("speed and memory", rows=[{"length": 640, "seconds": 0.0625}], hardware={"cpu": "an abacus"}),
        ],
        "settings": {"source": "elsewhere", "texts": 61, "dtype": "torch.float32"},
        "versions": {"torch": "9.8.7"},
    }
    (out / "conversion_report.json").write_text(json.dumps(report))
    return out


def check(name: str, **detail: Any) -> dict[str, Any]:
    return {"name": name, "status": "measured", "detail": detail, "rule": f"the rule of {name}"}


def recorded(path: Path, **changes: Any) -> Path:
    """A result.json like a recipe's."""
    record = RunRecord(
        "mlm",
        {"model": "checkpoint", "dataset": "somebody/texts", "output_dir": "out dir", "seed": 17, "attention": ""},
        metrics={
            "exact": {"perplexity": 12.34567, "loss": 2.511},
            "converted": {"perplexity": 14.5, "loss": 2.674},
            "trained": {"perplexity": 13.125, "loss": 2.5745, "runtime": 3.77, "samples_per_second": 88.25},
        },
        layer_errors={
            "before": {"layers": ["one", "two"], "mechanism": [0.51, 0.61], "mean of values": [0.81, 0.91]},
            "after": {"layers": ["one", "two"], "mechanism": [0.21, 0.31], "mean of values": [0.82, 0.92]},
        },
        training={"steps": 43, "tokens_per_second": 1234.5678, "peak_memory_mb": 321.5, "log": [{"loss": 6.66}]},
        finished=True,
    )
    values = record.to_dict() | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def numbers_of(value: Any) -> set[str]:
    """Every number of a JSON value, as a card may print it: exactly, with four digits, or inside a string."""
    if isinstance(value, dict):
        return set().union(*(numbers_of(entry) for pair in value.items() for entry in pair))
    if isinstance(value, list):
        return set().union(*map(numbers_of, value))
    if isinstance(value, float):
        return set(NUMBER.findall(f"{value!r} {value:.4g}"))
    return set(NUMBER.findall(str(value)))


# ---- the text ----------------------------------------------------------------------------------------------------


def test_every_number_is_recorded(checkpoint, tmp_path):
    """In the JSON inputs, or what the mechanism says of itself; the numbers of tensors are counted, layers listed."""
    result = recorded(tmp_path / "result.json")
    text = str(checkpoint_card(checkpoint, [result]))
    report = json.loads((checkpoint / "conversion_report.json").read_text())
    known = numbers_of([json.loads(path.read_text()) for path in (result, checkpoint / "config.json")])
    known |= numbers_of(report) | numbers_of(he.describe("longformer"))
    statuses = [tensor["status"] for tensor in report["tensors"].values()]
    known |= {str(statuses.count(status)) for status in statuses} | {"0", "1"}
    strange = set(NUMBER.findall(text)) - known
    assert not strange, strange
    # and what was measured is there, not only what is not
    for number in (
        "0.9877",
        "0.4711",
        "640",
        "0.0625",
        "12.35",
        "14.5",
        "13.12",
        "0.51",
        "0.21",
        "0.82",
        "43",
        "1235",
    ):
        assert number in NUMBER.findall(text), number
    for never in ("0.777", "6.66", "0.81"):
        assert never not in NUMBER.findall(text), never
    for said in ("Seed 17", "an abacus", "torch 9.8.7", "| converted |", "mean of values", "arxiv.org/abs/2004.05150"):
        assert said in text, said
    assert NOT_MEASURED not in text


def test_changed_records_change_the_card(checkpoint, tmp_path):
    result = recorded(tmp_path / "result.json")
    before = str(checkpoint_card(checkpoint, [result]))
    values = json.loads(result.read_text())
    values["metrics"]["trained"]["perplexity"] = 99.5
    result.write_text(json.dumps(values))
    after = str(checkpoint_card(checkpoint, [result]))
    assert after == before.replace("13.125", "99.5").replace("13.12", "99.5")


def test_front_matter_is_valid(checkpoint, tmp_path):
    write_card(checkpoint, results=[recorded(tmp_path / "result.json")])
    data = ModelCard.load(checkpoint / "README.md").data
    assert (data.license, data.language, data.library_name, data.pipeline_tag) == (
        "mit",
        "en",
        "transformers",
        "fill-mask",
    )
    assert data.tags == ["bert", "hf_efficient", "efficient-attention", "longformer"]
    assert data.datasets == ["somebody/texts"]
    assert data.get("base_model") is None, "a folder is no model of the Hub"
    assert data.model_name == "checkpoint"
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"perplexity": 13.125, "loss": 2.5745}
    assert results["loss"].dataset_type == "somebody/texts" and results["loss"].task_type == "fill-mask"


def test_base_model_is_what_the_hub_knows(tmp_path):
    out = converted(tmp_path / "out", "gpt2", "local", attention_window=8)
    path = out / "conversion_report.json"
    for source, expected in (("openai-community/gpt2", "openai-community/gpt2"), ("unknown", None)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"source": source}))
        card = checkpoint_card(out)
        assert card.data.get("base_model") == expected
        assert card.data.pipeline_tag == "text-generation"
        assert source in card.text
    assert f"Licence of the source: {NOT_RECORDED}" in card.text and card.data.license is None


def test_nothing_measured_is_said(tmp_path):
    out = converted(tmp_path / "out", "t5")
    card = checkpoint_card(out)
    assert f"As converted: {NOT_MEASURED}." in card.text
    assert f"By length: {NOT_MEASURED}." in card.text
    assert f"Training runs: {NOT_RECORDED}." in card.text
    assert card.data.pipeline_tag is None and card.data.eval_results is None
    (out / "conversion_report.json").unlink()
    card = checkpoint_card(out)
    assert f"What was copied and what was added: {NOT_RECORDED}." in card.text
    assert f"Commands: {NOT_RECORDED}." in card.text


def test_unfinished_and_earlier_runs_are_no_results_of_these_weights(checkpoint, tmp_path):
    finished, broken_off = (tmp_path / f"{name}.json" for name in ("first", "second"))
    recorded(finished)
    recorded(broken_off, finished=False, metrics={"trained": {"loss": float("nan")}}, layer_errors={}, training={})
    card = checkpoint_card(checkpoint, [finished, broken_off])
    assert card.data.eval_results is None
    assert "This run was not finished." in card.text and f"Cost: {NOT_MEASURED}." in card.text
    results = checkpoint_card(checkpoint, [broken_off, finished]).data.eval_results
    assert [result.metric_value for result in results or []] == [13.125, 2.5745]
    recorded(broken_off, metrics={"trained": {"loss": float("nan"), "accuracy": 0.5}})
    results = checkpoint_card(checkpoint, [broken_off]).data.eval_results
    assert [result.metric_type for result in results or []] == ["accuracy"]


def test_results_are_found_where_recipes_write_them(checkpoint, tmp_path):
    out = tmp_path / "run"
    recorded(out / "result.json")
    checkpoint.rename(out / "model")
    card = checkpoint_card(out / "model")
    assert card.text.lstrip().startswith("# run\n") and "### mlm" in card.text
    # given as well as found, it is still one run
    assert str(checkpoint_card(out / "model", [out / "result.json"])) == str(card)
    recorded(out / "model" / "result.json", recipe="classify")
    assert checkpoint_card(out / "model").text.count("### ") == 2


def test_commands_make_the_same_checkpoint_again(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = checkpoint_card(checkpoint).text.split("```bash\n")[1].split("```")[0].splitlines()
    convert, verify = (shlex.split(line) for line in block)
    assert convert[0] == verify[0] == "hf-efficient"
    run(*convert[1:])
    again, first = (load_converted(path) for path in (tmp_path / "converted", checkpoint))
    assert again.config.efficient_attention == first.config.efficient_attention
    theirs = first.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())
    assert verify[1:] == ["verify", "converted", str(tmp_path / "source")]

    lines = checkpoint_card(checkpoint, [recorded(tmp_path / "result.json")]).text.split("```bash\n")[1].splitlines()
    assert shlex.split(lines[0])[3] == "checkpoint", "training began with another folder than conversion made"
    assert shlex.split(lines[2]) == [
        *("python", "recipes/mlm.py", "--model=checkpoint", "--dataset=somebody/texts"),
        *("--output_dir=out dir", "--seed=17"),
    ]


def test_commands_of_recipes_are_read_by_them(checkpoint, tmp_path):
    settings_class = runpy.run_path(str(ROOT / "recipes" / "mlm.py"))["Settings"]
    attention = '{"mechanism": "local", "attention_window": 8}'
    settings = settings_class(
        model="a b", output_dir="out", attention=attention, learning_rate=3e-4, pack=True, use_cpu=True
    )
    result = recorded(tmp_path / "result.json", settings=settings.recorded())
    command = shlex.split(checkpoint_card(checkpoint, [result]).text.split("```bash\n")[1].splitlines()[2])
    assert command[:2] == ["python", "recipes/mlm.py"]
    assert parse_settings(settings_class, command[2:]) == settings
    result = recorded(result, settings={"steps": 3}, recipe="distill")
    assert '# distill: settings {"steps": 3}' in checkpoint_card(checkpoint, [result]).text
    result = recorded(result, settings={"steps": 3}, command="hf-efficient distill a b")
    assert "\nhf-efficient distill a b\n" in checkpoint_card(checkpoint, [result]).text


@pytest.mark.parametrize("name", ["data/train.jsonl", "data/train.parquet", "texts.txt"])
def test_a_data_file_is_no_dataset_of_the_hub(name, checkpoint, tmp_path):
    """Also where it is not to be seen from here, as after a run on another machine."""
    result = recorded(tmp_path / "result.json", settings={"dataset": name, "output_dir": "out"})
    data = checkpoint_card(checkpoint, [result]).data
    assert data.datasets is None
    assert {(r.dataset_type, r.dataset_name) for r in data.eval_results or []} == {("text", name)}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_is_recorded_under_its_files_name(path):
    """The card's commands are made of it."""
    assert set(re.findall(r'\bstart\(\s*"([^"]+)"', path.read_text())) <= {path.stem}


def test_the_snippet_runs(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    space: dict[str, Any] = {}
    exec(checkpoint_card(checkpoint).text.split("```python\n")[1].split("```")[0], space)
    assert type(space["model"]).__name__ == "EfficientBertForMaskedLM"
    assert space["tokenizer"]("w10").input_ids == [2, 10, 3]


# ---- other folders -----------------------------------------------------------------------------------------------


def test_card_of_a_reverted_checkpoint(checkpoint, tmp_path):
    run("revert", checkpoint, tmp_path / "back")
    card = checkpoint_card(tmp_path / "back", [recorded(tmp_path / "result.json")])
    assert "`BertForMaskedLM` with full attention in every layer" in card.text
    assert "longformer" not in card.text and card.data.tags == ["bert"]
    assert [result.metric_value for result in card.data.eval_results or []] == [13.125, 2.5745]
    assert "from transformers import BertForMaskedLM" in card.text


def test_card_of_adapters(checkpoint, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["efficient"])
    model: Any = AutoModelForMaskedLM.from_pretrained(checkpoint)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapters")
    (tmp_path / "adapters" / "README.md").unlink(missing_ok=True)
    card = checkpoint_card(tmp_path / "adapters")
    assert card.data.library_name == "peft" and "longformer" in card.data.tags
    assert f"This folder holds adapters of `{checkpoint}`" in card.text and "0.9877" in card.text
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(card.text.split("```python\n")[1].split("```")[0], space)
    assert type(space["model"]).__name__.startswith("PeftModel")
    checkpoint.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"not a checkpoint folder here: put it there or merge the adapters"):
        checkpoint_card(tmp_path / "adapters")


def test_sentence_embeddings_have_their_own_tag(checkpoint):
    (checkpoint / "modules.json").write_text("[]")
    data = checkpoint_card(checkpoint).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")


# ---- the command -------------------------------------------------------------------------------------------------


def test_card_command(checkpoint, tmp_path):
    result = recorded(tmp_path / "result.json")
    shown = run("card", checkpoint, "--results", result)
    assert "mit" in shown.stdout and "fill-mask" in shown.stdout
    written = (checkpoint / "README.md").read_text()
    assert written == str(checkpoint_card(checkpoint, [result]))
    given = document("card", checkpoint, "--out", tmp_path / "new" / "CARD.md")
    assert given["metadata"]["license"] == "mit" and (tmp_path / "new" / "CARD.md").is_file()

    assert "exists" in error("card", checkpoint) and (checkpoint / "README.md").read_text() == written
    run("card", checkpoint, "--overwrite")
    assert (checkpoint / "README.md").read_text() != written
    assert not list(checkpoint.glob(".*")), "something was left behind"


BROKEN: dict[str, tuple[str, str, str]] = {
    "truncated result": ("result.json", '{"recipe": "mlm", ', "can't be read"),
    "result of something else": ("result.json", '{"loss": 3}', "is no record of a run"),
    "list": ("result.json", "[1]", "it holds no JSON object"),
    "metrics": (
        "result.json",
        json.dumps(RunRecord("mlm", {}, metrics={"trained": 3}).to_dict()),  # type: ignore[dict-item]
        "its metrics are not figures by name",
    ),
    "truncated report": ("conversion_report.json", '{"source":', "Is it truncated?"),
    "other report": ("conversion_report.json", '{"source": "a"}', "it lacks revision, model_class"),
    "truncated config": ("config.json", "{", "config.json can't be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(case, checkpoint):
    name, content, message = BROKEN[case]
    (checkpoint / name).write_text(content)
    given = error("card", checkpoint)
    assert name in given and message in given
    assert is_first_card(checkpoint / "README.md")


def test_card_refuses_what_does_not_belong_together(checkpoint, tmp_path):
    assert "is not a folder" in error("card", tmp_path / "missing")
    assert "No such file" in error("card", checkpoint, "--results", tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    assert "neither config.json nor adapter_config.json" in error("card", tmp_path / "empty")
    other = converted(tmp_path / "other", "bert", "local", attention_window=8)
    (other / "conversion_report.json").write_bytes((checkpoint / "conversion_report.json").read_bytes())
    assert "belongs to another one" in error("card", other)


@pytest.mark.usefixtures("logged")
def test_an_unreadable_licence_is_left_out_with_a_warning(checkpoint, tmp_path):
    (tmp_path / "source" / "README.md").write_text("---\nlicense: [mit\n---\n")
    shown = run("card", checkpoint)
    assert shown.stderr.count("warning:") == 1 and "front matter" in shown.stderr
    assert f"Licence of the source: {NOT_RECORDED}" in (checkpoint / "README.md").read_text()


# ---- sparse experts ----------------------------------------------------------------------------------------------


@pytest.fixture
def sparse(tmp_path) -> Path:
    source = save_source(tmp_path / "source", "bert")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Source\n")
    he.upcycle(source, 6, top_k=2, capacity_factor=1.75, seed=23).save(tmp_path / "sparse")
    return tmp_path / "sparse"


def test_card_of_experts_alone(sparse):
    card = checkpoint_card(sparse)
    text, report = str(card), json.loads((sparse / "upcycling_report.json").read_text())
    assert card.data.tags == ["bert", "hf_efficient", "sparse-experts"] and card.data.license == "mit"
    for said in (
        "with sparse experts: 6 in a layer, 2 for each token.", "`bert.encoder.layer.1.intermediate`",
        f"| parameters as upcycled | {report['parameters']}, of the source: {report['source_parameters']} |",
        f"| of these met by one token | {report['active_parameters']} |",
        f"differ from the source's by {report['difference']:.4g} of the largest; allowed were 1e-05",
        f"Source: `{report['source']}`", f"torch {report['versions']['torch']}", "6 copies of the dense weights",
        "only until the experts are trained apart", "As upcycled: not measured", "https://arxiv.org/abs/2212.05055",
        "https://arxiv.org/abs/2101.03961", "those beyond 1.75 times its even share, 2 · T / 6 of T tokens",
    ):  # fmt: skip
        assert said in text, said
    for never in ("efficient attention", "efficient-attention", "output_attentions", "mean of values"):
        assert never not in text, never
    known = numbers_of(report) | numbers_of(json.loads((sparse / "config.json").read_text())) | {"2212.05055", "2023"}
    statuses = [tensor["status"] for tensor in report["tensors"].values()]
    known |= {str(statuses.count(status)) for status in statuses} | {"2101.03961", "2022", "0", "1"}
    assert not set(NUMBER.findall(text)) - known


def test_card_of_verified_experts(sparse):
    checks = [check("fidelity", embedding_cosine=0.98765), check("exact limit", relative_difference=0.5)]
    settings = {"efficient_attention": [], "texts": 61}
    record_fidelity(sparse, {"passed": True, "checks": checks, "settings": settings, "versions": {"torch": "9.8.7"}})
    text = str(checkpoint_card(sparse))
    assert "| figure | upcycled |" in text and "| embedding cosine | 0.9877 |" in text and "the rule of exact" in text
    assert "mean of values" not in text and "torch 9.8.7" in text


@pytest.mark.parametrize("sparse_first", [True, False])
def test_card_of_experts_and_attention_tells_both_in_order(sparse_first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (save_source(Path("source"), "bert") / "README.md").write_text("---\nlicense: mit\n---\n# Source\n")
    first = "sparse" if sparse_first else "long"
    if sparse_first:
        he.upcycle("source", 6, seed=5).save("sparse")
        he.convert("sparse", "longformer", attention_window=8).save("both")
    else:
        he.convert("source", "longformer", attention_window=8).save("long")
        he.upcycle("long", 6, layers=(0, 1)).save("both")
    card = checkpoint_card("both")
    assert card.data.tags == ["bert", "hf_efficient", "efficient-attention", "longformer", "sparse-experts"]
    assert card.data.license == "mit"
    assert "efficient attention: longformer; and sparse experts: 6 in a layer" in card.text
    assert "output_attentions" in card.text and "As converted: not measured" in card.text
    assert card.text.index("Source: `source`") < card.text.index(f"Source: `{first}`")
    # the commands make the same weights again
    lines = card.text.split("## Reproduce\n\n```bash\n")[1].split("\n```")[0].splitlines()
    verbs = ["upcycle", "verify", "convert", "verify"] if sparse_first else ["convert", "verify", "upcycle", "verify"]
    assert [line.split()[1] for line in lines] == verbs
    expected = load_converted("both").state_dict()
    Path(first).rename("before")
    Path("both").rename("after")
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] != "verify":
            words[2] = {"converted": "both"}.get(words[2], words[2])
            run(*words)
    made = load_converted("both").state_dict()
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


def test_card_refuses_the_report_of_other_experts(sparse):
    path = sparse / "upcycling_report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | {"efficient_experts": report["efficient_experts"] | {"top_k": 1}}))
    with pytest.raises(ValueError, match="belongs to another one"):
        checkpoint_card(sparse)
    path.write_text(json.dumps({"source": "x"}))
    with pytest.raises(ValueError, match="is not a report of upcycling: it lacks revision"):
        checkpoint_card(sparse)
    path.unlink()
    card = checkpoint_card(sparse)
    assert f"| sparse layers | {NOT_RECORDED} |" in card.text and "sparse experts: 6" in card.text


# ---- distill -----------------------------------------------------------------------------------------------------


@pytest.fixture
def linformer(tmp_path) -> Path:
    source = save_source(tmp_path / "source", "bert")
    he.convert(source, "linformer", rank=16).save(tmp_path / "linformer")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return tmp_path / "linformer"


def test_distill_command(linformer, tmp_path):
    out = tmp_path / "out"
    options = ["--texts", tmp_path / "texts.txt", "--steps", 3, "--length", 16, "--learning-rate", 0.01]
    shown = run("distill", linformer, out, *options)
    result = json.loads((out / "result.json").read_text())
    errors = result["layer_errors"]
    for layer in range(2):
        row = next(line for line in shown.stdout.splitlines() if f"layer.{layer}." in line)
        values = [errors["before"]["mechanism"], errors["after"]["mechanism"], errors["after"]["mean of values"]]
        assert [cell.strip() for cell in row.split("│")[2:-1]] == [f"{value[layer]:.4g}" for value in values]
    assert errors["after"]["mechanism"] != errors["before"]["mechanism"]
    assert f"{result['metrics']['trained']['embedding_cosine']:.4g}" in shown.stdout

    # the result is whole: only what was to be trained has changed, tokenizer and report are there
    trained, before = load_converted(out / "model").state_dict(), load_converted(linformer).state_dict()
    changed = {name for name in before if not torch.equal(trained[name], before[name])}
    assert changed and all(".efficient." in name for name in changed)
    before, after = (json.loads((path / "conversion_report.json").read_text()) for path in (linformer, out / "model"))
    first, last = after.pop("history")
    assert [first] == before.pop("history") and after == before
    assert (last["what"], last["steps"], last["source"], last["trained"]) == (
        "distill",
        3,
        str(linformer),
        "mechanism",
    )
    assert (out / "model" / "tokenizer.json").is_file()

    # its card knows the run, and the command in it makes the same weights again
    text = checkpoint_card(out / "model").text
    assert "### distill" in text and all(STAGES[name] in text for name in ("converted", "control", "trained"))
    command = shlex.split(next(line for line in text.splitlines() if line.startswith("hf-efficient distill")))
    command[command.index(str(out))] = str(tmp_path / "again")
    given = document(*command[1:])
    assert given["layer_errors"] == errors and given["settings"]["texts"] == str(tmp_path / "texts.txt")


def test_distill_overwrites_runs_and_nothing_else(linformer, tmp_path):
    out = tmp_path / "out"
    options = ["--texts", tmp_path / "texts.txt", "--steps", 1, "--length", 16]
    run("distill", linformer, out, *options)
    before = (out / "result.json").read_bytes()
    assert "not empty" in error("distill", linformer, out, *options)
    # what fails leaves the former run where it was
    assert "must be at least 0" in error("distill", linformer, out, *options, "--steps", -1, "--overwrite")
    assert (out / "result.json").read_bytes() == before
    run("distill", linformer, out, *options, "--seed", 1, "--overwrite")
    assert json.loads((out / "result.json").read_text())["seed"] == 1
    (out / "thesis").write_text("years of work")
    assert "also holds thesis" in error("distill", linformer, out, *options, "--overwrite")
    assert "holds" in error("distill", out / "model", out, *options, "--overwrite")
    assert (out / "thesis").read_text() == "years of work"
    assert not list(tmp_path.glob(".*"))


def test_distill_errors(linformer, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    texts = ["--texts", tmp_path / "texts.txt", "--length", 16]
    assert "without efficient attention" in error("distill", source, out, *texts)
    assert "is not a folder" in error("distill", tmp_path / "none", out, *texts)
    assert "give one of them" in error("distill", linformer, out, *texts, "--resume", "--overwrite")
    assert "must be at least 0" in error("distill", linformer, out, *texts, "--steps", -1)
    (linformer / "tokenizer.json").unlink()
    (linformer / "tokenizer_config.json").unlink()
    assert "no tokenizer" in error("distill", linformer, out, *texts)
    assert not out.exists()


def test_distill_uses_the_offline_corpus(linformer, tmp_path, monkeypatch):
    calls: list[Any] = []

    def record(model: Any, tokenizer: Any, texts: Any, *, output_dir: Path, **options: Any) -> dict[str, Any]:
        calls.append((texts, options))
        (output_dir / "model").mkdir(parents=True)
        return json.loads(recorded(tmp_path / "made.json").read_text())

    monkeypatch.setattr("hf_efficient.training.distill.distill", record)
    monkeypatch.setattr("hf_efficient.corpus.offline_texts", lambda split="held-out": [split])
    run("distill", linformer, tmp_path / "out", "--train", "all", "--end-to-end-steps", 7, "--resume")
    ((texts, options),) = calls
    assert texts == ["train"] and options["held_out"] == ["held-out"]
    assert options["train"] == "all" and options["end_to_end_steps"] == 7 and options["resume"] is True
    assert options["length"] == 512 and options["batch_size"] == 2 and options["learning_rate"] == 0.0
    made = json.loads((tmp_path / "out" / "result.json").read_text())
    assert made["settings"]["texts"] == "offline" and "--texts" not in made["command"]
