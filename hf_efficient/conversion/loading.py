"""Load stock and converted checkpoints, and their tokenizers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from hf_efficient.conversion.offloading import load_from_disk
from hf_efficient.conversion.sentence_transformers import checkpoint_folder
from hf_efficient.models.loading import (
    LOCATION_KEYWORDS,
    SHOWN,
    Weights,
    class_named,
    find_weights,
    guessed_class,
    one_line,
    read_config,
    require_architecture,
    require_host_tensors,
)
from hf_efficient.models.provenance import ABSENT, REPORT_NAME, UPCYCLING_NAME
from hf_efficient.models.registry import is_efficient, named_class
from hf_efficient.profiling.json_files import read_json

# models of transformers that `import_checkpoint` takes, and that have no full attention to convert
IMPORTED = ("longformer", "big_bird")
Loaded = tuple[PreTrainedModel, dict[str, Any]]
LOADING_KEYWORDS = (*LOCATION_KEYWORDS, "dtype", "model_class")
KEPT = ("subfolder", "model_class", "dtype")
"""Of these, what the history of a checkpoint keeps beside its source and revision."""
# those of from_pretrained that would give another model than the checkpoint's, or one that can't be read
NOT_TAKEN = (
    "adapter_kwargs", "adapter_name", "attn_implementation", "config", "device_map", "device_mesh",
    "distributed_config", "experts_implementation", "fusion_config", "generation_config", "gguf_file",
    "ignore_mismatched_sizes", "kernel_config", "key_mapping", "load_in_4bit", "load_in_8bit", "max_memory",
    "offload_buffers", "offload_folder", "output_loading_info", "quantization_config", "state_dict", "torch_dtype",
    "tp_plan", "tp_size", "trust_remote_code", "use_kernels", "use_safetensors", "weights_only",
)  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
logger = logging.getLogger(f"transformers.{__name__}")


@dataclass
class Source:
    """What `convert` and `upcycle` start from.

    Attributes:
        name: of the checkpoint, or of a loaded model. tokenizer: `None` = it has none; of pictures: the image processor.
        folder: of the checkpoint; `None` for a loaded model.
        missing, ignored: tensors that the checkpoint lacks, and those that its class does not use.
        recast: {tensor: "dtype in the checkpoint → dtype here"}, where they differ.
        given: what was said of the checkpoint: `subfolder`, `model_class` and `dtype` by name, as far as they were given.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    folder: Path | None = None
    missing: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)
    recast: dict[str, str] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)


def open_source(
    source: str | Path | PreTrainedModel,
    tokenizer: Any,
    load: Callable[..., Loaded],
    **loading: Any,
) -> Source:
    """A loaded model as it is, or a checkpoint by way of `load`, with its own tokenizer unless one is given.

    Args:
        loading: see `LOADING_KEYWORDS`; `None` = not given.

    Raises:
        ValueError: one of these for a loaded model.
    """
    loading = {key: value for key, value in loading.items() if value is not None}
    if isinstance(source, PreTrainedModel):
        if loading:
            raise ValueError(
                f"{', '.join(loading)}: this model is loaded already, so leave out what says which checkpoint to load, and "
                "how."
            )
        return Source(source.config._name_or_path or type(source).__name__, source, tokenizer)
    name = str(source)
    location = {key: loading[key] for key in LOCATION_KEYWORDS if key in loading}
    model, info = load(name, **loading)
    folder = checkpoint_folder(name, **{k: v for k, v in location.items() if k != "proxies"})
    if tokenizer is None:
        tokenizer = load_preparation(name, model, config=model.config, **location)
    recast = {} if "dtype" in loading else _recast(name, model, info["weights"])
    _warn_of_values(name, model, recast)
    given = {key: getattr(loading[key], "__name__", _short(loading[key])) for key in KEPT if key in loading}
    missing, ignored = set(info["missing_keys"]), sorted(info["unexpected_keys"])
    return Source(name, model, tokenizer, folder, missing, ignored, recast, given)


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(for loading, for the mechanism); raises ValueError for what transformers' `from_pretrained` takes alone."""
    for name in NOT_TAKEN:
        if name in options:
            raise ValueError(
                f"{name} is no option here: load the model with from_pretrained(…, {name}=…) and convert the loaded model."
            )
    loading = {name: options[name] for name in options if name in LOADING_KEYWORDS}
    return loading, {name: value for name, value in options.items() if name not in loading}


def load_stock(name: str, revision: str | None = None, **loading: Any) -> Loaded:
    """An original checkpoint in its class, and transformers' loading info, with "weights", the files.

    Args:
        loading: see `LOADING_KEYWORDS`; `model_class`, by default what the config names, else what the tensors fit.

    Raises:
        ValueError: unsupported architecture, weights that can't be read, or tensors of the model itself missing.
    """
    return load_as_it_is(name, revision, check=refuse_converted, **loading)


def refuse_converted(name: str, config: PreTrainedConfig) -> None:
    """Raises ValueError for a checkpoint that has efficient attention already, by this package or by transformers."""
    if config.model_type in IMPORTED:
        raise ValueError(
            f"{name} is a {config.model_type} checkpoint, which has efficient attention of its own: "
            "hf_efficient.import_checkpoint, or hf-efficient import, makes a converted model of it."
        )
    if getattr(config, "efficient_attention", None):
        raise ValueError(f"{name} already has efficient attention; revert it before converting it to something else.")


def load_as_it_is(
    name: str,
    revision: str | None = None,
    *,
    model_class: Any = None,
    dtype: Any = None,
    variant: str | None = None,
    check: Callable[[str, PreTrainedConfig], None] | None = None,
    offload_folder: Path | None = None,
    **location: Any,
) -> Loaded:
    """A checkpoint, original or not, and transformers' loading info; otherwise as `load_stock`.

    Args:
        offload_folder: leave the weights in their files, with what is not there as it is needed in this folder.
    """
    location |= {"revision": revision} if revision is not None else {}
    given = None if model_class is None else class_named(model_class)
    config = read_config(name, given, **location)
    if check is not None:
        check(name, config)
    weights = find_weights(name, config, variant, **location)
    with _readable(name):
        tensors = weights.tensors
    cls = given or named_class(config) or guessed_class(config, {key: shape for key, (_, shape) in tensors.items()})
    require_architecture(name, cls, config)
    more: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
    with _readable(name):
        more |= {"config": config, "use_safetensors": weights.is_safe, "trust_remote_code": False, "variant": variant}
        if offload_folder is None:
            model, info = cls.from_pretrained(name, output_loading_info=True, **more, **location)
        else:
            model, info = load_from_disk(cls, name, offload_folder, weights, **more, **location)
    require_host_tensors(name, model, info["missing_keys"])
    model.eval()
    return model, info | {"weights": weights}


def load_converted(name: str | Path, offload_folder: Path | None = None) -> PreTrainedModel:
    """A converted checkpoint in the Efficient class that its config names.

    Args:
        offload_folder: as for `load_as_it_is`.

    Raises:
        ValueError: the checkpoint is not converted, its weights can't be read, or it lacks tensors that its source had.
    """
    config = read_config(name)
    cls = named_class(config)
    if cls is None or not is_efficient(cls):
        raise ValueError(
            f"{name} is a {config.model_type!r} checkpoint without efficient attention; convert it first."
        )
    with _readable(name):
        if offload_folder is None:
            model, info = cls.from_pretrained(name, output_loading_info=True)
        else:
            model, info = load_from_disk(cls, str(name), offload_folder, find_weights(name, config), config=config)
    lost = sorted(set(info["missing_keys"]) - _absent_in_the_source(Path(name)))
    if lost:
        raise ValueError(f"{name} lacks {len(lost)} tensors: {', '.join(lost[:SHOWN])}. The checkpoint is incomplete.")
    model.eval()
    return model


def _absent_in_the_source(folder: Path) -> set[str]:
    """The tensors that started anew, as the checkpoint's reports say."""
    files = [folder / file for file in (REPORT_NAME, UPCYCLING_NAME) if (folder / file).is_file()]
    absent: set[str] = set()
    for file in files:
        tensors = read_json(file).get("tensors") or {}
        if not isinstance(tensors, dict) or not all(isinstance(tensor, dict) for tensor in tensors.values()):
            raise ValueError(f"{file} is damaged: what it says of tensors is not an object for each of them.")
        absent |= {name for name, tensor in tensors.items() if tensor.get("from") == ABSENT}
    return absent


def _readable(name: str | Path) -> Any:
    """Say which checkpoint it is that can't be read, whatever the reader's own message."""
    return one_line(f"the weights of {name}")


def _recast(name: str, model: PreTrainedModel, weights: Weights) -> dict[str, str]:
    """{tensor: "dtype in the file → dtype here"} of tensors that are held in a wider dtype.

    Raises:
        ValueError: some are held in one that does not hold all their values.
    """
    files = {tensor: dtype for tensor, (dtype, _) in weights.tensors.items()}
    here = {tensor: value.dtype for tensor, value in model.state_dict().items() if tensor in files}
    changed = {
        tensor: f"{_short(files[tensor])} → {_short(here[tensor])}" for tensor in here if here[tensor] != files[tensor]
    }
    known = {tensor: files[tensor] for tensor in changed if isinstance(files[tensor], torch.dtype)}
    wide = {tensor: torch.promote_types(dtype, here[tensor]) for tensor, dtype in known.items()}
    narrowed = {tensor: changed[tensor] for tensor in wide if wide[tensor] != here[tensor]}
    if narrowed:
        widest, used = functools.reduce(torch.promote_types, wide.values()), _short(model.dtype)
        raise ValueError(
            f"{len(narrowed)} tensors of {name} would lose digits: {_listed(narrowed)}. Say which dtype the model gets: "
            f"{_short(widest)} keeps all values, {used} is what the config or the first tensor says "
            f"(--dtype {_short(widest)}, dtype={_short(widest)!r})."
        )
    return changed


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(changes: dict[str, str]) -> str:
    return ", ".join(f"{tensor} {change}" for tensor, change in list(changes.items())[:SHOWN])


def _warn_of_values(name: str, model: PreTrainedModel, recast: dict[str, str]) -> None:
    if recast:
        logger.warning(f"{len(recast)} tensors of {name} keep their values, but not their dtype: {_listed(recast)}.")
    values = {tensor: value for tensor, value in model.state_dict().items() if not value.is_meta}
    damaged = [tensor for tensor, value in values.items() if not bool(torch.isfinite(value).all())]
    if damaged:
        logger.warning(f"{name} has NaN or infinity in {len(damaged)} tensors: {', '.join(damaged[:SHOWN])}.")


def load_preparation(name: str, model: Any, **location: Any) -> Any:
    """What prepares the inputs of a model of this checkpoint: its tokenizer, or of pictures its image processor.

    Raises:
        ValueError: there are files of it, but they can't be read.
    """
    if not takes_pictures(model):
        return load_tokenizer(name, **location)
    location = {k: v for k, v in location.items() if k != "config" and v is not None}
    if not _has_file(name, IMAGE_PROCESSOR_FILE, location):
        return None
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **location)
    except Exception as error:  # of classes of their own
        why = " ".join(str(error).split())
        raise ValueError(
            f"the image processor of {name} ({IMAGE_PROCESSOR_FILE}) can't be read: {why} Mend it, or remove the file to go "
            "on without one."
        ) from error


def takes_pictures(model: Any) -> bool:
    """Whether a model's inputs are pictures, which need no tokenizer."""
    return bool(model.main_input_name == "pixel_values")


def load_tokenizer(name: str, revision: str | None = None, config: Any = None, **location: Any) -> Any:
    """The tokenizer of a checkpoint; `None` means that no file of one is there.

    Raises:
        ValueError: there are files of one, but they can't be read.
    """
    location |= {"revision": revision} if revision is not None else {}
    error = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **_with_config(config), **location)
        # without tokenizer files transformers makes one up, which knows a few special tokens and nothing else
        if len(tokenizer) - len(tokenizer.get_added_vocab()) > 16:
            return tokenizer
    except Exception as caught:  # the parsers raise classes of their own
        error = caught
    there = next((file for file in TOKENIZER_FILES if _has_file(name, file, location)), None)
    if there is None:
        return None
    why = " ".join(str(error).split()) if error else "it knows special tokens and no others; are files missing?"
    raise ValueError(
        f"the tokenizer of {name} ({there}) can't be read: {why} Mend it, or remove its files to go on without one."
    ) from error


def _with_config(config: Any) -> dict[str, Any]:
    """Stock configs tell the tokenizer's class where no file does."""
    return {} if config is None or hasattr(config, "efficient_attention") else {"config": config}


def _has_file(name: str, file: str, location: dict[str, Any]) -> bool:
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    return cached_file(str(name), file, **quiet, **location) is not None
