"""Writing checkpoint folders: completely or not at all, and only checkpoints are ever overwritten."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from hf_efficient.conversion.card import write_first_card
from hf_efficient.conversion.sentence_transformers import copy_side_files
from hf_efficient.families.readable import refuse_adapters
from hf_efficient.profiling.json_files import finite


def require_free(path: str | Path, overwrite: bool = False) -> None:
    """Refuse what `atomic_folder` would refuse, before any work is done.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False, or it is anything but an empty folder or a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists; choose another folder, or overwrite it with --overwrite / overwrite=True."
        )
    if not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").is_file()):
        raise FileExistsError(f"{path} is not a checkpoint folder (it has no config.json), so it is not overwritten.")


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder next to `path` that takes its place when the block succeeds, and vanishes when it does not.

    Raises:
        FileExistsError: see `require_free`.
        OSError: the finished folder could not be put in place; the former content is back, or the message says where it is.
    """
    path = Path(path)
    require_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if path.exists():
            _swap(folder, path)
        else:
            folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Put `new` at `path`; the old folder is deleted only after that has worked."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    old = aside / path.name
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        try:
            old.rename(path)
        except OSError as error:
            raise OSError(f"{path} could not be replaced; its former content is in {old}.") from error
        aside.rmdir()
        raise
    shutil.rmtree(aside)


class Report:
    """What was done to a checkpoint, tensor by tensor: the base of dataclasses, each with the statuses that it knows."""

    statuses: ClassVar[tuple[str, ...]]
    tensors: dict[str, dict[str, Any]]

    def counts(self) -> dict[str, int]:
        """Number of tensors by status."""
        found = [tensor["status"] for tensor in self.tensors.values()]
        return {status: found.count(status) for status in self.statuses}

    def to_dict(self) -> dict[str, Any]:
        return finite(asdict(self))  # type: ignore[call-overload]


@dataclass
class Result:
    """A model made from a checkpoint, with its tokenizer (`None` if the source had none) and the report of its making.

    The report belongs to the model, whose `save_pretrained` writes it.
    """

    model: PreTrainedModel
    tokenizer: Any
    report: Any
    source_folder: Path | None = None

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write a checkpoint folder, all of it or nothing.

        Raises:
            FileExistsError: `path` exists and `overwrite` is False.
            ValueError: the model carries adapters by now, of which no checkpoint of the whole model can be made.
        """
        refuse_adapters(self.model, "save")
        with atomic_folder(path, overwrite) as folder:
            self.model.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            if self.source_folder is not None:
                copy_side_files(self.source_folder, folder, self._text_length())
            write_first_card(folder, self.model, self.report.source, Path(path).name)
        return Path(path)

    def _text_length(self) -> int | None:
        """Tokens after which sentence-transformers is to cut texts; `None` = as before."""
        return None
