"""Pictures of a run: loss over steps, and the error of every layer before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def require_pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files.

    Raises:
        ImportError: it is missing; names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'hf-efficient[recipes]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def loss_curve(
    log_history: Sequence[Mapping[str, Any]], path: str | Path, levels: Mapping[str, float] | None = None
) -> None:
    """Training and evaluation loss over optimiser steps, as a PNG.

    Args:
        log_history: the Trainer's `state.log_history`.
        levels: {name: loss} drawn as horizontal lines, e.g. the loss before training.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    pyplot = require_pyplot()
    figure, axes = pyplot.subplots(figsize=(6.4, 4), constrained_layout=True)
    for key, name in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=name)
    for number, (name, loss) in enumerate((levels or {}).items()):
        axes.axhline(loss, linestyle=(0, (4, 2 + number)), linewidth=1, color=f"C{number + 2}", label=name)
    axes.set(xlabel="optimiser step", ylabel="loss, nats per token", title="Loss")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)


def layer_picture(errors: Mapping[str, Mapping[str, Sequence[Any]]], path: str | Path) -> None:
    """Relative error of every converted layer against full attention, beside the controls, as a PNG.

    Args:
        errors: {"before" | "after": what `layer_errors` returns}; of the controls those of the last entry are drawn.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    pyplot = require_pyplot()
    last = list(errors.values())[-1]
    places = range(len(last["layers"]))
    figure, axes = pyplot.subplots(figsize=(max(4.8, 0.6 * len(places) + 2.4), 4), constrained_layout=True)
    rows = {when: found["mechanism"] for when, found in errors.items()}
    width = 0.8 / len(rows)
    for number, (when, values) in enumerate(rows.items()):
        axes.bar([i + (number + 0.5) * width - 0.4 for i in places], values, width, label=when)
    controls = [name for name in last if name not in ("layers", "mechanism")]
    for number, name in enumerate(controls):
        heights = [float("nan") if value is None else value for value in last[name]]
        axes.plot(places, heights, "_", markersize=22, markeredgewidth=2, color=f"C{len(rows) + number}",
                  label=f"control: {name}")  # fmt: skip
    axes.set_xticks(places, [str(i) for i in places])
    axes.set(
        xlabel="converted layer", ylabel="relative error of the output", title="Against full attention, layer by layer"
    )
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)
