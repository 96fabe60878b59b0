"""Causal linear attention over length: time per token of the op that all kernel mechanisms share, and how exact it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_efficient.benchmarks.models import rounded
from hf_efficient.ops.linear_attention import linear_attention
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.timing import Mark, attempt, timed

LENGTHS = (1024, 4096, 16384, 65536)
HEADS, FEATURES, WIDTH = 4, 64, 64
# where the quadratic definition is computed beside it, in fp64
CHECKED = 2048


def log_features(length: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Log-features of queries and keys and values, as wide apart as those of trained models (standard deviation 2)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (FEATURES, FEATURES, WIDTH)
    q, k, v = (torch.randn(1, HEADS, length, size, generator=generator) for size in sizes)
    return [x.to(dtype) for x in (2 * q, 2 * k, v)]


def error_to_definition(length: int = CHECKED, device: str = "cpu") -> float:
    """Largest difference of the chunked fp32 form to the quadratic formula in fp64, relative to the largest value."""
    q, k, v = (x.to(device) for x in log_features(length, torch.float32, 0))
    weights = (q.double().exp() @ k.double().exp().transpose(-1, -2)).tril()
    expected = weights @ v.double() / weights.sum(-1, keepdim=True)
    found = linear_attention(q, k, v, is_causal=True)
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def linear_suite(
    lengths: Sequence[int] = LENGTHS, rounds: int = 5, checked: int = CHECKED, progress: bool = True
) -> dict[str, Any]:
    """Forward, and forward with backward, at every length in turn; times by wall clock and by all threads' CPU time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls: dict[str, Callable[[Mark], None]] = {}
    attention = partial(linear_attention, is_causal=True)
    for length in lengths:
        tensors = [
            x.to(device) for x in (*log_features(length, torch.float32, 0), torch.ones(1, HEADS, length, WIDTH))
        ]
        calls |= {f"{kind} {length}": attempt(attention, kind, tensors) for kind in ("forward", "training")}
    times = timed(calls, rounds, 600, device, "linear" if progress else None)
    results = []
    for name, found in times.items():
        kind, tokens = name.split()
        seconds = [time.total for time in found]
        row: dict[str, Any] = {"pass": kind, "length": int(tokens), "seconds": statistics.median(seconds)}
        row |= {"seconds_min": min(seconds), "seconds_max": max(seconds)}
        row["microseconds_per_token"] = 1e6 * row["seconds"] / int(tokens)
        if device == "cpu":
            row["cpu_microseconds_per_token"] = 1e6 * statistics.median(t.cpu or 0.0 for t in found) / int(tokens)
        results.append(row)
    return {
        "suite": "linear",
        "settings": {
            "heads": HEADS,
            "features": FEATURES,
            "width": WIDTH,
            "batch": 1,
            "dtype": "float32",
            "device": device,
            "rounds": min(len(found) for found in times.values()),
            "seed": 0,
            "checked_length": checked,
        },
        "relative_error": error_to_definition(checked, device),
        "results": results,
        "hardware": hardware(),
        "versions": versions(),
    }


def linear_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people."""
    return rounded(document["results"])
