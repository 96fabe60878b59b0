"""A folder imports only folders below it, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

# folder or root module: what it may import of ours, lowest first; ARCHITECTURE.md shows the same table
LAYERS = {
    "_version": "",
    "names": "",
    "corpus": "",
    "profiling": "_version",
    "patterns": "",
    "kernels": "patterns",
    "ops": "kernels patterns",
    "cache": "ops patterns",
    "attention.base": "cache ops patterns",
    "attention": "attention.base cache ops patterns",
    "families": "attention.base ops names",
    "patching": "families attention.base cache ops patterns names",
    "experts": "patching families ops",
    "models": "experts patching families attention.base profiling names",
    "conversion": "models experts patching families attention.base ops profiling corpus",
    "evaluation": "conversion models experts patching families attention.base ops profiling corpus",
    "exporting": "conversion models patching families attention.base ops profiling",
    "testing": "conversion models patching families attention.base",
    "training": "evaluation conversion models experts patching families attention.base cache ops profiling corpus",
    "advice": "training evaluation conversion models experts patching families attention.base cache ops profiling corpus",
    "visualize": "attention.base patterns profiling",
    "benchmarks": "advice training testing exporting evaluation conversion models experts patching families attention.base "
    "cache ops patterns profiling corpus",
    "cards": "training conversion models experts attention.base profiling",
    "cli": "cards benchmarks visualize advice training exporting evaluation conversion models attention.base profiling "
    "corpus _version",
    "hf_efficient": "models attention.base _version",
}


def layer_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[1:3]) if parts[1:3] == ["attention", "base"] else parts[min(1, len(parts) - 1)]


def imports_of(package: Path) -> dict[str, set[str]]:
    """{module: modules of the package that it imports}, also inside functions and for types alone."""
    files = {".".join(p.relative_to(package.parent).with_suffix("").parts): p for p in package.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    return {name: set(_imported(path, files)) - {name} for name, path in files.items()}


def _imported(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports of the package are absolute"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {name if name in modules else node.module for name in found} & modules.keys()


def upward(imports: dict[str, set[str]]) -> list[str]:
    return sorted(
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if layer_of(other) not in [layer_of(module), *LAYERS[layer_of(module)].split()]
    )


IMPORTS = imports_of(ROOT / "hf_efficient")


def test_the_layers_have_an_order():
    folders = list(LAYERS)
    for number, (folder, below) in enumerate(LAYERS.items()):
        assert set(below.split()) <= set(folders[:number]), f"{folder} may import only folders above it in the table"
    assert {layer_of(module) for module in IMPORTS} == set(LAYERS)


def test_folders_import_only_folders_below_them():
    assert not upward(IMPORTS)


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()


def test_an_upward_import_and_a_circle_are_found(tmp_path: Path):
    for name, text in {
        "ops/softmax.py": "def f():\n    from hf_efficient.cache.bounded import g",
        "cache/bounded.py": "import hf_efficient.ops.softmax",
    }.items():
        (tmp_path / "hf_efficient" / name).parent.mkdir(parents=True)
        (tmp_path / "hf_efficient" / name).write_text(text)
    imports = imports_of(tmp_path / "hf_efficient")
    assert upward(imports) == ["hf_efficient.ops.softmax imports hf_efficient.cache.bounded"]
    with pytest.raises(CycleError):
        TopologicalSorter(imports).prepare()


def test_the_architecture_page_shows_the_layers():
    rows = [line.split("|")[1:-1] for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines() if "|" in line]
    shown = {row[0].strip(" `"): row[2].replace("`", "").replace(",", "").split() for row in rows if "`" in row[0]}
    assert shown == {folder: below.split() for folder, below in LAYERS.items()}


def test_few_modules_stand_at_the_root():
    assert len(list((ROOT / "hf_efficient").glob("*.py"))) <= 6
