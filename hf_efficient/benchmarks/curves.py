"""Recorded times over length, drawn: one line per model, one picture per kind of run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_efficient.training.plots import require_pyplot


def draw_curves(document: dict[str, Any], path: Path, panels: Sequence[str]) -> None:
    """Time ÷ that of full attention over tokens, as a PNG; the spread of all rounds as a band.

    Args:
        document: its results have a `model`, `tokens`, `ratio`, `ratio_min` and `ratio_max`.
        panels: fields by which results go to pictures of their own.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    pyplot = require_pyplot()
    results = document["results"]
    places = list(dict.fromkeys(tuple(row[name] for name in panels) for row in results))
    names = list(dict.fromkeys(row["model"] for row in results))
    figure, grid = pyplot.subplots(1, len(places), figsize=(5.4 * len(places), 4.6), squeeze=False)
    for axes, place in zip(grid[0], places, strict=True):
        for number, name in enumerate(names):
            rows = [row for row in results if row["model"] == name and tuple(row[p] for p in panels) == place]
            if rows:
                tokens = [row["tokens"] for row in rows]
                axes.plot(tokens, [row["ratio"] for row in rows], marker=".", label=name, color=f"C{number}")
                low, high = ([row[key] for row in rows] for key in ("ratio_min", "ratio_max"))
                axes.fill_between(tokens, low, high, alpha=0.15, color=f"C{number}")
        lengths = sorted({row["tokens"] for row in results})
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time ÷ full attention")
        axes.set_title(", ".join(f"{name} {value}" for name, value in zip(panels, place, strict=True)), fontsize=10)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        axes.set_yticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5, 10], [str(t) for t in ticks])
        axes.grid(alpha=0.3)
    handles = {
        label: handle for axes in grid[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    hardware, settings = document["hardware"], document["settings"]
    figure.suptitle(f"{document['suite']}: {hardware['cpu']}, {settings['threads']} thread", fontsize=9)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)
