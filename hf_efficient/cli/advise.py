"""`hf-efficient advise`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_efficient.cli.common import (
    CacheDir,
    Checkpoint,
    Dtype,
    ModelClass,
    Revision,
    Subfolder,
    Texts,
    Token,
    emit,
    require_source,
    running,
)
from hf_efficient.cli.options import read_texts


def advise(
    source: Checkpoint,
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 2048,
    texts: Texts = None,
    budget: Annotated[
        float, typer.Option(help="Seconds; when they are over, the advice is from what is there.")
    ] = 600.0,
    max_time: Annotated[
        float | None, typer.Option(help="Largest time ratio to full attention.", show_default="0.97")
    ] = None,
    target: Annotated[
        float, typer.Option(help="Share of what the model loses without attention that must be won back.")
    ] = 0.95,
    candidate: Annotated[
        list[str] | None, typer.Option(help="Only this mechanism, or its JSON; repeat it.", show_default="all")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="How positions are lengthened, as for convert.", show_default="the usual way")
    ] = None,
    untrained_only: Annotated[
        bool, typer.Option("--untrained-only", help="Leave out mechanisms that need training.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on even where attention takes hardly any of the time.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Picture of time and loss to write, a PNG.")] = None,
    record: Annotated[
        Path | None,
        typer.Option("--json", help="JSON file of all measurements to write; with one that is there, go on."),
    ] = None,
    seed: int = 0,
    revision: Revision = None,
    subfolder: Subfolder = None,
    model_class: ModelClass = None,
    dtype: Dtype = None,
    cache_dir: CacheDir = None,
    token: Token = None,
) -> None:
    """Measure which mechanism suits a checkpoint, on its own weights, and say which one and how to convert to it."""
    with running():
        require_source(source)
        from hf_efficient.advice.advice import TEXTS
        from hf_efficient.advice.advise import advise as measure
        from hf_efficient.training.plots import require_pyplot

        if out is not None:
            require_pyplot()
        documents = None if texts is None else read_texts(texts)
        places: dict[str, Any] = dict(revision=revision, subfolder=subfolder, model_class=model_class, dtype=dtype)
        places |= dict(cache_dir=cache_dir, token=token)
        found = measure(
            source,
            length,
            documents,
            budget,
            max_time,
            target,
            candidate or None,
            positions=positions,
            untrained_only=untrained_only,
            force=force,
            record=record,
            seed=seed,
            **places,
        )
        if texts is not None:
            words = [shlex.split(command) for command in found.commands]
            found.commands = [shlex.join(str(texts) if word == TEXTS else word for word in one) for one in words]
        if out is not None:
            found.draw(out)
    typer.echo(found.text + (" (partial: the budget was used up)" if found.partial else ""))
    for command in found.commands:
        typer.echo(f"    {command}")
    if found.floor is not None:
        typer.echo(f"floor: no mechanism takes less than {found.floor:.2f} of the time of full attention")
    for remark in found.remarks():
        typer.echo(remark)
    if found.front:
        title = f"measured on texts that {'it' if found.partial else 'nothing'} was chosen by"
        emit(None, False, title, *found.table())
