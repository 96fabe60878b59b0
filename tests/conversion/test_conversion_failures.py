"""Bad input and bad luck: a clear error, and nothing lost, half-written or silently replaced by full attention."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fresh import python
from safetensors.torch import load_file, save_file
from tiny import converted, save_source, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import hf_efficient as he
from hf_efficient.attention.longformer import LongformerAttention
from hf_efficient.testing import inputs_for, tiny_model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_for(model)).logits


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "bert", "bert")


@pytest.fixture
def target(tmp_path) -> Path:
    """A converted checkpoint that a test may damage."""
    return converted(tmp_path / "converted", "bert")


# ---- impossible settings -----------------------------------------------------------------------------------------

SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("longformr", {}, "unknown mechanism 'longformr'.*longformer"),
    ("longformer", {"windw": 8}, "no option 'windw'.*attention_window"),
    ("local", {"attention_window": 8, "block_size": 4}, "no option 'block_size'"),
    *[
        (mechanism, {"attention_window": window}, "attention_window")
        for mechanism in ("local", "longformer")
        for window in (7, 0, -2, True, 8.0, "8", None, [8, 7])
    ],
    ("bigbird", {"block_size": 0}, "block_size=0"),
    ("bigbird", {"num_random_blocks": -1}, "num_random_blocks=-1"),
    ("linformer", {"rank": 0}, "rank=0"),
    ("linformer", {"rank": 500}, "rank=500 exceeds max_length=128"),
    ("performer", {"num_features": 0}, "num_features=0"),
    ("performer", {"kernel": "cosine"}, "kernel='cosine'"),
    ("local", {"layers": [0, 7]}, r"layers \[7\] do not exist.*0 to 1"),
    ("local", {"layers": []}, r"layers=\(\)"),
    ("local", {"layers": [-1]}, "layers="),
    ("local", {"layers": [0, 0]}, "layers="),
    ("local", {"layers": [True]}, "layers="),
    ("local", {"side": "decoder"}, "side='decoder'"),
    ("local", {"side": "left"}, "side='left'"),
    ("longformer", {"attention_window": (4, 4, 4)}, "lists 3 windows.*2 layers"),
    ("longformer", {"global_tokens": "last"}, "global_tokens='last'"),
    ("local", {"max_positions": 64}, "max_positions=64"),
    *[("local", {"max_positions": count}, "max_positions=") for count in (0, -1, True, 256.0, "256")],
    ("local", {"max_positions": 200, "positions": "interpolate"}, "multiple of 128"),
    ("local", {"positions": "stretch"}, "positions='stretch'"),
]


@pytest.mark.parametrize("mechanism,options,message", SETTINGS, ids=[f"{m}-{o}" for m, o, _ in SETTINGS])
def test_impossible_settings_are_named_and_harm_nothing(mechanism, options, message):
    model = tiny_model("bert")
    before, answer, settings = copy.deepcopy(model.state_dict()), logits(model), model.config.to_dict()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        he.convert(model, mechanism, tokenizer=tiny_tokenizer("bert"), **options)
    assert type(model) is transformers.BertForMaskedLM and model.config.to_dict() == settings
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), answer)


@pytest.mark.parametrize("count", [0, -5, True, 256.0, "256"])
def test_impossible_lengths_are_refused_where_there_is_no_table(count):
    with pytest.raises(ValueError, match="max_positions="):
        he.convert(tiny_model("t5"), "local", max_positions=count, tokenizer=tiny_tokenizer("t5"))


@pytest.mark.parametrize(
    "form", [5, None, {"attention_window": 8}, [], "[]", '{"attention_window": 8}', "{", object()]
)
def test_what_is_no_mechanism_is_refused(form):
    with pytest.raises((ValueError, TypeError)):
        he.convert(tiny_model("bert"), form, tokenizer=tiny_tokenizer("bert"))


def test_model_without_its_weights_is_refused():
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(tiny_model("bert").config)
    with pytest.raises(ValueError, match=r"not loaded.*meta device"):
        he.convert(model, "local", tokenizer=tiny_tokenizer("bert"))


def test_all_reasons_are_given_at_once():
    groups = [
        {"mechanism": "linformer", "layers": [0]},
        {"mechanism": "local", "layers": [0]},
        {"mechanism": "local", "layers": [9]},
    ]
    with pytest.raises(ValueError) as caught:
        he.convert(tiny_model("gpt2"), groups, tokenizer=tiny_tokenizer("gpt2"))
    for reason in ("linformer can't be causal", "layer 0 is named by more than one config", "layers [9] do not exist"):
        assert reason in str(caught.value)


@pytest.mark.parametrize("family,side", [("gpt2", None), ("t5", "decoder"), ("t5", "both")])
def test_encoder_only_mechanism_is_refused_on_causal_layers(family, side):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=r"linformer can't be causal.*use local"):
        he.convert(model, "linformer", max_length=128, rank=8, side=side, tokenizer=tiny_tokenizer(family))
    assert type(model).__name__ in ("GPT2LMHeadModel", "T5ForConditionalGeneration")
    logits(model)


@pytest.mark.parametrize("name", ["Bloom", "Deberta"])
def test_attention_of_its_own_is_named(name, tmp_path):
    sizes: dict[str, Any] = dict(vocab_size=99, num_hidden_layers=1, num_attention_heads=2, hidden_size=16)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = AutoModel.from_config(config)
    message = f"model_type '{config.model_type}'.* does not go through AttentionInterface"
    with pytest.raises(ValueError, match=message):
        he.convert(model, "local", tokenizer=tiny_tokenizer("bert"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        he.convert(tmp_path, "local")
    with pytest.raises(ValueError, match=f"loads bert checkpoints, but .* is '{config.model_type}'"):
        he.EfficientBertModel.from_pretrained(tmp_path, efficient_attention="local")


def test_what_is_already_converted_is_refused(source, target):
    model = tiny_model("bert")
    result = he.convert(model, "local", attention_window=8, tokenizer=tiny_tokenizer("bert"))
    answer = logits(result.model)
    patched = tiny_model("bert")
    with he.patch_attention(patched, "local", attention_window=8):
        for again in (result.model, target):
            with pytest.raises(ValueError, match="already has efficient attention; revert it"):
                he.convert(again, "local", attention_window=4)
        with pytest.raises(ValueError, match="already installed in this model; undo it first"):
            he.convert(patched, "local", attention_window=4, tokenizer=tiny_tokenizer("bert"))
    assert torch.equal(logits(result.model), answer)
    with pytest.raises(ValueError, match="already converted"):
        he.EfficientBertModel.from_pretrained(target, efficient_attention="local")
    with pytest.raises(ValueError, match="already converted"):
        he.EfficientBertModel.from_pretrained(target, max_positions=512)
    with pytest.raises(ValueError, match="original bert checkpoint: say what to convert it to"):
        he.EfficientBertModel.from_pretrained(source)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_conflicting_attn_implementation_is_refused(implementation, source, target):
    with pytest.raises(ValueError, match="contradicts"):
        AutoModelForMaskedLM.from_pretrained(target, attn_implementation=implementation)
    with pytest.raises(ValueError, match="contradicts"):
        AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(target), attn_implementation=implementation)
    with pytest.raises(ValueError, match="contradicts"):
        he.EfficientBertForMaskedLM.from_pretrained(
            source, efficient_attention="local", attn_implementation=implementation
        )
    model = AutoModelForMaskedLM.from_pretrained(target)
    with pytest.raises(ValueError, match="silently switch efficient attention off"):
        model.set_attn_implementation(implementation)
    model.config._attn_implementation = implementation
    with pytest.raises(RuntimeError, match="silently switch it off"):
        logits(model)
    assert logits(AutoModelForMaskedLM.from_pretrained(target, attn_implementation="hf_efficient")).isfinite().all()


def test_failure_while_installing_leaves_the_model_as_it_was(monkeypatch):
    """The second layer fails: nothing of the first one stays."""
    for family in ("bert", "t5"):
        model = tiny_model(family)
        before, answer, settings = copy.deepcopy(model.state_dict()), logits(model), model.config.to_dict()
        working, calls = LongformerAttention.initialise_from, []

        def fail_on_the_second(self: Any, source: Any, calls: Any = calls, working: Any = working) -> dict[str, str]:
            calls.append(self)
            if len(calls) == 2:
                raise MemoryError("no memory for the second layer")
            return working(self, source)

        with monkeypatch.context() as patch:
            patch.setattr(LongformerAttention, "initialise_from", fail_on_the_second)
            with pytest.raises(MemoryError):
                he.convert(model, "longformer", max_positions=256, tokenizer=tiny_tokenizer(family))
        assert model.state_dict().keys() == before.keys() and model.config.to_dict() == settings
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert torch.equal(logits(model), answer)
        he.convert(model, "longformer", attention_window=8, tokenizer=tiny_tokenizer(family))


# ---- damaged files -----------------------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "corrupt header":
        path.write_bytes(data[:8] + b"\xff" * 64 + data[72:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "another shape":
        tensors = load_file(path)
        name = next(n for n in tensors if n.endswith("query.weight"))
        save_file(tensors | {name: torch.zeros(3, 3)}, path, {"format": "pt"})
    elif how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "corrupt header", "empty", "another shape", "missing"])
def test_damaged_weights_are_refused(how, target, tmp_path):
    original = save_source(tmp_path / "original", "bert")
    damage(original, how)
    with pytest.raises((ValueError, OSError), match=str(original)):
        he.convert(original, "local")
    damage(target, how)
    with pytest.raises(Exception):  # noqa: B017  (safetensors and transformers raise classes of their own)
        AutoModelForMaskedLM.from_pretrained(target)


@pytest.mark.parametrize("gone", ["one", "all"])
def test_converted_checkpoint_without_its_mechanism_tensors_is_refused(gone, target):
    tensors = load_file(target / "model.safetensors")
    ours = [name for name in tensors if ".efficient." in name]
    for name in ours if gone == "all" else ours[:1]:
        del tensors[name]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    count = len(ours) if gone == "all" else 1
    for auto in (AutoModelForMaskedLM, AutoModel):
        with pytest.raises(ValueError, match=f"lacks {count} tensors of its efficient attention"):
            auto.from_pretrained(target)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "value,message",
    [
        ([{"mechanism": "longforma"}], "unknown mechanism"),
        ([{"mechanism": "longformer", "attention_window": 7}], "attention_window=7"),
        ([{"mechanism": "longformer", "windw": 8}], "no option 'windw'"),
        ([], "needs config.efficient_attention"),
        (None, "needs config.efficient_attention"),
    ],
)
def test_damaged_settings_are_refused(value, message, target):
    edit_config(target, efficient_attention=value)
    with pytest.raises(ValueError, match=message):
        AutoModelForMaskedLM.from_pretrained(target)


def test_missing_source_is_an_os_error(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises((OSError, ValueError)):
            he.convert(path, "local")


# ---- writing -----------------------------------------------------------------------------------------------------


def fail_while_writing(monkeypatch: Any, where: str, error: BaseException) -> None:
    """Make one step of saving fail after it has written something."""

    def half(path: Any) -> Any:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        assert folder.suffix == ".tmp", f"{folder} is not temporary"
        (folder / "half-written").write_bytes(b"x" * 1000)
        raise error

    targets = {
        "weights": "transformers.modeling_utils.safe_save_file",
        "config": "transformers.PreTrainedConfig.save_pretrained",
        "tokenizer": "transformers.PreTrainedTokenizerFast.save_pretrained",
    }
    if where == "weights":
        monkeypatch.setattr(targets[where], lambda tensors, path, **kw: half(path))
    else:
        monkeypatch.setattr(targets[where], lambda self, path, **kw: half(path))


@pytest.mark.parametrize("where", ["weights", "config", "tokenizer"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_interruption_while_saving_leaves_nothing_behind(overwrite, where, source, tmp_path, monkeypatch):
    result = he.convert(source, "longformer", attention_window=8)
    if overwrite:
        he.convert(source, "local", attention_window=4).save(tmp_path / "out")
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        fail_while_writing(patch, where, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            result.save(tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])
    result.save(tmp_path / "out", overwrite=overwrite)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["efficient_attention"][0]["mechanism"]
        == "longformer"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_existing_folder_is_kept(source, tmp_path):
    result = he.convert(source, "local", attention_window=8)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    before = contents(tmp_path)
    for name in ("out", "file"):
        with pytest.raises(FileExistsError, match="overwrite"):
            result.save(tmp_path / name)
    assert contents(tmp_path) == before
    # not even when told to: what is no checkpoint is somebody's work
    for name in ("out", "file"):
        with pytest.raises(FileExistsError, match="not a checkpoint folder"):
            result.save(tmp_path / name, overwrite=True)
    assert contents(tmp_path) == before
    (tmp_path / "out" / "config.json").write_text("{}")
    result.save(tmp_path / "out", overwrite=True)
    assert "notes.txt" not in contents(tmp_path / "out") and (tmp_path / "out" / "config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]
    result.save(tmp_path / "new" / "deeper" / "out")
    assert oct((tmp_path / "new" / "deeper" / "out").stat().st_mode & 0o777) == "0o755"


def test_source_without_tokenizer_converts_with_a_warning(tmp_path, logged):
    tiny_model("bert").save_pretrained(tmp_path / "source")
    result = he.convert(tmp_path / "source", "local", attention_window=8)
    assert any("no tokenizer" in line for line in logged)
    assert result.tokenizer is None
    assert "tokenizer.json" not in contents(result.save(tmp_path / "out"))


# ---- without this package ----------------------------------------------------------------------------------------


LOADED = (("bert", AutoModelForMaskedLM, "BertForMaskedLM"), ("gpt2", AutoModelForCausalLM, "GPT2LMHeadModel"))
# tries every class on every folder, and prints what each attempt came to
FRESH = """
import json, sys, torch, transformers
{first}
outcomes = {{}}
for path, name in json.loads(sys.argv[1]):
    try:
        with torch.no_grad():
            model = getattr(transformers, name).from_pretrained(path).eval()
            outcomes[name] = model(input_ids=torch.arange(200)[None] % 90).logits.tolist()
    except Exception as error:
        outcomes[name] = f"{{type(error).__name__}}: {{error}}"
print("OUTCOMES" + json.dumps(outcomes))
"""


def fresh(first: str, attempts: list[tuple[str, str]]) -> dict[str, Any]:
    done = python("-c", FRESH.format(first=first), json.dumps(attempts))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("OUTCOMES")[1])


def test_fresh_process_needs_this_package_and_then_agrees(tmp_path):
    paths = {family: str(converted(tmp_path / family, family)) for family, _, _ in LOADED}
    attempts = [(paths[family], name) for family, auto, stock in LOADED for name in (auto.__name__, stock)]
    without = fresh("assert 'hf_efficient' not in sys.modules", attempts)
    for _, auto, stock in LOADED:
        assert "contains custom code" in without[auto.__name__], without[auto.__name__]
        # the stock class finds all of its own weights, so without a word it would run full attention
        assert "hf_efficient" in without[stock], without[stock]
    imported = fresh("import hf_efficient", attempts)
    for family, auto, stock in LOADED:
        assert "import hf_efficient" in imported[stock]
        with torch.no_grad():
            expected = auto.from_pretrained(paths[family])(input_ids=torch.arange(200)[None] % 90).logits
        assert not isinstance(imported[auto.__name__], str), imported[auto.__name__]
        assert torch.equal(torch.tensor(imported[auto.__name__]), expected)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5"])
def test_stock_class_never_runs_full_attention_on_a_converted_checkpoint(family, tmp_path):
    path = converted(tmp_path / "model", family)
    for options in ({}, {"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}):
        with pytest.raises(ValueError, match="pip install hf_efficient; import hf_efficient"):
            type(tiny_model(family)).from_pretrained(path, **options)
