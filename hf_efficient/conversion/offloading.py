"""Models whose weights stay in the files of their checkpoint and come in for calls, by accelerate's hooks.

Such a model costs the memory of the tensors that are in use; whatever looks at names, shapes and configs alone
works on it as on any other.
"""

from __future__ import annotations

import atexit
import copy
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_efficient.families import HostModel
from hf_efficient.models.loading import Refused, Weights, find_weights, read_config
from hf_efficient.profiling.memory import available_memory

# tables of positions, relative biases and token types are read outside calls
RESIDENT_BYTES = 2**26
SHARE = 0.5
"""Of the memory that is free: the largest checkpoint that is converted in memory unasked."""
logger = logging.getLogger(f"transformers.{__name__}")
_waiting: set[Path] = set()
"""Folders with tensors of runs, not with checkpoints."""


def chosen_streaming(name: Any, asked: bool | None, variant: str | None = None, **location: Any) -> bool:
    """Whether the weights of a checkpoint stay on the disk: as asked, else where they take more than half the free memory.

    Raises:
        ValueError: it was asked for, and can't be: the model is loaded, or the files are not of safetensors.
    """
    if asked is False:
        return False
    if isinstance(name, nn.Module):
        if asked:
            raise ValueError("streaming=True is for checkpoints on the disk, and this model is loaded: leave it out.")
        return False
    config = read_config(name, **location) if asked else None
    weights = find_weights(name, config, variant, **location)
    if not weights.is_safe:
        if asked:
            raise ValueError(_needs_safetensors(name, weights))
        return False
    size, free = weights.total_bytes, available_memory()
    if asked or free is None or size <= SHARE * free:
        return bool(asked)
    logger.warning(
        f"{name} has {size / 1e9:.1f} GB of weights, and {free / 1e9:.1f} GB of memory are free: its weights stay on the "
        "disk and are written one by one (streaming; --no-streaming, streaming=False loads them)."
    )
    return True


def _needs_safetensors(name: Any, weights: Weights) -> str:
    return (
        f"{name} has {weights.file.name}, and leaving weights on the disk needs safetensors files: load and save it once "
        "with transformers, on a machine that holds it, or load it whole."
    )


def is_on_disk(model: Any) -> bool:
    """Whether some weights of a model are in files."""
    return "disk" in (getattr(model, "hf_device_map", None) or {}).values()


def load_from_disk(cls: Any, name: str, folder: Path, weights: Weights, **options: Any) -> tuple[Any, dict[str, Any]]:
    """`cls.from_pretrained` with the weights left in their files; and the loading info.

    In memory are small embeddings other than the words', and what the checkpoint lacks.

    Args:
        folder: for tensors that the files hold in another form. weights: the files. options: of `from_pretrained`.
    """
    if not weights.is_safe:
        raise Refused(_needs_safetensors(name, weights))
    weights.require_listed()
    _waiting.add(folder)
    place, state = _places(cls, options["config"]), torch.get_rng_state()
    while True:
        torch.set_rng_state(state)  # what is missing starts as it would in memory
        loading = options | {"config": copy.deepcopy(options["config"])}
        model, info = cls.from_pretrained(
            name, device_map=place, offload_folder=str(folder), output_loading_info=True, **loading
        )
        lacking = {name for name in place for key in info["missing_keys"] if key.startswith(f"{name}.")}
        if all(place[name] == "cpu" for name in lacking):
            _keep_one_hook(model)
            _settle_ties(model)
            return model, info
        place |= dict.fromkeys(lacking, "cpu")


def new_folder(inside: Path | None = None) -> Path:
    """A temporary folder for a model's weights, which goes at the end of the process.

    Args:
        inside: where it is to be; `None` = where the system has temporary files.
    """
    if inside is not None:
        inside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="hf_efficient.", dir=inside))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def put_away_in(folder: Path) -> Callable[[str, nn.Module], None]:
    """Moves the parameters of a module to files in a folder, from which they come in for its calls."""

    def put_away(name: str, module: nn.Module) -> None:
        from accelerate import disk_offload

        if any(True for _ in module.parameters()):
            disk_offload(module, folder / name, execution_device=torch.device("cpu"))
            _keep_one_hook(module)

    return put_away


def value_of(model: PreTrainedModel, name: str) -> Tensor:
    """A tensor of the state dict, read from its file if it is in one."""
    from transformers.integrations.accelerate import load_offloaded_parameter

    tensor = model.get_parameter_or_buffer(name).detach()
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def tie_again(model: PreTrainedModel) -> None:
    """Make tied parameters one object again: a call replaces those that are offloaded, each by another."""
    for target, source in model.all_tied_weights_keys.items():
        path, _, leaf = target.rpartition(".")
        parent = model.get_submodule(path)
        if (parameter := parent._parameters.get(leaf)) is not None and parameter.is_meta:
            parent._parameters[leaf] = model.get_parameter(source)


def source_files(model: nn.Module) -> list[Path]:
    """The weight files of the checkpoint, and what is beside them: merged experts come from files that are made of these."""
    maps = [getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in model.modules()]
    indices = {id(index): index for m in maps if (index := getattr(getattr(m, "dataset", m), "index", None))}
    files = {entry["safetensors_file"] for index in indices.values() for entry in index.values() if _is_in_file(entry)}
    folders = {Path(file).parent for file in files} - _waiting
    return sorted(file for folder in folders for file in folder.glob("*.safetensors"))


def _is_in_file(entry: Any) -> bool:
    return isinstance(entry, dict) and "safetensors_file" in entry


def _places(cls: Any, config: Any) -> dict[str, str]:
    """{module with tensors of its own: "cpu" for the embeddings that stay in memory, or "disk"}.

    What is inside such a module is where it is.

    Raises:
        ValueError: the model itself, around all modules, has tensors.
    """
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    host = HostModel.of(model)
    positions = {id(module) for stack in host.stacks for module, _ in host.family.positions.weights(stack)}
    words = {id(stack.module.get_input_embeddings()) for stack in host.stacks}

    def stays(module: nn.Module) -> bool:
        is_small = isinstance(module, nn.Embedding) and module.weight.nbytes <= RESIDENT_BYTES
        return id(module) in positions or (is_small and id(module) not in words)

    owners = {tuple(name.split(".")[:-1]) for name in model.state_dict()}
    if () in owners:
        raise Refused(f"{cls.__name__} has tensors outside of its modules: --no-streaming (streaming=False) loads it.")
    outer: list[tuple[str, ...]] = []
    for path in sorted(owners):  # what is inside comes next
        if not outer or path[: len(outer[-1])] != outer[-1]:
            outer.append(path)
    modules = {".".join(path): model.get_submodule(".".join(path)) for path in outer}
    return {name: "cpu" if any(map(stays, module.modules())) else "disk" for name, module in modules.items()}


def _keep_one_hook(model: nn.Module) -> None:
    """Of a module's two hooks, one of which it has as a root or from a module around it, keep the one that loads."""
    for module in model.modules():
        hooks = getattr(getattr(module, "_hf_hook", None), "hooks", ())
        offloading = [hook for hook in hooks if getattr(hook, "offload", False)]
        if offloading:
            module._hf_hook = offloading[0]


def _settle_ties(model: PreTrainedModel) -> None:
    """Untie weights that the config ties, and that the checkpoint has twice with different values, as is done in memory."""
    for target, source in list(model.all_tied_weights_keys.items()):
        pair = [model.get_parameter(name) for name in (target, source)]
        if pair[0] is not pair[1] and all(p.is_meta for p in pair):
            if torch.equal(value_of(model, target), value_of(model, source)):
                continue
            model.all_tied_weights_keys.pop(target)
            logger.warning(
                f"{target} and {source} are tied in the config and differ in the checkpoint: both are kept."
            )
    tie_again(model)
