"""`hf-efficient list` and `hf-efficient inspect`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

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
from hf_efficient.cli.options import as_text, flag


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
        _say(card.facts, as_json, _one(card))
        return
    _say([card.facts for card in cards.values()], as_json, _all(cards))


def _say(document: Any, as_json: bool, lines: Iterable[str]) -> None:
    if as_json:
        emit(document, as_json, "", [], [])
        return
    for line in lines:
        typer.echo(line)


def _all(cards: dict[str, catalogue.Card]) -> Iterator[str]:
    """A line for each mechanism, by kind: how it starts, where it works, its time."""
    yield f"{len(cards)} mechanisms; hf-efficient list NAME: all of one"
    for kind in sorted({card.facts["kind"] for card in cards.values()}):
        yield f"\n{kind}"
        for name, card in cards.items():
            if card.facts["kind"] == kind:
                where = "causal too" if card.facts["causal"] else "encoders"
                yield f"  {name:20}{card.in_short:20}{where:12}{card.facts['time'].split(';')[0]}"


def _one(card: catalogue.Card) -> Iterator[str]:
    """The facts of a mechanism, and a paragraph for each option."""
    facts = card.facts
    yield f"{facts['mechanism']}: {facts['title']}, {facts['paper']}"
    says = {"kind": facts["kind"], "training": card.training, "exact when": facts["exact_when"]}
    says |= {"time, n tokens": facts["time"], "memory": facts["memory"]}
    says |= {"in decoders": "yes" if facts["causal"] else "no", "T5's bias": "yes" if facts["relative_bias"] else "no"}
    for what, text in says.items():
        yield from _wrapped(f"  {what:16}", text, 18)
    yield "\noptions"
    for name in card.types:
        yield from _wrapped("  ", f"{flag(name)} {card.types[name]}, default {as_text(facts['options'][name])}", 6)
        yield from _wrapped("      ", card.meanings.get(name, ""), 6)


def _wrapped(first: str, text: str, indent: int) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 100)
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(first + text, width, subsequent_indent=" " * indent, **options)


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
