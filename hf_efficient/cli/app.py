"""The command line, `hf-efficient convert | verify | revert | list | … | card | distill`: thin layers over the verbs."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_efficient.attention.base.pattern import SHARED_OPTIONS
from hf_efficient.attention.base.registry import describe, list_mechanisms
from hf_efficient.cli.common import Checkpoint, Json, Out, Overwrite, _emit, _require_free, _require_source, _running
from hf_efficient.cli.options import as_text, chosen_configs, read_texts, refuse_strays, with_mechanism_options
from hf_efficient.cli.training import card, distill
from hf_efficient.cli.upcycle import upcycle
from hf_efficient.visualize.show import show as draw
from hf_efficient.visualize.visibility import drawable_mechanisms, require_drawable

app = typer.Typer(
    name="hf-efficient",
    help="Convert pretrained BERT, RoBERTa, GPT-2 and T5 checkpoints to efficient attention, prove how close they "
    "stayed, and undo it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# ---- convert -----------------------------------------------------------------------------------------------------


def convert(
    context: typer.Context,
    source: Checkpoint,
    out: Out,
    attention: Annotated[str | None, typer.Option(help="Mechanism, see hf-efficient list, or its JSON.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with a mechanism or, for a hybrid, a list; instead of --attention.")
    ] = None,
    max_positions: Annotated[
        int | None, typer.Option(help="Longest input of the result, in tokens.", show_default="the source's")
    ] = None,
    positions: Annotated[str, typer.Option(help="How to lengthen the position table: tile or interpolate.")] = "tile",
    layers: Annotated[str | None, typer.Option(help="0,1,2 or 0-5.", show_default="all")] = None,
    side: Annotated[
        str | None, typer.Option(help="encoder, decoder or both.", show_default="the encoder, if there is one")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Texts for mechanisms that start from data: .txt with one per line, .jsonl, or corpus, English text that "
            "is always at hand.",
            show_default="a start without data",
        ),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, for any option of the mechanism.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    **given: str | None,
) -> None:
    """Convert a pretrained checkpoint and write it, with its tokenizer and a report, to OUT."""
    with _running():
        refuse_strays([source, str(out), *context.args], attention)
        configs = chosen_configs(attention, config, {"layers": layers, "side": side, **given}, option or [])
        _require_source(source)
        _require_free(out, overwrite, source)
        from hf_efficient.conversion.convert import convert as convert_checkpoint

        places: dict[str, Any] = dict(max_positions=max_positions, positions=positions, revision=revision)
        result = convert_checkpoint(source, configs, **places, calibration=_calibration_texts(calibration))
        result.save(out, overwrite)
        report = result.report
    document = {"out": str(out), "counts": report.counts(), **report.to_dict()}
    title, header = f"{source} → {out} ({report.model_class})", ["tensors", "number", "which"]
    _emit(document, as_json, title, header, _tensor_rows(report))


def _calibration_texts(given: str | None) -> list[str] | None:
    if given is None:
        return None
    from hf_efficient.corpus import offline_texts

    return offline_texts("train") if given == "corpus" else read_texts(Path(given))


def _tensor_rows(report: Any) -> list[list[Any]]:
    """Status, number and names of the tensors of a conversion report."""
    named: dict[str, list[str]] = {status: [] for status in report.counts()}
    for name, tensor in report.tensors.items():
        # copied tensors need no explanation, initialised ones only a word on where their values came from
        entry = {"copied": "bit for bit", "initialised": tensor["from"]}.get(tensor["status"], name)
        if entry not in named[tensor["status"]]:
            named[tensor["status"]].append(entry)
    rows: list[list[Any]] = [[status, report.counts()[status], "\n".join(named[status])] for status in named]
    if report.ignored:
        rows.append(["not used", len(report.ignored), "\n".join(report.ignored)])
    return rows


app.command("convert", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    with_mechanism_options(convert)
)


# ---- verify ------------------------------------------------------------------------------------------------------


def _record(folder: Path, fidelity: dict[str, Any]) -> None:
    """Put the figures into the checkpoint's report, whole or not at all."""
    from hf_efficient.conversion.saving import REPORT_NAME, UPCYCLING_NAME

    # experts alone have no conversion behind them
    path = next((folder / name for name in (REPORT_NAME, UPCYCLING_NAME) if (folder / name).is_file()), None)
    if path is None:
        warnings.warn(f"{folder / REPORT_NAME} does not exist, so the figures are not recorded.", stacklevel=2)
        return
    report = json.loads(path.read_text()) | {"fidelity": fidelity}
    temporary = folder / f".{path.name}.tmp"
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)


@app.command("verify")
def verify(
    converted: Annotated[str, typer.Argument(help="Folder or Hub id of a converted checkpoint.")],
    source: Annotated[str, typer.Argument(help="Hub id or folder of the checkpoint it came from.")],
    texts: Annotated[
        Path | None,
        typer.Option(
            help=".txt with one text per line, or .jsonl.", show_default="English text that is always at hand"
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per text.", show_default="the source's")] = None,
    speed: Annotated[
        str | None, typer.Option(help="Lengths at which to measure speed and memory, e.g. 512,1024.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Climb the proof ladder; exit code 1 if a rung fails. The figures go into CONVERTED's report."""
    with _running():
        for name in (converted, source):
            _require_source(name)
        try:
            lengths = [int(length) for length in speed.split(",")] if speed else []
        except ValueError:
            raise ValueError(f"--speed {speed!r} can't be read; write lengths as 512,1024.") from None
        if max_length is not None and max_length < 2:
            raise ValueError(f"--max-length {max_length} leaves no text; give at least 2.")
        from hf_efficient.corpus import offline_texts
        from hf_efficient.evaluation.verify import verify as climb

        documents = offline_texts() if texts is None else read_texts(texts)
        report = climb(
            converted,
            source,
            documents,
            max_length=max_length,
            speed_lengths=lengths,
            progress=sys.stderr.isatty(),
        )
        if Path(converted).is_dir():
            _record(Path(converted), report.to_dict())
    rows = [
        [rung.status, f"{rung.name}: {rung.rule}", "\n".join(f"{k}: {as_text(v)}" for k, v in rung.detail.items())]
        for rung in report.rungs
    ]
    title = f"{converted} beside {source}: {'passed' if report.passed else 'FAILED'}"
    _emit(report.to_dict(), as_json, title, ["outcome", "rung", "figures"], rows)
    if not report.passed:
        raise typer.Exit(1)


# ---- revert, list, inspect ---------------------------------------------------------------------------------------


@app.command("revert")
def revert(
    converted: Annotated[str, typer.Argument(help="Folder or Hub id of a converted checkpoint.")],
    out: Out,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the original checkpoint back: bit for bit, unless it was trained since."""
    with _running():
        _require_source(converted)
        _require_free(out, overwrite, converted)
        from hf_efficient.conversion.revert import revert_checkpoint

        document = revert_checkpoint(converted, out, overwrite)
    _emit(document, as_json, f"{converted} → {out}", ["what", "value"], [list(item) for item in document.items()])


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """Show every mechanism: where it works, what it costs, when it is exact."""
    with _running():
        cards = [describe(name) for name in list_mechanisms()]
    rows = [
        [
            card["mechanism"],
            f"{card['title']}, {card['paper']}",
            f"{card['time']}; {card['memory']}",
            card["causal"],
            card["relative_bias"],
            card["exact_when"],
        ]
        for card in cards
    ]
    headings = ["mechanism", "paper", "time; memory", "causal", "T5 bias", "exact at n tokens when"]
    _emit(cards, as_json, f"{len(cards)} mechanisms", headings, rows)


@app.command("inspect")
def inspect_command(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """Show what a checkpoint uses layer by layer, and what an original could take; no weights are loaded."""
    with _running():
        _require_source(checkpoint)
        from hf_efficient.conversion.inspect import inspect_checkpoint

        facts = inspect_checkpoint(checkpoint)
    layers, possible = facts["layers"], facts["mechanisms"]
    if as_json or facts["converted"]:
        rows = [[layer["side"], layer["layer"], layer["mechanism"], layer["options"]] for layer in layers]
        headings = ["side", "layer", "attention", "options"]
    else:
        rows = [[p["side"], p["mechanism"], p["possible"], "; ".join(p["reasons"])] for p in possible]
        headings = ["side", "mechanism", "possible", "why not, with default options"]
    length = facts["max_positions"] or "no table of"
    title = f"{checkpoint}: {facts['model_class']}, {len(layers)} layers, {length} positions"
    if facts["experts"]:
        title += f", {facts['experts']['num_experts']} experts"
    _emit(facts, as_json, title, headings, rows)


# ---- show --------------------------------------------------------------------------------------------------------


def show(
    context: typer.Context,
    mechanism: Annotated[str, typer.Argument(help="A mechanism that is a pattern; or one as JSON.")],
    length: Annotated[int, typer.Option(help="Tokens.")] = 1024,
    causal: Annotated[bool, typer.Option("--causal", help="A decoder's layer: nobody sees later tokens.")] = False,
    num_heads: Annotated[int, typer.Option(help="Heads of the layer.")] = 12,
    layer: Annotated[int, typer.Option(help="Which layer, from 0.")] = 0,
    num_layers: Annotated[int, typer.Option(help="Layers of the stack.")] = 12,
    out: Annotated[Path | None, typer.Option(help="Also write the picture to this file, as PNG.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, for any option of the mechanism.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file, if there is one.")] = False,
    as_json: Json = False,
    **given: str | None,
) -> None:
    """Draw what sees what, with the number of pairs and tiles: one panel for each kind of head."""
    with _running():
        if mechanism in list_mechanisms():
            require_drawable(mechanism)
        refuse_strays([mechanism, *context.args], mechanism, "show", ("MECHANISM",), SHARED_OPTIONS)
        configs = chosen_configs(mechanism, None, given, option or [])
        picture = draw(
            configs, length=length, is_causal=causal, num_heads=num_heads, layer=layer, num_layers=num_layers
        )
        document = {"out": None if out is None else str(picture.save(out, overwrite)), **picture.facts}
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(str(picture))
    if out is not None:
        typer.echo(f"written to {out}")


app.command("show", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    with_mechanism_options(show, drawable_mechanisms(), SHARED_OPTIONS)
)


# ---- bench -------------------------------------------------------------------------------------------------------


@app.command("bench")
def bench_command(
    suite: Annotated[
        str,
        typer.Argument(
            help="attention, content or linear (attention alone: patterns, keys chosen by content, linear), encoder (time), "
            "memory, fidelity and recovery (all-MiniLM-L6-v2, before and after transfer), or gpu (its tests and times)."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure: time and memory against full attention, or fidelity to it; minutes each."""
    with _running():
        from hf_efficient.benchmarks.suites import SUITES, as_rows

        if suite not in SUITES:
            raise ValueError(f"no suite {suite!r}; there are {', '.join(SUITES)}.")
        document = SUITES[suite]()
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = out.with_suffix(".partial")
            partial.write_text(json.dumps(document, indent=2) + "\n")
            partial.replace(out)
    _emit(document, as_json, f"{suite}: {document['hardware']['cpu']}", *as_rows(document))


app.command("card")(card)
app.command("distill")(distill)
app.command("upcycle")(upcycle)


def main() -> None:
    """Entry point of the `hf-efficient` program."""
    app()


if __name__ == "__main__":
    main()
