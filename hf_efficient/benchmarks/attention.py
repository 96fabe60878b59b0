"""Time and memory of the attention alone, against full attention and transformers' own efficient classes.

    hf-efficient bench attention --out attention.json     # draws attention.png beside it

All methods of one place run in turn, round by round, so that ratios compare neighbours in time. On a GPU, times come from
CUDA events and memory from the allocator; on the CPU, memory is the growth of a process made for one call.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_efficient.attention.base.mechanism import EfficientAttention
from hf_efficient.benchmarks.baselines import (
    BASELINES,
    BIASED,
    DENSE,
    MASKED,
    SAME,
    TILE,
    WINDOW,
    Point,
    build,
    mechanism_names,
    settings_of,
)
from hf_efficient.benchmarks.models import wide_model
from hf_efficient.benchmarks.work import ceilings, work_of
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.forward import forward_call
from hf_efficient.profiling.memory import growth_of, peaks
from hf_efficient.profiling.timing import attempt, cuda_peak, ratios, reason_of, table_of, timed
from hf_efficient.training.plots import require_pyplot

PRODUCTS = {"forward": 2, "training": 7}
# query, key, value, output; backward reads them and the output's gradient again, and writes three gradients
TRAFFIC = {"forward": 1, "training": 3}
FLAGSHIPS = ("local", "bigbird")
# what grows faster than the length at fixed options: a key in every stride, a slot in every block
QUADRATIC = ("axial", "combined", "longt5", "sparse_transformer")
# transformers' LongT5 keeps a bias of several GB at lengths beyond this
SHORT_ONLY = ("transformers LongT5 local", "transformers LongT5 transient-global")


@dataclass(frozen=True)
class Stage:
    """Methods that run in turn at one point: `"forward"` without gradients, or `"training"` (forward and backward)."""

    point: Point
    kind: str
    names: tuple[str, ...]
    rounds: int = 5
    seconds: float = 60.0


# what holds on the CPU at 4096 tokens, 12 heads of 64, float32: (ours, pass, at least so many times faster, than)
BARS = (
    ("local", "forward", 3.8, MASKED),
    ("local", "forward", 4.5, "transformers Longformer"),
    ("local", "training", 3.5, MASKED),
    ("local", "training", 4.5, "transformers Longformer"),
    ("bigbird", "forward", 3.0, MASKED),
    ("bigbird", "forward", 4.0, "transformers BigBird"),
)
OVER_FLOOR = 1.5


def cpu_stages() -> list[Stage]:
    """Forward at 512 to 16384 tokens, training where it takes seconds, bfloat16 at 4096; about five minutes on two cores."""
    everyone = tuple(mechanism_names())
    stages = []
    for length, rounds in ((512, 5), (1024, 5), (2048, 5), (4096, 5), (8192, 3), (16384, 2)):
        baselines = ["transformers Longformer", "transformers BigBird"]
        baselines += DENSE if length <= 8192 else ()
        baselines += (*SHORT_ONLY, "transformers Longformer, first token global") if length <= 4096 else ()
        # its first call at a length compiles for half a minute
        baselines += ["FlexAttention, local"] if length == 4096 else []
        stages.append(Stage(Point(length), "forward", (*everyone, *baselines), rounds, 25))
        if length <= 8192:
            trained = everyone if length == 4096 else FLAGSHIPS
            baselines = [MASKED, "transformers Longformer", "transformers BigBird"]
            stages.append(Stage(Point(length), "training", (*trained, *baselines), rounds, 25))
    names = (*everyone, *DENSE, "transformers Longformer", "transformers BigBird")
    return [*stages, Stage(Point(4096, dtype="bfloat16"), "forward", names, 3, 15)]


def cuda_stages() -> list[Stage]:
    """The most telling places first, since a run may end before the last ones."""
    stages = []
    kinds = [("bfloat16", 64), ("bfloat16", 128), ("float16", 64), ("float32", 64), ("float16", 128), ("float32", 128)]
    for dtype, width in kinds:
        ours = (*mechanism_names(), *BIASED) if (dtype, width) == kinds[0] else FLAGSHIPS
        for length, batch in ((16384, 8), (4096, 1), (4096, 8), (65536, 1), (16384, 1), (65536, 8)):
            baselines = ["transformers Longformer", "transformers BigBird"]
            # full attention for at most a few seconds
            baselines += DENSE if batch * length**2 <= (2**31 if dtype == "float32" else 2**32) else ()
            if dtype == "bfloat16" and (length, batch) == (16384, 8):
                # FlexAttention compiles for every place
                baselines += [n for n in BASELINES if "Flex" in n or "first token" in n]
            if dtype == "bfloat16" and batch * length <= 2**17:
                baselines += SHORT_ONLY
            point = Point(length, batch, width=width, dtype=dtype, device="cuda")
            stages += [Stage(point, kind, (*ours, *baselines), 10, 6) for kind in PRODUCTS]
    return stages


# ---- one stage ---------------------------------------------------------------------------------------------------


def run_stage(
    stage: Stage, best: dict[str, float], progress: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of all methods of a stage, and those that could not run, with the reason."""
    point, place = stage.point, asdict(stage.point) | {"pass": stage.kind}
    tensors, calls, reasons = point.tensors(), {}, {}
    for name in stage.names:
        try:
            calls[name] = attempt(build(name, point), stage.kind, tensors)
        except Exception as error:
            reasons[name] = reason_of(error)
    title = f"{stage.kind}, {point.length} tokens, {point.dtype}" if progress else None
    times = timed(calls, stage.rounds, stage.seconds, point.device, title, reasons)
    rows = []
    for name, samples in times.items():
        row: dict[str, Any] = {"contender": name, "ours": name not in BASELINES, **place, "rounds": len(samples)}
        totals = [t.total for t in samples]
        row |= {"seconds": statistics.median(totals), "slowest": max(totals)}
        if stage.kind == "training":
            row["backward_seconds"] = statistics.median(t.total - t.forward for t in samples)
        if samples[0].cpu is not None:
            row["cpu_seconds"] = statistics.median(t.cpu or 0.0 for t in samples)
        else:
            row["peak_mb"] = cuda_peak(calls[name])
        if row["ours"]:
            base = name.split(",")[0]
            row |= _achieved(base, stage, row["seconds"], best)
            against = [n for n in (*DENSE, *SAME.get(base, ())) if n in times]
            row["faster_than"] = {other: ratios(times[other], samples) for other in against}
        rows.append(row)
    return rows, [{"contender": name, **place, "reason": why} for name, why in reasons.items()]


def _achieved(name: str, stage: Stage, seconds: float, best: dict[str, float]) -> dict[str, Any]:
    """Work, rates, and the time below which the hardware can't get: products over visible pairs, or bytes once."""
    work, products = work_of(name, stage.point), PRODUCTS[stage.kind]
    flops, tile_flops, moved = work.flops(products), work.tile_flops(products), work.bytes * TRAFFIC[stage.kind]
    return {
        "gflop": flops / 1e9,
        "tile_gflop": None if tile_flops is None else tile_flops / 1e9,
        "mb": moved / 1e6,
        "tflops": flops / seconds / 1e12,
        "tile_tflops": None if tile_flops is None else tile_flops / seconds / 1e12,
        "gbps": moved / seconds / 1e9,
        "floor_seconds": max(flops / best["flops"], moved / best["bytes"]),
    }


def crossovers(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each of our methods and places that differ by length alone: from which length on it beats full attention.

    `length` is the first measured one from which on it is faster at all of them, `None` if it is not at the longest.
    """
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        for other in DENSE:
            if other in row.get("faster_than", {}):
                key = (row["contender"], row["pass"], row["dtype"], row["batch"], row["width"], other)
                found.setdefault(key, {})[row["length"]] = row["faster_than"][other]["ratio"]
    names = ("contender", "pass", "dtype", "batch", "width", "against")
    results = []
    for key, by_length in found.items():
        lengths = sorted(by_length)
        faster = [by_length[n] > 1 for n in lengths]
        first = next((n for at, n in enumerate(lengths) if all(faster[at:])), None)
        results.append(dict(zip(names, key, strict=True)) | {"lengths": lengths, "length": first})
    return results


# ---- memory ------------------------------------------------------------------------------------------------------


def cpu_plan() -> list[tuple[str, str, int]]:
    """(method, pass, length) of the memory figures on the CPU."""
    plan = [(name, "forward", n) for name in FLAGSHIPS for n in (8192, 16384, 32768, 65536)]
    for name in (n for n in mechanism_names() if n not in FLAGSHIPS):
        plan += [(name, "forward", n) for n in ((8192, 16384) if name in QUADRATIC else (32768, 65536))]
    plan += [(name, "training", n) for name in FLAGSHIPS for n in (8192, 16384)]
    baselines = (MASKED, "transformers Longformer", "transformers BigBird")
    return plan + [(name, "forward", n) for name in baselines for n in (4096, 8192)]


def cpu_memory(
    plan: list[tuple[str, str, int]], sizes: dict[str, int], progress: bool = False
) -> list[dict[str, Any]]:
    """Megabytes by which one call raises the resident memory of a process of its own, and its growth per doubling.

    Empty where the operating system does not tell (anything but Linux).
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    measured = peaks(_peak, [(*entry, sizes) for entry in plan], "memory" if progress else None)
    for (name, kind, length), peak in zip(plan, measured, strict=True):
        if peak is not None:
            found.setdefault((name, kind), {})[length] = peak
    return [
        {
            "contender": name,
            "pass": kind,
            # JSON has text for keys
            "peak_mb": {str(n): peak for n, peak in row.items()},
            "growth": {str(n): row[n] / row[n // 2] for n in row if n // 2 in row},
        }
        for (name, kind), row in found.items()
    ]


def _peak(name: str, kind: str, length: int, sizes: dict[str, int]) -> float:
    short, point = Point(min(length, 2 * WINDOW), **sizes), Point(length, **sizes)  # type: ignore[arg-type]
    attempt(build(name, short), kind, short.tensors())(lambda: None)
    tensors = point.tensors()
    # a dense mask is what masked attention costs; modules and their inputs are there anyway
    attention = None if name == MASKED else build(name, point)
    return growth_of(lambda: attempt(attention or build(name, point), kind, tensors)(lambda: None))


# ---- the suite ---------------------------------------------------------------------------------------------------


class NoAttention(EfficientAttention):
    """Every token keeps its own value: what a model costs without attention."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: Any) -> Tensor:
        return value


def without_attention(model: Any) -> Any:
    """The converted model with every mechanism taken out of it, in place."""
    for module in list(model.modules()):
        if isinstance(child := module._modules.get("efficient"), EfficientAttention):
            module.efficient = NoAttention(child.config, child.geometry)
    return model


def over_floor(length: int = 8192, repeats: int = 5, device: str = "cpu") -> dict[str, Any]:
    """Time of two layers of BERT-base width with our window, over the same layers without attention."""
    spec = {"mechanism": "local", "attention_window": WINDOW}
    (model, inputs), (other, _) = (wide_model("bert", spec, length, "encoder") for _ in range(2))
    models = {"local": model.to(device), "no attention": without_attention(other).to(device)}
    calls = {name: forward_call(x, inputs) for name, x in models.items()}
    figures = table_of(timed(calls, repeats, device=device), "no attention")["local"]
    met = figures["ratio"] <= OVER_FLOOR
    return {"length": length, "layers": 2, "window": WINDOW, **figures, "limit": OVER_FLOOR, "met": met}


def bars_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured of `BARS`, with the slowest round."""
    found = []
    for name, kind, least, other in BARS:
        place = {"contender": name, "pass": kind, "length": 4096, "dtype": "float32", "device": "cpu"}
        row = next((r for r in rows if r | place == r), None)
        if row is not None and other in row["faster_than"]:
            figures = row["faster_than"][other]
            found.append(place | {"than": other, "at_least": least, **figures, "met": figures["ratio"] >= least})
    return found


def attention_suite(
    stages: list[Stage] | None = None,
    memory: list[tuple[str, str, int]] | None = None,
    model_length: int = 8192,
    deadline: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Every stage in turn; by default those of the hardware at hand, on the GPU if there is one.

    Args:
        memory: (method, pass, length) to measure in processes of their own; by default `cpu_plan` without a GPU.
        deadline: `time.monotonic()` after which no further stage starts; those left out are named under `skipped`.
    """
    on_gpu = torch.cuda.is_available()
    if stages is None:
        stages = cuda_stages() if on_gpu else cpu_stages()
        memory = memory if on_gpu or memory is not None else cpu_plan()
    rows, failed, skipped, best = list[Any](), list[Any](), list[Any](), dict[str, dict[str, float]]()
    for stage in tqdm(stages, desc="attention", disable=not progress, file=sys.stderr):
        if deadline is not None and time.monotonic() > deadline:
            skipped.append(asdict(stage))
            continue
        if stage.point.dtype not in best:
            best[stage.point.dtype] = ceilings(stage.point)
        new, without = run_stage(stage, best[stage.point.dtype], progress)
        rows, failed = rows + new, failed + without
        gc.collect()
        torch.cuda.empty_cache()
    point = stages[0].point
    sizes = {"batch": point.batch, "heads": point.heads, "width": point.width}
    return {
        "suite": "attention",
        "settings": {**sizes, "seed": 0, "options": {n: settings_of(n) for n in mechanism_names()}, "tile": TILE},
        "results": rows,
        "bars": bars_of(rows),
        "crossover": crossovers(rows),
        "memory": cpu_memory(memory or [], sizes, progress),
        "over_floor": over_floor(model_length, device=point.device) if model_length else None,
        "ceilings": best,
        "failed": failed,
        "skipped": skipped,
        "hardware": hardware(),
        "versions": versions(),
    }


# ---- for people --------------------------------------------------------------------------------------------------


def attention_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows: what every method took, and how many times longer full attention and its rival took."""
    headings = ["method", "pass", "tokens", "batch, width, dtype", "ms", "slowest", "TFLOP/s", "× floor"]
    headings += ["full, masked ×", "rival ×", "rival"]
    rows = []
    for row in document["results"]:
        faster = row.get("faster_than", {})
        rivals = {n: f["ratio"] for n, f in faster.items() if n not in DENSE}
        rival = min(rivals, key=lambda n: rivals[n]) if rivals else None
        place = f"{row['batch']}, {row['width']}, {row['dtype']}"
        times = [f"{1000 * row[name]:.4g}" for name in ("seconds", "slowest")]
        rates = [f"{row['tflops']:.3g}", f"{row['seconds'] / row['floor_seconds']:.3g}"] if row["ours"] else ["", ""]
        dense = f"{faster[MASKED]['ratio']:.2f}" if MASKED in faster else ""
        pair = ["", ""] if rival is None else [f"{rivals[rival]:.2f}", rival]
        rows.append([row["contender"], row["pass"], row["length"], place, *times, *rates, dense, *pair])
    return headings, rows


def draw(document: dict[str, Any], path: Path) -> None:
    """Time over length, one line per method, one picture per pass: batch, width and dtype of the first result."""
    pyplot = require_pyplot()
    first = document["results"][0]
    place = {name: first[name] for name in ("batch", "heads", "width", "dtype")}
    picture, axes = pyplot.subplots(1, 2, figsize=(15, 5.5), constrained_layout=True)
    names = list(dict.fromkeys(row["contender"] for row in document["results"]))
    colours = dict(zip(names, pyplot.colormaps["tab20"](range(len(names))), strict=True))
    for axis, kind in zip(axes, PRODUCTS, strict=True):
        rows = [row for row in document["results"] if row | place | {"pass": kind} == row]
        for name in (n for n in names if any(row["contender"] == n for row in rows)):
            line = sorted((row["length"], row["seconds"]) for row in rows if row["contender"] == name)
            style = "--" if name in BASELINES else "-"
            axis.plot(*zip(*line, strict=True), style, marker="o", markersize=3, label=name, color=colours[name])
        lengths = sorted({row["length"] for row in rows})
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds", title=f"attention alone, {kind}")
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    device = document["hardware"]["gpu"] or document["hardware"]["cpu"]
    picture.suptitle(f"{device}; " + ", ".join(f"{name} {value}" for name, value in place.items()), fontsize=9)
    picture.savefig(path, dpi=130)
