"""Tables and pictures of the suite's record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_efficient.attention.base.registry import attention_configs, get_mechanism
from hf_efficient.training.plots import require_pyplot

STAGES = ("converted", "finetuned", "transferred", "transferred, finetuned")
HEADINGS = ["task", "attention", "keys", "time ratio", "reach", *STAGES]


def name_of(attention: dict[str, Any] | None) -> str:
    """A mechanism with the options that its cost depends on, for people."""
    if attention is None:
        return "dense"
    if "control" in attention:
        return f"control: {attention['control']}"
    config = get_mechanism(attention["mechanism"]).Config
    default = config().to_dict()
    own = {k: v for k, v in attention.items() if k != "mechanism" and isinstance(v, int)}
    shown = [v for k, v in own.items() if k in config.shares or v != default.get(k)]
    return " ".join([attention["mechanism"], "/".join(map(str, shown))]).strip()


def controlled_by(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """{a setting: names of those that it is the control of, being what is left of them without what they learn}."""
    found: dict[str, list[str]] = {}
    for attention in {str(row["attention"]): row["attention"] for row in rows}.values():
        if attention is not None and "control" not in attention:
            config = attention_configs(attention)[0]
            control = config.attention_class.control_config(config)
            if control is not None:
                found.setdefault(str(control.to_dict()), []).append(name_of(attention))
    return found


def suite_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people: accuracy of every mechanism and stage, task after task."""
    return HEADINGS, [[block_name(block), *row] for block in document["tasks"] for row in block_rows(block)]


def task_name(task: dict[str, Any]) -> str:
    return f"{task['name']} {task['family']} {task['n']}"


def block_name(block: dict[str, Any]) -> str:
    """The task, and whether it fails to tell mechanisms apart."""
    validity = block["validity"]
    return task_name(block["task"]) + (", validity: failed" if validity and not validity["passed"] else "")


def block_rows(block: dict[str, Any], italics: str = "") -> list[list[Any]]:
    """One line per setting, then the rules; a row that beats neither control nor rules stands between `italics`."""
    figures: dict[str, dict[str, Any]] = {}
    for figure in block["summary"]:
        figures.setdefault(str(figure["attention"]), {})[figure["stage"]] = figure
    floor, owners = _floor(block), controlled_by(block["rows"])
    lines: list[list[Any]] = []
    for row in block["rows"]:
        stages = figures.pop(str(row["attention"]), None)
        if stages is None:  # of a further seed
            continue
        best = max(figure["mean"] for figure in stages.values())
        is_low = row["attention"] is not None and "control" not in row["attention"] and best <= floor
        name = name_of(row["attention"])
        if str(row["attention"]) in owners:
            name += f", the control of {', '.join(owners[str(row['attention'])])}"
        figures_of = ((row["keys_per_query"], ".0f"), (row.get("time_ratio"), ".2f"), (row["reach"], ".3f"))
        cells = [name, *("–" if value is None else format(value, digits) for value, digits in figures_of)]
        start = stages.get("converted") or stages["dense"]
        cells += [_cell(stages.get(stage), start) if stage in stages else "–" for stage in STAGES]
        if row["attention"] is None:
            cells[4] = _cell(start, start)
        lines.append([f"{italics}{cell}{italics}" if is_low and cell != "–" else cell for cell in cells])
    lines += [[f"rule: {name}", "0", "–", "–", f"{value:.3f}", *["–"] * 3] for name, value in block["rules"].items()]
    return lines


def _floor(block: dict[str, Any]) -> float:
    controls = [f["mean"] for f in block["summary"] if f["attention"] and "control" in f["attention"]]
    return max([*controls, *block["rules"].values()], default=0.0)


def _cell(figure: Any, start: Any) -> str:
    """Mean (min–max); "=" where it differs from what it started from by less than the wider range."""
    if figure is None:
        return "–"
    if figure["seeds"] == 1:
        return f"{figure['mean']:.3f}"
    wider = max(one["max"] - one["min"] for one in (figure, start))
    if figure is not start and abs(figure["mean"] - start["mean"]) < wider:
        return "="
    return f"{figure['mean']:.3f} ({figure['min']:.3f}–{figure['max']:.3f})"


def needle_rows(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Accuracy of untrained conversions by the depth at which the pair stands."""
    rows = [
        [task_name(block["task"]), name_of(row["attention"]), *(f"{v:.2f}" for v in row["depth"].values())]
        for block in document["tasks"]
        for row in block["rows"]
        if row["seed"] == 0 and "depth" in row
    ]
    depths = next((list(r["depth"]) for b in document["tasks"] for r in b["rows"] if "depth" in r), [])
    return ["task", "attention", *(f"depth {depth}" for depth in depths)], rows


def draw_suite(document: dict[str, Any], path: Path) -> None:
    """Accuracy over keys per query, a panel for each task, with the front and the controls; and needles by depth.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    pyplot = require_pyplot()
    blocks, (headings, needles) = document["tasks"], needle_rows(document)
    count = len(blocks) + bool(needles)
    figure, grid = pyplot.subplots(1, count, figsize=(4.6 * count, 4.6), squeeze=False)
    for axes, block in zip(grid[0], blocks, strict=False):
        _draw_front(axes, block)
    if needles:
        axes, values = grid[0][-1], [[float(v) for v in row[2:]] for row in needles]
        axes.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(needles)), [f"{row[0]}: {row[1]}" for row in needles], fontsize=6)
        axes.set_xticks(range(len(headings) - 2), [heading.split()[-1] for heading in headings[2:]])
        axes.set_title("needle, untrained, by depth", fontsize=9)
    figure.suptitle(f"suite, {document['run']}: accuracy over keys per query", fontsize=9)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def _draw_front(axes: Any, block: dict[str, Any]) -> None:
    points = []
    for figure in block["summary"]:
        row = next(row for row in block["rows"] if row["attention"] == figure["attention"])
        if figure["attention"] and "control" not in figure["attention"] and row["keys_per_query"]:
            points.append((row["keys_per_query"], figure))
    best: dict[str, tuple[float, Any]] = {}
    for keys, figure in points:
        name = str(figure["attention"])
        if name not in best or figure["mean"] > best[name][1]["mean"]:
            best[name] = (keys, figure)
    for keys, figure in best.values():
        low, high = figure["mean"] - figure["min"], figure["max"] - figure["mean"]
        axes.errorbar(keys, figure["mean"], yerr=[[low], [high]], marker="o", markersize=4)
        axes.annotate(name_of(figure["attention"]), (keys, figure["mean"]), fontsize=6)
    front: list[tuple[float, float]] = []
    top = -1.0
    for keys, figure in sorted(best.values(), key=lambda point: (point[0], -point[1]["mean"])):
        if figure["mean"] > top:
            top = figure["mean"]
            front.append((keys, top))
    if front:
        axes.step(*zip(*front, strict=True), where="post", color="grey", linewidth=0.8)
    axes.axhline(_floor(block), color="red", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", ylim=(-0.05, 1.08), xlabel="keys per query")
    axes.set_title(block_name(block), fontsize=9)
