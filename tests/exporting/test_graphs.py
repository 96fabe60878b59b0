"""Graphs with an open batch and length compute what the model does, at lengths and paddings that they were not made with."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from command_line import document
from command_line import error as command_error
from long_models import converted_head, trained, with_head

import hf_efficient as he
from hf_efficient.exporting.graph import GraphResult, NamedOutputs, input_names, program_of
from hf_efficient.exporting.graph_export import compared_lengths
from hf_efficient.exporting.onnx import OnnxTarget
from hf_efficient.testing import assert_close, inputs_for, tiny_model

LONGEST = 320
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="NOT TESTED: ONNX needs `pip install 'hf-efficient[onnx]'`")
# shorter than a window, one and a half of its blocks, a prime, the longest; with a batch for each
CALLS = ((9, 2), (24, 1), (97, 5), (LONGEST, 2))
# host, mechanism, options
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "local", dict(attention_window=32)),
    ("roberta", "local", dict(attention_window=8, dilation=3, sink_tokens=2)),
    ("distilbert", "longformer", dict(attention_window=32, global_tokens=(0, 5, 150))),
    ("bert", "bigbird", dict(block_size=16)),
    ("roberta", "bigbird", dict(block_size=8, num_random_blocks=0, first_block_weight=3.0)),
    ("bert", "longt5", dict(attention_window=8, global_block_size=16)),
]


def batch_of(model: Any, length: int, batch: int, side: str) -> dict[str, torch.Tensor]:
    """Random tokens of which three quarters are hidden, in all rows but the first, or in a single one."""
    inputs = inputs_for(model, batch, length, padded=False, seed=length)
    mask, rows, count = inputs["attention_mask"], slice(int(batch > 1), None), length - max(length // 4, 1)
    hidden = {"right": slice(length - count, None), "left": slice(count), "holes": slice(length // 3, length // 2)}
    mask[rows, hidden[side]] = 0
    inputs["input_ids"] = torch.where(mask.bool(), inputs["input_ids"], model.config.pad_token_id or 0)
    return inputs


def assert_same(run: Any, module: NamedOutputs, tolerance: float, sides: tuple[str, ...], calls: Any = CALLS) -> None:
    for length, batch in calls:
        for side in sides:
            inputs = batch_of(module.model, length, batch, side)
            found, expected = run(inputs), module(**inputs)
            assert found.keys() == expected.keys()
            real = inputs["attention_mask"]
            for name, value in expected.items():
                where = real if value.shape[:2] == real.shape else None
                assert_close(found[name], value, tolerance, f"{name} at {length} tokens, {side}", where=where)


@pytest.mark.parametrize(("host", "mechanism", "options"), ROWS, ids=str)
@torch.no_grad()
def test_a_program_is_the_model_at_any_length(host, mechanism, options):
    # in double precision, as the order of sums differs from that of the fused forms
    model = he.convert(tiny_model(host, layers=1, positions=LONGEST), mechanism, **options).model.double()
    module = NamedOutputs(model, is_decoder=host == "gpt2").eval()
    program = program_of(module, ["input_ids", "attention_mask"], LONGEST).module()
    sides = ("right", "left", "holes") if host == "bert" else ("right", "left")
    assert_same(lambda inputs: program(**inputs), module, 1e-6, sides)


# one of several heads for each
ONNX: list[tuple[str, str, dict[str, Any]]] = [
    ("RobertaForTokenClassification", "local", dict(attention_window=16)),
    ("BertForSequenceClassification", "longformer", dict(attention_window=16, global_tokens="first")),
    ("BertForQuestionAnswering", "bigbird", dict(block_size=16)),
]


@needs_onnx
@pytest.mark.parametrize(("head", "mechanism", "options"), ONNX, ids=str)
@torch.no_grad()
def test_an_onnx_folder_is_the_model_at_any_length(head, mechanism, options, tmp_path):
    model = trained(he.convert(with_head(head, layers=1), mechanism, max_positions=256, **options).model)
    result = he.export(model, "onnx")
    folder = result.save(tmp_path / "exported")
    report = json.loads((folder / "export_report.json").read_text())
    assert report["target"] == "onnx" and max(row["error"] for row in report["checks"]) <= 1e-4
    assert len({row["length"] for row in report["checks"]}) == 5
    assert {row["batch"] for row in report["checks"]} == {1, 2, 5}
    assert {row["padding"] for row in report["checks"]} == {"right", "left"}
    assert {file.name for file in folder.iterdir()} == {"model.onnx", "config.json", "export_report.json", "README.md"}
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == [result.report.model_class.removeprefix("Efficient")]
    assert "efficient" not in (folder / "config.json").read_text()
    typed = "token_type_ids" in report["inputs"]
    run = OnnxTarget().load(folder / "model.onnx")

    def called(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        more = {"token_type_ids": torch.zeros_like(inputs["input_ids"])} if typed else {}
        return run(inputs | more)

    assert_same(
        called, NamedOutputs(model, is_decoder=False).eval(), 1e-4, ("right", "left"), ((11, 3), (67, 1), (101, 4))
    )
    import onnx

    graph = onnx.load(folder / "model.onnx").graph
    for value in graph.input:
        assert [d.dim_param for d in value.type.tensor_type.shape.dim] == ["batch_size", "sequence_length"]
    assert report["axes"]["sequence_length"][1] == result.report.max_positions


@pytest.mark.parametrize("window", [64, 512, [512, 4096]])
def test_graphs_are_compared_at_five_lengths_whatever_the_window(window):
    options = [dict(attention_window=window)]
    source: Any = SimpleNamespace(
        host=SimpleNamespace(max_positions=512), config=SimpleNamespace(efficient_attention=options)
    )
    found = compared_lengths(None, source)
    assert len(found) == 5 and found[0] < 512 // 2 and found[-1] == 512


def test_a_graph_has_the_inputs_that_its_tokenizer_gives():
    for names in (["input_ids", "attention_mask"], ["input_ids", "token_type_ids", "attention_mask"]):
        tokenizer = SimpleNamespace(model_input_names=names)
        source: Any = SimpleNamespace(config=SimpleNamespace(type_vocab_size=2), tokenizer=tokenizer)
        assert set(input_names(source)) == set(names)


REFUSED: list[tuple[Any, str, dict[str, Any], str]] = [
    ("bert", "synthesizer", {}, "synthesizer has no form whose length stays open; these have one: .*bigbird.*local"),
    ("bert", "hedgehog", {}, "beyond a window .* use attention_window=0"),
    ("bert", "etc", dict(num_global_tokens=4), "num_global_tokens=0"),
    ("bert", "longformer", dict(global_tokens="question", separator_token_id=7), "name positions, or use 'first'"),
    ("bert", "local", dict(implementation="flex"), "implementation='flex'.* convert with 'auto'"),
    ("gpt2", "performer", {}, "causal performer has no form"),
    ("t5", "local", {}, "load the checkpoint as T5EncoderModel"),
    ("bart", "local", {}, "an encoder and a decoder, .* use to='stock'"),
    ("vit", "local", {}, "takes pixel_values"),
]


@pytest.mark.parametrize(("host", "mechanism", "options", "reason"), REFUSED)
def test_what_has_no_graph_is_refused_with_what_has_one(host, mechanism, options, reason):
    with pytest.raises(ValueError, match=reason):
        he.export(he.convert(tiny_model(host), mechanism, **options).model, "program")


def test_heads_without_a_graph_and_what_differs_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="BertForMultipleChoice has a head"):
        he.export(converted_head("BertForMultipleChoice", "local"), "program")
    source = he.convert(tiny_model("bert", layers=1), "local", attention_window=8).save(tmp_path / "source")
    message = command_error("export", source, tmp_path / "out", "--to", "program", "--tolerance", "1e-12")
    assert "more than tolerance=1e-12: nothing was made" in message and not (tmp_path / "out").exists()
    found = document("export", source, tmp_path / "out", "--to", "program", "--lengths", "5,31")
    assert found["error"] <= 1e-6 and {row["length"] for row in found["checks"]} == {5, 31}
    assert {"model.pt2", "config.json", "export_report.json"} <= {x.name for x in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="max_shard_size='1MB': a graph is one file"):
        GraphResult(None, None, None).save(tmp_path / "shards", max_shard_size="1MB")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf-efficient\[onnx\]'"):
        OnnxTarget()
