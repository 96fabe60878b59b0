"""Tables of the recall tasks, from the record of `hf-efficient bench suite`."""

from __future__ import annotations

from typing import Any

from hf_efficient.benchmarks.suite.run import CONTROL
from hf_efficient.benchmarks.suite.tables import HEADINGS, block_rows, needle_rows, task_name
from hf_efficient.cards.markdown import table


def tasks(data: dict[str, Any], mechanism: str | None = None) -> str | None:
    """Accuracy of every stage on every task, of all mechanisms or of one beside its controls; `None` = it was not run."""
    parts = []
    for block in data["tasks"]:
        if block["validity"] is None:  # the run was ended before this task
            continue
        rows = [row for row in block["rows"] if mechanism is None or _stands_by(row["attention"], mechanism)]
        if mechanism is not None and not any(_is_of(row["attention"], mechanism) for row in rows):
            continue
        failed = "" if block["validity"]["passed"] else " The task is not valid here: this table ranks nothing."
        lines = block_rows(block | {"rows": rows}, italics="*")
        parts.append(table([task_name(block["task"]), *HEADINGS[1:]], lines) + failed)
    return "\n\n".join(parts) or None


def _is_of(attention: Any, mechanism: str) -> bool:
    return bool(attention) and attention.get("mechanism") == mechanism


def _stands_by(attention: Any, mechanism: str) -> bool:
    return attention is None or attention == CONTROL or _is_of(attention, mechanism)


def remarks(data: dict[str, Any]) -> str:
    """What was held equal, and what the columns are."""
    settings = data["settings"]
    return (
        f"Accuracy after S = {settings['steps']} steps of {settings['batch']} rows (transfer has half of them), learning "
        f"rate {settings['learning_rate']:g}, {settings['test_rows']} test rows. keys: keys per query; reach: share of the "
        "questions whose answer the pattern shows. *Italics*: no better than the control or the best rule. The models begin "
        "with the circuit that the task needs, so their attention is sharp: kernels and low rank meet their worst case."
    )


def listops(data: dict[str, Any]) -> str:
    """How far rules get in ListOps, which is why it ranks nothing."""
    rules = (data.get("listops") or {}).get("rules", {})
    told = ", ".join(f"{name} {value:.3f}" for name, value in rules.items())
    return f"ListOps of Long Range Arena, by rules that read one level of brackets at most: {told}." if told else ""


def needles(data: dict[str, Any]) -> str | None:
    """Accuracy of untrained conversions by the depth at which the pair stands; `None` = it was not run."""
    header, rows = needle_rows(data)
    return table(header, rows) if rows else None
