"""Graphs for onnxruntime: how far they are from their models, their size, and their speed over length.

    hf-efficient bench graphs --out onnx.json

Accuracy: tiny BERTs of one layer with random weights, as `export` compares them. Speed: two layers of BERT-base width, one
row of random tokens without padding, on the CPU; the model in PyTorch, its graph, and the graph of the stock model with full
attention run in turn, round by round, all on one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_efficient.benchmarks.models import BASE_WIDTH, wide_model
from hf_efficient.conversion.convert import convert
from hf_efficient.exporting.export import export
from hf_efficient.exporting.graph import GraphReport, NamedOutputs, program_of
from hf_efficient.exporting.onnx import OnnxTarget
from hf_efficient.profiling.environment import hardware, one_thread, versions
from hf_efficient.profiling.forward import forward_call, random_inputs
from hf_efficient.profiling.timing import Mark, table_of, timed
from hf_efficient.testing.tiny import tiny_model

TINY: dict[str, dict[str, Any]] = {
    "local": dict(attention_window=64),
    "longformer": dict(attention_window=64, global_tokens="first"),
    "bigbird": dict(block_size=16),
    "blockwise": dict(block_size=64),
    "sparse_transformer": dict(stride=32),
    "axial": dict(row_length=32),
    "longt5": dict(attention_window=64),
    "linformer": dict(rank=64),
    "nystromformer": dict(num_landmarks=64),
    "set_transformer": {},
    "performer": {},
    "linear_transformer": {},
    "cosformer": {},
    "random_feature": {},
}
WIDE: dict[str, dict[str, Any]] = {
    "local": dict(attention_window=512),
    "longformer": dict(attention_window=512, global_tokens="first"),
    "bigbird": dict(block_size=64),
    "linformer": dict(rank=256),
}
POSITIONS, LENGTHS = 512, (512, 2048, 4096)
STOCK = "stock, onnxruntime"


def graphs_suite(
    lengths: Sequence[int] = LENGTHS, rounds: int = 5, seconds: float = 60.0, progress: bool = True
) -> dict[str, Any]:
    """Figures of every row of `TINY`, and times of `WIDE` at each length, in fewer rounds once `seconds` are used.

    Raises:
        ImportError: the packages of `hf-efficient[onnx]` are missing.
    """
    rows = [row for name in tqdm(TINY, desc="graphs", disable=not progress) for row in _accuracy(name)]
    settings = {"layers": 2, "hidden_size": BASE_WIDTH, "batch": 1, "dtype": "float32", "threads": 1, "seed": 0}
    return {
        "suite": "graphs",
        "settings": settings | {"rounds": rounds, "seconds": seconds},
        "rows": rows,
        "speed": _speed(lengths, rounds, seconds, progress),
        "hardware": hardware(),
        "versions": versions() | OnnxTarget().versions(),
    }


def _accuracy(name: str) -> list[dict[str, Any]]:
    model = convert(tiny_model("bert", layers=1, positions=POSITIONS), name, **TINY[name]).model
    report = export(model, "onnx").report
    assert isinstance(report, GraphReport)
    return [{"mechanism": name, "options": TINY[name], "bytes": report.size} | row for row in report.checks]


def _session(model: Any, length: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The graph of a model, for inputs of up to `length` tokens, in onnxruntime on one thread."""
    target = OnnxTarget(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, target.file)
        target.write(
            program_of(NamedOutputs(model, is_decoder=False), ["input_ids", "attention_mask"], length), [], path
        )
        return target.load(path)


def _speed(lengths: Sequence[int], rounds: int, seconds: float, progress: bool) -> list[dict[str, Any]]:
    most, found = max(lengths), []
    models: dict[str, Any] = {
        name: wide_model("bert", {"mechanism": name, **options}, most, "encoder")[0] for name, options in WIDE.items()
    }
    graphs = {STOCK: _session(wide_model("bert", None, most, "encoder")[0], most)}
    graphs |= {f"{name}, onnxruntime": _session(model, most) for name, model in models.items()}

    def called(graph: Any, inputs: dict[str, Tensor]) -> Callable[[Mark], None]:
        def call(mark: Mark) -> None:
            graph(inputs)

        return call

    for length in lengths:
        inputs = random_inputs(next(iter(models.values())).config, length)
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
        calls = {name: called(graph, inputs) for name, graph in graphs.items()}
        calls |= {f"{name}, PyTorch": forward_call(model, inputs) for name, model in models.items()}
        with one_thread():
            times = timed(calls, rounds, seconds, progress=f"{length} tokens" if progress else None)
        found += [
            {"model": name, "tokens": length, "rounds": len(times[name]), **row}
            for name, row in table_of(times, STOCK).items()
        ]
    return found


def graphs_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people: the largest error of each mechanism, length and padding; then the times."""
    head = ["what", "tokens", "padding", "error", "bytes", "time ÷ stock graph (min–max)"]
    rows: list[list[Any]] = [
        [row["mechanism"], row["length"], row["padding"], row["error"], row["bytes"], None] for row in document["rows"]
    ]
    for row in document["speed"]:
        ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"
        rows.append([row["model"], row["tokens"], None, None, None, ratio])
    return head, rows
