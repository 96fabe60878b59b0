"""One loader for all verbs: old and ordinary checkpoints enter, incomplete and damaged ones are refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import document, error, run
from safetensors.torch import load_file, save_file
from tiny import converted, save_source, tiny_tokenizer

import hf_efficient as he
from hf_efficient.cards.checkpoint import checkpoint_card
from hf_efficient.conversion import revert_checkpoint
from hf_efficient.conversion.loading import NOT_TAKEN, load_converted, load_stock
from hf_efficient.conversion.upcycle import upcycle
from hf_efficient.evaluation import verify as verification
from hf_efficient.models.registry import MODELS
from hf_efficient.testing import FAMILIES, tiny_model
from hf_efficient.training.settings import Settings, parse_settings

OPTIONS: dict[str, Any] = dict(attention_window=8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {family: save_source(root / family, family, layers=1) for family in FAMILIES}


@pytest.fixture
def source(request: pytest.FixtureRequest, sources: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(sources[getattr(request, "param", "bert")], tmp_path / "source")


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    kept = {k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None}
    path.write_text(json.dumps(kept))


def as_bin(folder: Path, shards: int = 1) -> None:
    """The weights as `torch.save` wrote them before safetensors."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        return
    where = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(state)}
    for file in set(where.values()):
        torch.save({n: t for n, t in state.items() if where[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


# ---- old checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_an_old_checkpoint_goes_there_and_back(source, shards, tmp_path):
    expected, cls = load_file(source / "model.safetensors"), type(load_stock(str(source))[0])
    as_bin(source, shards)
    edit_config(source, architectures=None)
    assert type(load_stock(str(source))[0]) is cls
    edit_config(source, model_type=None)
    with pytest.raises(ValueError, match=r"no model_type.*--model-class"):
        he.convert(source, "local", **OPTIONS)
    run(
        "convert",
        source,
        tmp_path / "out",
        "--attention",
        "local",
        "--attention-window",
        8,
        "--model-class",
        cls.__name__,
    )
    revert_checkpoint(str(tmp_path / "out"), tmp_path / "back")
    actual = load_file(tmp_path / "back" / "model.safetensors")
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
    model = MODELS[cls].from_pretrained(source, efficient_attention="local", **OPTIONS)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    upcycled = upcycle(source, 2, layers=[0], model_class=cls).model
    assert type(upcycled) is MODELS[cls]


# what ties its head to the word table has no tensor more than the model below it
TIED = (transformers.T5Model, transformers.GPT2LMHeadModel, transformers.T5ForConditionalGeneration)
HEADS = [cls for cls in MODELS if cls.config_class.model_type in FAMILIES]


@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
def test_tensors_tell_the_class_that_holds_all_of_them(cls, tmp_path):
    config = tiny_model(cls.config_class.model_type, layers=1).config
    config.num_labels = 3
    model = cls(config)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=None)
    found, info = load_stock(str(tmp_path))
    assert not info["missing_keys"] and not info["unexpected_keys"]
    same = {name for name in model.state_dict()} == {name for name in found.state_dict()}
    assert same or type(found) in (
        transformers.T5Model,
        transformers.GPT2LMHeadModel,
        transformers.T5ForConditionalGeneration,
    )


def test_what_holds_more_than_tensors_is_not_opened(source, tmp_path):
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    (source / "model.safetensors").unlink()
    torch.save({"weight": Trap()}, source / "pytorch_model.bin")
    for load in (
        lambda: he.convert(source, "local"),
        lambda: upcycle(source),
        lambda: he.EfficientBertForMaskedLM.from_pretrained(source, efficient_attention="local"),
    ):
        with pytest.raises(ValueError, match=r"(?s)is not opened.*weights_only=False.*safetensors.torch.save_file"):
            load()
    (source / "pytorch_model.bin").rename(source / "trap.bin")
    for name in ("trap.bin", "../elsewhere.safetensors"):
        index = {"weight_map": {"bert.embeddings.word_embeddings.weight": name}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"which is no \.safetensors file of the checkpoint"):
            he.convert(source, "local")
    assert not (tmp_path / "executed").exists()


def test_code_of_a_checkpoint_is_never_run(source, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (source / "theirs.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    edit_config(source, model_type="theirs", auto_map={"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"})
    for command in (
        ["convert", source, tmp_path / "out", "--attention", "local"],
        ["inspect", source],
        ["revert", source, "out"],
    ):
        assert "config.json of" in error(*command)
    with pytest.raises(ValueError):
        he.EfficientBertModel.from_pretrained(source, efficient_attention="local")
    assert not (tmp_path / "executed").exists()


# ---- keywords ----------------------------------------------------------------------------------------------------


def test_keywords_of_from_pretrained_are_honoured(source, tmp_path):
    shutil.copytree(source, tmp_path / "repository" / "inner")
    result = he.convert(
        tmp_path / "repository", "local", subfolder="inner", dtype="bfloat16", token="hf_x", cache_dir=tmp_path / "cache",
        local_files_only=True, model_class=transformers.BertForSequenceClassification, **OPTIONS,
    )  # fmt: skip
    assert (
        type(result.model).__name__ == "EfficientBertForSequenceClassification"
        and result.model.dtype is torch.bfloat16
    )
    assert result.tokenizer is not None and result.report.counts()["random"] == 4
    with pytest.raises(ValueError, match="model_class='BertForNothing' is not known"):
        he.convert(source, "local", model_class="BertForNothing")


def test_a_folder_inside_is_read_by_all_commands_and_stands_in_the_card(source, tmp_path, monkeypatch):
    """Where only the class says which architecture it is; and a recipe says that it needs a folder of its own."""
    shutil.copytree(source, tmp_path / "repository" / "inner")
    edit_config(tmp_path / "repository" / "inner", model_type=None, architectures=None)
    monkeypatch.chdir(tmp_path)
    elsewhere = verification.Check("fresh process", "passed", {}, "is not started here")
    monkeypatch.setattr(verification, "_fresh_process", lambda *inputs: elsewhere)
    place, attention = ["--subfolder", "inner"], ["--attention", "local", "--attention-window", 8]
    classified = [*place, "--model-class", "BertForMaskedLM"]
    assert document("inspect", "repository", *classified)["model_class"] == "BertForMaskedLM"
    assert "loads gpt2 checkpoints" in error("inspect", source, "--model-class", "GPT2LMHeadModel")
    run("convert", "repository", "out", *classified, "--dtype", "float64", *attention)
    lines = str(checkpoint_card("out")).splitlines()
    converting = next(line for line in lines if line.startswith("hf-efficient convert"))
    assert converting.endswith("--subfolder inner --model-class BertForMaskedLM --dtype float64")
    assert "hf-efficient verify converted repository --subfolder inner" in lines
    (tmp_path / "texts.txt").write_text("w5 w6 w7\nw8 w9 w10 w11")
    told = document("verify", "out", "repository", *place, "--texts", "texts.txt")
    assert "--subfolder inner" in told["command"] and told["passed"]


@pytest.mark.parametrize("option", ["--subfolder", "--model-class", "--revision", "--variant", "--dtype"])
def test_a_recipe_says_where_a_checkpoint_of_another_form_can_be_read(option):
    with pytest.raises(ValueError, match=f"no setting {option}: .* hf-efficient convert, which takes --model-class"):
        parse_settings(Settings, ["--model", "m", "--output-dir", "o", option, "x"])


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_other_keywords_of_from_pretrained_are_refused_by_name(name, source):
    verbs = [lambda **given: upcycle(source, **given)]
    if name != "offload_folder":  # where `convert` leaves weights that do not stay in memory
        verbs.append(lambda **given: he.convert(source, "local", **given))
    for verb in verbs:
        with pytest.raises(ValueError, match=rf"^{name} is no option here.*from_pretrained"):
            verb(**{name: None})


def test_a_mistyped_folder_does_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *given, **options: pytest.fail("asked"))
    for name in ("models/brt", "models/", "./brt", "a/b/c"):
        if not Path(name).exists():
            assert "does not exist" in error("convert", name, "out", "--attention", "local")


# ---- tensors that are missing ------------------------------------------------------------------------------------


def without(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(
        {key: tensor for key, tensor in state.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_each_missing_tensor_of_the_source_is_refused_or_reported(source, tmp_path):
    whole = (source / "model.safetensors").read_bytes()
    refused = 0
    for name in load_file(source / "model.safetensors"):
        without(source, name)
        try:
            report = he.convert(source, "local", **OPTIONS).report
        except ValueError as caught:
            assert "tensors of the model itself" in str(caught) and name in str(caught)
            refused += 1
        else:
            assert name.startswith(("cls.", "lm_head.")) and report.tensors[name]["status"] == "random"
        (source / "model.safetensors").write_bytes(whole)
    assert refused >= 12
    save_file({"other": torch.zeros(1)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="tensors of the model itself"):
        he.convert(source, "local", **OPTIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_missing_tensor_of_a_converted_checkpoint_is_refused(family, tmp_path):
    out = converted(tmp_path / "out", family)
    whole, cls = (out / "model.safetensors").read_bytes(), type(load_converted(out))
    for name in load_file(out / "model.safetensors"):
        if re.search(r"(encoder\.layer|coder\.block|transformer\.h)\.1\.", name):
            continue  # the first layer has these, and more
        without(out, name)
        with pytest.raises(ValueError, match=rf"(?s)lacks \d tensors.*{name}"):
            revert_checkpoint(str(out), tmp_path / "back")
        if not name.startswith(("cls.", "lm_head.")):
            with pytest.raises(ValueError, match=rf"(?s)lacks \d tensors.*{name}"):
                cls.from_pretrained(out)
        (out / "model.safetensors").write_bytes(whole)
    assert not (tmp_path / "back").exists()


# ---- damaged files -----------------------------------------------------------------------------------------------

JSON_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "modules.json", "sentence_bert_config.json")


@pytest.mark.parametrize("value", ["null", "[]", "3", '"text"', "{", "\x00", '{"vocab_size": "4"}', '[{"path": 3}]'])
@pytest.mark.parametrize("file", [*JSON_FILES, "conversion_report.json"])
def test_damaged_json_is_one_line(file, value, source, tmp_path):
    if file == "conversion_report.json":
        folder, command = converted(tmp_path / "converted", "bert", "local"), ["revert"]
    else:
        folder, command = source, ["convert", "--attention", "local", "--attention-window", 8]
    (folder / file).write_text(value)
    from command_line import CliRunner, app

    result = CliRunner().invoke(app, [str(word) for word in [command[0], folder, tmp_path / "out", *command[1:]]])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    if result.exit_code:
        assert len(result.stderr[result.stderr.index("error: ") :].strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ['{"tensors": 3}', '{"tensors": {"a": 3}}', '{"tensors": ["a"]}'])
@pytest.mark.parametrize("file", ["conversion_report.json", "upcycling_report.json"])
def test_a_report_that_tells_nothing_of_tensors_is_one_line(file, value, source, tmp_path):
    """To `revert`, and to `verify`, which loads a checkpoint in the same way."""
    out = he.convert(source, "local", **OPTIONS).save(tmp_path / "converted")
    (out / file).write_text(value)
    message = error("revert", out, tmp_path / "out")
    assert f"{file} is damaged" in message and "\n" not in message
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        load_converted(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_broken_tokenizer_is_not_taken_for_none(family, tmp_path):
    source, out = (
        save_source(tmp_path / "source", family, layers=1),
        converted(tmp_path / "converted", family, "local"),
    )
    for folder in (source, out):
        (folder / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    assert "the tokenizer of" in error(
        "convert", source, tmp_path / "new", "--attention", "local", "--attention-window", 8
    )
    assert "the tokenizer of" in error("revert", out, tmp_path / "new")
    result = he.convert(source, "local", tokenizer=tiny_tokenizer(family), **OPTIONS)
    assert result.tokenizer is not None


def test_wider_dtypes_and_values_that_are_none_are_named(source, logged):
    state = load_file(source / "model.safetensors")
    names = [name for name in state if name.endswith((".query.weight", ".key.weight"))]
    state[names[0]] = state[names[0]].half()
    state[names[1]][0, 0] = float("nan")
    save_file(state, source / "model.safetensors", {"format": "pt"})
    report = he.convert(source, "local", **OPTIONS).report
    assert report.recast == {names[0]: "float16 → float32"}
    assert any("but not their dtype" in line for line in logged)
    assert any("NaN or infinity in 1 tensors" in line for line in logged)


@pytest.mark.parametrize(
    ("whole", "part", "kept"),
    [
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_digits_are_lost_only_if_asked_for(whole, part, kept, source):
    state = {name: tensor.to(whole) for name, tensor in load_file(source / "model.safetensors").items()}
    name = next(name for name in state if name.endswith(".query.weight"))
    state[name] = state[name].to(part)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": str(whole).removeprefix("torch.")}))
    short = str(kept).removeprefix("torch.")
    message = error("convert", source, source.parent / "out", "--attention", "local", "--attention-window", 8)
    assert f"1 tensors of {source} would lose digits: {name}" in message and f"--dtype {short}" in message
    result = he.convert(source, "local", **OPTIONS, dtype=short)
    assert torch.equal(result.model.state_dict()[name], state[name].to(kept)) and result.report.recast == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tensors_that_transformers_keeps_wider_stay_so(dtype, tmp_path):
    """T5's last feed-forward projection, beside a model in half precision."""
    source = save_source(tmp_path / "source", "t5", layers=1)
    type(tiny_model("t5")).from_pretrained(source, dtype=dtype).save_pretrained(source)
    he.convert(source, "local", **OPTIONS).save(tmp_path / "out")
    he.revert(he.EfficientT5ForConditionalGeneration.from_pretrained(tmp_path / "out")).save_pretrained(
        tmp_path / "back"
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert len({tensor.dtype for tensor in before.values()}) == (2 if dtype is torch.float16 else 1)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_what_says_which_checkpoint_to_load_is_refused_for_a_loaded_model():
    model = tiny_model("bert", layers=1)
    for verb in (
        lambda: he.convert(model, "local", dtype=torch.float16),
        lambda: he.upcycle(model, 2, revision="main"),
        lambda: he.export(model, "stock", subfolder="sub"),
        lambda: he.import_checkpoint(model, model_class="LongformerModel"),
    ):
        with pytest.raises(ValueError, match=r"(dtype|revision|subfolder|model_class): this model is loaded already"):
            verb()
