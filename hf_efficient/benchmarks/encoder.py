"""Speed of whole encoders over length: full attention, ours, transformers' own classes, and the floor without attention.

    hf-efficient bench encoder --out encoder.json     # draws encoder.png beside it

Two layers of BERT-base width with random weights, one row of random tokens without padding, float32, one thread. All run in
turn, round by round, after a round that warms up, so that ratios compare neighbours in time. Equal for all: width, layers,
feed-forward layers, tokens, window and block sizes. Training is forward, backward and one step of AdamW.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_efficient.benchmarks.attention import without_attention
from hf_efficient.benchmarks.models import BASE_WIDTH, wide_model
from hf_efficient.profiling.environment import hardware, one_thread, versions
from hf_efficient.profiling.forward import forward_call, random_inputs
from hf_efficient.profiling.timing import Mark, table_of, timed

FULL, FLOOR = "full attention (SDPA)", "no attention"
WINDOW, BLOCK = 512, 64
CONVERTED: dict[str, tuple[str, dict[str, Any]]] = {
    f"local, window {WINDOW}": ("local", dict(attention_window=WINDOW)),
    f"longformer, window {WINDOW}, first token global": (
        "longformer",
        dict(attention_window=WINDOW, global_tokens="first"),
    ),
    f"bigbird, block {BLOCK}": ("bigbird", dict(block_size=BLOCK)),
    "linformer, rank 256": ("linformer", dict(rank=256)),
    "performer": ("performer", {}),
}
LONGFORMER, BIGBIRD = f"transformers Longformer, window {WINDOW}", f"transformers BigBird, block {BLOCK}"
# transformers' BigBird computes full attention up to this length, and at every length afterwards
FULL_UP_TO = (5 + 2 * 3) * BLOCK
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def models_at(length: int) -> dict[str, Any]:
    """{name: model} of all that is compared at a length."""
    transformers = importlib.import_module("transformers")
    models = {FULL: wide_model("bert", None, length, "encoder")[0]}
    models[FLOOR] = without_attention(wide_model("bert", {"mechanism": "local"}, length, "encoder")[0])
    for name, (mechanism, options) in CONVERTED.items():
        own = options | ({"rank": min(256, length)} if mechanism == "linformer" else {})
        models[name] = wide_model("bert", {"mechanism": mechanism, **own}, length, "encoder")[0]
    sizes = dict(vocab_size=1000, num_hidden_layers=2)
    models[LONGFORMER] = transformers.LongformerModel(
        transformers.LongformerConfig(attention_window=WINDOW, max_position_embeddings=length + 2, **sizes)
    ).eval()
    if length > FULL_UP_TO:
        models[BIGBIRD] = transformers.BigBirdModel(
            transformers.BigBirdConfig(block_size=BLOCK, max_position_embeddings=length, **sizes)
        ).eval()
    return models


def training_call(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[Mark], None]:
    """One training step, to be timed: forward, backward, a step of AdamW."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def call(mark: Mark) -> None:
        loss = model(**inputs)[0].square().mean()
        mark()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return call


def encoder_suite(
    lengths: Sequence[int] = LENGTHS, rounds: int = 7, seconds: float = 90.0, progress: bool = True
) -> dict[str, Any]:
    """Time of one forward pass and of one training step at each length.

    Args:
        rounds, seconds: of one length and pass: so many rounds, or fewer once these seconds are used.
    """
    results = []
    for length in lengths:
        models = models_at(length)
        inputs = random_inputs(models[FULL].config, length)
        for kind, made in (("forward", forward_call), ("training", training_call)):
            # in evaluation mode all the same: dropout would be drawn in another way by each
            calls = {name: made(model, inputs) for name, model in models.items()}
            with one_thread():
                times = timed(calls, rounds, seconds, progress=f"{length} tokens, {kind}" if progress else None)
            against = table_of(times, LONGFORMER)
            for name, row in table_of(times, FULL).items():
                results.append(
                    {"model": name, "tokens": length, "pass": kind, "rounds": len(times[name]), **row}
                    | {"tokens_per_second": length / row["seconds"]}
                    | {"ratio_to_transformers_longformer": against[name]["ratio"]}
                )
    settings = {"layers": 2, "hidden_size": BASE_WIDTH, "batch": 1, "dtype": "float32", "dropout": 0.0, "seed": 0}
    return {
        "suite": "encoder",
        "settings": settings | {"threads": 1, "rounds": rounds, "seconds": seconds},
        "results": results,
        "hardware": hardware(),
        "versions": versions(),
    }


def encoder_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people: ratios to full attention by length."""
    results = document["results"]
    lengths = list(dict.fromkeys(row["tokens"] for row in results))
    rows = []
    for kind, name in dict.fromkeys((row["pass"], row["model"]) for row in results):
        found = {row["tokens"]: row for row in results if (row["pass"], row["model"]) == (kind, name)}
        rows.append([name, kind, *(f"{found[n]['ratio']:.2f}" if n in found else "–" for n in lengths)])
    return ["time ÷ full attention", "pass", *map(str, lengths)], rows
