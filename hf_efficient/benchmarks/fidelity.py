"""How close every mechanism stays, untrained, on a real checkpoint: all-MiniLM-L6-v2 on held-out text."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from hf_efficient.attention.base.registry import attention_configs, get_mechanism
from hf_efficient.benchmarks.fidelity_by_length import by_length_rows, fidelity_by_length
from hf_efficient.conversion.calibrate import calibrate, calibration_batches
from hf_efficient.conversion.loading import load_stock
from hf_efficient.corpus import HUB_ID, minilm_checkpoint, offline_texts
from hf_efficient.evaluation.controls import control_figures
from hf_efficient.evaluation.fidelity import compare
from hf_efficient.families import HostModel
from hf_efficient.models.in_place import convert_in_place
from hf_efficient.profiling.environment import hardware, versions

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *(("local", dict(attention_window=w)) for w in (128, 256, 512)),
    *(("longformer", dict(attention_window=w, global_tokens="first")) for w in (128, 256, 512)),
    *(("bigbird", dict(block_size=b)) for b in (16, 32, 64)),
    *(("etc", dict(attention_window=w)) for w in (128, 256)),
    *(("longt5", dict(attention_window=128, global_block_size=16, log_count=b)) for b in (True, False)),
    *(("sparse_transformer", dict(stride=stride)) for stride in (32, 64)),
    ("sparse_transformer", dict(pattern="fixed", stride=64, summary_size=8)),
    *(("axial", dict(row_length=c)) for c in (32, 64)),
    *(("blockwise", dict(block_size=b)) for b in (128, 256)),
    *(("image_local", dict(block_size=b, memory_size=b)) for b in (64, 128)),
    *(("linformer", dict(rank=r)) for r in (64, 128, 256)),
    ("linformer", dict(rank=128, projection="max")),
    *(("set_transformer", dict(num_inducing=m)) for m in (64, 128)),
    *(("memory_compressed", dict(compression_rate=c, block_size=b)) for c, b in ((4, 64), (8, 64), (4, 256))),
    *(
        ("synthesizer", dict(variant=v))
        for v in ("dense", "random", "factorized_dense", "factorized_random", "mixture")
    ),
    *(("funnel", options) for options in ({}, dict(blocks=(2, 2)))),
    *(("nystromformer", dict(num_landmarks=n)) for n in (64, 128)),
    *(("performer", dict(num_features=m)) for m in (64, 256, 1024)),
    ("performer", dict(num_features=256, kernel="relu")),
    ("linear_transformer", {}),
    ("cosformer", {}),
    *(("random_feature", dict(num_features=m)) for m in (64, 256)),
    *((name, dict(attention_window=w)) for name in ("hedgehog", "t2r") for w in (64, 0)),
    *((name, dict(attention_window=64, sink_tokens=1)) for name in ("local", "hedgehog", "t2r")),
    *(("reformer", dict(num_hashes=r, attention_window=w)) for r, w in ((1, 0), (4, 0), (4, 128))),
    ("reformer", dict(num_hashes=4, attention_window=0, shared_qk=True)),
    *(("routing_transformer", dict(num_clusters=8, cluster_size=w)) for w in (64, 128)),
    *(("sinkhorn", dict(block_size=64, num_sorted_blocks=c)) for c in (0, 1, 2, 4)),
    *(("clustered", dict(num_clusters=c, top_k=k)) for c, k in ((64, 0), (128, 0), (64, 32))),
]
# training documents that mechanisms with constants from data see
CALIBRATION_TEXTS = 16


def fidelity_suite(
    lengths: Sequence[int] | None = None, texts: int = 16, length: int = 512, progress: bool = True
) -> dict[str, Any]:
    """all-MiniLM-L6-v2 with every layer replaced and nothing trained, on held-out text that fills its positions.

    Args:
        lengths: instead, `fidelity_by_length`: several checkpoints, each at these lengths.
    """
    if lengths is not None:
        return fidelity_by_length(lengths, progress=progress)
    folder = minilm_checkpoint()
    source, tokenizer = load_stock(str(folder))[0], AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    encoded = (tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in offline_texts("held-out"))
    full = [ids for ids in encoded if len(ids) == length][:texts]
    batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, length).long()} for ids in full]
    known = offline_texts("train")[:CALIBRATION_TEXTS]
    results: dict[str, dict[str, Any]] = {mechanism: {} for mechanism, _ in SETTINGS}
    model: Any = None
    for mechanism, options in tqdm(SETTINGS, desc="fidelity", disable=not progress, file=sys.stderr):
        model = load_stock(str(folder))[0]
        convert_in_place(HostModel.of(model), attention_configs(mechanism, **options))
        if hasattr(get_mechanism(mechanism), "calibrate"):
            calibrate(model, calibration_batches(known, tokenizer, model, length))
        results[mechanism][json.dumps(options)] = compare(model, source, batches)
    settings = {"checkpoint": HUB_ID, "texts": len(full), "length": length, "dtype": "float32", "seed": 0}
    settings["calibration_texts"] = len(known)
    return {
        "suite": "fidelity",
        "settings": settings,
        "results": results,
        "control": control_figures(model, source, batches),
        "hardware": hardware(),
        "versions": versions(),
    }


def fidelity_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people, the control last; by length the control comes first."""
    if "rows" in document:
        return by_length_rows(document)
    results = document["results"]
    named = {(name, options): row for name, settings in results.items() for options, row in settings.items()}
    named[("control", "mean of values")] = document["control"]
    shown = [name for name, value in document["control"].items() if isinstance(value, float)]
    rows = [[*place, *(round(row[name], 3) for name in shown)] for place, row in named.items()]
    return ["mechanism", "options", *shown], rows
