"""A converted model as a graph with an open batch and length: made once, written to a file, and that file compared."""

from __future__ import annotations

import copy
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.attention.base.registry import get_mechanism, list_mechanisms
from hf_efficient.conversion.folders import OutputFolder
from hf_efficient.conversion.sentence_transformers import copy_side_files
from hf_efficient.conversion.streaming import MAX_SHARD_SIZE
from hf_efficient.exporting.report import ExportReport, ExportResult, shown
from hf_efficient.exporting.target import Converted
from hf_efficient.models.in_place import config_of_class
from hf_efficient.patching.exact import eval_mode
from hf_efficient.patching.extra_tokens import PART
from hf_efficient.patching.hooks import state_of
from hf_efficient.patching.names import MODULE_NAME

Graph = Callable[[dict[str, Tensor]], dict[str, Tensor]]
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
DECODER_HEADS = ("LMHeadModel", "ForCausalLM")
BATCH, LENGTH = "batch_size", "sequence_length"
SHORTEST = 2
CARD = """---
{metadata}
---

# {title}

`{stock_class}` with the weights of {origin} ({attention} attention, `hf_efficient`) as one graph for any number of texts. It
needs neither `hf_efficient` nor the model's own code.

```python
{usage}
```

{conditions}

{figures}

The rows of the table are random tokens; `{file}` has the figures of all calls.
"""
# of the texts that a graph is made with; which size it has decides nothing
EXAMPLE = (2, 77)


class GraphTarget(ABC):
    """What a graph is written as.

    Attributes:
        name: as in `to=`. tolerance: largest relative error by default. file: its name in the folder.
    """

    name: ClassVar[str]
    tolerance: ClassVar[float]
    file: ClassVar[str]
    usage: ClassVar[str]

    @abstractmethod
    def write(self, program: torch.export.ExportedProgram, outputs: list[str], path: Path) -> None:
        """Write the program, whose outputs have these names, to a file."""

    @abstractmethod
    def load(self, path: Path) -> Graph:
        """What such a file computes: named inputs to named outputs."""

    def versions(self) -> dict[str, str]:
        """Those of what wrote and ran the file."""
        return {}

    def refusals(self, source: Converted) -> list[str]:
        """Why no graph can be made of this model, each with the setting that could; empty = one can."""
        model = source.model
        if model.main_input_name != "input_ids":
            return [
                f"{source.stock.__name__} takes {model.main_input_name}, and graphs are made of models of texts alone"
            ]
        if len({stack.side for stack in source.host.stacks}) > 1:
            encoders = [name for name in source.host.family.modeling.__all__ if name.endswith("EncoderModel")]
            remedy = f"load the checkpoint as {encoders[0]}, convert and export that" if encoders else "use to='stock'"
            return [
                f"{source.stock.__name__} has an encoder and a decoder, and a graph is made of one of them: {remedy}"
            ]
        name = source.stock.__name__
        reasons = []
        if not name.endswith(("Model", *HEADS, *DECODER_HEADS)):
            known = ", ".join((*HEADS, *DECODER_HEADS))
            reasons.append(
                f"{name} has a head that no graph is made of: load the checkpoint as base model or as {known}"
            )
        if any(state_of(stack.module, PART) for stack in source.host.stacks):
            reasons.append("learned tokens in front of the input have no place in a graph: use num_global_tokens=0")
        return reasons + _refused_layers(source)


def _refused_layers(source: Converted) -> list[str]:
    family = source.host.family
    reasons: dict[str, str] = {}
    for stack in source.host.stacks:
        for layer in stack.layers:
            mechanism: Any = layer.module._modules.get(MODULE_NAME)
            if mechanism is None:
                continue
            geometry = family.geometry(stack, layer)
            if mechanism.needs_input_ids:
                kind = mechanism.config.mechanism
                reason = f"{kind} looks for global tokens in each text's ids: name positions, or use 'first'"
                reasons[reason] = reason
            elif (reason := mechanism.graph_refusal(mechanism.config, geometry)) is not None:
                reasons[reason] = f"{reason}; these have one: {', '.join(traceable_mechanisms(geometry))}"
    return list(reasons.values())


def traceable_mechanisms(geometry: Any) -> list[str]:
    """Names of the mechanisms that have graphs in such a layer, with their usual options."""
    found = []
    for name in list_mechanisms():
        cls = get_mechanism(name)
        try:
            config = cls.Config()
            if cls.graph_refusal(config, geometry) is None and not cls.unsupported(config, geometry):
                found.append(name)
        except (TypeError, ValueError):  # options without a default
            continue
    return found


class NamedOutputs(nn.Module):
    """A model as a function of named tensors, to a dictionary of all tensors that it gives."""

    def __init__(self, model: Any, is_decoder: bool):
        super().__init__()
        self.model, self.options = model, {"use_cache": False} if is_decoder else {}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **given, **self.options)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def graph_module(source: Converted) -> NamedOutputs:
    """The model as it is made into a graph: in single precision on the CPU, a copy where it is elsewhere."""
    model = source.model
    if {(p.dtype, p.device.type) for p in model.parameters()} != {(torch.float32, "cpu")}:
        model = copy.deepcopy(model).float().cpu()
    return NamedOutputs(model, any(source.host.family.is_causal(s, s.layers[0]) for s in source.host.stacks))


def input_names(source: Converted) -> list[str]:
    """The inputs of a graph; with token types where the model has more than one, unless its tokenizer gives none."""
    given = ["token_type_ids"] if source.tokenizer is None else source.tokenizer.model_input_names
    is_typed = (getattr(source.config, "type_vocab_size", None) or 0) > 1
    return ["input_ids", "attention_mask", *(["token_type_ids"] if is_typed and "token_type_ids" in given else [])]


def program_of(module: NamedOutputs, names: list[str], longest: int | None) -> torch.export.ExportedProgram:
    """The graph of a module, of any batch and of `SHORTEST` to `longest` tokens (`None` = any number).

    Raises:
        ValueError: its batch or its length can't stay open.
    """
    rows, tokens = EXAMPLE[0], min(EXAMPLE[1], longest or EXAMPLE[1])
    example = {name: torch.zeros(rows, tokens, dtype=torch.long) for name in names}
    example["attention_mask"] = torch.ones(rows, tokens, dtype=torch.long)
    axes = {0: torch.export.Dim(BATCH, min=1), 1: torch.export.Dim(LENGTH, min=SHORTEST, max=longest)}
    try:
        with torch.no_grad(), eval_mode(module):
            return torch.export.export(
                module, (), example, dynamic_shapes={name: axes for name in names}, strict=False
            )
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        guard = next((line for line in lines if line.startswith("- ")), lines[0] if lines else "")
        raise ValueError(
            f"{type(module.model).__name__} can't be made into a graph whose batch and length stay open "
            f"({type(error).__name__}: {guard[:300]}): nothing was made."
        ) from error


@dataclass
class GraphReport(ExportReport):
    """What an export to a graph gave.

    Attributes:
        file, size: the graph's, in bytes. inputs, outputs: names in order. axes: {name: [least, largest or `None`]}.
    """

    file: str = ""
    size: int = 0
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    axes: dict[str, list[int | None]] = field(default_factory=dict)

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        heads = {
            "tokens": "length",
            "texts": "batch",
            "padding": "padding",
            "largest relative error": "error",
            "same argmax": "argmax_agreement",
        }
        return list(heads), [[shown(row[key]) for key in heads.values()] for row in self.checks]


@dataclass
class GraphResult(ExportResult):
    """A graph in a file that was compared with its source; `save(path)` writes it with config, tokenizer and report.

    `model` is the graph as the file gives it: a dictionary of named tensors to one of named tensors.
    """

    card: ClassVar[str] = CARD
    library: ClassVar[str | None] = None
    config: Any = None
    made: tempfile.TemporaryDirectory[str] | None = None

    def save(self, path: str | Path, overwrite: bool = False, max_shard_size: str | int = MAX_SHARD_SIZE) -> Path:
        self.write(OutputFolder(path, overwrite), max_shard_size)
        return Path(path)

    def write(self, target: OutputFolder, max_shard_size: str | int = MAX_SHARD_SIZE) -> None:
        if max_shard_size != MAX_SHARD_SIZE:
            raise ValueError(f"max_shard_size={max_shard_size!r}: a graph is one file: leave max_shard_size out.")
        target.require_apart(self.source_folder, self.report.source)
        assert self.made is not None
        with target.written() as folder:
            for file in sorted(Path(self.made.name).iterdir()):
                shutil.copyfile(file, folder / file.name)
            self.config.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            if self.source_folder is not None:
                copy_side_files(self.source_folder, folder, self._text_length())
            self._describe(folder, target.path.name)


def stock_config(source: Converted) -> Any:
    """The config of the class that was converted, which tools read beside a graph."""
    config = config_of_class(source.config, source.stock)
    config.architectures = [source.stock.__name__]
    config._attn_implementation = None
    return config
