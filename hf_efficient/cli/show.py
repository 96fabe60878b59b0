"""`hf-efficient show`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from hf_efficient.cli import catalogue
from hf_efficient.cli.common import Json, Option, running
from hf_efficient.cli.options import GIVEN, MechanismCommand, chosen_configs, refuse_strays


def show(
    context: typer.Context,
    mechanism: Annotated[
        str,
        typer.Argument(
            help="A mechanism that is a pattern, with its options, see hf-efficient list NAME; or one as JSON.",
            autocompletion=catalogue.complete_pattern,
        ),
    ],
    length: Annotated[int, typer.Option(help="Tokens.")] = 1024,
    causal: Annotated[bool, typer.Option("--causal", help="A decoder's layer: nobody sees later tokens.")] = False,
    num_heads: Annotated[int, typer.Option(help="Heads of the layer.")] = 12,
    layer: Annotated[int, typer.Option(help="Which layer, from 0.")] = 0,
    num_layers: Annotated[int, typer.Option(help="Layers of the stack.")] = 12,
    out: Annotated[Path | None, typer.Option(help="Also write the picture to this file, as PNG.")] = None,
    option: Option = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file, if there is one.")] = False,
    as_json: Json = False,
) -> None:
    """Draw what sees what, with the number of pairs and tiles: one panel for each kind of head."""
    with running():
        from hf_efficient.attention.base.pattern import SHARED_OPTIONS
        from hf_efficient.attention.base.registry import list_mechanisms
        from hf_efficient.visualize.show import show as draw
        from hf_efficient.visualize.visibility import require_drawable

        if mechanism in list_mechanisms():
            require_drawable(mechanism)
        refuse_strays(context, [mechanism], mechanism, ("MECHANISM",), SHARED_OPTIONS)
        configs = chosen_configs(mechanism, None, context.meta[GIVEN], option or [])
        picture = draw(
            configs, length=length, is_causal=causal, num_heads=num_heads, layer=layer, num_layers=num_layers
        )
        document = {"out": None if out is None else str(picture.save(out, overwrite)), **picture.facts}
    if as_json:
        from hf_efficient.profiling.json_files import json_text

        typer.echo(json_text(document))
        return
    typer.echo(str(picture))
    if out is not None:
        typer.echo(f"written to {out}")


class ShowCommand(MechanismCommand):
    """`show` takes the options that change a picture, of the mechanisms that have one."""

    def offered(self) -> tuple[Collection[str], Collection[str]]:
        drawable = [name for name, card in catalogue.cards().items() if card.is_pattern]
        return drawable, catalogue.shared_options()
