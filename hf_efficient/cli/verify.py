"""`hf-efficient verify`."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_efficient.cli.common import Converted, Json, Revision, Subfolder, Texts, emit, require_source, running
from hf_efficient.cli.options import as_text, read_texts

logger = logging.getLogger(f"transformers.{__name__}")


def verify(
    converted: Converted,
    source: Annotated[str, typer.Argument(help="Hub id or folder of the checkpoint it came from.")],
    texts: Texts = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per text.", show_default="the source's")] = None,
    speed: Annotated[
        str | None, typer.Option(help="Lengths at which to measure speed and memory, e.g. 512,1024.")
    ] = None,
    sample_layers: Annotated[
        int | None,
        typer.Option(help="Check K layers alone, in the memory of one: weights stay on the disk.", show_default="all"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a checkpoint (exit code 1 if it is not complete and correct), measure how close it is to its source, and whether
    it was trained since.

    The figures go into CONVERTED's report.
    """
    with running():
        for name in (converted, source):
            require_source(name)
        try:
            lengths = [int(length) for length in speed.split(",")] if speed else []
        except ValueError:
            raise ValueError(f"--speed {speed!r} can't be read; write lengths as 512,1024.") from None
        if max_length is not None and max_length < 2:
            raise ValueError(f"--max-length {max_length} leaves no text; give at least 2.")
        from hf_efficient.evaluation.verify import verify as run_checks

        documents = None if texts is None else read_texts(texts)
        report = run_checks(
            converted,
            source,
            documents,
            revision=revision,
            subfolder=subfolder,
            max_length=max_length,
            speed_lengths=lengths,
            sample_layers=sample_layers,
            progress=None if sys.stderr.isatty() else False,
        )
        document = report.to_dict() | {
            "command": _command(
                converted,
                source,
                revision=revision,
                subfolder=subfolder,
                texts=texts,
                max_length=max_length,
                speed=speed,
                sample_layers=sample_layers,
            )
        }
        if Path(converted).is_dir():
            record_fidelity(Path(converted), document)
    rows = [[*statement, ""] for statement in report.statements().items()]
    rows += [
        [check.status, f"{check.name}: {check.rule}", "\n".join(f"{k}: {as_text(v)}" for k, v in check.detail.items())]
        for check in report.checks
    ]
    title = f"{converted} compared with {source}: {'passed' if report.passed else 'FAILED'}"
    emit(document, as_json, title, ["outcome", "check", "figures"], rows)
    if not report.passed:
        raise typer.Exit(1)


def _command(converted: str, source: str, **options: Any) -> str:
    words = ["hf-efficient", "verify", converted, source]
    for name, value in options.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def record_fidelity(folder: Path, fidelity: dict[str, Any]) -> None:
    """Put the figures into the checkpoint's report, whole or not at all."""
    from hf_efficient.models.provenance import REPORT_NAME, UPCYCLING_NAME
    from hf_efficient.profiling.json_files import read_json, write_json

    # experts alone have no conversion behind them
    path = next((folder / name for name in (REPORT_NAME, UPCYCLING_NAME) if (folder / name).is_file()), None)
    if path is None:
        logger.warning(f"{folder / REPORT_NAME} does not exist, so the figures are not recorded.")
        return
    write_json(path, read_json(path) | {"fidelity": fidelity})
