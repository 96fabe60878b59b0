"""Timing of calls that run in turn: wall clock and CPU time of all threads, or CUDA events; memory of one CUDA call."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

Mark = Callable[[], None]


class Times(NamedTuple):
    """Seconds of one call, of its part before the mark, and of all threads (CPU only)."""

    total: float
    forward: float
    cpu: float | None


def attempt(attention: Callable[..., Tensor], kind: str, tensors: Sequence[Tensor]) -> Callable[[Mark], None]:
    """One call to be timed, which marks the end of its forward pass."""
    *heads, gradient = tensors

    def forward(mark: Mark) -> None:
        with torch.no_grad():
            attention(*heads)

    def training(mark: Mark) -> None:
        leaves = [x.detach().requires_grad_() for x in heads]
        out = attention(*leaves)
        mark()
        out.backward(gradient)

    return {"forward": forward, "training": training}[kind]


def timed_call(call: Callable[[Mark], None], repeat: int, device: str) -> Times:
    """Mean over `repeat` calls in a row."""
    on_gpu, stamps = device.startswith("cuda"), list[Any]()

    def mark() -> None:
        if on_gpu:
            stamps.append(torch.cuda.Event(enable_timing=True))
            stamps[-1].record()
        else:
            stamps.append(time.perf_counter())

    start = time.process_time()
    for _ in range(repeat):
        mark()
        call(mark)
    mark()
    if on_gpu:
        torch.cuda.synchronize()
    cpu = None if on_gpu else (time.process_time() - start) / repeat
    steps = [a.elapsed_time(b) / 1000 if on_gpu else b - a for a, b in pairwise(stamps)]
    return Times(sum(steps) / repeat, sum(steps[:: len(steps) // repeat]) / repeat, cpu)


def timed(
    calls: dict[str, Callable[[Mark], None]],
    rounds: int,
    seconds: float = math.inf,
    device: str = "cpu",
    progress: str | None = None,
    failed: dict[str, str] | None = None,
) -> dict[str, list[Times]]:
    """Times of each call, all in turn, so that drifting speed hits all alike: after a round that warms up, `rounds` rounds,
    or fewer once `seconds` are used.

    Args:
        failed: is given the reason for every call that fails in the round that warms up; `None` = its error is raised.
    """
    repeat = {}
    for name, call in tqdm(calls.items(), desc=progress, disable=progress is None, leave=False, file=sys.stderr):
        try:
            call(lambda: None)
            once = timed_call(call, 1, device).total if device.startswith("cuda") else 1.0
        except Exception as error:
            if failed is None:
                raise
            failed[name] = reason_of(error)
            continue
        # short kernels many times in a row, or the events measure the launch
        repeat[name] = max(1, min(50, int(0.002 / once)))
    times: dict[str, list[Times]] = {name: [] for name in repeat}
    start = time.perf_counter()
    for done in tqdm(range(rounds), desc=progress, disable=progress is None, leave=False, file=sys.stderr):
        if done and time.perf_counter() - start > seconds:
            break
        for name, count in repeat.items():
            times[name].append(timed_call(calls[name], count, device))
    return times


def ratios(times: list[Times], baseline: list[Times]) -> dict[str, float]:
    """`times` ÷ `baseline`, round by round: median, least and most, and on the CPU the median by time of all threads."""
    shares = [a.total / b.total for a, b in zip(times, baseline, strict=True)]
    figures = {"ratio": statistics.median(shares), "ratio_min": min(shares), "ratio_max": max(shares)}
    on_cpu = [a.cpu / b.cpu for a, b in zip(times, baseline, strict=True) if a.cpu and b.cpu]
    return figures | ({"cpu_ratio": statistics.median(on_cpu)} if len(on_cpu) == len(shares) else {})


def table_of(times: dict[str, list[Times]], baseline: str) -> dict[str, dict[str, float]]:
    """Per call: median seconds, and its `ratios` to the call named `baseline`."""
    return {
        name: {"seconds": statistics.median(t.total for t in taken), **ratios(taken, times[baseline])}
        for name, taken in times.items()
    }


def cuda_peak(call: Callable[[Mark], None]) -> float:
    """Megabytes that a call allocates at most beside what is there already."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(lambda: None)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def reason_of(error: Exception) -> str:
    """What went wrong, in short; a call that ran out of memory leaves none of it behind."""
    gc.collect()
    torch.cuda.empty_cache()
    return f"{type(error).__name__}: {str(error)[:300]}"
