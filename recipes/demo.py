"""The main job on a real checkpoint: convert all-MiniLM-L6-v2 from 512 to 4096 tokens, prove it, and use it.

    make demo                      # or: python recipes/demo.py [--output demo-output]

Takes the checkpoint from the Hub or from the installed package, English text from what every Python has, and prints:
where each tensor came from, every check of `verify`, the time over lengths, and retrieval over documents four times as long
as the original reads. The converted checkpoint is saved; one picture and one JSON file hold everything that was printed.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoTokenizer

import hf_efficient as he
from hf_efficient.conversion.loading import load_stock
from hf_efficient.corpus import minilm_checkpoint, offline_documents
from hf_efficient.evaluation.controls import control_figures
from hf_efficient.evaluation.fidelity import compare, mean_pool
from hf_efficient.families import HostModel
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.forward import forward_call, random_inputs
from hf_efficient.profiling.json_files import write_json
from hf_efficient.profiling.timing import table_of, timed

# ---- settings ----
MAX_POSITIONS = 4096
MECHANISMS = {
    "longformer 512, first global": ("longformer", dict(attention_window=512, global_tokens="first")),
    "bigbird, block 64": ("bigbird", dict(block_size=64)),
}
FIDELITY_TEXTS, FIDELITY_LENGTH = 8, 512
DOCUMENTS, DOCUMENT_LENGTH, PASSAGE = 20, 2048, 40
SPEED_LENGTHS, SPEED_REPEATS = (512, 1024, 2048, 4096), 2
SEED = 0

console = Console(width=80, record=True, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.captureWarnings(True)
    began = time.perf_counter()

    folder = minilm_checkpoint()
    source, tokenizer = load_stock(str(folder))[0], AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    console.print(
        f"[bold]1. Convert[/] all-MiniLM-L6-v2, {source.num_parameters() / 1e6:.1f}M parameters, from 512 to "
        f"{MAX_POSITIONS} positions. Tensors:"
    )
    results = {name: he.convert(str(folder), mechanism, max_positions=MAX_POSITIONS, **options)
               for name, (mechanism, options) in MECHANISMS.items()}  # fmt: skip
    for name, result in results.items():
        counts = ", ".join(f"{n} {status}" for status, n in result.report.counts().items() if n)
        console.print(f"   to {name}: {counts}")
    name, result = next(iter(results.items()))
    path = result.save(output / "longformer-minilm-4096", overwrite=True)

    tokens = {name: tokenizer(text, truncation=True, max_length=DOCUMENT_LENGTH)["input_ids"]
              for name, text in offline_documents().items()}  # fmt: skip
    figures = {"first_steps": first_steps(path, folder, result), "fidelity": show_fidelity(source, results, tokens)}
    figures["speed"] = show_speed(folder)
    figures["retrieval"] = show_retrieval(source, results, tokens)
    draw(figures, output / "demo.png")

    settings = {"seed": SEED, "hardware": hardware(), "versions": versions(), "seconds": time.perf_counter() - began}
    write_json(output / "demo.json", figures | settings)
    console.print("[bold]5. Next[/]")
    for step in ("hf-efficient inspect " + str(path), "hf-efficient show longformer --length 1024",
                 f"python recipes/embed.py --model {path} --output-dir embed"):  # fmt: skip
        console.print(f"   {step}", soft_wrap=True)
    console.print(f"\npicture: {output / 'demo.png'}   figures: {output / 'demo.json'}")
    console.print(f"{settings['seconds']:.0f} s on {torch.get_num_threads()} threads")
    (output / "demo.txt").write_text(console.export_text())


def first_steps(path: Path, folder: Path, result) -> dict:
    """The checks of `verify` on the saved checkpoint; ends the demo if one fails."""
    proof = he.verify(path, folder, None, max_length=FIDELITY_LENGTH, progress=False)
    said = proof.statements()
    console.print(f"\n[bold]2. How close?[/] verify: integrity and correctness {said['integrity and correctness']};")
    console.print(f"   weights {said['weights']}.")
    if not proof.passed:
        sys.exit(f"the converted checkpoint is not right:\n{proof}")
    return {"report": str(result.report), "proof": str(proof)}


def batches(tokens: dict[str, list[int]]) -> list[dict[str, torch.Tensor]]:
    """The first texts that fill the source's 512 positions, one per batch."""
    long = [ids for ids in tokens.values() if len(ids) >= FIDELITY_LENGTH][:FIDELITY_TEXTS]
    return [{"input_ids": torch.tensor([ids[:FIDELITY_LENGTH]]), "attention_mask": torch.ones(1, FIDELITY_LENGTH).long()}
            for ids in long]  # fmt: skip


def show_fidelity(source, results, tokens) -> dict:
    rows = {name: compare(result.model, source, batches(tokens)) for name, result in results.items()}
    model = next(iter(results.values())).model
    rows["control: mean of values"] = control_figures(model, source, batches(tokens))
    table = Table(title=f"Untrained, all layers ({FIDELITY_TEXTS} texts of {FIDELITY_LENGTH} tokens)")
    for column in ("", "embedding cosine", "lowest", "token cosine"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        keys = ("embedding_cosine", "embedding_cosine_min", "token_cosine")
        table.add_row(name, *(f"{row[key]:.4f}" for key in keys))
    console.print(table)
    return rows


@torch.no_grad()
def embed(model, ids: list[int]) -> torch.Tensor:
    inputs = torch.tensor([ids])
    return torch.nn.functional.normalize(mean_pool(model(inputs).last_hidden_state, torch.ones_like(inputs)), dim=-1)[
        0
    ]


def show_retrieval(source, results, tokens) -> dict:
    """Find the document that a passage was cut from, by embedding: early passages, and passages beyond token 600."""
    chosen = random.Random(SEED)
    documents = [ids for ids in tokens.values() if len(ids) == DOCUMENT_LENGTH][:DOCUMENTS]
    cuts = {
        "early": [chosen.randrange(1, 440 - PASSAGE) for _ in documents],
        "deep": [chosen.randrange(600, DOCUMENT_LENGTH - PASSAGE - 1) for _ in documents],
    }
    full = load_stock(source.config._name_or_path)[0]
    HostModel.of(full).lengthen(MAX_POSITIONS)
    first, last = documents[0][0], documents[0][-1]

    def chunked(ids: list[int]) -> torch.Tensor:
        parts = [ids[i : i + 512] for i in range(0, len(ids), 512)]
        return torch.nn.functional.normalize(torch.stack([embed(source, part) for part in parts]).mean(0), dim=-1)

    ways = {
        "original, cut to 512 tokens": (source, lambda ids: embed(source, [*ids[:511], last])),
        "original, mean over 512-token chunks": (source, chunked),
        "4096 positions, full attention": (full, lambda ids: embed(full, ids)),
        **{name: (r.model, lambda ids, m=r.model: embed(m, ids)) for name, r in results.items()},
    }
    rows = {}
    for name, (model, embed_document) in tqdm(ways.items(), desc="retrieval", leave=False):
        began = time.perf_counter()
        index = torch.stack([embed_document(ids) for ids in documents])
        seconds = time.perf_counter() - began
        rows[name] = {"seconds": seconds}
        for kind, starts in cuts.items():
            queries = [
                [first, *ids[start : start + PASSAGE], last] for ids, start in zip(documents, starts, strict=True)
            ]
            scores = torch.stack([embed(model, query) for query in queries]) @ index.T
            rows[name][kind] = float((scores.argmax(-1) == torch.arange(len(documents))).float().mean())
    console.print("\n[bold]4. What does it find[/] that the original, cut to 512 tokens, misses?")
    table = Table(title=f"the document of a {PASSAGE}-token passage: recall@1, {len(documents)} × 2048 tokens")
    for column in ("document embedding", "first 440", "beyond 600", "seconds"):
        table.add_column(column, justify="left" if column.startswith("doc") else "right")
    for name, row in rows.items():
        table.add_row(name, f"{row['early']:.2f}", f"{row['deep']:.2f}", f"{row['seconds']:.1f}")
    console.print(table)
    console.print("   Chunks find deep passages too, but they do not see each other.")
    return rows


def show_speed(folder: Path) -> list[dict]:
    """One forward pass, batch 1, fp32: interleaved times."""
    longest = max(SPEED_LENGTHS)
    full = load_stock(str(folder))[0]
    HostModel.of(full).lengthen(longest)
    models = {"full": full}
    models |= {mechanism: he.convert(str(folder), mechanism, max_positions=longest, **options).model
               for mechanism, options in MECHANISMS.values()}  # fmt: skip
    rows = []
    for length in tqdm(SPEED_LENGTHS, desc="speed", leave=False):
        inputs = random_inputs(full.config, length)
        calls = {name: forward_call(model, inputs) for name, model in models.items()}
        rows.append({"length": length, "time": table_of(timed(calls, SPEED_REPEATS), "full")})
    console.print(f"\n[bold]3. How fast?[/] One forward pass, fp32, {torch.get_num_threads()} threads")
    table = Table(title="× full = multiple of the time of full attention")
    for column in ("tokens", "full, s", *(f"{name}, × full" for name in models if name != "full")):
        table.add_column(column, justify="right")
    for row in rows:
        times = [f"{row['time']['full']['seconds']:.2f}",
                 *(f"{row['time'][n]['ratio']:.2f}" for n in models if n != "full")]  # fmt: skip
        table.add_row(str(row["length"]), *times)
    console.print(table)
    return rows


def draw(figures: dict, path: Path) -> None:
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), constrained_layout=True)
    retrieval = figures["retrieval"]
    names = [name.replace(", ", ",\n", 1) for name in retrieval]
    for shift, kind in ((-0.2, "early"), (0.2, "deep")):
        left.barh([i + shift for i in range(len(names))], [row[kind] for row in retrieval.values()], 0.38,
                  label={"early": "passage in the first 440 tokens", "deep": "passage beyond token 600"}[kind])  # fmt: skip
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set(xlabel="recall@1", title="Finding the document of a passage", xlim=(0, 1))
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    speed = figures["speed"]
    for name in speed[0]["time"]:
        right.plot([r["length"] for r in speed], [r["time"][name]["seconds"] for r in speed], marker="o", label=name)
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds per forward pass", title="Time on the CPU")
    right.set_xticks([r["length"] for r in speed], [str(r["length"]) for r in speed])
    right.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    right.tick_params(which="minor", labelsize=7)
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    picture.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
