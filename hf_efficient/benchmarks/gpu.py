"""Everything that needs a GPU in one command and ten minutes: its tests, then the attention benchmark and linear attention
beside flash-linear-attention's, one JSON.

    hf-efficient bench gpu --out gpu.json
    PYTHONPATH=. python -m hf_efficient.benchmarks.gpu gpu.json 540    # with nothing installed; seconds

Either runs at the root of a checkout, for the sake of the tests.

Tests and the compilation of kernels share the GPU and run in many processes at once; times are taken afterwards, alone.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_efficient.benchmarks.attention import Stage, attention_rows, attention_suite, cuda_stages
from hf_efficient.benchmarks.baselines import BASELINES, Point, build
from hf_efficient.ops.linear_attention import linear_attention
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.json_files import write_json
from hf_efficient.profiling.memory import fresh_python
from hf_efficient.profiling.timing import attempt, timed

# in the current folder, which therefore has to be a checkout
TESTS = (Path("tests/kernels/test_gpu.py"), Path("tests/kernels/test_kernels_gpu.py"))
SHARD = "HF_EFFICIENT_SHARD"
OUTCOME = re.compile(r"^(\S+\.py::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
REASON = re.compile(r"^(?:FAILED|ERROR) (\S+\.py::.*)$", re.MULTILINE)
# products per second in bfloat16 that a H200 reaches
PEAK = 790e12
# where the kernels are judged, and which share of PEAK on the pairs of its tiles is acceptable, and aimed at
TARGET = Point(16384, 8, dtype="bfloat16", device="cuda")
SHARES = {"forward": (0.35, 0.45), "backward": (0.25, 0.33)}
# what a bias may add to the forward pass, and its gradient to the backward pass
BIAS_LIMITS = {"forward": (0.25, 0.10), "backward": (0.25, 0.15)}
# features per head at which linear attention is compared, and whose kernels ours stand beside
FEATURES = (64, 256)
OURS, FLA = "linear attention", "flash-linear-attention"
# of all seconds there are: tests and compilation, and what writing and closing down takes
TEST_SHARE, RESERVE = 0.5, 30.0


# ---- tests and compilation, in processes of their own ---------------------------------------------------------------


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """As a pytest plugin: keep every n-th test, where `HF_EFFICIENT_SHARD` says `index/n`."""
    if shard := os.environ.get(SHARD):
        index, count = map(int, shard.split("/"))
        items[:] = items[index::count]


def run_shard(paths: Sequence[Path], index: int, count: int, left: Callable[[], float]) -> dict[str, Any]:
    """One shard of the GPU tests in the seconds `left`: outcome by test, and why tests failed; what ran in time counts."""
    arguments = (
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-v",
        "-ra",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-p",
        __name__,
        *paths,
    )
    # a line per test as soon as it is done, and no reason cut off
    facts = {SHARD: f"{index}/{count}", "PYTHONUNBUFFERED": "1", "COLUMNS": "400", "HF_HUB_OFFLINE": "1"}
    try:
        done = fresh_python(*arguments, timeout=left(), **facts)
        output, timed_out, errors = done.stdout, False, done.stderr[-500:]
    except subprocess.TimeoutExpired as stopped:
        raw = stopped.stdout or b""
        output, timed_out, errors = raw.decode(errors="replace") if isinstance(raw, bytes) else raw, True, ""
    outcomes = dict(OUTCOME.findall(output))
    return {
        "outcomes": outcomes,
        "reasons": sorted(set(REASON.findall(output))),
        "timed_out": timed_out,
        # a shard without a single outcome did not start
        "trouble": "" if outcomes or "deselected" in output or "no tests ran" in output else output[-500:] + errors,
    }


def summary(shards: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts of all shards, and what failed."""
    shards = list(shards)
    outcomes = {name: outcome for shard in shards for name, outcome in shard["outcomes"].items()}
    return {
        **{name: 0 for name in ("passed", "failed", "error", "skipped")},
        **{name.lower(): number for name, number in Counter(outcomes.values()).items()},
        "failures": [reason for shard in shards for reason in shard["reasons"]],
        "shards": len(shards),
        "shards_out_of_time": sum(shard["timed_out"] for shard in shards),
        "trouble": [shard["trouble"] for shard in shards if shard["trouble"]],
    }


def compile_jobs(stages: Iterable[Stage]) -> list[tuple[Point, str]]:
    """(point, method) of everything that compiles, once for each dtype, width and method."""
    found: dict[tuple[str, int, str], tuple[Point, str]] = {}
    for stage in stages:
        for name in stage.names:
            if name not in BASELINES or name.startswith("FlexAttention"):
                found.setdefault((stage.point.dtype, stage.point.width, name), (stage.point, name))
    return list(found.values())


def compile_one(point: Point, name: str, left: Callable[[], float]) -> dict[str, Any]:
    """Call a method once in a process of its own, so that its kernels lie in the caches on disk."""
    start, place = time.monotonic(), {"contender": name, **asdict(point)}
    try:
        done = fresh_python("-m", __name__, json.dumps([asdict(point), name]), timeout=left())
        reason = done.stderr[-300:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = "not done in time"
    return place | {"seconds": time.monotonic() - start, "reason": reason}


def in_parallel(calls: Sequence[Callable[[], Any]], workers: int) -> list[Any]:
    with ThreadPoolExecutor(workers) as pool:
        futures: list[Future[Any]] = [pool.submit(call) for call in calls]
        return [future.result() for future in futures]


def prepare(
    paths: Sequence[Path], jobs: Sequence[tuple[Point, str]], workers: int, deadline: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compile and test at once, until `deadline` (`time.monotonic()`): counts of the tests, seconds of each compilation."""

    def left() -> float:
        return max(1.0, deadline - time.monotonic())

    compiling = [partial(compile_one, *job, left) for job in jobs]
    testing = [partial(run_shard, paths, index, workers, left) for index in range(workers)]
    results = in_parallel([*compiling, *testing], workers)
    return summary(results[len(jobs) :]), results[: len(jobs)]


# ---- what the figures say -------------------------------------------------------------------------------------------


def repeatable(point: Point, names: Sequence[str] = ("local", "bigbird", "local, learned bias")) -> dict[str, bool]:
    """Whether equal calls give equal bits: the output and every gradient, three times each."""
    found = {}
    for name in names:
        first: list[torch.Tensor] | None = None
        equal = True
        for _ in range(3):
            *heads, gradient = point.tensors()
            leaves = [x.requires_grad_() for x in heads]
            attention: Any = build(name, point)
            out = attention(*leaves)
            out.backward(gradient)
            bias = attention.context.relative_bias
            results = [out, *(x.grad for x in leaves), *([] if bias is None else [bias.table.grad])]
            equal = equal and (first is None or all(map(torch.equal, first, results)))
            first = first or [x.detach() for x in results]
        found[name] = equal
    return found


def rows_at(rows: Iterable[dict[str, Any]], point: Point) -> dict[tuple[str, str], dict[str, Any]]:
    """{(method, pass): row} of one point."""
    place = asdict(point)
    return {(row["contender"], row["pass"]): row for row in rows if row | place == row}


def target_of(rows: Iterable[dict[str, Any]], point: Point = TARGET, peak: float = PEAK) -> dict[str, Any] | None:
    """Our window at the point where the kernels are judged: rates on the pairs of its tiles, backward as five products;
    and how many times longer others take. `None` where it was not measured."""
    found = rows_at(rows, point)
    if ("local", "forward") not in found or ("local", "training") not in found:
        return None
    seconds = {
        name: {
            "forward": found[name, "forward"]["seconds"],
            "backward": found[name, "training"]["backward_seconds"],
        }
        for name, kind in found
        if kind == "forward" and (name, "training") in found
    }
    flops = found["local", "forward"]["tile_gflop"] * 1e9
    result: dict[str, Any] = {"point": asdict(point), "peak_tflops": peak / 1e12}
    for kind, factor in (("forward", 1.0), ("backward", 2.5)):
        rate = factor * flops / seconds["local"][kind]
        accepted, wanted = SHARES[kind]
        result[kind] = {
            "seconds": seconds["local"][kind],
            "tile_tflops": rate / 1e12,
            "share": rate / peak,
            "accepted_from": accepted,
            "target": wanted,
            "others_take": {
                name: taken[kind] / seconds["local"][kind] for name, taken in seconds.items() if name != "local"
            },
        }
    return result


def bias_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """At every point: what share a bias adds to the forward pass, and its gradient to the backward pass."""
    rows, found = list(rows), []
    points = {Point(**{name: row[name] for name in asdict(TARGET)}) for row in rows}
    for point in sorted(points, key=str):
        here = rows_at(rows, point)
        pairs = (
            ("forward", "seconds", "local, fixed bias", "local", "forward"),
            ("backward", "backward_seconds", "local, learned bias", "local, fixed bias", "training"),
        )
        for kind, what, more, less, stage in pairs:
            if (more, stage) in here and (less, stage) in here:
                share = here[more, stage][what] / here[less, stage][what] - 1
                accepted, wanted = BIAS_LIMITS[kind]
                limits = {"accepted_to": accepted, "target": wanted}
                found.append({**asdict(point), "pass": kind, "adds": share, **limits})
    return found


# ---- linear attention -----------------------------------------------------------------------------------------------


def flash_linear_attention() -> Callable[..., torch.Tensor]:
    """`fla.ops.linear_attn.chunk_linear_attn` of features in the values' type, as a caller of `linear_attention`.

    Raises:
        ImportError: it is not installed.
    """
    from fla.ops.linear_attn import chunk_linear_attn

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        log_query, log_key, value = (x.transpose(1, 2) for x in tensors)
        query, key = (x.exp().to(value.dtype) for x in (log_query, log_key))
        out: torch.Tensor = chunk_linear_attn(query, key, value, scale=1.0, normalize=True)[0]
        return out.transpose(1, 2)

    return call


def linear_methods(device: str) -> tuple[dict[str, Callable[..., torch.Tensor]], dict[str, str]]:
    """Causal linear attention from log-features by name, ours on a GPU in both implementations; and what is missing."""

    def ours(implementation: str) -> Callable[..., torch.Tensor]:
        def call(*tensors: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = linear_attention(*tensors, is_causal=True, implementation=implementation)
            return out.to(tensors[2].dtype)

        return call

    found = {f"{OURS}, PyTorch": ours("torch")}
    if device.startswith("cuda"):
        found[OURS] = ours("triton")
    try:
        found[FLA] = flash_linear_attention()
    except ImportError:
        return found, {FLA: "not installed"}
    return found, {}


def linear_rows(point: Point, features: Sequence[int] = FEATURES, seconds: float = 4.0) -> list[dict[str, Any]]:
    """Seconds of causal linear attention at a point, each method in turn; a row without them says why."""
    rows = []
    for count in features:
        *_, value, gradient = point.tensors()
        generator = torch.Generator(point.device).manual_seed(1)
        shape = (*value.shape[:-1], count)
        logs = [torch.randn(shape, generator=generator, device=point.device) for _ in range(2)]
        for kind in ("forward", "training"):
            methods, missing = linear_methods(point.device)
            calls = {name: attempt(call, kind, (*logs, value, gradient)) for name, call in methods.items()}
            times = timed(calls, 5, seconds, point.device, failed=missing)
            place = asdict(point) | {"features": count, "pass": kind}
            for name, samples in times.items():
                row = {"contender": name, **place, "seconds": statistics.median(t.total for t in samples)}
                rows.append(row | {"reason": ""})
            for name, reason in missing.items():
                rows.append({"contender": name, **place, "seconds": None, "reason": reason})
    return rows


# ---- the suite ------------------------------------------------------------------------------------------------------


def gpu_suite(
    budget: float = 540.0,
    tests: Sequence[Path] = TESTS,
    stages: list[Stage] | None = None,
    target: Point = TARGET,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """All GPU tests, then the attention benchmark in what is left of `budget` seconds; the rest is named as skipped.

    Args:
        stages, target: what is measured, by default on the GPU; on other devices for trying this suite out.

    Raises:
        ValueError: there is no CUDA device, or the tests are not there.
    """
    if target.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            "the gpu suite needs a CUDA device, and this PyTorch sees none; run it where torch.cuda.is_available(), or "
            "use hf-efficient bench attention, which measures on the CPU too."
        )
    if missing := [str(path) for path in tests if not path.exists()]:
        raise ValueError(
            f"the gpu suite runs {' and '.join(missing)}, which an installed package does not bring: run it at the root of "
            "a checkout of the repository, or use hf-efficient bench attention, which needs none."
        )
    start = time.monotonic()
    stages = cuda_stages() if stages is None else stages
    workers = workers or max(2, (os.cpu_count() or 4) - 2)
    results, compiled = prepare(tests, compile_jobs(stages), workers, start + TEST_SHARE * budget)
    prepared = time.monotonic()
    bits: Any
    try:
        bits = repeatable(target)
    except Exception as error:  # the times are worth having also where a kernel fails
        bits = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    linear = linear_rows(target)
    attention = attention_suite(stages, model_length=0, deadline=start + budget - RESERVE, progress=progress)
    rows = attention["results"]
    return {
        "suite": "gpu",
        "settings": {"budget_seconds": budget, "seed": 0, "tests": [path.name for path in tests]},
        "seconds": {"tests and compilation": prepared - start, "all": time.monotonic() - start},
        "tests": results,
        "compiled": compiled,
        "repeatable": bits,
        "target": target_of(rows, target),
        "bias": bias_rows(rows),
        "linear": linear,
        "attention": attention,
        "hardware": hardware(),
        "versions": versions() | {"triton": _triton()},
    }


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    version: str = triton.__version__
    return version


def gpu_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of the times, with the tests' counts and the target in front."""
    headings, rows = attention_rows(document["attention"])
    facts = {"tests": {k: v for k, v in document["tests"].items() if isinstance(v, int)}}
    facts |= {"equal bits": document["repeatable"]}
    for kind in SHARES if document["target"] else ():
        facts[f"target, {kind}"] = {"share of peak": round(document["target"][kind]["share"], 3)}
    for row in document["linear"]:
        name = f"{row['contender']}, {row['features']} features, {row['pass']}"
        facts[name] = {"not measured,": row["reason"]} if row["reason"] else {"ms": round(1e3 * row["seconds"], 3)}
    named = [[f"{name}: " + ", ".join(f"{k} {v}" for k, v in values.items())] for name, values in facts.items()]
    return headings, [row + [""] * (len(headings) - 1) for row in named] + rows


def _main(first: str, budget: str = "540") -> None:
    """Either one compilation, as `compile_one` asks for it, or the whole suite into a file."""
    if not first.startswith("["):
        write_json(first, gpu_suite(float(budget)))
        return
    place, method = json.loads(first)
    point = Point(**place)
    for kind in ("forward", "training"):
        attempt(build(method, point), kind, point.tensors())(lambda: None)


if __name__ == "__main__":
    _main(*sys.argv[1:])
