"""The `hf-efficient` program: its commands, each in the file of its name.

No file here imports torch or transformers at its top, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hf_efficient.cli import common
from hf_efficient.cli.advise import advise
from hf_efficient.cli.bench import bench
from hf_efficient.cli.convert import convert, revert
from hf_efficient.cli.export import export, import_command
from hf_efficient.cli.inspect import inspect_command, list_command
from hf_efficient.cli.options import MechanismCommand
from hf_efficient.cli.show import ShowCommand, show
from hf_efficient.cli.training import card, distill
from hf_efficient.cli.upcycle import upcycle
from hf_efficient.cli.verify import verify

app = typer.Typer(
    name="hf-efficient",
    help="Convert pretrained BERT, RoBERTa, GPT-2 and T5 checkpoints to efficient attention, prove how close they "
    "stayed, and undo it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from hf_efficient._version import __version__

        typer.echo(f"hf-efficient {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress bars, warnings or logs: the result or an error.")
    ] = False,
) -> None:
    common.is_quiet.set(quiet)


# options of mechanisms that a command does not have are named by the command itself
MECHANISM = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command("advise")(advise)
app.command("convert", cls=MechanismCommand, context_settings=MECHANISM)(convert)
app.command("verify")(verify)
app.command("revert")(revert)
app.command("export")(export)
app.command("import")(import_command)
app.command("list")(list_command)
app.command("inspect")(inspect_command)
app.command("show", cls=ShowCommand, context_settings=MECHANISM)(show)
app.command("bench")(bench)
app.command("card")(card)
app.command("distill")(distill)
app.command("upcycle")(upcycle)


def main() -> None:
    """Entry point of `python -m hf_efficient.cli`."""
    app()
