"""Files next to a model that are copied along with it: how it hears, and pooling and similarity of sentence-transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from hf_efficient.profiling.json_files import read_json

MODULES = "modules.json"
SETTINGS = "sentence_bert_config.json"
PREPARATIONS = ("preprocessor_config.json", "processor_config.json")
NAMES = (MODULES, SETTINGS, "config_sentence_transformers.json", *PREPARATIONS)


def checkpoint_folder(name: str, revision: str | None = None, subfolder: str = "", **location: Any) -> Path:
    """The folder of a checkpoint with these files in it: itself, or the local copy of a Hub repository.

    Args:
        location: as for transformers' `from_pretrained`: `cache_dir`, `token`, `local_files_only`, `force_download`.
    """
    if Path(name).is_dir():
        return Path(name, subfolder).absolute()
    inside = f"{subfolder}/" if subfolder else ""
    folder = Path(
        snapshot_download(name, revision=revision, allow_patterns=[inside + file for file in NAMES], **location)
    )
    modules = module_folders(folder / subfolder)
    if modules:
        patterns = [f"{inside}{module}/*" for module in modules]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **location))
    return folder / subfolder


def module_folders(folder: Path) -> list[str]:
    """Names of the folders that `modules.json` names beside the model itself.

    Raises:
        ValueError: the file is damaged, or names a folder elsewhere.
    """
    if not (folder / MODULES).is_file():
        return []
    names: list[str] = []
    for entry in read_json(folder / MODULES, list):
        path = entry.get("path", "") if isinstance(entry, dict) else None
        if not isinstance(path, str) or os.path.isabs(path) or ".." in Path(path).parts:
            raise ValueError(
                f"{folder / MODULES} names {json.dumps(entry):.60}, which is no module of the checkpoint."
            )
        names += Path(path).parts[:1]
    return list(dict.fromkeys(names))


def max_seq_length(folder: Path) -> int | None:
    """Where sentence-transformers cuts texts, in tokens; `None` = nothing says so."""
    settings = folder / SETTINGS
    return read_json(settings).get("max_seq_length") if settings.is_file() else None


def copy_side_files(source: Path, folder: Path, length: int | None) -> None:
    """Copy them from one checkpoint folder to another, which may have a preparation of inputs of its own.

    Args:
        length: replaces `max_seq_length` unless it is `None`.

    Raises:
        ValueError: a file is damaged, or is a link out of the checkpoint.
    """
    has_own = any((folder / name).exists() for name in PREPARATIONS)
    for file in [file for file in _side_files(source) if not (has_own and file.name in PREPARATIONS)]:
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    settings = folder / SETTINGS
    if settings.is_file() and length is not None:
        values = read_json(settings) | {"max_seq_length": length}
        settings.write_text(json.dumps(values, indent=2) + "\n")


def _side_files(source: Path) -> Iterator[Path]:
    modules = [source / name for name in module_folders(source)]
    named = [entry for name in NAMES for entry in [source / name] if entry.is_file()]
    for entry in [*named, *modules, *(e for module in modules for e in module.rglob("*"))]:
        if not Path(os.path.realpath(entry)).is_relative_to(_root(source)):
            raise ValueError(f"{entry} is a link out of the checkpoint: put the file itself there, or remove it.")
        if entry.is_file():
            yield entry


def _root(source: Path) -> Path:
    """The folder that files of a checkpoint may lie in; in the Hub's cache they are links to a folder of all revisions."""
    real = Path(os.path.realpath(source))
    snapshots = next((parent for parent in real.parents if parent.name == "snapshots"), None)
    return snapshots.parent if snapshots is not None and (snapshots.parent / "blobs").is_dir() else real
