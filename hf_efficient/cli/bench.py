"""`hf-efficient bench`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_efficient.cli.common import Json, emit, running
from hf_efficient.cli.options import parse_lengths


def bench(
    suite: Annotated[
        str,
        typer.Argument(
            help="attention, content or linear (attention alone: patterns, keys chosen by content, linear), encoder (time), "
            "decode (time per token), memory, fidelity and recovery (all-MiniLM-L6-v2, before and after transfer), export "
            "(how far exported models are from their sources), graphs (the same in onnxruntime, and speed), streaming "
            "(conversion with weights on the disk), suite (recall, by one protocol for all mechanisms), or gpu (its tests "
            "and times)."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Only these lengths in tokens, e.g. 512,4096; of encoder, decode and memory; of fidelity: by length."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Of suite, and its default: minutes.")] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Of suite: every mechanism and length, three seeds; hours. Goes on in --out."),
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", hidden=True)] = False,
    as_json: Json = False,
) -> None:
    """Measure: time and memory against full attention, or fidelity to it; takes minutes per run."""
    with running():
        from hf_efficient.benchmarks.suites import SUITES
        from hf_efficient.profiling.json_files import write_json

        if suite not in SUITES:
            raise ValueError(f"no suite {suite!r}; there are {', '.join(SUITES)}.")
        chosen, given = SUITES[suite], parse_lengths(lengths)
        if given and "lengths" not in inspect.signature(chosen.run).parameters:
            raise ValueError(f"--lengths {lengths}: the suite {suite} has its own; leave it out.")
        options: dict[str, Any] = {"lengths": given} if given else {}
        runs = [name for name, wanted in {"quick": quick, "full": full, "smoke": smoke}.items() if wanted]
        if runs and suite != "suite":
            raise ValueError(
                f"--{' --'.join(runs)}: only `bench suite` has such runs; {suite} has one, so leave it out."
            )
        if len(runs) > 1:
            raise ValueError(f"--{' --'.join(runs)}: give one of them.")
        if suite == "suite":
            options = {"run": runs[0] if runs else "quick", "record": out}
        document = chosen.run(**options)
        if out is not None:
            write_json(out, document)
            if chosen.draw is not None:
                chosen.draw(document, out.with_suffix(".png"))
    emit(document, as_json, f"{suite}: {document['hardware']['cpu']}", *chosen.rows(document))
