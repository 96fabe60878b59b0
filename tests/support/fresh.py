"""Programs run as a new Python would run them, without the seconds in which it imports PyTorch and transformers.

A server that has imported both, and nothing of this package, is forked for each program.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "transformers", "transformers.modeling_utils", "transformers.trainer", "accelerate"]
    + [f"transformers.models.{name}.modeling_{name}" for name in ("auto", "bert", "roberta", "gpt2", "t5")]
)
SECONDS = 600


def python(
    *arguments: Any, cwd: str | Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `python *arguments` prints and returns: a script, or `-c` and code, then its own arguments."""
    return _ended([dict(os.environ if env is None else env)], arguments, cwd)[0]


def launch(count: int, *arguments: Any) -> list[subprocess.CompletedProcess[str]]:
    """`python *arguments` in `count` processes that find one another as those of `torchrun` do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    place |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return _ended([os.environ | place | rank for rank in ranks], arguments)


def _ended(
    environments: Sequence[dict[str, str]], arguments: Sequence[Any], cwd: str | Path | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """One process per environment; where one takes too long or fails, none is left behind."""
    words = [str(word) for word in arguments]
    with TemporaryDirectory() as folder:
        files = [[f"{folder}/{index}.{name}" for name in ("out", "err")] for index in range(len(environments))]
        started = [
            SERVER.Process(target=_run, args=(words, str(cwd or Path.cwd()), environment, pair))
            for environment, pair in zip(environments, files, strict=True)
        ]
        for process in started:
            process.start()
        try:
            _wait(started, words)
        finally:
            for process in started:
                process.kill()
                process.join()
        return [
            subprocess.CompletedProcess(words, process.exitcode or 0, *[Path(file).read_text() for file in pair])
            for process, pair in zip(started, files, strict=True)
        ]


def _wait(started: Sequence[BaseProcess], words: list[str]) -> None:
    """Until all have ended, or one has failed, for which the others would wait."""
    deadline = time.monotonic() + SECONDS
    while any(process.exitcode is None for process in started):
        wait([process.sentinel for process in started if process.exitcode is None], timeout=10)
        if any(process.exitcode for process in started):
            return
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(words, SECONDS)


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
