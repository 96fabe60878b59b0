"""Timing of calls that run in turn: wall clock and CPU time of all threads, or CUDA events; memory of one CUDA call."""

from __future__ import annotations

import gc
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
    calls: dict[str, Callable[[Mark], None]], rounds: int, seconds: float, device: str, progress: str | None = None
) -> tuple[dict[str, list[Times]], dict[str, str]]:
    """Times of each call, all in turn, until `rounds` rounds are made or, after the first, `seconds` are used.

    Returns:
        times by name, and the reason for every call that failed in the round that warms up.
    """
    repeat, failed = {}, {}
    for name, call in tqdm(calls.items(), desc=progress, disable=progress is None, leave=False, file=sys.stderr):
        try:
            call(lambda: None)
            once = timed_call(call, 1, device).total if device.startswith("cuda") else 1.0
        except Exception as error:  # a contender that can't run here is a result, not an accident
            failed[name] = reason_of(error)
            continue
        # short kernels many times in a row, or the events measure the launch
        repeat[name] = max(1, min(50, int(0.002 / once)))
    times: dict[str, list[Times]] = {name: [] for name in repeat}
    start = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - start > seconds:
            break
        for name, count in repeat.items():
            times[name].append(timed_call(calls[name], count, device))
    return times, failed


def speedups(theirs: list[Times], ours: list[Times]) -> dict[str, float]:
    """How many times longer they take, round by round: median, least and most, and the median by time of all threads."""
    shares = [a.total / b.total for a, b in zip(theirs, ours, strict=True)]
    figures = {"ratio": statistics.median(shares), "ratio_min": min(shares), "ratio_max": max(shares)}
    if all(t.cpu for t in ours):
        figures["cpu_ratio"] = statistics.median(a.cpu / b.cpu for a, b in zip(theirs, ours, strict=True))  # type: ignore[operator]
    return figures


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


def interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int, progress: str | None = None
) -> dict[str, list[float]]:
    """Seconds of each call, all calls in turn, `repeats` times after one warm-up: drifting speed hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in tqdm(range(repeats + 1), desc=progress, disable=progress is None, leave=False, file=sys.stderr):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Per call: median seconds, and median, minimum and maximum over rounds of its time divided by the baseline's."""
    table = {}
    for name, times in seconds.items():
        shares = [a / b for a, b in zip(times, seconds[baseline], strict=True)]
        table[name] = {
            "seconds": statistics.median(times),
            "ratio": statistics.median(shares),
            "ratio_min": min(shares),
            "ratio_max": max(shares),
        }
    return table
