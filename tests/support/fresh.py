"""Programs run as a new Python would run them, without the seconds in which it imports PyTorch and transformers.

A server that has imported both, and nothing of this package, is forked for each program.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "transformers", "transformers.modeling_utils"]
    + [f"transformers.models.{name}.modeling_{name}" for name in ("auto", "bert", "roberta", "gpt2", "t5")]
)
SECONDS = 600


def python(
    *arguments: Any, cwd: str | Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `python *arguments` prints and returns: a script, or `-c` and code, then its own arguments."""
    words = [str(word) for word in arguments]
    with TemporaryDirectory() as folder:
        files = [f"{folder}/out", f"{folder}/err"]
        given = (words, str(cwd or Path.cwd()), dict(os.environ if env is None else env), files)
        process = SERVER.Process(target=_run, args=given)
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, SECONDS)
        printed = [Path(file).read_text() for file in files]
        return subprocess.CompletedProcess(words, process.exitcode, *printed)


def _run(words: list[str], folder: str, environment: dict[str, str], files: list[str]) -> None:
    import torch

    assert "hf_efficient" not in sys.modules
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
