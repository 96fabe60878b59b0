"""How much is lost with 0, 1, … all layers exact, by several rules of which layers: on a real checkpoint, recorded.

python -m hf_efficient.benchmarks.hybrids "microformer-mgm" 512 --window 64 --out hybrids-mgm-512.json
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_efficient.advice.bench import CHOOSE, CONFIRM, Bench, lengthened, score
from hf_efficient.advice.candidates import Candidate
from hf_efficient.advice.hybrid import by_loss_alone, evenly_spaced, exact_sets, greedy
from hf_efficient.advice.losses import Passes, loss_of
from hf_efficient.advice.material import longest
from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.benchmarks.checkpoints import CHECKPOINTS
from hf_efficient.corpus import HUB_ID
from hf_efficient.families import HostModel
from hf_efficient.patching.temporary import patch_attention
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.json_files import write_json
from hf_efficient.training.transfer.layer_errors import layer_errors

TEXTS = 3


def hybrid_curves(
    bench: Bench, config: EfficientAttentionConfig, layers: Sequence[int], embeds: bool
) -> dict[str, Any]:
    """{rule: {"order": layers in the order in which they become exact, "loss": with 0, 1, … all of them exact}}.

    Orders are found on the texts to choose by, losses are of the others. Evenly spaced layers have no order.
    """
    parts = {part: len(texts) for part, texts in bench.texts.items()}

    def loss(converted: Collection[int], part: str = CHOOSE) -> float:
        if not converted:
            return 0.0
        row = bench.measure(
            Candidate((dataclasses.replace(config, layers=tuple(sorted(converted))),)), part, parts[part]
        )
        found = score(row, part, loss_of(row[part]["figures"][0], embeds))
        assert found is not None, row
        return found.mean()

    with patch_attention(bench.passes.model, dataclasses.replace(config, layers=tuple(layers))):
        errors = layer_errors(bench.passes.model, bench.texts[CHOOSE])["mechanism"]
    largest_error = [layer for _, layer in sorted(zip(errors, layers, strict=True), reverse=True)]
    orders = {
        "by loss alone": by_loss_alone(layers, loss),
        "greedy": greedy(layers, loss),
        "by layer error": largest_error,
        "first layers": list(layers),
        "last layers": list(layers)[::-1],
    }
    curves: dict[str, Any] = {}
    for rule, order in orders.items():
        curves[rule] = {"order": order, "loss": [loss(set(layers) - exact, CONFIRM) for exact in exact_sets(order)]}
    even = [evenly_spaced(layers, count) for count in range(len(layers) + 1)]
    curves["evenly spaced"] = {"order": None, "loss": [loss(set(layers) - exact, CONFIRM) for exact in even]}
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description="Record what is lost by the number of exact layers.")
    parser.add_argument("checkpoint", choices=list(CHECKPOINTS))
    parser.add_argument("length", type=int)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = CHECKPOINTS[given.checkpoint]
    model = checkpoint.load()
    host = HostModel.of(model)
    config = attention_config("local", attention_window=given.window, sink_tokens=1)
    with torch.no_grad(), lengthened(host, given.length, None):
        rows = checkpoint.rows(model, given.length, 2 * TEXTS)
        texts = {CHOOSE: rows[:TEXTS], CONFIRM: rows[TEXTS:]}
        bench = Bench(Passes(model, checkpoint.ignored_tokens), longest(rows), texts, {})
        layers = [layer.index for layer in host.stacks[0].layers]
        curves = hybrid_curves(bench, config, layers, given.checkpoint == HUB_ID)
    facts = {"suite": "hybrids", "checkpoint": given.checkpoint, "source": checkpoint.source, "length": given.length}
    facts |= {"attention": config.to_dict(), "texts": TEXTS, "passes": bench.passed}
    write_json(given.out, facts | {"curves": curves, "hardware": hardware(), "versions": versions()})


if __name__ == "__main__":
    main()
