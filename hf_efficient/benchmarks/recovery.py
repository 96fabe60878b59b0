"""How much attention transfer recovers on a real checkpoint: all-MiniLM-L6-v2, before and after, on held-out text."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_efficient.conversion.convert import convert
from hf_efficient.conversion.loading import load_tokenizer
from hf_efficient.corpus import HUB_ID, minilm_checkpoint, offline_texts
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.training.distill import distill

LENGTH, TEXTS = 512, 16
FOLDER = Path("outputs/recovery")
STAGES = ("converted", "transferred", "trained", "control")
# mechanism, its options, and the settings of `distill`; a step of Linformer is cheap enough for twice the rows
RUNS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linformer", dict(rank=128), dict(steps=200, end_to_end_steps=100, batch_size=4)),
    ("hedgehog", dict(attention_window=64, sink_tokens=1), dict(steps=200, batch_size=2)),
    ("hedgehog", dict(attention_window=0), dict(steps=200, end_to_end_steps=100, batch_size=2)),
    ("t2r", dict(attention_window=0), dict(steps=200, end_to_end_steps=100, batch_size=2)),
    ("performer", dict(num_features=256), dict(steps=0, end_to_end_steps=300, batch_size=2)),
    ("linear_transformer", {}, dict(steps=200, batch_size=2)),
    ("random_feature", dict(num_features=64), dict(steps=200, batch_size=2)),
    ("nystromformer", dict(num_landmarks=64), dict(steps=200, batch_size=2)),
    ("memory_compressed", dict(compression_rate=8, block_size=64), dict(steps=200, batch_size=2)),
    ("set_transformer", dict(num_inducing=128), dict(steps=200, batch_size=2)),
    ("synthesizer", dict(variant="dense"), dict(steps=200, batch_size=2)),
    ("sinkhorn", dict(sortnet="bilinear"), dict(steps=200, batch_size=2)),
]


def held_out_texts(tokenizer: Any) -> list[str]:
    """The first held-out documents that fill all positions: the ones that untrained fidelity is measured on."""
    long = (text for text in offline_texts("held-out") if len(tokenizer(text, verbose=False)["input_ids"]) >= LENGTH)
    return [text for text, _ in zip(long, range(TEXTS), strict=False)]


def recovery_suite(progress: bool = True) -> dict[str, Any]:
    """Convert, transfer, measure; minutes per mechanism. Interrupted, it goes on where it was when called again.

    Every mechanism learns from the same training documents and is measured on the same held-out ones. With two stages
    "transferred" is after the first (only the mechanism's own parameters) and "trained" after the second (the
    attention projections too).
    """
    folder = minilm_checkpoint()
    tokenizer = load_tokenizer(str(folder), None)
    texts, held_out = offline_texts("train"), held_out_texts(tokenizer)
    results: dict[str, dict[str, Any]] = {}
    for number, (mechanism, options, settings) in enumerate(
        tqdm(RUNS, desc="recovery", disable=not progress, file=sys.stderr)
    ):
        converted = convert(str(folder), mechanism, **options)
        report = distill(
            converted.model,
            tokenizer,
            texts,
            output_dir=FOLDER / f"{number}-{mechanism}",
            held_out=held_out,
            resume=True,
            eval_texts=TEXTS,
            length=LENGTH,
            save_steps=50,
            **settings,
        )
        row = {stage: report["metrics"][stage] for stage in STAGES if stage in report["metrics"]}
        row |= {"layer_errors": report["layer_errors"], "seconds": report["training"]["seconds"], "settings": settings}
        results.setdefault(mechanism, {})[json.dumps(options)] = row
    shutil.rmtree(FOLDER)
    return {
        "suite": "recovery",
        "settings": {
            "checkpoint": HUB_ID,
            "texts": len(held_out),
            "length": LENGTH,
            "dtype": "float32",
            "seed": 0,
        },
        "results": results,
        "hardware": hardware(),
        "versions": versions(),
    }


def recovery_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people: embedding cosine and layer error stage by stage."""
    rows = []
    for mechanism, runs in document["results"].items():
        for options, run in runs.items():
            cosines = [round(run[stage]["embedding_cosine"], 3) if stage in run else "–" for stage in STAGES]
            errors = [
                round(sum(values) / len(values), 3)
                for stage in ("before", "after")
                for values in [run["layer_errors"][stage]["mechanism"]]
            ]
            rows.append([mechanism, options, *cosines, *errors, round(run["seconds"])])
    return ["mechanism", "options", *STAGES, "layer error before", "layer error after", "seconds"], rows
