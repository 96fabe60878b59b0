"""Time and peak memory of a converted model next to full attention, over lengths."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from hf_efficient.conversion.loading import load_converted, load_stock
from hf_efficient.families import PREFIX, HostModel
from hf_efficient.profiling.environment import hardware
from hf_efficient.profiling.forward import forward_call, random_inputs
from hf_efficient.profiling.memory import growth_of, peaks
from hf_efficient.profiling.timing import table_of, timed


def compare_with_full_attention(
    model: Any, source: Any, lengths: Sequence[int], repeats: int = 3, progress: bool = False
) -> dict[str, Any]:
    """Time and peak memory of `model` and of `source` with full SDPA attention, batch 1, over lengths.

    Returns:
        {"rows": one dict per length, "crossover": the first length from which on `model` is faster, or None}.
    """
    full = copy.deepcopy(source)
    host = HostModel.of(full)
    limit = host.max_positions
    rows: list[dict[str, Any]] = []
    available = HostModel.of(model).max_positions
    lengths = [length for length in lengths if available is None or length <= available]
    if limit is not None and max(lengths, default=0) > limit:
        host.lengthen(max(lengths))
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"full": f"{scratch}/full", "efficient": f"{scratch}/efficient"}
        full.save_pretrained(paths["full"])
        model.save_pretrained(paths["efficient"])
        for length in lengths:
            inputs = random_inputs(full.config, length)
            calls = {"full": forward_call(full, inputs), "efficient": forward_call(model, inputs)}
            bar = f"{length} tokens" if progress else None
            figures = table_of(timed(calls, repeats, device=str(model.device), progress=bar), "full")
            rows.append(
                {
                    "length": length,
                    "full_seconds": figures["full"]["seconds"],
                    "efficient_seconds": figures["efficient"]["seconds"],
                    "time_ratio": figures["efficient"]["ratio"],
                }
            )
        points = [(path, length) for length in lengths for path in paths.values()]
        found = iter(peak_memory(points, "memory" if progress else None))
        for row in rows:
            row |= {"full_peak_mb": next(found), "efficient_peak_mb": next(found)}
    faster = [row["time_ratio"] < 1 for row in rows]
    crossover = next((row["length"] for i, row in enumerate(rows) if all(faster[i:])), None)
    return {"rows": rows, "crossover": crossover, "repeats": repeats, "hardware": hardware()}


# ---- memory ------------------------------------------------------------------------------------------------------


def peak_memory(points: Sequence[tuple[str | Path, int]], progress: str | None = None) -> list[float | None]:
    """Megabytes by which one forward pass of a saved checkpoint raises the resident memory of a fresh process.

    Args:
        points: (checkpoint, length) of each pass. progress: text of the bar; `None` = no bar.

    Returns:
        `None` for each where the operating system does not tell (anything but Linux).
    """
    return peaks(_checkpoint_peak, [(str(path), length) for path, length in points], progress)


def _checkpoint_peak(path: str, length: int) -> float:
    converted = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type.startswith(PREFIX)
    model: Any = load_converted(path) if converted else load_stock(path)[0]
    return _forward_peak(model, random_inputs(model.config, length))


def _forward_peak(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    # what is made once and kept is no part of a pass
    forward_call(model, {k: v[:, :16] for k, v in inputs.items()})(lambda: None)
    return growth_of(lambda: forward_call(model, inputs)(lambda: None))
