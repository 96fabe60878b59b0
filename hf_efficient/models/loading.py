"""Reading checkpoints: the config, the files of weights, the class that fits them, and what must be in them.

No code of a checkpoint is run, whatever its config asks for, and files of tensors are read as tensors alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from hf_efficient.families import PREFIX, HostModel, family_of, is_family
from hf_efficient.models.provenance import REPORT_NAME
from hf_efficient.models.registry import MODELS, NAME, class_by_name, efficient_names, heads, is_efficient

LOCATION_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
SHOWN = 8
# as safetensors writes them
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
# which of classes with the same tensors is meant, where a config does not say so
USUAL_HEADS = ("ForMaskedLM", "LMHeadModel", "ForConditionalGeneration", "ForSequenceClassification")
OLD_BUFFERS = (".position_ids", ".attn.bias", ".masked_bias")
COPY_OF_TENSORS = """{file} holds more than tensors, or is damaged, so it is not opened ({error}). If you trust whoever \
made it, make a copy that holds tensors alone, beside it:
    state = torch.load({file!r}, map_location="cpu", weights_only=False)
    safetensors.torch.save_file({{k: v.clone().contiguous() for k, v in state.items()}}, {copy!r}, {{"format": "pt"}})"""


class Refused(ValueError):
    """What this package says of a checkpoint, which needs no other words around it."""


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Whatever a library raises about a damaged file is a ValueError of one line that names it."""
    try:
        yield
    except (OSError, Refused):
        raise
    except Exception as error:
        raise ValueError(f"{what} can't be read: {' '.join(str(error).split()) or type(error).__name__}") from error


def read_config(name: Any, model_class: Any = None, **location: Any) -> Any:
    """The config of a checkpoint.

    Args:
        model_class: stock or Efficient; says which architecture it is where the file has no `model_type`.
        location: see `LOCATION_KEYWORDS`.

    Raises:
        ValueError: a damaged file, no `model_type`, another architecture than that of `model_class`, or an unknown one.
        OSError: there is none.
    """
    with one_line(f"config.json of {name}"):
        values, _ = PreTrainedConfig.get_config_dict(name, **location)
        if not isinstance(values, dict):
            raise ValueError(f"it holds {values!r:.40}, where an object is needed.")
        stock = getattr(model_class, "stock_class", model_class)
        if "model_type" not in values and model_class is None:
            raise ValueError(
                "it has no model_type: say which class the model has, e.g. --model-class BertForMaskedLM or "
                "model_class='BertForMaskedLM', or load it with that class; a recipe needs it there."
            )
        if "model_type" in values:
            _require_family(name, str(values["model_type"]), **location)
            return AutoConfig.from_pretrained(name, trust_remote_code=False, **location)
        is_converted = values.get("efficient_attention") or values.get("efficient_experts")
        config = (model_class if is_converted else stock).config_class.from_dict(values)
        config._name_or_path = str(name)
        return config


def _require_family(name: Any, model_type: str, **location: Any) -> None:
    """Refuse a converted checkpoint of a family that is not installed, by the distribution that its report names."""
    if not model_type.startswith(PREFIX) or is_family(model_type.removeprefix(PREFIX)):
        return
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    path = cached_file(str(name), REPORT_NAME, **quiet, **location)
    origin = json.loads(Path(path).read_text(encoding="utf-8")).get("family") if path else None
    source = "{name} {version}".format(**origin) if origin else "a package that its report does not name"
    raise Refused(
        f"{name} is {model_type!r}, whose model family is not installed: it came from {source}. Install that, or call "
        "hf_efficient.register_family first."
    )


def class_named(given: Any) -> Any:
    """A stock or Efficient class by its name, or as it is.

    Raises:
        ValueError: there is none of that name.
    """
    is_class = isinstance(given, type) and (given in MODELS or is_efficient(given))
    found = given if is_class else class_by_name(given) if isinstance(given, str) else None
    if found is None or issubclass(found, PreTrainedConfig):
        names = [name.removeprefix(NAME) for name in efficient_names() if not name.endswith("Config")]
        raise ValueError(f"model_class={given!r} is not known; it must be one of {', '.join(names)}.")
    return found


def require_architecture(name: Any, model_class: Any, config: Any) -> None:
    """Raises ValueError where a checkpoint is of another architecture than the class that was given for it."""
    wanted = model_class.config_class.model_type
    if wanted != config.model_type:
        raise ValueError(f"{model_class.__name__} loads {wanted} checkpoints, but {name} is {config.model_type}.")


# ---- weights -----------------------------------------------------------------------------------------------------


@dataclass
class Weights:
    """The files with a checkpoint's tensors: of safetensors where there are any, else those that `torch.save` wrote."""

    name: str
    file: Path
    location: dict[str, Any]

    @property
    def is_safe(self) -> bool:
        return "safetensors" in self.file.name

    @cached_property
    def tensors(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """{tensor: (dtype, shape)}, without the values.

        Raises:
            ValueError: a file is damaged, or holds more than tensors; or an index names other files.
        """
        found: dict[str, tuple[Any, tuple[int, ...]]] = {}
        for file in self._files():
            found |= _safe_tensors(file) if self.is_safe else _pickled_tensors(file)
        return found

    @cached_property
    def total_bytes(self) -> int:
        """What the tensors take, as the index says, or else the files."""
        if self.file.suffix == ".json":
            with one_line(str(self.file)):
                stated = json.loads(self.file.read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
            if isinstance(stated, int | float):
                return int(stated)
        return sum(file.stat().st_size for file in self._files())

    def require_listed(self) -> None:
        """Refuse an index that names tensors which no file has, or leaves some out.

        Raises:
            ValueError: as `tensors`, and names them.
        """
        if self.file.suffix != ".json":
            return
        with one_line(str(self.file)):
            listed = json.loads(self.file.read_text(encoding="utf-8"))["weight_map"]
        for file in self._files():
            own, there = {name for name, where in listed.items() if where == file.name}, set(_safe_tensors(file))
            if own != there:
                odd = sorted(own ^ there)
                shown = ", ".join(odd[:SHOWN])
                raise Refused(
                    f"{self.file} does not fit {file.name}: {len(odd)} tensors are in one of both alone: {shown}. Fetch or "
                    "save the checkpoint again."
                )

    def require_tensors_alone(self) -> None:
        """Raises as `tensors`, where a file might hold more than tensors; those of safetensors can't."""
        if not self.is_safe:
            _ = self.tensors
        self._files()

    def _files(self) -> list[Path]:
        if self.file.suffix != ".json":
            return [self.file]
        ending = ".safetensors" if self.is_safe else ".bin"
        with one_line(str(self.file)):
            names = sorted(set(json.loads(self.file.read_text(encoding="utf-8"))["weight_map"].values()))
            others = [n for n in names if Path(n).name != n or not n.endswith(ending)]
            if others:
                raise ValueError(f"it names {others[0]}, which is no {ending} file of the checkpoint.")
        return [Path(str(cached_file(self.name, name, **self.location))) for name in names]


def find_weights(name: Any, config: Any = None, variant: str | None = None, **location: Any) -> Weights:
    """The weights that transformers would load; raises OSError where there are none."""
    names = [_with_variant(file, variant) for file in WEIGHT_FILES]
    named = getattr(config, "transformers_weights", None)
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    for file in [named] if named else names:
        path = cached_file(str(name), file, **quiet, **location)
        if path is not None:
            return Weights(str(name), Path(path), location)
    raise OSError(f"{name} has no weights: none of {', '.join(names)} is there.")


def _with_variant(file: str, variant: str | None) -> str:
    start, _, end = file.rpartition(".")
    return file if variant is None else f"{start}.{variant}.{end}"


def _safe_tensors(file: Path) -> dict[str, tuple[Any, tuple[int, ...]]]:
    with safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: (DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
            for name, part in slices.items()
        }


def _pickled_tensors(file: Path) -> dict[str, tuple[Any, tuple[int, ...]]]:
    try:
        state = torch.load(file, map_location="meta", weights_only=True)
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    except Exception as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        copy = str(file.with_name(SAFE_WEIGHTS_NAME))
        raise Refused(COPY_OF_TENSORS.format(file=str(file), copy=copy, error=why)) from error


# ---- classes and what they need ----------------------------------------------------------------------------------


def guessed_class(config: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
    """The stock class of the config's architecture whose tensors are most nearly those of these names and shapes."""
    family_of(config.model_type)  # an unsupported architecture is refused
    there = {(_today(name), shape) for name, shape in shapes.items()}
    ranked = []
    for order, cls in enumerate(heads(config.model_type)):
        with torch.device("meta"):
            try:
                model = cls(copy.deepcopy(config))  # some heads change it
            except ValueError:  # e.g. a head that wants another config
                continue
        own = {(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
        lost = {name for name, _ in own - there} - set(model.all_tied_weights_keys)
        unknown = {name for name, _ in there - own if not name.endswith(OLD_BUFFERS)}
        ending = next((i for i, end in enumerate(USUAL_HEADS) if cls.__name__.endswith(end)), len(USUAL_HEADS))
        ranked.append((len(unknown) + len(lost), ending, order, cls))
    return min(ranked)[-1]


def _today(name: str) -> str:
    """The name that transformers gives to a tensor of an old checkpoint."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def require_host_tensors(name: Any, model: Any, missing: Any) -> None:
    """Refuse a checkpoint that lacks tensors of the model itself; those of a head or a pooler may start anew.

    Raises:
        ValueError: names them.
    """
    if not missing:
        return
    host = HostModel.of(model)
    needed = {
        id(tensor)
        for stack in host.stacks
        for inside, tensor in stack.module.named_parameters()
        if not inside.startswith("pooler.")
    }
    if host.family.positions.kind == "sinusoidal":  # Marian does not save what it computes
        needed -= {id(weight) for stack in host.stacks for _, weight in host.family.positions.weights(stack)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    lost = sorted(key for key in missing if key in parameters and id(parameters[key]) in needed)
    if lost:
        shown = ", ".join(lost[:SHOWN]) + (f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else "")
        raise Refused(f"{name} lacks {len(lost)} tensors of the model itself: {shown}. The checkpoint is incomplete.")
