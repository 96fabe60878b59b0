"""`hf-efficient list` and `hf-efficient inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_efficient.cli import catalogue
from hf_efficient.cli.common import (
    CacheDir,
    Checkpoint,
    Json,
    ModelClass,
    Revision,
    Subfolder,
    Token,
    emit,
    require_source,
    running,
)
from hf_efficient.cli.options import flag


def list_command(
    mechanism: Annotated[
        str | None,
        typer.Argument(
            help="Show the options of this one.", show_default="all", autocompletion=catalogue.complete_mechanism
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show every mechanism: where it works, what it costs, when it is exact; or one mechanism's options."""
    cards = catalogue.cards()
    if mechanism is not None:
        if mechanism not in cards:
            with running():
                from hf_efficient.attention.base.registry import get_mechanism

                get_mechanism(mechanism)  # names the ones that look like it
        card = cards[mechanism]
        facts = card.facts
        title = f"{mechanism}: {facts['title']}, {facts['paper']}; {card.training}"
        options = [[flag(n), card.types[n], facts["options"][n], card.meanings.get(n)] for n in card.types]
        emit(facts, as_json, title, ["option", "type", "default", "meaning"], options)
        return
    rows = [
        [
            name,
            f"{card.facts['title']}, {card.facts['paper']}",
            f"{card.facts['time']}; {card.facts['memory']}",
            card.facts["causal"],
            card.facts["relative_bias"],
            card.facts["exact_when"],
            card.training,
        ]
        for name, card in cards.items()
    ]
    headings = ["mechanism", "paper", "time; memory", "causal", "T5 bias", "exact at n tokens when", "training"]
    emit([card.facts for card in cards.values()], as_json, f"{len(cards)} mechanisms", headings, rows)


def inspect_command(
    checkpoint: Checkpoint,
    revision: Revision = None,
    subfolder: Subfolder = None,
    model_class: ModelClass = None,
    cache_dir: CacheDir = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint uses layer by layer, and what an original could take; no weights are loaded."""
    with running():
        require_source(checkpoint)
        from hf_efficient.conversion.inspect import inspect_checkpoint, length_words

        place = dict(revision=revision, subfolder=subfolder, cache_dir=cache_dir, token=token)
        given = {name: value for name, value in place.items() if value is not None}
        facts = inspect_checkpoint(checkpoint, model_class, **given)
    layers, possible = facts["layers"], facts["mechanisms"]
    if as_json or facts["converted"]:
        columns = ["side", "layer", "mechanism", "options", "training"]
        rows = [[layer[name] for name in columns] for layer in layers]
        headings = ["side", "layer", "attention", "options", "training"]
    else:
        rows = [[p["side"], p["mechanism"], p["possible"], "; ".join(p["reasons"]), p["training"]] for p in possible]
        headings = ["side", "mechanism", "possible", "why not, with default options", "training"]
    length = length_words(facts["lengths"], facts["made_for"])
    title = f"{checkpoint}: {facts['model_class']}, {len(layers)} layers, {length}"
    if facts["experts"]:
        title += f", {facts['experts']['num_experts']} experts"
    emit(facts, as_json, title, headings, rows)
