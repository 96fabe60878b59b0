"""Output folders: whatever goes wrong, the source and bystanders are byte-equal, and the output is whole or absent."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import error, run
from tiny import converted, save_source

import hf_efficient as he
from hf_efficient.conversion import revert_checkpoint
from hf_efficient.conversion.folders import OutputFolder, atomic_folder
from hf_efficient.conversion.upcycle import upcycle
from hf_efficient.profiling.json_files import whole_file

Writer = Callable[[Path, Path, bool], Any]
WRITERS: dict[str, Writer] = {
    "convert": lambda source, out, overwrite: he.convert(source, "local", attention_window=8).save(out, overwrite),
    "upcycle": lambda source, out, overwrite: upcycle(source, 2).save(out, overwrite),
    "revert": lambda source, out, overwrite: revert_checkpoint(str(source), out, overwrite),
    "convert a loaded model": lambda source, out, overwrite: he.convert(
        type(he.testing.tiny_model("bert")).from_pretrained(source), "local", attention_window=8
    ).save(out, overwrite),
}
COMMANDS: dict[str, list[str]] = {
    "convert": ["--attention", "local", "--attention-window", "8"],
    "upcycle": ["--num-experts", "2"],
    "revert": [],
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {"stock": save_source(root / "stock", "bert"), "converted": converted(root / "converted", "bert", "local")}


@pytest.fixture
def source(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint in the folder `run` with a sibling, in a folder that is a checkpoint too."""
    kind = originals["converted" if getattr(request, "param", "") == "revert" else "stock"]
    for name in ("", "checkpoint-500", "checkpoint-1000"):
        shutil.copytree(kind, tmp_path / "run" / name, dirs_exist_ok=True)
    return tmp_path / "run" / "checkpoint-500"


def state(folder: Path) -> dict[str, bytes | str]:
    """Every file, folder and link below a folder, hidden ones included."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        is_link = path.is_symlink()
        kind = f"link to {os.readlink(path)}" if is_link else path.read_bytes() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = kind
    return found


def linked(source: Path, link: Callable[[Path, Path], None]) -> Path:
    """A checkpoint whose weights `source` has only by links: `link(new, old)` makes one."""
    out = source.parent.parent / "other"
    shutil.copytree(source, out)
    (source / "model.safetensors").unlink()
    link(source / "model.safetensors", out / "model.safetensors")
    return out


def by_a_link(source: Path) -> Path:
    (source.parent.parent / "link").symlink_to(source.parent)
    return source.parent.parent / "link"


def below(source: Path) -> Path:
    shutil.copytree(source, source.parent / "copy")
    shutil.move(source.parent / "copy", source / "deeper" / "out")
    return source / "deeper" / "out"


PLACES: dict[str, Callable[[Path], Path]] = {
    "the source": lambda source: source,
    "above": lambda source: source.parent,
    "above by a relative path": lambda source: Path(os.path.relpath(source.parent)),
    "above by a link": by_a_link,
    "below": below,
    "holds the weights by a link": lambda source: linked(source, lambda new, old: new.symlink_to(old)),
    "holds the weights by a hard link": lambda source: linked(source, lambda new, old: os.link(old, new)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("writer", "source"), [(w, w) for w in WRITERS], indirect=["source"])
def test_an_output_that_holds_its_source_is_refused(writer, place, source, tmp_path):
    out = PLACES[place](source)
    before = state(tmp_path)
    with pytest.raises((ValueError, FileExistsError), match=r"source|also holds checkpoint-1000, checkpoint-500"):
        WRITERS[writer](source, out, True)
    if writer in COMMANDS:
        message = error(writer, source, out, "--overwrite", *COMMANDS[writer])
        assert "choose another folder" in message and "\n" not in message
    assert state(tmp_path) == before


@pytest.mark.parametrize(("writer", "source"), [(w, w) for w in COMMANDS], indirect=["source"])
def test_a_new_folder_beside_or_below_the_source_is_written(writer, source, tmp_path, monkeypatch):
    monkeypatch.chdir(source)
    before = state(source)
    for out in (Path("below"), Path("..") / "beside", Path("..") / "new" / "deeper"):
        run(writer, ".", out, *COMMANDS[writer])
        assert (out / "config.json").is_file() and (out / "model.safetensors").is_file()
        assert oct(out.stat().st_mode & 0o777) == "0o755"
    shutil.rmtree("below")
    assert state(source) == before and not list(tmp_path.rglob(".*"))


def test_other_files_that_are_read_are_sources_too(source, tmp_path):
    texts = source / "texts.txt"
    shutil.copytree(source, tmp_path / "out")
    (tmp_path / "out" / "config-of-attention.json").write_text('{"mechanism": "local"}')
    texts.symlink_to(tmp_path / "out" / "vocabulary.txt")
    (tmp_path / "out" / "vocabulary.txt").write_text("a text")
    before = state(tmp_path)
    for option in (["--config", tmp_path / "out" / "config-of-attention.json"], ["--calibration", texts]):
        attention = [] if option[0] == "--config" else ["--attention", "routing_transformer"]
        message = error(
            "convert", tmp_path / "run" / "checkpoint-1000", tmp_path / "out", "--overwrite", *attention, *option
        )
        assert "holds the source" in message
    assert state(tmp_path) == before


# ---- what happens meanwhile --------------------------------------------------------------------------------------


def old(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    return out


MEANWHILE: dict[str, Callable[[Path], Any]] = {
    "a file": lambda out: out.write_text("mine"),
    "a folder": lambda out: (out.mkdir(), (out / "mine").write_text("mine")),
    "an empty folder": lambda out: out.mkdir(),
    "a checkpoint": lambda out: (out.mkdir(), (out / "config.json").write_text("mine")),
    "a link": lambda out: out.symlink_to("elsewhere"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", MEANWHILE)
def test_what_appears_while_writing_is_kept(what, overwrite, tmp_path):
    """Also with `overwrite`: it allowed to replace what was there, which was nothing."""
    out, before = tmp_path / "out", {}
    with pytest.raises(FileExistsError, match="appeared"), atomic_folder(out, overwrite) as folder:
        (folder / "config.json").write_text("new")
        MEANWHILE[what](out)
        before = {k: v for k, v in state(tmp_path).items() if not k.startswith(".out")}
    assert state(tmp_path) == before


CHANGES: dict[str, Callable[[Path], Any]] = {
    "another file": lambda out: (out / "thesis").write_text("years of work"),
    "a changed file": lambda out: (out / "config.json").write_text("trained since"),
    "a checkpoint inside": lambda out: ((out / "checkpoint-1").mkdir(), (out / "checkpoint-1" / "w").write_text("w")),
    "another folder": lambda out: (shutil.rmtree(out), out.mkdir(), (out / "config.json").write_text("other")),
    "a file": lambda out: (shutil.rmtree(out), out.write_text("mine")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_only_what_was_seen_is_replaced(what, tmp_path):
    out, before = old(tmp_path), {}
    with pytest.raises(FileExistsError, match="changed meanwhile"), atomic_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        CHANGES[what](out)
        before = {k: v for k, v in state(tmp_path).items() if not k.startswith(".out")}
    assert state(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_interruption_at_any_renaming_leaves_the_former_folder_or_the_new_one(
    number, moment, overwrite, tmp_path, monkeypatch
):
    out = old(tmp_path) if overwrite else tmp_path / "out"
    rename, calls = Path.rename, []

    def interrupted(self: Path, target: Any) -> Path:
        calls.append(self)
        if len(calls) == number and moment == "before":
            raise KeyboardInterrupt
        moved = rename(self, target)
        if len(calls) == number:
            raise KeyboardInterrupt
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        try:
            with atomic_folder(out, overwrite) as folder:
                (folder / "config.json").write_text("new")
        except KeyboardInterrupt:
            assert number <= len(calls)
    contents = (out / "config.json").read_text() if out.exists() else None
    assert contents in (["old", "new"] if overwrite else [None, "new"])
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if out.exists() else [])


def test_what_an_interrupted_run_left_is_named(tmp_path, logged):
    out = old(tmp_path)
    (tmp_path / ".out.abc.old" / "out").mkdir(parents=True)
    (tmp_path / ".out.xyz.tmp").mkdir()
    (tmp_path / ".outer.xyz.tmp").mkdir()
    OutputFolder(out, overwrite=True)
    texts = [line for line in logged if "a run was interrupted" in line]
    assert len(texts) == 2 and ".out.abc.old holds the former content" in texts[0] and ".out.xyz.tmp" in texts[1]
    assert (tmp_path / ".out.abc.old" / "out").is_dir(), "deleting is left to who knows what is in it"


def test_a_terminated_command_tidies_up(tmp_path):
    import signal

    from hf_efficient.cli.common import running

    former = signal.getsignal(signal.SIGTERM)
    out = old(tmp_path)
    with pytest.raises(SystemExit), running(), OutputFolder(out, overwrite=True, strangers=lambda _: []).cleared():
        (out / "result.json").write_text("half")
        signal.raise_signal(signal.SIGTERM)
    assert state(tmp_path) == {"out": "folder", "out/config.json": b"old"}
    assert signal.getsignal(signal.SIGTERM) is former


# ---- places where nothing can be written -------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["mount point", "current folder", "dangling link", "below a file", "read-only"])
def test_impossible_places_are_refused_before_the_work(place, originals, tmp_path, monkeypatch):
    out = old(tmp_path)
    if place == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(out))
    elif place == "current folder":
        monkeypatch.chdir(out)
        out = Path(".")
    elif place == "dangling link":
        out = tmp_path / "link"
        out.symlink_to("nowhere")
    elif place == "below a file":
        out = tmp_path / "out" / "config.json" / "out"
    else:
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    before = state(tmp_path)
    import hf_efficient.conversion.loading as loading

    monkeypatch.setattr(loading, "load_as_it_is", lambda *given, **options: pytest.fail("worked"))
    message = error("convert", originals["stock"], out, "--overwrite", *COMMANDS["convert"])
    assert {
        "mount point": "is a mount point",
        "current folder": "is the current folder",
        "dangling link": "which does not exist",
        "below a file": "is a file",
        "read-only": "is read-only",
    }[place] in message
    assert state(tmp_path) == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["new", "overwrite"])
@pytest.mark.parametrize(("writer", "source"), [(w, w) for w in COMMANDS], indirect=["source"])
@pytest.mark.parametrize("limit", [2_000, 12_000])
def test_a_full_disk_is_one_line(writer, overwrite, limit, source, tmp_path):
    """The system itself refuses to write larger files than the limit, in the tokenizer's library or in safetensors."""
    out = tmp_path / "out"
    if overwrite:
        old(tmp_path)
    before = state(tmp_path)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
    try:
        message = error(writer, source, out, *COMMANDS[writer], *overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert "can't be written" in message or "too large" in message
    assert "\n" not in message and state(tmp_path) == before


def test_what_is_written_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Files, and the folders that name them; the last of all is the folder above."""
    order: list[Any] = []

    def noted(name: str, what: Callable[..., Any]) -> None:
        does = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given: (order.append(what(*given)), does(*given))[1])

    noted("fsync", lambda handle: os.fstat(handle).st_ino)
    noted("rename", lambda *given: "renamed")
    noted("replace", lambda *given: "renamed")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        for name in ("weights", "inner/weights"):
            (folder / name).write_text(name)
        written = {path.stat().st_ino for path in [folder, *folder.rglob("*")]}
    assert written <= set(order[: order.index("renamed")]) and order[-1] == tmp_path.stat().st_ino
    order.clear()
    with whole_file(tmp_path / "card.md") as file:
        file.write_text("new")
    assert order == [(tmp_path / "card.md").stat().st_ino, "renamed"]


def test_a_whole_file_replaces_only_if_told_to(tmp_path):
    path = tmp_path / "card.md"
    with pytest.raises(FileExistsError), whole_file(path, overwrite=False) as file:
        file.write_text("new")
        path.write_text("appeared")
    assert state(tmp_path) == {"card.md": b"appeared"}
    with whole_file(path) as file:
        file.write_text("new")
    assert state(tmp_path) == {"card.md": b"new"}


def test_a_card_replaces_no_file_of_the_checkpoint(originals, tmp_path):
    folder = shutil.copytree(originals["converted"], tmp_path / "checkpoint")
    before = state(tmp_path)
    for name in ("config.json", "model.safetensors", "conversion_report.json"):
        assert "is no Markdown file" in error("card", folder, "--out", folder / name, "--overwrite")
    assert state(tmp_path) == before
