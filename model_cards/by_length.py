"""Tables of untrained fidelity by length on real checkpoints, from their record."""

from __future__ import annotations

from typing import Any

from hf_efficient.cards.markdown import table

CONTROL = "control"


def _figures(row: dict[str, Any]) -> list[str]:
    """Token cosine, error of the last states, KL and agreement of the head; – = the model has no head."""
    if "error" in row:
        return ["–"] * 4
    mean = row["mean"]
    agreement = next((mean[name] for name in mean if name.endswith("_agreement")), None)
    values = (mean["token_cosine"], mean["states"], mean.get("kl"), agreement)
    return ["–" if value is None else f"{value:.3f}" for value in values]


HEADINGS = ["token cosine", "error of states", "KL, nats", "agreement"]


def card_table(data: dict[str, Any], mechanism: str) -> str | None:
    """The rows of one mechanism and the control's at their lengths; `None` = it has none."""
    found = []
    for row in data["rows"]:
        is_control = row["name"] == CONTROL
        own = [one for one in data["rows"] if _is_of(one, mechanism) and _place(one) == _place(row)]
        if own and (is_control or row in own):
            name = (
                "control: mean of values" if is_control else row["name"].removeprefix(mechanism).strip() or "default"
            )
            keys = "–" if row["keys_per_query"] is None else f"{row['keys_per_query']:.0f}"
            found.append([row["checkpoint"], row["length"], name, keys, *_figures(row)])
    if not found:
        return None
    return table(["checkpoint", "tokens", "setting", "keys per query", *HEADINGS], found)


def _is_of(row: dict[str, Any], mechanism: str) -> bool:
    return row["attention"] is not None and row["attention"][0]["mechanism"] == mechanism


def _place(row: dict[str, Any]) -> tuple[str, int]:
    return row["checkpoint"], row["length"]


def overview(data: dict[str, Any]) -> str:
    """One table per checkpoint: settings by rows, lengths by columns; the loss that counts, and the time ratio."""
    parts = []
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["checkpoint"] == checkpoint and "error" not in row]
        lengths = sorted({row["length"] for row in rows})
        loss = "kl" if "kl" in rows[0]["mean"] else "states"
        title = {"kl": "KL, nats", "states": "error of states"}[loss]
        found: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for row in rows:
            name = "control: mean of values" if row["attention"] is None else f"`{row['attention'][0]['mechanism']}`"
            found.setdefault(name, {}).setdefault(row["length"], []).append(row)
        cells = []
        for name, by_length in found.items():
            cells.append([name, *(_best(by_length.get(length, []), loss) for length in lengths)])
        parts.append(
            table([f"{checkpoint}: {title}, cheaper / dearer setting", *(f"{n} tokens" for n in lengths)], cells)
        )
    return "\n\n".join(parts)


def _best(rows: list[dict[str, Any]], loss: str) -> str:
    """The least loss of the settings at each cost, the cheaper first, with the time ratio."""
    costs: list[list[dict[str, Any]]] = []
    for row in sorted(rows, key=_keys):
        # costs are a factor of two apart
        if costs and _keys(row) <= 2**0.5 * _keys(costs[-1][0]):
            costs[-1].append(row)
        else:
            costs.append([row])
    best = [min(same, key=lambda row: row["mean"][loss]) for same in costs]
    return " / ".join(f"{row['mean'][loss]:.3f} (×{row['time_ratio']:.2f})" for row in best) or "–"


def _keys(row: dict[str, Any]) -> float:
    return row["keys_per_query"] or 0.0


def remarks(data: dict[str, Any]) -> str:
    """What the figures are, and what they came from."""
    sources = "; ".join(
        f"{name}: {one['package']} {one['version']}, {one['licence']}" for name, one in data["sources"].items()
    )
    settings = data["settings"]
    return (
        "All layers, nothing trained, against full attention at the same length, at about an eighth and a quarter of its "
        f"keys per query; {settings['tokens']} tokens of text for each row (at least 2 texts). Times are CPU time on a "
        f"machine that did other work too, so only large differences mean something. {sources}."
    )
