"""Files of sentence-transformers next to a model: pooling and similarity settings, which are copied along with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

NAMES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
MODULE_FOLDERS = "[0-9]*_*"
SETTINGS = "sentence_bert_config.json"


def checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint with these files in it: itself, or the local copy of a Hub repository."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=[*NAMES, f"{MODULE_FOLDERS}/*"]))


def max_seq_length(folder: Path) -> int | None:
    """Where sentence-transformers cuts texts, in tokens; `None` = nothing says so."""
    settings = folder / SETTINGS
    return json.loads(settings.read_text()).get("max_seq_length") if settings.is_file() else None


def copy_side_files(source: Path, folder: Path, length: int | None) -> None:
    """Copy them from one checkpoint folder to another; `length` replaces `max_seq_length` unless it is `None`."""
    for name in NAMES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    for module in source.glob(MODULE_FOLDERS):
        if module.is_dir():
            shutil.copytree(module, folder / module.name)
    settings = folder / SETTINGS
    if settings.is_file() and length is not None:
        values = json.loads(settings.read_text()) | {"max_seq_length": length}
        settings.write_text(json.dumps(values, indent=2) + "\n")
