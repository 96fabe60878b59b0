"""`hf-efficient list` and `hf-efficient inspect`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Annotated

import typer

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
    mechanism: Annotated[str | None, typer.Argument(help="Show the options of this one.", show_default="all")] = None,
    as_json: Json = False,
) -> None:
    """Show every mechanism: where it works, what it costs, when it is exact; or one mechanism's options."""
    with running():
        from hf_efficient.attention.base.registry import describe, get_mechanism, list_mechanisms, training_words

        if mechanism is not None:
            card, config = describe(mechanism), get_mechanism(mechanism).Config
            meanings = _meanings(config)
            hints = {field.name: str(field.type) for field in dataclasses.fields(config)}
    if mechanism is not None:
        title = f"{mechanism}: {card['title']}, {card['paper']}; {training_words(mechanism)}"
        options = [[flag(name), hints[name], card["options"][name], meanings.get(name)] for name in hints]
        emit(card, as_json, title, ["option", "type", "default", "meaning"], options)
        return
    cards = [describe(name) for name in list_mechanisms()]
    rows = [
        [
            card["mechanism"],
            f"{card['title']}, {card['paper']}",
            f"{card['time']}; {card['memory']}",
            card["causal"],
            card["relative_bias"],
            card["exact_when"],
            training_words(card["mechanism"]),
        ]
        for card in cards
    ]
    headings = ["mechanism", "paper", "time; memory", "causal", "T5 bias", "exact at n tokens when", "training"]
    emit(cards, as_json, f"{len(cards)} mechanisms", headings, rows)


def _meanings(config: type) -> dict[str, str]:
    """What the docstrings of a config class and its bases say of each field."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        entries = re.findall(r"^    ([a-z_, ]+): (.+(?:\n {8}.+)*)", inspect.getdoc(cls) or "", re.MULTILINE)
        found |= {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
    return found


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
