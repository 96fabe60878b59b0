"""Weights written one tensor at a time, to the very files that `save_pretrained` would write; a run that stopped goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_torch_storage_id, get_torch_storage_size, split_state_dict_into_shards_factory
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils import logging as progress_bars

from hf_efficient.conversion.offloading import source_files, tie_again, value_of
from hf_efficient.models.loading import SHOWN
from hf_efficient.profiling.ending import write_errors
from hf_efficient.profiling.environment import versions
from hf_efficient.profiling.json_files import read_json, write_json

PATTERN = "model{suffix}.safetensors"
MAX_SHARD_SIZE = "50GB"
"""As in `save_pretrained`."""
PROGRESS = "progress.json"
SYNC_BYTES = 2**28
"""After so many bytes a file is flushed to the disk, and the progress noted."""
logger = logging.getLogger(f"transformers.{__name__}")


@dataclass(frozen=True)
class ShardFile:
    """One file to write: its start with the header, and where each tensor ends, in the order of the file."""

    start: bytes
    ends: dict[str, int]

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> ShardFile:
        """The file that safetensors makes of tensors; their values are not looked at."""
        # the library says the order of the tensors and what it calls their types
        small = {name: torch.empty(1, dtype=tensor.dtype) for name, tensor in tensors.items()}
        data = save(small, {"format": "pt"})
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        end, ends = 0, {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = end, end + tensors[name].nbytes
                entry |= {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
                ends[name] = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = len(text).to_bytes(8, "little") + text
        return cls(start, {name: len(start) + end for name, end in ends.items()})


class ModelFiles:
    """The weight files of a model, as `save_pretrained` would lay them out.

    Args:
        model: its weights may be on the disk.
        max_shard_size: as for `save_pretrained`.

    Raises:
        ValueError: some tensors are saved in a form that is made of more than one of the model's.
    """

    def __init__(self, model: PreTrainedModel, max_shard_size: str | int = MAX_SHARD_SIZE):
        tie_again(model)
        self.model = model
        ignored = set(model._keys_to_ignore_on_save or ())
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
        state = remove_tied_weights_from_state_dict(state, model)
        saved = revert_weight_conversion(model, state)
        self.sources = _sources(model, state, saved)
        split = split_state_dict_into_shards_factory(
            saved,
            filename_pattern=PATTERN,
            max_shard_size=max_shard_size,
            get_storage_size=get_torch_storage_size,
            get_storage_id=_storage_id,
        )
        self.files = {
            file: ShardFile.of({name: saved[name] for name in names})
            for file, names in split.filename_to_tensors.items()
        }
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        self.index = {"metadata": metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
        self._converted: tuple[str, dict[str, Tensor]] = ("", {})
        self.not_finite: list[str] = []

    @property
    def total_bytes(self) -> int:
        return sum(max(file.ends.values(), default=0) for file in self.files.values())

    def identity(self) -> str:
        """Of what is to be written, and of what it is made of: equal for runs that can go on with each other's files."""
        read = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source_files(self.model)]
        starts = [(name, file.start.hex()) for name, file in self.files.items()]
        facts = json.dumps([read, starts, self.model.config.to_dict(), versions()], default=str, sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def value(self, name: str) -> Tensor:
        """The tensor that is saved under a name, contiguous on the CPU."""
        source, is_converted = self.sources[name]
        if not is_converted:
            tensor = value_of(self.model, source)
        else:
            if self._converted[0] != source:
                self._converted = source, revert_weight_conversion(self.model, {source: value_of(self.model, source)})
            tensor = self._converted[1][name]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            self.not_finite.append(name)
        return tensor.contiguous()


def _storage_id(tensor: Tensor) -> Any:
    """Equal for tensors of one storage, also on the meta device: parts of merged experts are saved in one file."""
    return get_torch_storage_id(tensor) or tensor.untyped_storage()._cdata


def _sources(
    model: PreTrainedModel, state: dict[str, Tensor], saved: dict[str, Tensor]
) -> dict[str, tuple[str, bool]]:
    """{name in the files: (name in the model, whether its form changes)}."""
    same = {id(tensor): name for name, tensor in state.items()}
    sources = {name: (same[id(tensor)], False) for name, tensor in saved.items() if id(tensor) in same}
    used = {source for source, _ in sources.values()}
    for name in state:
        if name not in used and len(sources) < len(saved):
            made = revert_weight_conversion(model, {name: state[name]})
            sources |= {new: (name, True) for new in made if new in saved and saved[new].shape == made[new].shape}
    lost = [name for name in saved if name not in sources]
    if lost:
        raise ValueError(
            f"{len(lost)} tensors are saved in another form than the model has them, each made of several: "
            f"{', '.join(lost[:SHOWN])}; that needs the model in memory: --no-streaming, streaming=False."
        )
    return sources


class PartialFolder:
    """Unfinished weight files, in a folder beside the output that outlives the process, until they move into the output."""

    def __init__(self, output: Path):
        self.path = output.parent / f".{output.name}.partial"

    def write(self, files: ModelFiles) -> None:
        """Write what is not there yet of all weight files, with a progress bar.

        Raises:
            OSError: the disk is full, or another process writes there; what was written stays.
        """
        with write_errors(self.path), self._owned():
            self._write(files)

    def _write(self, files: ModelFiles) -> None:
        done = self._begin(files)
        bar = progress_bars.tqdm(
            total=files.total_bytes, initial=sum(done.values()), unit="B", unit_scale=True, desc="writing weights"
        )
        with bar:
            for name, file in files.files.items():
                for written in _append(self.path / name, file, done.get(name, 0), files):
                    bar.update(written - done.get(name, 0))
                    done[name] = written
                    self._note(files, done)
        if files.index is not None:
            text = json.dumps(files.index, indent=2, sort_keys=True) + "\n"
            (self.path / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
        if files.not_finite:
            shown = ", ".join(files.not_finite[:SHOWN])
            logger.warning(f"NaN or infinity in {len(files.not_finite)} tensors: {shown}.")

    def move_into(self, folder: Path) -> None:
        """Put the finished files into a folder, and remove what is left here."""
        for file in sorted(self.path.iterdir()):
            if file.name != PROGRESS:
                os.replace(file, folder / file.name)
        shutil.rmtree(self.path)

    def _begin(self, files: ModelFiles) -> dict[str, int]:
        """{file: bytes of it that are there}; what another conversion left is removed."""
        self.identity, note = files.identity(), self.path / PROGRESS
        found = read_json(note) if note.is_file() else {}
        done: dict[str, int] = found.get("written", {})
        sizes = {name: (self.path / name).stat().st_size for name in done if (self.path / name).is_file()}
        if found.get("identity") != self.identity:
            for file in [f for f in self.path.iterdir() if f.is_file()]:
                file.unlink()
            done = {}
        done = {name: size for name, size in done.items() if sizes.get(name, 0) >= size}
        if done:
            logger.warning(f"going on with {sum(done.values()) / 1e9:.2f} GB that a run before wrote to {self.path}.")
        return done

    def _note(self, files: ModelFiles, done: dict[str, int]) -> None:
        write_json(self.path / PROGRESS, {"identity": self.identity, "written": done})

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """The folder is there, and no other process writes to it."""
        self.path.mkdir(parents=True, exist_ok=True)
        if os.name != "posix":
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            _lock(handle, self.path)
            yield
        finally:
            os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"another process writes to {folder}: wait for it, or end it.") from None
    except OSError:
        logger.warning(f"the disk of {folder} has no locks: see that no other process writes there.")


def _append(path: Path, file: ShardFile, done: int, files: ModelFiles) -> Iterator[int]:
    """Write a file from byte `done` on; yields how many of its bytes are on the disk, every `SYNC_BYTES` and at the end."""
    noted, last = done, max(file.ends.values(), default=0)
    with open(path, "r+b" if done else "wb") as out:
        out.seek(done)
        out.truncate()
        if not done:
            out.write(file.start)
        for name, end in file.ends.items():
            if end > done:
                _write_tensor(out, files.value(name))
            if out.tell() - noted >= SYNC_BYTES or (end == last and out.tell() > noted):
                noted = _synced(out)
                yield noted


def _write_tensor(out: Any, tensor: Tensor) -> None:
    if tensor.numel():
        out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _synced(out: Any) -> int:
    out.flush()
    os.fsync(out.fileno())
    return int(out.tell())
