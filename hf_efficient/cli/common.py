"""What the commands share: options, progress, tables or JSON, and checks of folders."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_efficient.cli.options import as_text
from hf_efficient.profiling.ending import terminable, write_errors

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT, if there is one.")]
Checkpoint = Annotated[str, typer.Argument(help="Hub id or folder of a checkpoint.")]
Converted = Annotated[str, typer.Argument(help="Folder or Hub id of a converted checkpoint.")]
Out = Annotated[Path, typer.Argument(help="Folder to write.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")]
Subfolder = Annotated[str | None, typer.Option(help="Folder of the checkpoint inside the repository or SOURCE.")]
ModelClass = Annotated[
    str | None,
    typer.Option(
        help="Class of the checkpoint, e.g. BertForMaskedLM.", show_default="what its config or its tensors say"
    ),
]
Dtype = Annotated[str | None, typer.Option(help="Data type to load weights in.", show_default="the checkpoint's")]
CacheDir = Annotated[str | None, typer.Option(help="Folder of downloads.", show_default="the Hub's own")]
Token = Annotated[str | None, typer.Option(help="Access token of the Hub.", show_default="the one that is stored")]
Option = Annotated[list[str] | None, typer.Option(help="NAME=VALUE, for any option of the mechanism.")]
Streaming = Annotated[
    bool | None,
    typer.Option(
        "--streaming/--no-streaming",
        help="Leave weights in their files and write them one by one, in the memory of one layer; the same command goes on "
        "after an interruption. Or load them.",
        show_default="by size",
    ),
]
MaxShardSize = Annotated[str, typer.Option(help="Largest file of weights.")]
Texts = Annotated[
    Path | None,
    typer.Option(
        help=".txt with one text per line, or .jsonl.", show_default="sample text from Python's documentation"
    ),
]
TRAINING_PACKAGES = ("accelerate", "datasets", "evaluate", "peft")
is_quiet = ContextVar("is_quiet", default=False)


@contextmanager
def running() -> Iterator[None]:
    """Errors become one message on stderr and exit code 1; stdout stays free for the result."""

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        typer.echo(f"warning: {message}", err=True)

    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
            warnings.showwarning = show
            stream = nowhere if is_quiet.get() else sys.stderr
            with redirect_stdout(stream), redirect_stderr(stream), _logged(), terminable(), write_errors("the result"):
                yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        if isinstance(error, ImportError) and any(name in str(error) for name in TRAINING_PACKAGES):
            typer.echo("training needs further packages: pip install 'hf-efficient[train]'", err=True)
        raise typer.Exit(1) from None


class _Echo(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


@contextmanager
def _logged() -> Iterator[None]:
    """What the package logs looks like the command's own messages, instead of transformers'."""
    logger, handler = logging.getLogger("transformers.hf_efficient"), _Echo()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def emit(document: Any, as_json: bool, title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """The result on stdout: one JSON document, or a table; a paragraph for each row where a table would break words."""
    if as_json:
        from hf_efficient.profiling.json_files import json_text

        typer.echo(json_text(document, default=str))
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    # in a file or a pipe there is no window to fit into
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    console = Console(markup=False, highlight=False, emoji=False, width=width)
    texts = [[as_text(value) for value in row] for row in rows]
    longest = [max(map(len, " ".join(column).split()), default=0) for column in zip(columns, *texts, strict=True)]
    if sum(longest) + 3 * len(columns) + 1 > console.width:
        console.print(title)
        for first, *others in texts:
            console.print(first)
            for column, text in zip(columns[1:], others, strict=True):
                console.print(Padding(f"{column}: {text}", (0, 0, 0, 4)))
        return
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in texts:
        table.add_row(*row)
    console.print(table)


def require_source(name: str) -> None:
    """A mistyped folder is refused before the Hub is asked for a repository of that name."""
    if Path(name).exists():
        return
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith("/"):
        raise FileNotFoundError(f"{name} does not exist.")
    parent = Path(name).parent
    if parent != Path(".") and parent.is_dir():
        raise FileNotFoundError(f"{name} does not exist, but the folder {parent} does.")
