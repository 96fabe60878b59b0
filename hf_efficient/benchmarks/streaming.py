"""A checkpoint converted with its weights on the disk and in memory: peaks, interruptions, and whether the files are equal.

    hf-efficient bench streaming --out streaming.json

A Llama with random weights in bfloat16, in several files, to Longformer. The first run is killed when a third of the result
is written, the second at two thirds, the third ends. Every run is a process of its own; needs three times the checkpoint on
the disk, and the checkpoint in memory.
"""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.json_files import read_json

SIZES: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_key_value_heads=16
)
CONVERT = """
import sys, time
from hf_efficient.conversion import convert
from hf_efficient.profiling.json_files import write_json
from hf_efficient.profiling.memory import growth_of, peak_memory
source, out, streaming = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
def run():
    convert(source, "longformer", attention_window=512, streaming=streaming).save(out, max_shard_size=sys.argv[4])
start = time.perf_counter()
growth = growth_of(run)
figures = {"growth_mb": growth, "seconds": time.perf_counter() - start, **peak_memory()}
write_json(out + ".json", figures)
"""


def streaming_suite(gigabytes: float = 3.0, shards: int = 10) -> dict[str, Any]:
    """Peak memory and time of both ways for a checkpoint of this size in so many files, and whether all files are equal."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        source, shard = Path(folder, "source"), f"{int(gigabytes * 1000 / shards)}MB"
        layers = _write_checkpoint(source, gigabytes, shard)
        outs = {way: Path(folder, way, "out") for way in ("disk", "memory")}
        total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        kills = [_killed_at(share * total, source, outs["disk"], shard) for share in (1 / 3, 2 / 3)]
        rows = []
        for way, out in outs.items():
            process = _start(source, out, way == "disk", shard)
            errors = process.communicate()[1]
            if process.returncode:
                raise RuntimeError(f"the conversion failed: {errors[-2000:]}")
            rows.append({"weights": way, **read_json(f"{out}.json")})
        names = sorted(file.name for file in outs["memory"].iterdir())
        same = sorted(file.name for file in outs["disk"].iterdir()) == names
        _, unequal, missing = filecmp.cmpfiles(outs["disk"], outs["memory"], names, shallow=False)
        files = len(list(source.glob("*.safetensors")))
    settings = {"gigabytes": total / 1e9, "files": files, "layers": layers, **SIZES, "dtype": "bfloat16"}
    equal = same and not unequal and not missing
    found = {"killed_at_bytes": kills, "files_compared": len(names), "all_files_equal": equal}
    return {"suite": "streaming", "settings": settings, "results": rows, **found} | {
        "hardware": hardware(),
        "versions": versions(),
    }


def _write_checkpoint(folder: Path, gigabytes: float, shard: str) -> int:
    """A random checkpoint of at least this size; returns its number of layers."""
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    of_layer = 2 * (4 * hidden**2 + 3 * hidden * inner)
    layers = -int(-(gigabytes * 1e9 - 4 * hidden * SIZES["vocab_size"]) // of_layer)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, dtype=torch.bfloat16)
    LlamaForCausalLM._from_config(config).save_pretrained(folder, max_shard_size=shard)
    return layers


def _start(source: Path, out: Path, on_disk: bool, shard: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CONVERT, str(source), str(out), str(on_disk), shard]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _killed_at(size: float, source: Path, out: Path, shard: str) -> int:
    """Kill a conversion once this many bytes of its result are written; returns how many were."""
    process = _start(source, out, True, shard)
    while process.poll() is None:
        files = list(out.parent.glob(f".{out.name}.partial/*.safetensors"))
        written = sum(file.stat().st_size for file in files)
        if written >= size:
            process.kill()
            process.communicate()
            return written
        time.sleep(0.02)
    raise RuntimeError(f"the conversion ended before it was to be killed: {process.communicate()[1][-2000:]}")


def streaming_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people."""
    rows = [
        [r["weights"], f"{r['growth_mb']:.0f}", f"{r['peak_memory_mb']:.0f}", f"{r['seconds']:.0f}"]
        for r in document["results"]
    ]
    return ["weights", "MB more than after the imports", "peak of the process, MB", "seconds"], rows
