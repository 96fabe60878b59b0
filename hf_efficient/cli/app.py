"""The `hf-efficient` program: its commands, each in the file of its name.

No file here imports torch or transformers at its top, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

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
    help="Convert pretrained transformers to efficient attention, prove how close they stayed, and undo it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
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
MECHANISM: dict[str, Any] = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}
BERT = "google-bert/bert-base-uncased"


def _add(name: str, function: Callable[..., Any], short: str, example: str, **more: Any) -> None:
    epilog = f"Example: hf-efficient {name} {example}"
    app.command(name, short_help=short, epilog=epilog, **more)(function)


_add("advise", advise, "Measure which mechanism suits a checkpoint.", f"{BERT} --length 2048")
_add("convert", convert, "Convert a checkpoint to efficient attention.",
     f"{BERT} long-bert --attention longformer --max-positions 4096", cls=MechanismCommand, **MECHANISM)  # fmt: skip
_add("verify", verify, "Check a converted checkpoint against its source.", f"long-bert {BERT}")
_add("revert", revert, "Write the original checkpoint back.", "long-bert bert-again")
_add("export", export, "Write a class of transformers, or a graph.", "long-bert longformer-bert --to longformer")
_add("import", import_command, "Convert a Longformer, LED, LongT5 or BigBird.", "allenai/longformer-base-4096 roberta")
_add("list", list_command, "Show all mechanisms, or one with its options.", "longformer")
_add("inspect", inspect_command, "Show what a checkpoint uses, layer by layer.", "long-bert")
_add("show", show, "Draw which keys each query sees.", "longformer --length 1024 --global-tokens first",
     cls=ShowCommand, **MECHANISM)  # fmt: skip
_add("bench", bench, "Measure time, memory, fidelity or recall.", "encoder --lengths 512,4096 --out encoder.json")
_add("card", card, "Write a checkpoint's model card.", "long-bert")
_add("distill", distill, "Teach mechanisms what full attention does.", "hedgehog-bert recovered --steps 200")
_add("upcycle", upcycle, "Turn feed-forward layers into experts.", f"{BERT} bert-8-experts --num-experts 8")


def main() -> None:
    """Entry point of `python -m hf_efficient.cli`."""
    app()
