"""ONNX, for runtimes without PyTorch: `model.onnx`, beside the stock config and the tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficient.exporting.graph import BATCH, LENGTH, Graph, GraphTarget

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# beyond the size of one message weights go to a file beside it
LARGEST_FILE = 1.9e9
USAGE = """import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("model.onnx")
batch = AutoTokenizer.from_pretrained(".")(["…"], return_tensors="np")
outputs = session.run(None, {x.name: batch[x.name] for x in session.get_inputs()})"""


class OnnxTarget(GraphTarget):
    """`model.onnx`, compared in onnxruntime on the CPU."""

    name = "onnx"
    tolerance = 1e-4
    file = "model.onnx"
    usage = USAGE

    def __init__(self, threads: int = 0) -> None:
        self.threads = threads  # of onnxruntime; 0 = as it chooses
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                f"to='onnx' needs {', '.join(missing)}: run `pip install 'hf-efficient[onnx]'`, or use to='program'."
            )

    def write(self, program: torch.export.ExportedProgram, outputs: list[str], path: Path) -> None:
        size = sum(x.numel() * x.element_size() for x in program.state_dict.values())
        names = outputs or None
        made: Any = torch.onnx.export(program, (), output_names=names, verbose=False, external_data=False)
        _name_axes(made.model)
        made.save(path, external_data=size > LARGEST_FILE)

    def load(self, path: Path) -> Graph:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, self.threads
        session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
            return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}

        return run

    def versions(self) -> dict[str, str]:
        return {name: importlib.import_module(name).__version__ for name in PACKAGES}


def _name_axes(model: Any) -> None:
    """Give the open axes of inputs and outputs their names in place of the compiler's."""
    first = model.graph.inputs[0].shape
    names = {str(first[0]): BATCH, str(first[1]): LENGTH}
    for value in (*model.graph.inputs, *model.graph.outputs):
        for axis, size in enumerate(value.shape or ()):
            if str(size) in names:
                value.shape[axis] = names[str(size)]
