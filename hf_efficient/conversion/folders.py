"""Output folders: written completely or not at all, and nothing is deleted but the checkpoint that stood there."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_efficient.conversion.sentence_transformers import module_folders
from hf_efficient.profiling.ending import write_errors

Identity = tuple[int, int]
logger = logging.getLogger(f"transformers.{__name__}")


def strangers_of_a_checkpoint(path: Path) -> list[str]:
    """What stands in a folder that is no part of a checkpoint: other folders than those of its modules.

    Raises:
        FileExistsError: the folder is neither empty nor a checkpoint.
    """
    if not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").is_file()):
        raise FileExistsError(f"{path} is not a checkpoint folder (it has no config.json), so it is not overwritten.")
    own = module_folders(path)
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name not in own)


class OutputFolder:
    """A folder that is to be written as a whole; what stands there is looked at here, before any work is done.

    Args:
        path: where the folder is to be; of a link to a folder, the folder it leads to.
        overwrite: whether a checkpoint that stands there may be replaced.
        sources: folders and files that are read for it, which it must not hold; what is no path is passed over.
        strangers: names in the folder that forbid to replace it; by default `strangers_of_a_checkpoint`.

    Raises:
        FileExistsError: something stands there and `overwrite` is False, or it is not only a checkpoint.
        ValueError: it holds a source, or is a part of one.
        OSError: nothing can be written or replaced there.
    """

    def __init__(
        self,
        path: str | Path,
        overwrite: bool = False,
        sources: Iterable[str | Path | None] = (),
        strangers: Callable[[Path], list[str]] = strangers_of_a_checkpoint,
    ):
        self.given, self.path = Path(path), Path(os.path.realpath(path))
        self.strangers = strangers
        if os.path.lexists(self.given) and not self.given.exists():
            raise FileExistsError(f"{path} is a link to {self.path}, which does not exist; choose another folder.")
        self.seen = _listing(self.path) if self.path.exists() else None
        if self.seen is not None:
            if not overwrite:
                raise FileExistsError(
                    f"{path} exists; choose another folder, or overwrite it with --overwrite / overwrite=True."
                )
            self._require_replaceable()
        self.require_apart(*sources)
        self._require_writable()
        self._name_leftovers()

    # ---- refusals before the work --------------------------------------------------------------------------------

    def _require_replaceable(self) -> None:
        others = self.strangers(self.path)
        if others:
            raise FileExistsError(
                f"{self.given} also holds {', '.join(others)}, so it is not overwritten; choose another folder."
            )
        here = _identity(self.path)
        if any(_identity(folder) == here for folder in (Path.cwd(), *Path.cwd().parents)):
            raise OSError(f"{self.given} is the current folder, or holds it; choose another folder.")
        if os.path.ismount(self.path):
            raise OSError(f"{self.given} is a mount point, which can't be replaced; give a folder inside it.")

    def require_apart(self, *sources: str | Path | None) -> None:
        """Refuse to write over what is read.

        Raises:
            ValueError: the folder is a source, holds one or a file of one, or would change one.
        """
        for source in sources:
            if source is None or not str(source) or not Path(source).exists():
                continue
            place = Path(os.path.realpath(source))
            inside = [_identity(folder) for folder in (place, *place.parents)]
            if self.seen is not None and self.seen[""][:2] == inside[0]:
                raise ValueError(f"{self.given} is the source itself; choose another folder.")
            if self.seen is not None and (self.seen[""][:2] in inside or self._shares_files(place)):
                raise ValueError(f"{self.given} holds the source {source}, or files of it; choose another folder.")
            above = [folder for folder in self.path.parents if folder.exists() and _identity(folder) == inside[0]]
            if above and (self.seen is not None or self._is_in_a_module(above[0])):
                raise ValueError(f"{self.given} is a part of the source {source}; choose another folder.")

    def _shares_files(self, source: Path) -> bool:
        """Whether files or folders of the source are links, of any kind, to some of this folder."""
        own = {entry[:2] for entry in (self.seen or {}).values()}
        return any(os.path.exists(entry) and _identity(entry) in own for entry in (source, *source.rglob("*")))

    def _is_in_a_module(self, source: Path) -> bool:
        return self.path.relative_to(source).parts[0] in module_folders(source)

    def _require_writable(self) -> None:
        parent = next(folder for folder in self.path.parents if folder.exists())
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is a file, so {self.given} can't be written.")
        for folder in [parent] if self.seen is None else [parent, self.path]:
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} is read-only, so {self.given} can't be written.")

    def _name_leftovers(self) -> None:
        pattern = f".{glob.escape(self.path.name)}.*"
        for end, what in ((".old", f"the former content of {self.given}"), (".tmp", "a half-written folder")):
            for left in sorted(self.path.parent.glob(pattern + end)):
                logger.warning(
                    f"{left} holds {what}: a run was interrupted, or goes on now. Delete it, or rename it, by hand."
                )

    # ---- writing -------------------------------------------------------------------------------------------------

    @contextmanager
    def written(self) -> Iterator[Path]:
        """A temporary folder that takes its place when the block succeeds, and vanishes when it does not.

        Weights are on the disk before the folder gets its name. An interruption leaves the former folder or the new one.

        Raises:
            FileExistsError: meanwhile something appeared there, or changed; it is left as it is.
            OSError: the folder could not be written or put in place; the former content is there, or the message says where.
        """
        made = [folder for folder in self.path.parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent))
        try:
            with write_errors(self.given):
                yield folder
            folder.chmod(0o755)
            _sync(folder)
            self._put_in_place(folder)
            _sync_entry(self.path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _remove_empty(made)

    @contextmanager
    def beside(self) -> Iterator[Path]:
        """A temporary folder on the same disk, for what is needed on the way."""
        made = [folder for folder in self.path.parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent)
        try:
            yield Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _remove_empty(made)

    def _put_in_place(self, folder: Path) -> None:
        if self.seen is not None:
            with self._replacing(_identity(folder)):
                folder.rename(self.path)
            return
        appeared = f"{self.given} appeared while it was to be written, and is left as it is; choose another folder."
        if os.path.lexists(self.path):
            raise FileExistsError(appeared)
        try:
            folder.rename(self.path)  # fails if a file, a link or a folder with anything in it is there
        except OSError as error:
            raise (FileExistsError(appeared) if os.path.lexists(self.path) else error) from error

    @contextmanager
    def cleared(self) -> Iterator[None]:
        """An empty folder in the place of the former one, which is deleted when the block succeeds, and else comes back."""
        if self.seen is None:
            yield
            return
        folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent))
        try:
            folder.chmod(0o755)
            with self._replacing(_identity(folder)):
                folder.rename(self.path)
                yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _replacing(self, new: Identity) -> Iterator[None]:
        """What was seen stands aside during the block; after an error it is back, and `new`, if it is there, is deleted."""
        aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".old", dir=self.path.parent))
        old = aside / self.path.name
        try:
            self.path.rename(old)
            self._require_unchanged(old)
            yield
        except BaseException as error:
            if os.path.lexists(old):
                if self.path.exists() and _identity(self.path) == new:
                    shutil.rmtree(self.path)
                try:
                    old.rename(self.path)
                except OSError:
                    raise OSError(f"{self.given} could not be replaced; its former content is in {old}.") from error
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)
        if aside.exists():
            logger.warning(f"the former content of {self.given} could not be deleted: {aside}.")

    def _require_unchanged(self, old: Path) -> None:
        now, seen = _listing(old), self.seen or {}
        changed = sorted(name for name in now if now[name] != seen.get(name))
        if changed:
            raise FileExistsError(
                f"{self.given} was changed meanwhile ({', '.join(name or 'it is another folder' for name in changed)}), "
                "so it is left as it is; choose another folder."
            )


@contextmanager
def atomic_folder(
    path: str | Path, overwrite: bool = False, sources: Iterable[str | Path | None] = ()
) -> Iterator[Path]:
    """`OutputFolder(path, overwrite, sources).written()`, where no work comes before the writing."""
    with OutputFolder(path, overwrite, sources).written() as folder:
        yield folder


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def _identity(path: str | Path) -> Identity:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _listing(path: Path) -> dict[str, tuple[int, ...]]:
    """{name: device, inode, and of files size and time of change} of a folder, "", and of all below it."""
    found = {}
    for entry in [path, *path.rglob("*")]:
        info = entry.lstat()
        facts = () if stat.S_ISDIR(info.st_mode) else (info.st_size, info.st_mtime_ns)
        name = "" if entry == path else str(entry.relative_to(path))
        found[name] = (info.st_dev, info.st_ino, *facts)
    return found


def _sync(folder: Path) -> None:
    """Wait until all files below are on the disk."""
    for entry in [*folder.rglob("*"), folder]:
        _sync_entry(entry)


def _sync_entry(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # only POSIX opens folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
