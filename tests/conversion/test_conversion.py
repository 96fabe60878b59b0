"""convert and revert: every tensor accounted for, positions lengthened as promised, the way back exact."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import converted, save_source, tiny_tokenizer, words
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import hf_efficient as he
from hf_efficient.experts.install import install_experts
from hf_efficient.families import ModelFamily, family_of
from hf_efficient.patching.install import plan
from hf_efficient.patching.names import IMPLEMENTATION
from hf_efficient.testing import FAMILIES, TINY, inputs_for, tiny_model

LONGFORMER: dict[str, Any] = {"attention_window": 8, "global_tokens": "first"}


def convert(model: Any, mechanism: Any = "longformer", **options: Any) -> Any:
    """`he.convert` of a tiny model, with a tokenizer so that nothing warns."""
    family = model.config.model_type.split("-")[-1].replace("camembert", "roberta").lstrip("mu")
    options.setdefault("tokenizer", tiny_tokenizer(family))
    if mechanism == "longformer":
        options = LONGFORMER | options
    return he.convert(model, mechanism, **options)


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_for(model, **options)).logits


def mechanisms(model: Any) -> dict[str, str]:
    """{"side layer": mechanism} of every converted layer."""
    return {
        f"{stack.side} {layer.index}": layer.module.efficient.config.mechanism
        for stack in family_of(model).stacks(model)
        for layer in stack.layers
        if layer.module._modules["efficient"] is not None
    }


# ---- the report --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["longformer", "local", "linformer", "performer"])
@pytest.mark.parametrize("family", [*FAMILIES, "xlm-roberta", "mt5", "umt5"])
def test_report_accounts_for_every_tensor(family, mechanism):
    model = tiny_model(family)
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"linformer": {"rank": 8, "max_length": 256}, "local": {"attention_window": 8}}.get(
        mechanism, {}
    )
    try:
        result = convert(model, mechanism, max_positions=256, **options)
    except ValueError as refusal:
        assert "these settings are not possible" in str(refusal)
        pytest.skip(f"{mechanism} refuses {family}")
    state, tensors = result.model.state_dict(), result.report.tensors
    assert tensors.keys() == state.keys()
    for name, facts in tensors.items():
        assert facts["shape"] == list(state[name].shape)
        if facts["status"] == "copied":
            assert torch.equal(state[name], source[name]), name
        elif facts["status"] == "extended":
            assert len(state[name]) > len(source[name]) and f"{len(source[name])} rows" in facts["from"]
        else:
            assert facts["status"] == "initialised" and ".efficient." in name and facts["from"], (name, facts)
    assert {name for name in tensors if tensors[name]["status"] != "initialised"} == source.keys()
    extended = [name for name in tensors if tensors[name]["status"] == "extended"]
    assert len(extended) == (0 if family.endswith("t5") else 1)
    assert sum(result.report.counts().values()) == len(state)
    assert result.report.model_class == TINY[family][1]


def test_report_names_what_the_source_lacks_and_what_it_has_too_much(tmp_path):
    path = save_source(tmp_path / "source", "bert")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    result = he.convert(path, "longformer", attention_window=8)
    fresh = {name for name, facts in result.report.tensors.items() if facts["status"] == "random"}
    assert fresh == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert result.report.ignored and all(name.startswith("cls.") for name in result.report.ignored)
    saved = json.loads((result.save(tmp_path / "out") / "conversion_report.json").read_text())
    assert saved == json.loads(json.dumps(result.report.to_dict()))
    assert saved["source"] == str(path) and saved["versions"]["transformers"] == transformers.__version__


def test_longformer_globals_start_as_copies():
    result = convert(tiny_model("roberta"))
    for layer in result.model.roberta.encoder.layer:
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            ours, theirs = getattr(attention.efficient, f"{name}_global"), getattr(attention, name)
            assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
            assert ours.weight.data_ptr() != theirs.weight.data_ptr()


# ---- positions ---------------------------------------------------------------------------------------------------


def table_of(model: Any) -> torch.nn.Embedding:
    stack = family_of(model).stacks(model)[0].module
    return stack.wpe if hasattr(stack, "wpe") else stack.embeddings.position_embeddings


OFFSETS = {"bert": 0, "roberta": 2, "xlm-roberta": 2, "camembert": 2, "gpt2": 0}


@pytest.mark.parametrize("family", OFFSETS)
def test_tiled_positions_repeat_and_leave_the_padding_rows(family, tmp_path):
    model, offset = tiny_model(family), OFFSETS[family]
    before = table_of(model).weight.detach().clone()
    result = convert(model, max_positions=300)
    table = table_of(result.model)
    assert table.weight.shape[0] == table.num_embeddings == offset + 300 == result.model.config.max_position_embeddings
    assert torch.equal(table.weight[:offset], before[:offset])
    for start in (0, 128, 256):
        rows = table.weight[offset + start : offset + min(start + 128, 300)]
        assert torch.equal(rows, before[offset : offset + len(rows)])
    assert table.padding_idx == (None if family in ("bert", "gpt2") else 1)
    assert result.report.max_positions == 300 and result.tokenizer.model_max_length == 300
    path = result.save(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(path).model_max_length == 300
    loaded = type(result.model).from_pretrained(path)
    inputs = inputs_for(loaded, length=300, padded=False)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, result.model.eval()(**inputs).logits)


@pytest.mark.parametrize("family", OFFSETS)
def test_interpolated_positions_keep_the_learned_rows(family):
    model, offset = tiny_model(family), OFFSETS[family]
    before = table_of(model).weight.detach().clone()
    after = table_of(convert(model, max_positions=256, positions="interpolate").model).weight.detach()
    assert torch.equal(after[:offset], before[:offset])
    learned = before[offset:]
    assert torch.equal(after[offset::2], learned)
    torch.testing.assert_close(after[offset + 1 : -1 : 2], (learned[:-1] + learned[1:]) / 2)
    assert torch.equal(after[-1], learned[-1])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_buffers_are_rebuilt(family, tmp_path):
    path = converted(tmp_path / "out", family, max_positions=300)
    rows = 300 + OFFSETS[family]
    for model in (AutoModelForMaskedLM.from_pretrained(path), convert(tiny_model(family), max_positions=300).model):
        embeddings = model.base_model.embeddings
        assert torch.equal(embeddings.position_ids, torch.arange(rows)[None])
        assert torch.equal(embeddings.token_type_ids, torch.zeros(1, rows, dtype=torch.long))
        assert "position_ids" not in "".join(model.state_dict())


def test_t5_has_no_table_but_tells_its_tokenizer(tmp_path):
    result = convert(tiny_model("t5"), max_positions=1000)
    path = result.save(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(path).model_max_length == 1000
    assert result.report.counts()["extended"] == 0
    assert logits(result.model, length=400, batch=1).isfinite().all()


def test_without_max_positions_nothing_is_lengthened():
    model = tiny_model("bert")
    before = table_of(model)
    result = convert(model)
    assert table_of(result.model) is before and result.tokenizer.model_max_length == 128
    with pytest.raises(ValueError, match=r"129 tokens.*128 positions"):
        logits(result.model, length=129)


# ---- which layers ------------------------------------------------------------------------------------------------


def test_selected_layers_sides_and_hybrids():
    def chosen(family: str, spec: Any, layers: int = 3) -> dict[str, str]:
        return mechanisms(convert(tiny_model(family, layers=layers), spec).model)

    local: dict[str, Any] = {"mechanism": "local", "attention_window": 4}
    bigbird: dict[str, Any] = {"mechanism": "bigbird", "block_size": 4}
    assert chosen("bert", local | {"layers": [0, 2]}) == {"encoder 0": "local", "encoder 2": "local"}
    assert chosen("gpt2", local | {"layers": [1]}) == {"decoder 1": "local"}
    assert chosen("bert", [local | {"layers": [0]}, bigbird | {"layers": [1, 2]}]) == {
        "encoder 0": "local",
        "encoder 1": "bigbird",
        "encoder 2": "bigbird",
    }
    assert chosen("t5", local, 1) == {"encoder 0": "local"}
    assert chosen("t5", local | {"side": "decoder"}, 1) == {"decoder 0": "local"}
    assert chosen("t5", local | {"side": "both"}, 1) == {"encoder 0": "local", "decoder 0": "local"}
    assert chosen("t5", [local | {"side": "encoder"}, bigbird | {"side": "decoder"}], 1) == {
        "encoder 0": "local",
        "decoder 0": "bigbird",
    }


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_layers_left_out_stay_exact(family):
    """A hybrid whose converted layers are in their exact limit equals the original."""
    model = tiny_model(family, layers=3)
    expected = logits(model)
    result = convert(model, {"mechanism": "local", "attention_window": 300, "layers": [1]})
    actual = logits(result.model)
    keep = inputs_for(model)["attention_mask"].bool()
    torch.testing.assert_close(actual[keep], expected[keep], rtol=1e-4, atol=1e-4)
    narrow = convert(tiny_model(family, layers=3), {"mechanism": "local", "attention_window": 2, "layers": [1]})
    assert (logits(narrow.model)[keep] - expected[keep]).abs().max() > 1e-2


def test_one_window_per_layer(tmp_path):
    model = tiny_model("bert", layers=3)
    result = convert(model, "longformer", attention_window=(4, 8, 40))
    path = result.save(tmp_path / "out")
    for loaded in (result.model, AutoModelForMaskedLM.from_pretrained(path)):
        assert [layer.attention.self.efficient.neighbours.left for layer in loaded.bert.encoder.layer] == [2, 4, 20]
    same = convert(tiny_model("bert", layers=3), "longformer", attention_window=8)
    assert not torch.equal(logits(result.model), logits(same.model))


def test_accepted_forms_give_the_same_model():
    expected = logits(convert(tiny_model("bert"), "local", attention_window=6).model)
    config = he.attention_config("local", attention_window=6)
    for form in (config, [config], config.to_dict(), [config.to_dict()], json.dumps([config.to_dict()])):
        assert torch.equal(logits(convert(tiny_model("bert"), form).model), expected)


# ---- the way back ------------------------------------------------------------------------------------------------

RELATIVES = [*FAMILIES, "xlm-roberta", "camembert", "mt5", "umt5"]


@pytest.mark.parametrize("positions", ["tile", "interpolate"])
@pytest.mark.parametrize("family", RELATIVES)
def test_revert_is_bit_for_bit(family, positions, tmp_path):
    original = tiny_model(family)
    original.save_pretrained(tmp_path / "source")
    original = type(original).from_pretrained(tmp_path / "source")
    expected, answer = copy.deepcopy(original.state_dict()), logits(original)
    settings = original.config.to_dict()
    side = "both" if family.endswith("t5") else None
    # T5 takes any length as it is
    result = convert(original, max_positions=256, positions=None if side else positions, side=side)
    assert logits(result.model).ne(answer).any()
    path = result.save(tmp_path / "out")
    reloaded = he.EfficientT5ForConditionalGeneration if family == "t5" else type(result.model)
    for model in (he.revert(result.model), he.revert(reloaded.from_pretrained(path))):
        assert type(model).__name__ == TINY[family][1]
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
        assert torch.equal(logits(model), answer)
        assert {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"} == {
            k: v for k, v in settings.items() if k != "_name_or_path"
        }
        for module in model.modules():
            for name in ("efficient_attention", "efficient_source", "attn_implementation"):
                assert not hasattr(getattr(module, "config", None), name), f"{type(module).__name__} keeps {name}"
            assert "efficient" not in getattr(getattr(module, "config", None), "model_type", "")
            assert getattr(getattr(module, "config", None), "_attn_implementation", None) != IMPLEMENTATION
            assert not module._forward_pre_hooks and "Lazy" not in type(module).__name__
        again = type(model).from_pretrained(_saved(model, tmp_path))
        assert torch.equal(logits(again), answer)
        # and it can be converted once more
        assert mechanisms(convert(copy.deepcopy(model), "local", attention_window=4).model)


def _saved(model: Any, folder: Any) -> Any:
    model.save_pretrained(folder / "reverted")
    return folder / "reverted"


def test_revert_keeps_what_training_changed():
    result = convert(tiny_model("bert"), max_positions=256)
    weight = result.model.bert.encoder.layer[0].attention.self.query.weight
    with torch.no_grad():
        weight.add_(1.0)
    trained = weight.detach().clone()
    assert torch.equal(he.revert(result.model).bert.encoder.layer[0].attention.self.query.weight, trained)


def test_revert_of_a_model_that_never_had_an_original():
    config = he.EfficientBertConfig(
        **TINY["bert"][2], num_hidden_layers=1, max_position_embeddings=64,
        efficient_attention=[{"mechanism": "local", "attention_window": 4}],
    )  # fmt: skip
    model = he.EfficientBertForMaskedLM(config).eval()
    reverted = he.revert(model)
    assert type(reverted) is transformers.BertForMaskedLM and table_of(reverted).num_embeddings == 64
    assert logits(reverted, length=40).isfinite().all()


def test_revert_refuses_what_was_never_converted():
    with pytest.raises(ValueError, match="not a converted model"):
        he.revert(tiny_model("bert"))


# ---- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", RELATIVES)
def test_saved_checkpoint_reloads_bit_for_bit(family, tmp_path):
    result = convert(tiny_model(family), max_positions=256)
    path = result.save(tmp_path / "out")
    loaded = type(result.model).from_pretrained(path)
    expected = result.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits(loaded, length=97), logits(result.model, length=97))
    stored = json.loads((path / "config.json").read_text())
    assert stored["model_type"] == f"efficient_{family}" and stored["architectures"] == [type(loaded).__name__]
    assert stored["efficient_attention"][0]["mechanism"] == "longformer"
    assert load_file(path / "model.safetensors").keys() <= expected.keys()


def test_new_label_count_for_a_converted_checkpoint(tmp_path):
    path = converted(tmp_path / "out", "bert")
    model = he.EfficientBertForSequenceClassification.from_pretrained(path, num_labels=5)
    assert model.classifier.out_features == 5 and model.classifier.weight.isfinite().all()
    tokens = AutoTokenizer.from_pretrained(path)(words(200), return_tensors="pt")
    assert model(**tokens).logits.shape == (1, 5)
    body = AutoModel.from_pretrained(path)
    assert type(body) is he.EfficientBertModel
    assert torch.equal(body.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_loading_info_is_given_for_original_and_converted_checkpoints(tmp_path):
    source = save_source(tmp_path / "source", "bert")
    model, info = he.EfficientBertForTokenClassification.from_pretrained(
        source, efficient_attention="local", max_positions=256, output_loading_info=True
    )
    assert type(model) is he.EfficientBertForTokenClassification
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    model.save_pretrained(tmp_path / "out")
    again, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(again) is he.EfficientBertModel and set(info["unexpected_keys"]) == {
        "classifier.weight",
        "classifier.bias",
    }


def test_a_hub_repository_brings_its_side_files(tmp_path, monkeypatch):
    """What sentence-transformers keeps beside the weights comes along from the Hub as it does from a folder."""
    import hf_efficient.conversion.sentence_transformers as side_files

    asked = []

    def download(name, **options):
        asked.append(options | {"name": name})
        (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
        return str(tmp_path)

    monkeypatch.setattr(side_files, "snapshot_download", download)
    assert side_files.checkpoint_folder("somebody/something", "v1") == tmp_path
    assert all(options["name"] == "somebody/something" and options["revision"] == "v1" for options in asked)
    assert "modules.json" in asked[0]["allow_patterns"] and "1_Pooling/*" in asked[1]["allow_patterns"]
    assert side_files.checkpoint_folder(str(tmp_path)) == tmp_path


# ---- once found, handed on ---------------------------------------------------------------------------------------


@contextmanager
def counted_calls(*functions: Any) -> Iterator[dict[str, int]]:
    """{name: calls} of these functions inside the block, whoever calls them and under which name."""
    names = {function.__code__: function.__name__ for function in functions}
    calls = dict.fromkeys(names.values(), 0)

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in names:
            calls[names[frame.f_code]] += 1

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_family_stacks_and_plan_are_found_once(family: str, tmp_path: Path) -> None:
    stock = tiny_model(family)
    save_source(tmp_path, family)
    with counted_calls(family_of, ModelFamily.stacks, plan) as calls:
        he.convert(str(tmp_path), "local", attention_window=8, max_positions=128)
    assert calls == {"family_of": 1, "stacks": 1, "plan": 1}
    with counted_calls(family_of, ModelFamily.stacks, plan) as calls:
        handle = he.patch_attention(stock, "local", attention_window=8)
    assert calls == {"family_of": 1, "stacks": 1, "plan": 1}
    with counted_calls(family_of, ModelFamily.stacks, plan) as calls:
        handle.undo()
    assert calls == {"family_of": 1, "stacks": 1, "plan": 0}
    with counted_calls(family_of, ModelFamily.stacks, install_experts) as calls:
        he.upcycle(str(tmp_path), 2)
    assert calls == {"family_of": 1, "stacks": 1, "install_experts": 1}
