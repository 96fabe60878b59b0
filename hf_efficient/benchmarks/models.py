"""Time and peak memory of converted models against full attention: interleaved, as ratios, with the hardware recorded."""

from __future__ import annotations

import copy
import importlib
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig

from .base import attention_configs, get_mechanism, list_mechanisms
from .conversion import convert_in_place, load_converted, load_stock, versions
from .families import PREFIX, family_of
from .memory import growth_of, peaks
from .patching import plan

BASE_WIDTH = 768
# options of the encoder benchmark; what transformers' own classes are compared at
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "local, window 512": ("local", dict(attention_window=512)),
    "longformer, window 512": ("longformer", dict(attention_window=512)),
    "longformer, window 512, first token global": ("longformer", dict(attention_window=512, global_tokens="first")),
    "bigbird, block 64": ("bigbird", dict(block_size=64)),
    "linformer, rank 256": ("linformer", dict(rank=256)),
    "performer, 256 features": ("performer", dict(num_features=256)),
}


def hardware() -> dict[str, Any]:
    """What a time depends on beside versions: processor, threads, accelerator."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


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


def random_inputs(config: Any, length: int) -> dict[str, torch.Tensor]:
    """One row of random tokens; encoder-decoder models get 16 decoder tokens."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(5, config.vocab_size, (1, length), generator=generator)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :16]
    return inputs


def forward_call(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A forward pass without gradients and without a cache, to be timed."""

    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def call() -> None:
        with torch.no_grad():
            model(**inputs, **options)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    return call


def compare_with_full_attention(
    model: Any, source: Any, lengths: Sequence[int], repeats: int = 3, progress: bool = False
) -> dict[str, Any]:
    """Time and peak memory of `model` and of `source` with full SDPA attention, batch 1, over lengths.

    Returns:
        {"rows": one dict per length, "crossover": the first length from which on `model` is faster, or None}.
    """
    full = copy.deepcopy(source)
    family = family_of(full)
    limit = family.max_positions(full.config)
    rows: list[dict[str, Any]] = []
    available = family.max_positions(model.config)
    lengths = [length for length in lengths if available is None or length <= available]
    if limit is not None and max(lengths, default=0) > limit:
        family.resize_positions(full, max(lengths))
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"full": f"{scratch}/full", "efficient": f"{scratch}/efficient"}
        full.save_pretrained(paths["full"])
        model.save_pretrained(paths["efficient"])
        for length in lengths:
            inputs = random_inputs(full.config, length)
            calls = {"full": forward_call(full, inputs), "efficient": forward_call(model, inputs)}
            figures = ratios(interleaved(calls, repeats, f"{length} tokens" if progress else None), "full")
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
    converted = AutoConfig.from_pretrained(path).model_type.startswith(PREFIX)
    model: Any = load_converted(path) if converted else load_stock(path)[0]
    return _forward_peak(model, random_inputs(model.config, length))


def _wide_peak(model_type: str, attention: dict[str, Any], length: int, side: str) -> float:
    return _forward_peak(*wide_model(model_type, attention, length, side))


def _forward_peak(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    # what is made once and kept is no part of a pass
    forward_call(model, {k: v[:, :16] for k, v in inputs.items()})()
    return growth_of(forward_call(model, inputs))


# ---- suites ------------------------------------------------------------------------------------------------------


def wide_model(
    model_type: str, attention: dict[str, Any] | None, length: int, side: str, layers: int = 2
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random model of BERT-base width for `length` tokens, without a head, and its inputs.

    `side="decoder"` of T5 puts the long input on the decoder, with 16 encoder tokens.
    """
    transformers = importlib.import_module("transformers")
    family = family_of(model_type)
    torch.manual_seed(0)
    if model_type.endswith("t5"):
        stock = getattr(family.modeling, family.stack_class.replace("Stack", "Model"))
        sizes: dict[str, Any] = dict(d_model=BASE_WIDTH, d_kv=64, d_ff=3072, num_layers=layers, num_heads=12)
    elif model_type == "gpt2":
        stock, sizes = transformers.GPT2Model, dict(n_layer=layers, n_positions=length)
    else:
        stock = getattr(family.modeling, family.stack_class)
        offset = 0 if model_type == "bert" else 2
        sizes = dict(num_hidden_layers=layers, max_position_embeddings=length + offset)
    model = stock(stock.config_class(vocab_size=1000, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)).eval()
    if attention is not None:
        convert_in_place(model, attention_configs([attention]))
    inputs = random_inputs(model.config, length)
    if side == "decoder" and model.config.is_encoder_decoder:
        inputs = {"input_ids": inputs["input_ids"][:, :16], "decoder_input_ids": inputs["input_ids"]}
    return model, inputs


def encoder_suite(lengths: Sequence[int] = (1024, 4096), repeats: int = 5, progress: bool = True) -> dict[str, Any]:
    """Two-layer encoders of BERT-base width, batch 1, fp32: ours against full SDPA and transformers' own classes."""
    transformers = importlib.import_module("transformers")
    results = {}
    for length in lengths:
        models: dict[str, Any] = {"full attention (SDPA)": wide_model("bert", None, length, "encoder")[0]}
        for name, (mechanism, options) in CONTENDERS.items():
            spec = {"mechanism": mechanism, **options}
            models[name] = wide_model("bert", spec, length, "encoder")[0]
        sizes = dict(vocab_size=1000, num_hidden_layers=2)
        models["transformers LongformerModel, window 512"] = transformers.LongformerModel(
            transformers.LongformerConfig(attention_window=512, max_position_embeddings=length + 2, **sizes)
        ).eval()
        models["transformers BigBirdModel, block 64"] = transformers.BigBirdModel(
            transformers.BigBirdConfig(max_position_embeddings=length, **sizes)
        ).eval()
        inputs = random_inputs(models["full attention (SDPA)"].config, length)
        calls = {name: forward_call(model, inputs) for name, model in models.items()}
        seconds = interleaved(calls, repeats, f"{length} tokens" if progress else None)
        table = ratios(seconds, "full attention (SDPA)")
        against = ratios(seconds, "transformers LongformerModel, window 512")
        for name, row in table.items():
            row["ratio_to_transformers_longformer"] = against[name]["ratio"]
        results[str(length)] = table
    settings = {"layers": 2, "hidden_size": BASE_WIDTH, "batch": 1, "dtype": "float32", "repeats": repeats, "seed": 0}
    return {
        "suite": "encoder",
        "settings": settings,
        "results": results,
        "hardware": hardware(),
        "versions": versions(),
    }


def supported_pairs() -> list[tuple[str, str, str]]:
    """(mechanism, model type, side) of all that is not refused and not of n² memory, with the options of `memory_suite`."""
    pairs = []
    for model_type, side in (
        ("bert", "encoder"),
        ("roberta", "encoder"),
        ("gpt2", "decoder"),
        ("t5", "encoder"),
        ("t5", "decoder"),
    ):
        model = wide_model(model_type, None, 16, side)[0]
        for mechanism in list_mechanisms():
            if get_mechanism(mechanism).facts.memory == "n²":
                continue  # by definition: nothing to be shown, and more than machines have
            config = get_mechanism(mechanism).Config.from_dict(_memory_options(mechanism, side, 16))
            try:
                plan(model, [config])
            except ValueError:
                continue
            pairs.append((mechanism, model_type, side))
    return pairs


def _memory_options(mechanism: str, side: str, length: int) -> dict[str, Any]:
    lengths = {"rank": min(256, length), "max_length": length} if mechanism == "linformer" else {}
    return {"side": side, **lengths}


def memory_suite(lengths: Sequence[int] = (8192, 16384), progress: bool = True) -> dict[str, Any]:
    """Peak memory of one forward pass of two layers of BERT-base width, for every supported pair, and its growth."""
    pairs = supported_pairs()
    entries = [
        (model_type, {"mechanism": mechanism, **_memory_options(mechanism, side, length)}, length, side)
        for mechanism, model_type, side in pairs
        for length in lengths
    ]
    found = iter(peaks(_wide_peak, entries, "memory" if progress else None))
    results = []
    for mechanism, model_type, side in pairs:
        row: dict[str, Any] = {"mechanism": mechanism, "model_type": model_type, "side": side}
        row |= {f"peak_mb_{length}": next(found) for length in lengths}
        row["growth"] = row[f"peak_mb_{lengths[-1]}"] / row[f"peak_mb_{lengths[0]}"]
        results.append(row)
    settings = {
        "layers": 2,
        "hidden_size": BASE_WIDTH,
        "batch": 1,
        "dtype": "float32",
        "lengths": list(lengths),
        "seed": 0,
    }
    return {
        "suite": "memory",
        "settings": settings,
        "results": results,
        "hardware": hardware(),
        "versions": versions(),
    }


def _elsewhere(suite: str) -> Any:
    """The module of a suite that has one of its own."""
    return importlib.import_module(f".benchmark_{suite}", __package__)


def _run_elsewhere(suite: str, **options: Any) -> dict[str, Any]:
    return getattr(_elsewhere(suite), f"{suite}_suite")(**options)


def as_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of a suite's results, for people."""
    if document["suite"] in OWN_MODULE:
        return _elsewhere(document["suite"]).as_rows(document)
    results = document["results"]
    if document["suite"] == "memory":
        flat = results
    else:
        flat = [{"model": name, "tokens": n} | row for n, table in results.items() for name, row in table.items()]
    rows = [[round(v, 3) if isinstance(v, float) else v for v in row.values()] for row in flat]
    return list(flat[0]), rows


OWN_MODULE = ("attention", "content", "fidelity", "gpu", "linear", "recovery")
SUITES: dict[str, Callable[..., dict[str, Any]]] = {
    "encoder": encoder_suite,
    "memory": memory_suite,
    **{suite: partial(_run_elsewhere, suite) for suite in OWN_MODULE},
}
