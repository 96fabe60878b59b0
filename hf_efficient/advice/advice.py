"""What `advise` found: the choice in words, the commands that make it, the figures behind it, and a picture."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_efficient.advice.candidates import Candidate
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.json_files import finite
from hf_efficient.training.plots import require_pyplot

PROTOCOL = 1
SOURCE, TEXTS = "SOURCE", "TEXTS"
"""Stand in commands for the checkpoint of a loaded model that has no name, and for the file of the caller's texts."""
END_TO_END_STEPS = 100


@dataclass
class Advice:
    """Which mechanism to convert a checkpoint to, and what that rests on.

    Attributes:
        attention: what `convert` takes; `None` = keep full attention.
        reaches_target: it removes the wanted share of the control's loss as it is; else it is the nearest, to be trained.
        text: the choice in words. commands: of `hf-efficient`, in order, that carry it out.
        loss: name of the figure that counts, see `LOSSES`.
        floor: time ratio of the control, attention that computes the mean of all values: no mechanism takes less.
        front: candidates to which no other is preferable, the cheapest first, measured on texts that nothing was chosen by
            (if `partial`, on those that it was chosen by): `name`, `attention`, `keys_per_query`, `time_ratio`, `peak_mb`,
            `loss`, `loss_share` of the control's loss with `loss_share_min` and `_max` over texts, `needs_training`.
        partial: the budget was used up before the end: the advice is from what was measured until then.
        left: candidates left after each round. skipped: what was left out, and why.
        refused: {mechanism: why it can't work in this model}. errors: {candidate: what it failed with}.
        settings: what the measurements depend on. rows: all measurements, text by text.
    """

    text: str
    attention: list[dict[str, Any]] | None = None
    reaches_target: bool = False
    commands: list[str] = field(default_factory=list)
    loss: str | None = None
    floor: float | None = None
    front: list[dict[str, Any]] = field(default_factory=list)
    partial: bool = False
    left: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with hardware and versions."""
        facts: dict[str, Any] = {"suite": "advise", "protocol": PROTOCOL}
        return finite(facts | asdict(self) | {"hardware": hardware(), "versions": versions()})

    def __str__(self) -> str:
        lines = [self.text, *(f"    {command}" for command in self.commands)]
        if self.floor is not None:
            lines.append(f"floor: no mechanism takes less than {self.floor:.2f} of the time of full attention")
        for row in self.front:
            lines.append(
                f"×{row['time_ratio']:.2f}  loses {row['loss_share']:.3f} of the control's loss  {row['name']}"
            )
        return "\n".join([*lines, *self.remarks()])

    def remarks(self) -> list[str]:
        """What was left out, and what failed, a line each."""
        return [*self.skipped, *(f"{name} failed: {why}" for name, why in self.errors.items())]

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Headings and rows of the front, for people."""
        headings = [
            "setting",
            "keys per query",
            "time ratio",
            "memory (MB)",
            "share of the control's loss",
            "training",
        ]
        return headings, [
            [
                row["name"],
                row["keys_per_query"],
                round(row["time_ratio"], 3),
                row["peak_mb"],
                f"{row['loss_share']:.3f} ({row['loss_share_min']:.3f}–{row['loss_share_max']:.3f})",
                "needed" if row["needs_training"] else "not needed",
            ]
            for row in self.front
        ]

    def draw(self, path: str | Path) -> None:
        """The front in time and in loss removed, with full attention and the control, as a PNG.

        Raises:
            ImportError: matplotlib is missing; names the extra.
        """
        pyplot = require_pyplot()
        figure, axes = pyplot.subplots(figsize=(7.5, 4.8), constrained_layout=True)
        times = [row["time_ratio"] for row in self.front]
        shares = [1 - row["loss_share"] for row in self.front]
        spread = [
            [max(0.0, row["loss_share_max"] - row["loss_share"]) for row in self.front],
            [max(0.0, row["loss_share"] - row["loss_share_min"]) for row in self.front],
        ]
        if self.front:
            axes.errorbar(times, shares, yerr=spread, marker="o", capsize=3)
        for row, x, y in zip(self.front, times, shares, strict=True):
            axes.annotate(row["name"], (x, y), textcoords="offset points", xytext=(6, -10), fontsize=8)
        axes.axhline(1, color="0.5", linewidth=1, linestyle="--")
        axes.axvline(1, color="0.5", linewidth=1, linestyle="--")
        axes.annotate("full attention", (1, 1), textcoords="offset points", xytext=(-4, 4), ha="right", fontsize=8)
        if self.floor is not None:
            axes.plot([self.floor], [0], marker="x", color="C3")
            axes.annotate("mean of values", (self.floor, 0), textcoords="offset points", xytext=(6, 2), fontsize=8)
        axes.set(xlabel="time ÷ full attention", ylabel="share of the control's loss removed")
        axes.set_title(f"{self.settings.get('model')}, {self.settings.get('length')} tokens", fontsize=10)
        figure.savefig(path, dpi=130, format="png")
        pyplot.close(figure)


def commands(
    source: Sequence[str],
    candidate: Candidate,
    length: int,
    texts: str | None,
    is_good_enough: bool,
) -> list[str]:
    """The conversion, and the training after it where that is needed.

    Args:
        source: the checkpoint, and options of `convert` that say which one it is and how long it becomes.
        length: tokens that it was measured at. texts: file of texts, or "corpus"; `None` = the model has
            no tokenizer, so that no command can read any.
    """
    attention = candidate.attention
    spec = attention[0] if len(attention) == 1 else attention
    name, *places = source
    words = ["hf-efficient", "convert", name, "OUT", *places, "--attention", json.dumps(spec)]
    words += ["--calibration", texts] if candidate.is_calibrated and texts else []
    found = [shlex.join(words)]
    if not is_good_enough and texts:
        given = [] if texts == "corpus" else ["--texts", texts]
        # the transfer layer by layer, which is before, trains what a mechanism adds, and some add nothing
        steps = ["--length", str(length), "--end-to-end-steps", str(END_TO_END_STEPS)]
        found.append(shlex.join(["hf-efficient", "distill", "OUT", "TRAINED", *given, *steps]))
    return found
