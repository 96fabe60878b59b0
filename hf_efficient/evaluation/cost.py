"""Time and peak memory of a converted model next to full attention, over lengths."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.keys_shown import all_keys
from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.attention.base.registry import get_mechanism
from hf_efficient.conversion.loading import load_converted, load_stock
from hf_efficient.families import PREFIX, HostModel
from hf_efficient.patching.names import MODULE_NAME
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
                    "full_keys_per_query": mean_keys_per_query(full, length),
                    "efficient_keys_per_query": mean_keys_per_query(model, length),
                }
            )
        points = [(path, length) for length in lengths for path in paths.values()]
        found = iter(peak_memory(points, "memory" if progress else None))
        for row in rows:
            row |= {"full_peak_mb": next(found), "efficient_peak_mb": next(found)}
    faster = [row["time_ratio"] < 1 for row in rows]
    crossover = next((row["length"] for i, row in enumerate(rows) if all(faster[i:])), None)
    return {"rows": rows, "crossover": crossover, "repeats": repeats, "hardware": hardware()}


# ---- keys per query ----------------------------------------------------------------------------------------------

# settings are a choice among these, which are round, four to a doubling
SIZES = (2, 4, 6, *(step * 2**power for power in range(1, 20) for step in (4, 5, 6, 7)))


def keys_per_query(config: EfficientAttentionConfig | None, geometry: AttentionGeometry, length: int) -> float | None:
    """Keys, or what stands for them, that a query is compared with: see `EfficientAttentionConfig.keys_per_query`.

    Args:
        config: a mechanism's; `None` = the layer stays as the host has it.
        geometry: of the layer. length: tokens of a row without padding.

    Returns:
        `None` where the mechanism does not tell.
    """
    return all_keys(geometry, length) if config is None else config.keys_per_query(geometry, length)


def mean_keys_per_query(model: Any, length: int) -> float | None:
    """`keys_per_query`, the mean over the layers of a model, converted or not, of each stack that has converted ones.

    Returns:
        `None` where one of its mechanisms does not tell.
    """
    host = HostModel.of(model)
    installed = {layer: getattr(layer.module, MODULE_NAME, None) for stack in host.stacks for layer in stack.layers}
    stacks = [stack for stack in host.stacks if any(installed[layer] for layer in stack.layers)] or host.stacks
    found = []
    for stack in stacks:
        for layer in stack.layers:
            own = installed[layer]
            geometry = host.family.geometry(stack, layer) if own is None else own.geometry
            found.append(keys_per_query(None if own is None else own.config, geometry, length))
    return None if None in found else sum(keys for keys in found if keys is not None) / len(found)


def setting_near(
    mechanism: str, geometry: AttentionGeometry, length: int, keys: float
) -> EfficientAttentionConfig | None:
    """The setting of a mechanism whose keys per query, in rows of `length` tokens, are nearest to `keys` by their ratio.

    Other options keep their defaults. A mechanism whose cost no option changes has one setting. `None` where a layer of this
    geometry can't have the mechanism with any of them, or the mechanism does not tell what it costs.
    """
    cls = get_mechanism(mechanism)
    found: dict[EfficientAttentionConfig, float] = {}
    for size in SIZES:
        if not keys / 3 <= size <= 3 * keys:
            continue
        try:
            config = cls.Config.of_size(size, geometry, length)
        except ValueError:
            continue
        if config in found or cls.unsupported(config, geometry):
            continue
        seen = config.keys_per_query(geometry, length)
        if seen is None:
            return None
        found[config] = abs(math.log(seen / keys))
    # of equal ones the larger
    return min(reversed(found), key=found.__getitem__, default=None)


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
