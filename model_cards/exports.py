"""The table of recorded exports: what each class of transformers was measured to differ by."""

from __future__ import annotations

from typing import Any

from hf_efficient.cards.markdown import table

HEADINGS = [
    "target",
    "from",
    "setting",
    "tokens",
    "largest error",
    "same argmax",
    "missing, unexpected keys",
    "imported again",
    "tensors of the original that a revert does not give back",
]


def export_table(data: dict[str, Any] | None) -> str:
    """Target × model × setting: the worst of all lengths, with padding and without."""
    if data is None:
        return "not measured"
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in data["rows"]:
        checkpoint = f" ({row['checkpoint']})" if "checkpoint" in row else ""
        setting = ", ".join(str(v) if k == "mechanism" else f"{k}={v}" for k, v in row["attention"].items())
        groups.setdefault((row["target"], row["model_class"] + checkpoint, setting), []).append(row)
    body = [[f"`{name[0]}`", *name[1:], *_figures(rows)] for name, rows in groups.items()]
    versions = ", ".join(f"{name} {data['versions'][name]}" for name in ("torch", "transformers"))
    return (
        table(HEADINGS, body)
        + "\n\nTiny random models of two layers, trained (random) parameters of the mechanism, and a real BERT of 12 layers "
        "where one is named. Largest difference of a real token's output over the largest output, in single precision; "
        f"where that is rounding alone, in double. `stock` is compared with full attention, `nystromformer` with "
        f'`pinv_init="batch"`. {data["hardware"]["cpu"]}; {versions}; `hf-efficient bench export`.'
    )


def _figures(rows: list[dict[str, Any]]) -> list[str]:
    lengths = ", ".join(str(n) for n in sorted({row["length"] for row in rows}))
    agreement = [row["argmax_agreement"] for row in rows if row["argmax_agreement"] is not None]
    first = rows[0]
    back, unlike = first["import_error"], first.get("unlike_original")
    return [
        lengths,
        f"{max(row['error'] for row in rows):.1e}",
        f"{min(agreement):.2%}" if agreement else "–",
        f"{first['missing']}, {first['unexpected']}",
        "–" if back is None else f"{back:.1e}",
        "–" if unlike is None else str(unlike),
    ]
