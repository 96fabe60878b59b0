"""What chooses keys by content or carries a memory, over length, beside full attention and transformers' Reformer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.benchmarks.baselines import Attention, MechanismAttention, Point
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.timing import Mark, attempt, ratios, timed

LENGTHS = (1024, 4096, 16384)
HEADS, WIDTH = 4, 64
QUERIES = 8  # for which the keys that reach them are counted
ENCODERS: dict[str, dict[str, Any]] = {
    "reformer": dict(num_buckets=16, bucket_size=64, num_hashes=4, num_chunks_before=1, attention_window=0),
    "routing_transformer": dict(attention_window=64),
    "sinkhorn": dict(block_size=64, num_sorted_blocks=2),
    "clustered": dict(num_clusters=64, top_k=32),
}
DECODERS: dict[str, dict[str, Any]] = {
    **{name: ENCODERS[name] for name in ("reformer", "routing_transformer", "sinkhorn")},
    "transformer_xl": dict(segment_length=128, memory_length=384),
    "compressive": dict(segment_length=128, memory_length=256, compressed_memory_length=128, compression_rate=4),
}
FULL, REFORMER = "full (SDPA)", "transformers Reformer"


def options_at(name: str, length: int, is_causal: bool) -> dict[str, Any]:
    """Options of a mechanism at a length: routing has k clusters of w tokens, k · w = N and k about √N, as in its paper."""
    options = (DECODERS if is_causal else ENCODERS)[name]
    if name == "routing_transformer":
        clusters = 1 << (length.bit_length() - 1) // 2
        options = options | {"num_clusters": clusters, "cluster_size": length // clusters}
    return options


class TransformersReformer:
    """`LSHSelfAttention` with the options of `reformer` here; its query is its key, too."""

    def __init__(self, point: Point, is_causal: bool):
        from transformers import ReformerConfig
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention

        options = ENCODERS["reformer"]
        config = ReformerConfig(
            hidden_size=point.heads * point.width,
            num_attention_heads=point.heads,
            attention_head_size=point.width,
            lsh_attn_chunk_length=options["bucket_size"],
            num_hashes=options["num_hashes"],
            num_buckets=options["num_buckets"],
            lsh_num_chunks_before=options["num_chunks_before"],
            lsh_attention_probs_dropout_prob=0.0,
            hash_seed=0,
            is_decoder=is_causal,
        )
        self.module, self.point = LSHSelfAttention(config, layer_idx=0).to(point.device, point.kind).eval(), point
        # the halves of what comes in stand for its two projections
        inner = point.heads * point.width
        self.module.query_key = _Half(slice(0, inner))  # type: ignore[assignment]
        self.module.value = _Half(slice(inner, 2 * inner))  # type: ignore[assignment]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given = torch.cat([x.transpose(1, 2).flatten(2) for x in (query, value)], dim=-1)
        out: Tensor = self.module(given)[0]
        return out.unflatten(-1, (self.point.heads, self.point.width)).transpose(1, 2)


class _Half(torch.nn.Module):
    def __init__(self, part: slice):
        super().__init__()
        self.part = part

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., self.part]


def methods(point: Point, is_causal: bool) -> dict[str, Attention]:
    """All that are compared at a point, by name; what can't be causal has no causal form."""
    ours = {
        name: MechanismAttention(name, point, is_causal=is_causal, **options_at(name, point.length, is_causal))
        for name in (DECODERS if is_causal else ENCODERS)
    }
    full = partial(F.scaled_dot_product_attention, is_causal=is_causal)
    return {FULL: full, REFORMER: TransformersReformer(point, is_causal), **ours}


def keys_read(attention: Attention, tensors: list[Tensor]) -> float:
    """Median number of values with a gradient from one output, of `QUERIES` queries from the first to the last."""
    query, key, value = tensors
    value = value.detach().requires_grad_()
    out = attention(query, key, value)
    counts = []
    for index in torch.linspace(0, query.shape[2] - 1, QUERIES).long().tolist():
        [gradient] = torch.autograd.grad(out[0, 0, index].sum(), value, retain_graph=True)
        counts.append(int(gradient[0, 0].any(-1).sum()))
    return statistics.median(counts)


def _facts(attention: Attention, tensors: list[Tensor]) -> dict[str, Any]:
    """What is equal or not between methods, beside their time."""
    with torch.no_grad(), LargestTensor() as recorder:
        attention(*tensors)
    found: dict[str, Any] = {"largest_tensor": recorder.numel, "keys_read": keys_read(attention, tensors)}
    # of mechanisms in which a query can be in no cluster
    coverage = getattr(getattr(attention, "module", None), "coverage", None)
    if coverage is not None and (of_queries := coverage(tensors[0][0], tensors[0].shape[2])):
        found["coverage"] = of_queries[0]
    return found


def content_suite(
    lengths: Sequence[int] = LENGTHS, rounds: int = 5, seconds: float = 240, progress: bool = True
) -> dict[str, Any]:
    """Forward, and forward with backward, of all methods in turn at each length; the largest tensor, and the keys read.

    Both Reformers have the same hashes, buckets, chunks and chunks looked back, and read as many keys in an encoder. Causal
    choices differ (see `ReformerAttention`), and so do other methods: each row says how many keys it read.

    Args:
        seconds: per length, side and pass, after which no further round begins.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: list[dict[str, Any]] = []
    for length in lengths:
        point = Point(length, heads=HEADS, width=WIDTH, device=device)
        *heads, gradient = point.tensors()
        for side, is_causal in (("encoder", False), ("decoder", True)):
            found = methods(point, is_causal)
            facts = {name: _facts(attention, heads) for name, attention in found.items()}
            for kind in ("forward", "training"):
                calls: dict[str, Callable[[Mark], None]] = {
                    name: attempt(attention, kind, [*heads, gradient]) for name, attention in found.items()
                }
                times = timed(calls, rounds, seconds, device, f"{side} {length}" if progress else None)
                for name, taken in times.items():
                    row: dict[str, Any] = {"contender": name, "side": side, "pass": kind, "length": length}
                    row["seconds"] = statistics.median(time.total for time in taken)
                    row |= {"rounds": len(taken), **facts[name]}
                    if name in ENCODERS | DECODERS:
                        row["options"] = options_at(name, length, is_causal)
                    row["faster_than"] = {
                        rival: ratios(times[rival], taken) for rival in (FULL, REFORMER) if rival != name
                    }
                    results.append(row)
    return {
        "suite": "content",
        "settings": {
            "heads": HEADS,
            "width": WIDTH,
            "batch": 1,
            "dtype": "float32",
            "device": device,
            "seed": 0,
        },
        "results": results,
        "hardware": hardware(),
        "versions": versions(),
    }


def content_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people."""
    speedups = [f"speed-up over {FULL}", f"over {REFORMER}"]
    header = ["method", "side", "pass", "tokens", "keys read", "ms", *speedups, "largest tensor"]
    rows = []
    for row in document["results"]:
        shares = [
            row["faster_than"][name]["ratio"] if name in row["faster_than"] else None for name in (FULL, REFORMER)
        ]
        cells = ["–" if ratio is None else round(ratio, 2) for ratio in shares]
        place = [row["contender"], row["side"], row["pass"], row["length"], round(row["keys_read"])]
        rows.append([*place, round(1000 * row["seconds"], 1), *cells, row["largest_tensor"]])
    return header, rows
