"""Peak memory of single calls, each in a process of its own that has touched no tensor before."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm


def fresh_python(*arguments: Any, timeout: float | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own that finds this package, also where it is not installed.

    Raises:
        subprocess.TimeoutExpired: it took more than `timeout` seconds, and was ended.
    """
    command, environment = _python(arguments, variables)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def growth_of(call: Callable[[], Any]) -> float:
    """Megabytes by which `call` raises the resident memory of this process at its highest (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def peaks(
    measure: Callable[..., float], entries: Sequence[Sequence[Any]], progress: str | None = None
) -> list[float | None]:
    """What `measure(*entry)` returns for each entry, in a process of its own, with as many threads as here.

    One fresh Python imports the module of `measure`, a function at its top level, and is forked for every entry: the
    import, seconds long, is paid once, and no entry sees memory that another has left.

    Args:
        entries: what JSON can hold. progress: text of the bar; `None` = no bar.

    Returns:
        `None` for each where the operating system does not tell (anything but Linux).

    Raises:
        RuntimeError: an entry failed; with what its process wrote last.
    """
    if not entries or not Path("/proc/self/clear_refs").exists():
        return [None] * len(entries)
    bar = tqdm(total=len(entries), desc=progress, disable=progress is None, leave=False, file=sys.stderr)
    given = [measure.__module__, measure.__name__, torch.get_num_threads(), entries]
    # every tensor goes back to the system when it is freed: otherwise the peak depends on how the heap is fragmented
    command, environment = _python(("-m", __name__, json.dumps(given)), {"MALLOC_MMAP_THRESHOLD_": "65536"})
    found: list[float | None] = []
    with bar, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found.append(json.loads(line))
                bar.update()
        errors.seek(0)
        error = errors.read()
    if process.returncode:
        raise RuntimeError(f"measuring the memory of {entries[len(found)]} failed:\n{error[-2000:]}")
    return found


def _python(arguments: Sequence[Any], variables: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join(paths)}
    return [sys.executable, *map(str, arguments)], environment


def _status(field: str) -> int:
    """Kilobytes that the kernel reports for this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1])


def _forked(module: str, function: str, threads: int, entries: list[list[Any]]) -> Iterator[float]:
    measure, context = getattr(importlib.import_module(module), function), multiprocessing.get_context("fork")
    for entry in entries:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sender, measure, threads, entry))
        process.start()
        sender.close()
        try:
            yield receiver.recv()
        except EOFError:
            process.join()
            raise SystemExit(f"ended with exit code {process.exitcode}") from None
        process.join()


def _send(sender: Any, measure: Callable[..., float], threads: int, entry: list[Any]) -> None:
    torch.set_num_threads(threads)
    sender.send(measure(*entry))


if __name__ == "__main__":
    for value in _forked(*json.loads(sys.argv[1])):
        print(json.dumps(value), flush=True)


def available_memory() -> int | None:
    """Bytes that this process may still take: of the machine, its control group and its address space.

    `None` where the operating system does not tell (anything but Linux).
    """
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.exists():
        return None
    line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
    free = [int(line.split()[1]) * 1024]
    limit = group / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free.append(int(text) - int((group / "memory.current").read_text()))
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        free.append(space - _status("VmSize") * 1024)
    return max(0, min(free))


def peak_memory() -> dict[str, Any]:
    """Peak memory of this process in MB (10⁶ bytes).

    On the GPU what PyTorch held since `torch.cuda.reset_peak_memory_stats`; else the resident set, which nothing resets:
    whatever was evaluated, with full attention too, is part of it.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return {"peak_memory_mb": torch.cuda.max_memory_allocated() / 1e6, "peak_memory_of": "gpu"}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return {"peak_memory_mb": peak, "peak_memory_of": "process, evaluations included"}
