"""What users install: a wheel in a fresh environment, whose program works outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from paths import ROOT
from tiny import save_source, words

import hf_efficient as he

pytestmark = pytest.mark.slow

# of each process that the environment starts: the modules that it took from the checkout
WITNESS = """
import atexit, json, sys

def written():
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    strange = [file for file in files if file.startswith({root!r}) and not file.startswith({libraries!r})]
    with open({log!r}, "a") as log:
        print(json.dumps([sys.argv[1:], strange]), file=log)

atexit.register(written)
"""


def python(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # built from a copy, since setuptools leaves build folders beside what it builds
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "hf_efficient", folder / "project" / "hf_efficient", ignore=ignored)
    for name in ("hf_efficient_command.py", "setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / "project")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")
    python("-m", "pip", "--disable-pip-version-check", "wheel", *options, folder, folder / "project")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel installed, and the dependencies of this one within its reach."""
    folder = tmp_path_factory.mktemp("environment")
    python("-m", "venv", "--without-pip", folder)
    options = ("--no-deps", "--no-index", "--disable-pip-version-check")
    python("-m", "pip", "--python", folder / "bin" / "python", "install", *options, wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    libraries = sysconfig.get_path("purelib")
    # a path named in a .pth file lends its packages, but not what its own .pth files point to: no editable installation
    (site / "dependencies.pth").write_text(libraries + "\n")
    log = str(folder / "processes.jsonl")
    (site / "sitecustomize.py").write_text(WITNESS.format(root=str(ROOT), libraries=libraries, log=log))
    return folder


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "hf_efficient").rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    assert names == {str(path.relative_to(ROOT)) for path in files} | {"hf_efficient_command.py"}
    assert "hf_efficient/py.typed" in names


def test_installed_program_works_outside_the_repository(environment, tmp_path):
    source, out = save_source(tmp_path / "source", "bert"), tmp_path / "out"
    (tmp_path / "texts.txt").write_text("\n".join(words(40, seed) for seed in range(3)) + "\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments: str | Path) -> str:
        command = [environment / "bin" / "hf-efficient", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "convert" in run("--help")
    assert [card["mechanism"] for card in json.loads(run("list", "--json"))] == he.list_mechanisms()
    sizes = ("--attention-window", "8", "--max-positions", "256")
    report = json.loads(run("convert", source, out, "--attention", "longformer", *sizes, "--json"))
    assert report["counts"]["extended"] == 1
    assert json.loads(run("verify", out, source, "--texts", "texts.txt", "--max-length", "32", "--json"))["passed"]
    assert "longformer" in run("card", out) and "longformer" in (out / "README.md").read_text()
    assert "all 12 heads" in run("show", "local", "--attention-window", "64")
    lines = (environment / "processes.jsonl").read_text().splitlines()
    processes = [json.loads(line) for line in lines]
    # six commands, and the process of its own in which verify loads the checkpoint
    assert len(processes) >= 7
    assert [strange for _, strange in processes if strange] == []
