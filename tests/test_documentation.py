"""What README.md and docs/ tell a reader to type works as it stands there, on tiny checkpoints of the same names."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run
from tiny import converted, save_source, tiny_model, words

from hf_efficient import corpus
from hf_efficient.evaluation.report import Check

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)
SOURCES = {
    "sentence-transformers/all-MiniLM-L6-v2": "bert",
    "google-bert/bert-base-uncased": "bert",
    "FacebookAI/roberta-base": "roberta",
    "openai-community/gpt2": "gpt2",
    "google-t5/t5-base": "t5",
}
# commands that have tests of their own: they install, take minutes, or are files of the repository
ELSEWHERE = ("pip ", "make ", "python recipes/")
QUICK = {"--steps 200": "--steps 1", "--end-to-end-steps 100": "--end-to-end-steps 1"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Tiny checkpoints under the names of real ones, and what a page takes as made on another."""
    folder = tmp_path_factory.mktemp("sources")
    for name, family in SOURCES.items():
        save_source(folder / name, family, positions=512)
    converted(folder / "classifier" / "model", "bert")
    run("convert", folder / "google-bert/bert-base-uncased", folder / "longformer-bert", "--attention", "longformer")
    return folder


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(re.sub(r"(?s)<!-- generated: .*?<!-- end -->", "", page.read_text()))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_every_block_runs(page, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "offline_documents", lambda *_: {f"text {i}": words(40, i) for i in range(20)})
    # a Python of its own takes seconds, and has tests in tests/evaluation
    skipped = Check("fresh process", "not applicable", {}, "")
    monkeypatch.setattr("hf_efficient.evaluation.verify._fresh_process", lambda *_: skipped)
    for path in sources.iterdir():
        if path.name != "longformer-bert" or page.stem == "verifying":  # other pages make their own
            shutil.copytree(path, tmp_path / path.name)
    names = {"stock_model": tiny_model("bert"), "batch": {"input_ids": torch.tensor([[5, 6, 7]])}}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
            continue
        for line in text.splitlines():
            for theirs, ours in QUICK.items():
                line = line.replace(theirs, ours)
            typed = shlex.split(line, comments=True)
            if line.startswith("hf-efficient "):
                run(*typed[1:])
            elif line.startswith("python recipes/"):
                assert (ROOT / typed[1]).exists(), line
            else:
                assert line.startswith(ELSEWHERE), f"{page.name}: who tests {line!r}?"
