"""What the commands share: options, progress, tables or JSON, and checks of folders."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_efficient.cli.options import as_text

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT, if there is one.")]
Checkpoint = Annotated[str, typer.Argument(help="Hub id or folder of a checkpoint.")]
Out = Annotated[Path, typer.Argument(help="Folder to write.")]


# ---- what all commands share -------------------------------------------------------------------------------------


@contextmanager
def _running() -> Iterator[None]:
    """Errors become one message on stderr and exit code 1; stdout stays free for the result."""

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        typer.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.showwarning = show
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


def _emit(document: Any, as_json: bool, title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """The result on stdout: as one JSON document or as a table."""
    if as_json:
        typer.echo(json.dumps(document, indent=2, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*map(as_text, row))
    # in a file or a pipe there is no window to fit into
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    Console(markup=False, highlight=False, emoji=False, width=width).print(table)


def _require_source(name: str) -> None:
    """A mistyped folder is refused before the Hub is asked for a repository of that name."""
    if (name.startswith((".", "~", os.sep)) or name.count("/") > 1) and not Path(name).exists():
        raise FileNotFoundError(f"{name} does not exist.")


def _require_free(out: Path, overwrite: bool, source: str) -> None:
    """Refuse what saving would refuse, before minutes of work; and never replace the source itself."""
    from hf_efficient.conversion.saving import require_free

    require_free(out, overwrite)
    if out.exists() and out.resolve() == Path(source).resolve():
        raise ValueError(f"{out} is the source itself; choose another folder.")
