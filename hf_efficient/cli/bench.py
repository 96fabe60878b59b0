"""`hf-efficient bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_efficient.cli.common import Json, emit, running


def bench(
    suite: Annotated[
        str,
        typer.Argument(
            help="attention, content or linear (attention alone: patterns, keys chosen by content, linear), encoder (time), "
            "memory, fidelity and recovery (all-MiniLM-L6-v2, before and after transfer), export (how far "
            "exported models are from their sources), or gpu (its tests and times)."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure: time and memory against full attention, or fidelity to it; takes minutes per run."""
    with running():
        from hf_efficient.benchmarks.suites import SUITES
        from hf_efficient.profiling.json_files import write_json

        if suite not in SUITES:
            raise ValueError(f"no suite {suite!r}; there are {', '.join(SUITES)}.")
        document = SUITES[suite].run()
        if out is not None:
            write_json(out, document)
    emit(document, as_json, f"{suite}: {document['hardware']['cpu']}", *SUITES[suite].rows(document))
