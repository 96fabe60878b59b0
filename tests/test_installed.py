"""What users install: a wheel in a fresh environment, whose program works outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT
from tiny import converted, save_source, words

import hf_efficient as he

pytestmark = pytest.mark.slow

# of each process that the environment starts: the modules that it took from the checkout
WITNESS = """
import atexit, json, sys

def written():
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    strange = [file for file in files if file.startswith({root!r})]
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


def requirements(name: str) -> set[str]:
    """The distributions that an installation without extras needs, of those that are installed here."""
    found, waiting = set(), [name]
    while waiting:
        name = canonicalize_name(waiting.pop())
        try:
            needed = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            parsed = map(Requirement, needed)
            waiting += [one.name for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def lend(folder: Path, distributions: set[str]) -> None:
    """Links to the packages of distributions that are installed here, and to nothing else."""
    folder.mkdir()
    for name in distributions:
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (folder / top).exists():  # some packages share a folder
                (folder / top).symlink_to(Path(str(distribution(name).locate_file(top))).resolve())


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel installed, and what it requires without extras within its reach."""
    folder = tmp_path_factory.mktemp("environment")
    python("-m", "venv", "--without-pip", folder)
    options = ("--no-deps", "--no-index", "--disable-pip-version-check")
    python("-m", "pip", "--python", folder / "bin" / "python", "install", *options, wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as content:
        (metadata,) = (content.read(name).decode() for name in content.namelist() if name.endswith("/METADATA"))
    lines = [
        line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist")
    ]
    needed = [one.name for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate({"extra": ""})]
    lend(folder / "libraries", set().union(*map(requirements, needed)))
    # a path named in a .pth file lends its packages, but not what its own .pth files point to: no editable installation
    (site / "dependencies.pth").write_text(f"{folder / 'libraries'}\n")
    log = str(folder / "processes.jsonl")
    (site / "sitecustomize.py").write_text(WITNESS.format(root=str(ROOT), log=log))
    return folder


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "hf_efficient").rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    assert names == {str(path.relative_to(ROOT)) for path in files} | {"hf_efficient_command.py"}
    assert "hf_efficient/py.typed" in names


def test_a_checkpoint_loads_without_what_training_needs(environment, tmp_path):
    path = converted(tmp_path / "converted", "gpt2")
    program = """
import sys, importlib.util, hf_efficient, transformers
from hf_efficient.cli import main
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(tokenizer.decode(model.generate(**tokenizer("w10 w11", return_tensors="pt"), max_new_tokens=4)[0]))
print(type(model).__name__, [name for name in sys.argv[3:] if importlib.util.find_spec(name)])
sys.argv[1:] = ["distill", *sys.argv[1:3], "--steps", "0", "--end-to-end-steps", "1"]
main()
"""
    training = ("accelerate", "datasets", "evaluate", "peft", "sklearn", "matplotlib", "sentence_transformers")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [environment / "bin" / "python", "-c", program, path, tmp_path / "out", *training]
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "EfficientGPT2LMHeadModel []", done.stderr
    assert done.returncode == 1 and "hf-efficient[train]" in done.stderr, done.stderr


def test_installed_program_works_outside_the_repository(environment, tmp_path):
    source, out = save_source(tmp_path / "source", "bert"), tmp_path / "out"
    (tmp_path / "texts.txt").write_text("\n".join(words(40, seed) for seed in range(3)) + "\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*command: str | Path) -> str:
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    program = environment / "bin" / "hf-efficient"
    assert "convert" in run(program, "--help")
    assert [card["mechanism"] for card in json.loads(run(program, "list", "--json"))] == he.list_mechanisms()
    sizes = ("--attention-window", "8", "--max-positions", "256")
    report = json.loads(run(program, "convert", source, out, "--attention", "longformer", *sizes, "--json"))
    assert report["counts"]["extended"] == 1
    # the other commands in one process, which imports torch once
    verify = ["verify", out, source, "--texts", "texts.txt", "--max-length", "32", "--json"]
    commands = [verify, ["card", out], ["show", "local", "--attention-window", "64"]]
    code = "import json, sys\nfrom hf_efficient.cli import app\n"
    code += "for words in json.loads(sys.argv[1]):\n    app(words, standalone_mode=False)\n    print(chr(0))"
    verified, card, shown, _ = run(
        environment / "bin" / "python", "-c", code, json.dumps(commands, default=str)
    ).split("\0")
    assert json.loads(verified)["passed"]
    assert "longformer" in card and "longformer" in (out / "README.md").read_text()
    assert "all 12 heads" in shown
    lines = (environment / "processes.jsonl").read_text().splitlines()
    processes = [json.loads(line) for line in lines]
    # three commands, the process of the others, and the one of its own in which verify loads the checkpoint
    assert len(processes) >= 5
    assert [strange for _, strange in processes if strange] == []
