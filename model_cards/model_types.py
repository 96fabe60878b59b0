"""The model types that convert, counted and as a table, from the recorded sweep."""

from __future__ import annotations

from typing import Any

from hf_efficient.benchmarks.sweep import REASONS
from hf_efficient.cards.markdown import table

MEANING = {
    "WINDOW": "its layers have windows that its config does not tell in one number",
    "MASK": "it makes masks of N × N itself, or of chunks, pictures or packed rows",
    "LOGITS": "its logits are capped, or share their softmax with sinks, in layers that can't be told",
    "BIAS": "it adds a dense bias",
    "KEYWORD": "it hands its layers something that is not honoured",
    "CAUSALITY": "its layers do not say whether they are causal as its masks do",
    "MLA": "values are of another width than keys",
    "SHARED": "layers share one module",
    "CACHE": "it keeps a cache of its own",
    "WEIGHTS": "its weights are not what they seem",
    "PROOF": "what was found in it could not be proved",
    "NO FAMILY": "transformers has no modeling file for it",
}


def model_types_table(record: dict[str, Any] | None) -> str:
    """Every model type of one release of transformers, by what happens to it."""
    if record is None:
        return "not measured"
    types: dict[str, dict[str, Any]] = record["types"]
    groups = [
        ("exact, by a family of its own", [k for k, v in types.items() if v["outcome"] == "exact" and v["written"]]),
        ("exact, proved on each model", [k for k, v in types.items() if v["outcome"] == "exact" and not v["written"]]),
        *(
            (f"refused: {MEANING[reason]}", [k for k, v in types.items() if v.get("reason") == reason])
            for reason in REASONS
        ),
        ("refused: its attention does not go through `AttentionInterface`", _of(types, "own attention code")),
        ("made of other model types, which count alone", _of(types, "composite")),
        ("not tried: no small random model of it runs", _of(types, "no tiny model")),
    ]
    rows = [[what, str(len(names)), _shown(what, names)] for what, names in groups if names]
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("hf_efficient", "torch", "transformers"))
    return table(["model types", "number", "which"], rows) + f"\n\n{len(types)} model types of {versions}."


def model_counts(record: dict[str, Any] | None) -> str:
    """One sentence: how many model types convert, and how many are refused."""
    if record is None:
        return "not measured"
    types: dict[str, dict[str, Any]] = record["types"]
    exact = [one for one in types.values() if one["outcome"] == "exact"]
    written = sum(bool(one["written"]) for one in exact)
    own = len(_of(types, "own attention code"))
    refused = len(_of(types, "refused"))
    return (
        f"{len(exact)} model types of transformers {record['versions']['transformers']} convert exactly, {written} of them "
        f"by a family of their own; {refused} are refused with a reason, {own} have attention code of their own."
    )


def _of(types: dict[str, dict[str, Any]], outcome: str) -> list[str]:
    return [name for name, one in types.items() if one["outcome"] == outcome]


def _shown(what: str, names: list[str]) -> str:
    return "see the record" if what.startswith(("made of", "not tried")) else ", ".join(f"`{name}`" for name in names)
