"""Generated parts of README.md, docs/ and the model cards: tables from the registry and from recorded measurements.

    python model_cards/generate.py           # rewrite them            (make docs)
    python model_cards/generate.py --check   # fail if one is not what the registry and the records say

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`. A figure that no record holds reads
"not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import by_length
import recall
from exports import export_table
from model_types import model_counts, model_types_table

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.registry import describe, get_mechanism, list_mechanisms
from hf_efficient.cards.markdown import table
from hf_efficient.cards.sizes import sizes_table
from hf_efficient.cli.catalogue import cards

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "model_cards" / "results"
PLACES: dict[str, Any] = {
    "BERT, RoBERTa": dict(side="encoder", is_causal=False, has_relative_bias=False, max_positions=512),
    "GPT-2": dict(side="decoder", is_causal=True, has_relative_bias=False, max_positions=1024),
    "T5 encoder": dict(
        side="encoder", is_causal=False, has_relative_bias=True, max_positions=None, relative_bias_reach=91
    ),
    "T5 decoder": dict(
        side="decoder", is_causal=True, has_relative_bias=True, max_positions=None, relative_bias_reach=113
    ),
}
MARKER = re.compile(r"(<!-- generated: ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def refusals(mechanism: str) -> dict[str, list[str]]:
    """{place: reasons why the mechanism can't work there, whatever its options}; an empty list = supported."""
    cls = get_mechanism(mechanism)
    config = cls.Config()
    found = {}
    for place, facts in PLACES.items():
        options: dict[str, Any] = dict(num_heads=12, head_dim=64, hidden_size=768, layer=0, num_layers=12)
        geometry = AttentionGeometry(**options, **facts, projection_bias=not facts["has_relative_bias"])
        found[place] = cls.unsupported(config, geometry)
        # some options need a value there: a longest input, a window that reaches far enough
        if found[place] and (wide := cls.exact_config(config, geometry, 1024)) is not None:
            found[place] = cls.unsupported(wide, geometry)
    return found


def support_table() -> str:
    """Mechanism × family × causal × exact limit, from the registry."""
    rows = []
    for mechanism in list_mechanisms():
        facts, reasons = describe(mechanism), refusals(mechanism)
        marks = ["–" if reasons[place] else "✓" for place in PLACES]
        causal = "yes" if facts["causal"] else "no"
        name = f"[`{mechanism}`](model_cards/{mechanism}.md)"
        rows.append([name, *marks, causal, facts["time"], facts["exact_when"], facts["training"]])
    return table(["mechanism", *PLACES, "causal", "time", "equals full attention when", "training"], rows)


def options_table(mechanism: str) -> str:
    """Options of a mechanism with their defaults and what its config class says of them."""
    meanings = cards()[mechanism].meanings
    options = describe(mechanism)["options"].items()
    rows = [[f"`{name}`", f"`{json.dumps(default)}`", meanings.get(name, "")] for name, default in options]
    return table(["option", "default", "meaning"], rows)


def places_table(mechanism: str) -> str:
    """Where a mechanism works, and why not elsewhere."""
    rows = [[place, "✓" if not why else "refused: " + "; ".join(why)] for place, why in refusals(mechanism).items()]
    return table(["place", "support"], rows)


def record(suite: str) -> dict[str, Any] | None:
    """A recorded measurement, or `None` if it was not made."""
    path = RESULTS / f"{suite}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _source(record: dict[str, Any]) -> str:
    names = ("hf_efficient", "torch", "transformers")
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in names)
    hardware = record["hardware"]
    return f"{hardware['cpu']}, {hardware['threads']} threads; {versions}; seed {record['settings']['seed']}."


def fidelity_table(mechanism: str) -> str:
    """Untrained fidelity of one mechanism on all-MiniLM-L6-v2, beside the control."""
    data = record("fidelity")
    if data is None or mechanism not in data["results"]:
        return "not measured"
    keys = ("embedding_cosine", "token_cosine", "hidden_error")
    rows = []
    for options, figures in data["results"][mechanism].items():
        label = ", ".join(f"{k} {v}" for k, v in json.loads(options).items())
        rows.append([label, *(f"{figures[key]:.3f}" for key in keys)])
    rows.append(["control: mean of values", *(f"{data['control'][key]:.3f}" for key in keys)])
    settings = data["settings"]
    what = (
        f"`{settings['checkpoint']}`, {settings['texts']} texts of {settings['length']} tokens, all layers, untrained."
    )
    return (
        table(["setting", "embedding cosine", "token cosine", "hidden-state error"], rows)
        + f"\n\n{what} {_source(data)}"
    )


def by_length_table(mechanism: str = "") -> str:
    """Untrained fidelity on real checkpoints at several lengths, of one mechanism or of all."""
    data = record("fidelity_by_length")
    if data is None:
        return "not measured"
    found = by_length.card_table(data, mechanism) if mechanism else by_length.overview(data)
    return "not measured" if found is None else f"{found}\n\n{by_length.remarks(data)} {_source(data)}"


STAGES = {"converted": "untrained", "transferred": "attention transferred", "trained": "trained", "control": "control"}


def recovery_table(mechanism: str | None = None) -> str:
    """How much transfer recovers on all-MiniLM-L6-v2: embedding cosine and mean layer error, of one mechanism or of all."""
    data = record("recovery")
    if data is None or mechanism not in (None, *data["results"]):
        return "not measured"
    rows = []
    for name, runs in data["results"].items():
        for options, run in runs.items() if mechanism in (None, name) else ():
            label = ", ".join(f"{k} {v}" for k, v in json.loads(options).items())
            label = label or "default options" if mechanism else ", ".join(filter(None, [f"`{name}`", label]))
            steps = f"{run['settings']['steps']} + {run['settings'].get('end_to_end_steps', 0)}"
            cosines = [f"{run[stage]['embedding_cosine']:.3f}" if stage in run else "–" for stage in STAGES]
            errors = [
                sum(e) / len(e) for e in (run["layer_errors"][when]["mechanism"] for when in ("before", "after"))
            ]
            rows.append([label, steps, *cosines, *(f"{error:.3f}" for error in errors), f"{run['seconds'] / 60:.1f}"])
    header = ["setting", "steps by layer + end to end", *STAGES.values()]
    settings = data["settings"]
    what = (
        f"Embedding cosine to `{settings['checkpoint']}`, {settings['texts']} held-out texts of {settings['length']} "
        f"tokens, all layers; trained on rows of as many. Control: V averaged."
    )
    header += ["layer error before", "after", "minutes"]
    return table(header, rows) + f"\n\n{what} {_source(data)}"


PIPELINE = ("control", "converted", "continued", "transferred", "transferred, continued")


def perplexity_table(mechanism: str | None = None) -> str:
    """Held-out perplexity of small models trained from scratch, step by step after conversion."""
    parts = []
    for family in ("gpt2", "t5"):
        data = record(f"perplexity_{family}")
        rows = [] if data is None else _perplexity_rows(data, mechanism)
        if data is None or not rows:
            continue
        dense, ceiling = (data[name]["perplexity"] for name in ("dense", "dense, continued"))
        settings = data["settings"]
        what = (
            f"{settings['layers']} layers of width {settings['hidden_size']}, {settings['pretrain_steps']} steps from "
            f"scratch, then {settings['transfer_steps']} of transfer and {settings['steps']} of continued pretraining at "
            f"learning rate {settings['learning_rate']:g}, batches of {settings['batch_size']} × "
            f"{settings['block_length']}. Dense model: {dense:.2f}, continued "
            f"{ceiling:.2f}; the last column is the best end as a multiple of that. Control: mean of values, untrained."
        )
        header = [f"{family}, perplexity", *PIPELINE, "÷ dense model"]
        parts.append(table(header, rows) + f"\n\n{what} {_source(data)}")
    return "\n\n".join(parts) or "not measured"


def _perplexity_rows(data: dict[str, Any], mechanism: str | None) -> list[list[str]]:
    ceiling = data["dense, continued"]["perplexity"]
    rows = []
    for name, figures in data["results"].items():
        if mechanism in (None, figures["attention"]["mechanism"]):
            steps = [figures[step]["perplexity"] if step in figures else None for step in PIPELINE]
            best = min(value for value in steps[2:] if value is not None)
            cells = ["–" if value is None else f"{value:.2f}" for value in steps]
            rows.append([name, *cells, f"{best / ceiling:.3f}"])
    return rows


def recall_table(mechanism: str | None = None) -> str:
    """Recall tasks on constructed models, beside controls and rules."""
    data = record("suite")
    found = None if data is None else recall.tasks(data, mechanism)
    if data is None or found is None:
        return "not measured"
    more = "" if mechanism else f" {recall.listops(data)}"
    picture = "" if mechanism else _picture("suite", "Accuracy over keys per query, task by task")
    return f"{found}\n\n{recall.remarks(data)}{more} {_source(data)}{picture}"


def needle_table() -> str:
    """Where the pair stands makes no difference to full attention."""
    data = record("suite")
    found = None if data is None else recall.needles(data)
    return "not measured" if data is None or found is None else f"{found}\n\nUntrained. {_source(data)}"


def segments_table(mechanism: str) -> str:
    """Held-out perplexity of a small model read or trained in segments with a memory, beside full attention."""
    data = record("segments_gpt2")
    if data is None or (options := json.loads(data["settings"]["attention"])).pop("mechanism") != mechanism:
        return "not measured"
    names = {"dense": "full attention", "read": "the same model in segments", "memory": "trained in segments"}
    cells = [[name, f"{data[k]['perplexity']:.2f}", f"{data['ratios'].get(k, 1.0):.4f}"] for k, name in names.items()]
    facts = ", ".join(f"{name} {value}" for name, value in options.items())
    settings = data["settings"]
    what = f"{facts}; texts of {settings['block_length']} tokens, {settings['max_steps']} steps from scratch."
    return f"{table(['gpt2', 'perplexity', '÷ full attention'], cells)}\n\n{what} {_source(data)}"


def closeness_tables(mechanism: str) -> str:
    """Untrained fidelity, and what training recovered where that was recorded."""
    makers = (fidelity_table, by_length_table, recovery_table, recall_table, perplexity_table, segments_table)
    return "\n\n".join(text for make in makers if (text := make(mechanism)) != "not measured") or "not measured"


def speed_table() -> str:
    """Two-layer encoders of BERT-base width against full attention, transformers' own classes and no attention at all."""
    data = record("encoder")
    if data is None:
        return "not measured"
    settings, results = data["settings"], data["results"]
    lengths = list(dict.fromkeys(row["tokens"] for row in results))
    parts = []
    for kind in dict.fromkeys(row["pass"] for row in results):
        found = {(row["model"], row["tokens"]): row for row in results if row["pass"] == kind}
        rows = []
        for name in dict.fromkeys(name for name, _ in found):
            cells = [found.get((name, n)) for n in lengths]
            rows.append([name, *(_spread(cell) for cell in cells)])
        parts.append(table([f"{kind}: time ÷ full attention (min–max)", *(f"{n} tokens" for n in lengths)], rows))
    what = (
        f"{settings['layers']} layers, width {settings['hidden_size']}, batch {settings['batch']}, {settings['dtype']}, "
        f"{settings['threads']} thread; training is forward, backward and a step of AdamW. Medians of at most "
        f"{settings['rounds']} interleaved rounds; – = not run."
    )
    return "\n\n".join(parts) + f"\n\n{what} {_source(data)}" + _picture("encoder", "Time of an encoder over length")


def _spread(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"


def _picture(suite: str, what: str) -> str:
    return f"\n\n![{what}](model_cards/results/{suite}.png)" if (RESULTS / f"{suite}.png").exists() else ""


def decode_table() -> str:
    """Time per decoded token of two layers of GPT-2, against transformers' own cache."""
    data = record("decode")
    if data is None:
        return "not measured"
    settings, results = data["settings"], data["results"]
    lengths = list(dict.fromkeys(row["tokens"] for row in results))
    rows = []
    for width, batch, name in dict.fromkeys((row["width"], row["batch"], row["model"]) for row in results):
        found = {r["tokens"]: r for r in results if (r["width"], r["batch"], r["model"]) == (width, batch, name)}
        rows.append([name, width, str(batch), *(_spread(found.get(n)) for n in lengths)])
    header = ["time per token ÷ full attention (min–max)", "width", "batch", *(f"{n} tokens" for n in lengths)]
    sizes = ", ".join(f"{name} = {hidden} with {heads} heads" for name, (hidden, heads) in settings["widths"].items())
    what = (
        f"{settings['layers']} layers of GPT-2 ({sizes}), {settings['dtype']}, {settings['threads']} thread, after a prompt "
        "of so many tokens. Medians of interleaved rounds."
    )
    return table(header, rows) + f"\n\n{what} {_source(data)}" + _picture("decode", "Time per token over the prompt")


def memory_table(mechanism: str) -> str:
    """Peak memory of one forward pass and its growth, for every supported pair of a mechanism."""
    data = record("memory")
    rows = [] if data is None else [row for row in data["results"] if row["mechanism"] == mechanism]
    if data is None or not rows:
        return "not measured"
    lengths = data["settings"]["lengths"]
    body = [
        [
            f"{row['model_type']} {row['side']}",
            *(f"{row[f'peak_mb_{n}']:.0f}" for n in lengths),
            f"{row['growth']:.2f}",
        ]
        for row in rows
    ]
    header = ["2 layers, width 768, batch 1, fp32, forward", *(f"{n} tokens, MB" for n in lengths), "growth"]
    return table(header, body) + f"\n\n{_source(data)}"


def _attention_rows(data: dict[str, Any], mechanism: str) -> list[dict[str, Any]]:
    """Its float32 results of an attention record, forward before training, by length."""
    rows = [row for row in data["results"] if row["contender"] == mechanism and row["dtype"] == "float32"]
    return sorted(rows, key=lambda row: (row["pass"], row["length"]))


def _times_longer(row: dict[str, Any], others: list[str]) -> str:
    """How many times longer the named ones take, with the least and the most of all rounds; the first that was measured."""
    for figures in (row["faster_than"][name] for name in others if name in row["faster_than"]):
        return f"{figures['ratio']:.2f} ({figures['ratio_min']:.2f}–{figures['ratio_max']:.2f})"
    return "–"


def _attention_cells(row: dict[str, Any] | None) -> list[str]:
    """Milliseconds, and how many times longer full attention and transformers' class take."""
    if row is None:
        return ["–"] * 3
    rivals = [name for name in row["faster_than"] if name.startswith("transformers")]
    dense = ["full, masked (SDPA)", "full (SDPA)"]
    return [f"{1000 * row['seconds']:.0f}", _times_longer(row, dense), _times_longer(row, rivals)]


def attention_table(mechanism: str | None = None) -> str:
    """Attention alone: all mechanisms at 4096 tokens, or one at every length."""
    data = record("attention")
    if data is None:
        return "not measured"
    body = []
    for name in [mechanism] if mechanism else data["settings"]["options"]:
        found = {(row["length"], row["pass"]): row for row in _attention_rows(data, name)}
        for length in sorted({length for length, _ in found} if mechanism else {4096}):
            cells = [_attention_cells(found.get((length, kind))) for kind in ("forward", "training")]
            body.append([str(length) if mechanism else f"`{name}`", *cells[0], *cells[1]])
    header = ["tokens" if mechanism else "4096 tokens"]
    for kind in ("forward", "forward + backward"):
        header += [f"{kind}, ms", "speed-up over full attention", "over transformers' own class"]
    settings = data["settings"]
    what = (
        f"Attention alone, {settings['heads']} heads of {settings['width']}, batch {settings['batch']}, float32; full "
    )
    what += (
        "attention with a dense mask; – = no counterpart, or not measured. Medians (least–most) of interleaved rounds."
    )
    picture = _picture("attention", "Time of attention over length") if mechanism is None else ""
    return table(header, body) + f"\n\n{what} {_source(data)}{picture}"


def content_table(mechanism: str) -> str:
    """One mechanism that chooses keys by content or carries a memory, beside full attention and transformers' Reformer."""
    data = record("content")
    rows = [] if data is None else [row for row in data["results"] if row["contender"] == mechanism]
    if data is None or not rows:
        return "not measured"
    rivals = ("full (SDPA)", "transformers Reformer")
    body = []
    for row in rows:
        ratios = [row["faster_than"][rival] for rival in rivals]
        cells = [f"{r['ratio']:.2f} ({r['ratio_min']:.2f}–{r['ratio_max']:.2f})" for r in ratios]
        place = [row["side"], "forward" if row["pass"] == "forward" else "forward + backward", str(row["length"])]
        keys = [f"{row['keys_read']:.0f}" + (f" ({100 * row['coverage']:.0f} %)" if "coverage" in row else "")]
        body.append([*place, *keys, f"{1000 * row['seconds']:.0f}", *cells, f"{row['largest_tensor'] / 1e6:.2f}"])
    speedups = [f"speed-up over {rival}" for rival in rivals]
    header = ["side", "pass", "tokens", "keys read", "ms", *speedups, "largest tensor, 10⁶ numbers"]
    settings = data["settings"]
    theirs = [row for row in data["results"] if row["contender"] == rivals[1]]
    read = dict.fromkeys(f"{row['length']} tokens ({row['side']}): {row['keys_read']:.0f}" for row in theirs)
    what = (
        f"Attention alone, {settings['heads']} heads of {settings['width']}, float32, {_options_of(rows)}. Medians "
        "(least–most) of interleaved rounds. Keys read: those that reach a query, median of a few queries"
        + (", and the share of queries that some cluster takes" if any("coverage" in row for row in rows) else "")
        + f"; full attention reads all, transformers' Reformer {', '.join(read)}."
    )
    return f"{table(header, body)}\n\n{what} {_source(data)}"


def _options_of(rows: list[dict[str, Any]]) -> str:
    """The options of measured rows, in the order of their lengths where they follow the length."""
    values: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, value in row["options"].items():
            values.setdefault(name, {})[str(value)] = None
    return ", ".join(f"`{name}={' | '.join(found)}`" for name, found in values.items())


def cost_tables(mechanism: str) -> str:
    """Memory in a model, and what attention alone takes where that was recorded."""
    parts = [memory_table(mechanism)]
    data = record("attention")
    if data is not None and _attention_rows(data, mechanism):
        parts.append(attention_table(mechanism))
    if (text := content_table(mechanism)) != "not measured":
        parts.append(text)
    return "\n\n".join(parts)


def linear_table() -> str:
    """Causal linear attention alone, by length."""
    data = record("linear")
    if data is None:
        return "not measured"
    found = {(row["length"], row["pass"]): row for row in data["results"]}
    body = []
    for length in sorted({length for length, _ in found}):
        cells = []
        for row in (found[length, kind] for kind in ("forward", "training")):
            per_token = row.get("cpu_microseconds_per_token", row["microseconds_per_token"])
            cells += [f"{1000 * row['seconds']:.0f}", f"{per_token:.1f}"]
        body.append([str(length), *cells])
    header = ["tokens"]
    for kind in ("forward", "forward + backward"):
        header += [f"{kind}, ms", "CPU time per token, µs" if data["settings"]["device"] == "cpu" else "per token, µs"]
    settings = data["settings"]
    what = (
        f"Causal linear attention alone, {settings['heads']} heads, {settings['features']} features, values of "
        f"{settings['width']}, float32; medians of {settings['rounds']} rounds. Largest difference to the quadratic "
        f"formula in float64 at {settings['checked_length']} tokens: {data['relative_error']:.1e}."
    )
    return table(header, body) + f"\n\n{what} {_source(data)}"


def graphs_table() -> str:
    """Graphs in onnxruntime: the largest error of each mechanism, and times over length."""
    data = record("onnx")
    if data is None:
        return "not measured"
    body = []
    for name in dict.fromkeys(row["mechanism"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["mechanism"] == name]
        worst = (max(row["error"] for row in rows if row["padding"] == side) for side in ("right", "left"))
        lengths = ", ".join(str(length) for length in dict.fromkeys(row["length"] for row in rows))
        body.append([f"`{name}`", lengths, *(f"{error:.1e}" for error in worst), f"{rows[0]['bytes'] / 1e3:.0f}"])
    text = table(["mechanism", "tokens", "error, padded right", "padded left", "file, kB"], body)
    if data["speed"]:
        lengths_of_speed = list(dict.fromkeys(row["tokens"] for row in data["speed"]))
        found = {(row["model"], row["tokens"]): row for row in data["speed"]}
        body = [
            [name, *(_spread(found.get((name, length))) for length in lengths_of_speed)]
            for name in dict.fromkeys(row["model"] for row in data["speed"])
        ]
        heads = [f"{length} tokens" for length in lengths_of_speed]
        text += "\n\n" + table(["time ÷ the stock model's graph (min–max)", *heads], body)
    return f"{text}\n\nOf texts in batches of 1, 2 and 5, all but the first row padded. {_source(data)}"


def demo_output() -> str:
    """What `make demo` printed when it was recorded."""
    path = RESULTS / "demo.txt"
    lines = [line.rstrip() for line in path.read_text().splitlines()] if path.exists() else ["not measured"]
    return "\n".join(["```text", *lines, "```"])


def first_steps() -> str:
    """What the first lines of README.md print: the report of the conversion, and how the proof begins."""
    steps = (record("demo") or {}).get("first_steps")
    if steps is None:
        return "not measured"
    proof = steps["proof"].splitlines()[:4]
    return "\n".join(["```text", *steps["report"].splitlines(), *proof, "…", "```"])


def part(name: str) -> str:
    """The text of a generated part: a table's name, and a mechanism's name where it takes one."""
    makers: dict[str, Any] = {
        "attention": attention_table,
        "demo": demo_output,
        "exports": lambda: export_table(record("export")),
        "first steps": first_steps,
        "graphs": graphs_table,
        "fidelity": closeness_tables,
        "fidelity by length": by_length_table,
        "linear": linear_table,
        "memory": cost_tables,
        "model counts": lambda: model_counts(record("model_types")),
        "model types": lambda: model_types_table(record("model_types")),
        "options": options_table,
        "perplexity": perplexity_table,
        "places": places_table,
        "recovery": recovery_table,
        "sizes": sizes_table,
        "recall": recall_table,
        "needle": needle_table,
        "speed": speed_table,
        "decode": decode_table,
        "support": support_table,
    }
    kind, mechanism = (name, "") if name in makers else name.partition(" ")[::2]
    if kind not in makers:
        raise ValueError(f"no generated part {kind!r}; there are {', '.join(makers)}.")
    return makers[kind](mechanism) if mechanism else makers[kind]()


def fill(text: str, root: str = "") -> str:
    """`text` with every generated part made anew; `root` leads from the file's folder to that of README.md."""

    def made(match: re.Match[str]) -> str:
        content = part(match[2]).replace("](model_cards/", f"]({root}model_cards/")
        return f"{match[1]}{content}\n{match[3]}"

    return MARKER.sub(made, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something would change")
    check = parser.parse_args(arguments).check
    stale = []
    pages = [path for folder in ("docs", "model_cards") for path in sorted((ROOT / folder).glob("*.md"))]
    for path in (ROOT / "README.md", *pages):
        before = path.read_text()
        after = fill(before, "" if path.parent == ROOT else "../")
        if before != after:
            stale.append(path.name)
            if not check:
                path.write_text(after)
    if stale:
        print(f"{'out of date' if check else 'rewritten'}: {', '.join(stale)}", file=sys.stderr)
    return int(bool(stale) and check)


if __name__ == "__main__":
    sys.exit(main())
