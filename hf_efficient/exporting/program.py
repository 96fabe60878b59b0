"""A program of `torch.export`, for PyTorch without this package and for what compiles such programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficient.exporting.graph import Graph, GraphTarget

USAGE = """import torch
from transformers import AutoTokenizer

model = torch.export.load("model.pt2").module()
batch = AutoTokenizer.from_pretrained(".")(["…"], return_tensors="pt")
outputs = model(**batch)"""


class ProgramTarget(GraphTarget):
    """`model.pt2`, an `ExportedProgram` of PyTorch's own operators, in single precision."""

    name = "program"
    tolerance = 1e-5
    file = "model.pt2"
    usage = USAGE

    def write(self, program: torch.export.ExportedProgram, outputs: list[str], path: Path) -> None:
        torch.export.save(program, path)

    def load(self, path: Path) -> Graph:
        module: Any = torch.export.load(path).module()

        @torch.no_grad()
        def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            found: dict[str, Tensor] = module(**inputs)
            return found

        return run
