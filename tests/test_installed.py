"""What users install: a wheel holds the whole package and works outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
USE = """
import sys, torch
import hf_efficient as he
from hf_efficient.testing import inputs_for, tiny_model
from transformers import AutoModelForMaskedLM

target, out = sys.argv[1:]
assert he.__file__.startswith(target), he.__file__
names = he.list_mechanisms()
print("MECHANISMS", *names)
assert all(he.describe(name)["paper"] for name in names)
source = tiny_model("bert")
result = he.convert(source, "longformer", attention_window=8, max_positions=256)
result.save(out)
loaded = AutoModelForMaskedLM.from_pretrained(out)
inputs = inputs_for(loaded, length=200)
with torch.no_grad():
    assert torch.equal(loaded(**inputs).logits, result.model(**inputs).logits)
assert all(module.__file__.startswith(target) for name, module in sys.modules.items() if name.startswith("hf_efficient"))
"""


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # built from a copy, since setuptools leaves build folders beside what it builds
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(REPOSITORY / "hf_efficient", folder / "project" / "hf_efficient", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (REPOSITORY / name).is_file():
            shutil.copy(REPOSITORY / name, folder / "project")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, folder / "project")
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = REPOSITORY / "hf_efficient"
    expected = {
        str(path.relative_to(REPOSITORY))
        for path in package.rglob("*")
        if path.is_file() and (path.suffix == ".py" or path.name == "py.typed")
    }
    assert names == expected
    assert "hf_efficient/py.typed" in names


@pytest.mark.slow
def test_installed_wheel_works_outside_the_repository(wheel, tmp_path):
    import hf_efficient as he

    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE, str(target), str(tmp_path / "out")],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed = next(line for line in done.stdout.splitlines() if line.startswith("MECHANISMS")).split()[1:]
    assert listed == he.list_mechanisms()
