"""Visibility drawn: as text for the terminal, and as a matplotlib figure."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from typing import Any

import torch
from torch import Tensor

from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.attention.base.pattern import SHARED_OPTIONS
from hf_efficient.patterns.kinds import GlobalColumns, GlobalRows
from hf_efficient.patterns.pattern import Pattern, parts_of
from hf_efficient.patterns.random_blocks import BigBirdBlocks
from hf_efficient.patterns.sets import Without
from hf_efficient.visualize.visibility import Panel, Visibility

MOST_PANELS = 4
TERMINAL_CELLS, FIGURE_CELLS = 64, 256
SHADES = "░▒▓"
LABELS = {"Strided": "stride"}


def cell_size(length: int, most: int) -> int:
    """The smallest power of two that makes at most `most` cells of `length` tokens."""
    return 1 << (-(-length // most) - 1).bit_length()


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def head_names(heads: tuple[int, ...], num_heads: int) -> str:
    """`heads 0–5, 8`."""
    if len(heads) == num_heads:
        return f"all {num_heads} heads" if num_heads > 1 else "its only head"
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    names = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"head{'s' if len(heads) > 1 else ''} {names}"


def title(picture: Visibility) -> str:
    stack = "causal" if picture.geometry.is_causal else "encoder"
    return f"{_described(picture.config)}; {picture.length} tokens, {stack}, layer {picture.geometry.layer}"


def _described(config: EfficientAttentionConfig) -> str:
    """`longformer (attention_window 256, dilation 1)`, for people."""

    def plain(value: Any) -> str:
        if isinstance(value, tuple):
            return (" + " if isinstance(value[0], EfficientAttentionConfig) else " ").join(map(plain, value))
        return _described(value) if isinstance(value, EfficientAttentionConfig) else str(value)

    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in SHARED_OPTIONS}
    options = ", ".join(f"{name} {plain(value)}" for name, value in values.items() if value is not None)
    return f"{config.mechanism} ({options})"


# ---- terminal ----------------------------------------------------------------------------------------------------


def as_text(picture: Visibility) -> str:
    """Up to 64 × 32 characters for one head pattern; half of that, two side by side, for several."""
    cells = TERMINAL_CELLS if len(picture.panels) == 1 else TERMINAL_CELLS // 2
    width = cell_size(picture.length, cells)
    # a character is twice as high as wide: it takes two rows, or a pair takes two characters
    height, repeat = (2 * width, 1) if 2 * picture.length > cells else (1, 2)
    boxes = [_box(picture, panel, height, width, repeat) for panel in picture.panels[:MOST_PANELS]]
    lines = [title(picture)]
    for at in range(0, len(boxes), 2):
        lines += ["  ".join(pair) for pair in zip(*boxes[at : at + 2], strict=True)]
    unit = f"one character = {height} × {width} pairs" if repeat == 1 else "two characters = one pair"
    lines.append(f"queries ↓ keys →, {unit}: ░ under 1/3 of them visible, ▒ under 2/3, ▓ more, █ all")
    return "\n".join(line.rstrip() for line in [*lines, *_figures(picture)])


def _box(picture: Visibility, panel: Panel, height: int, width: int, repeat: int) -> list[str]:
    shares = picture.shares(panel.pattern, height, width).tolist()
    rows = ["".join(shade(share) * repeat for share in row) for row in shares]
    edge = "─" * len(rows[0])
    heading = f"{head_names(panel.heads, picture.geometry.num_heads)}: {percent(panel.pairs / picture.length**2)}"
    return [heading.ljust(len(edge) + 2), f"┌{edge}┐", *(f"│{row}│" for row in rows), f"└{edge}┘"]


def shade(share: float) -> str:
    """The character of a cell with this share of visible pairs: a blank only where there is none."""
    return " " if share == 0 else "█" if share == 1 else SHADES[int(share * 3)]


def _figures(picture: Visibility) -> list[str]:
    facts, lines = picture.facts, []
    for panel in picture.panels[:MOST_PANELS]:
        lines.append(
            f"{head_names(panel.heads, facts['num_heads'])}: {panel.pairs} of {picture.length}² pairs, {panel.tiles} of "
            f"{facts['possible_tiles']} tiles of {facts['block']} × {facts['block']}, {panel.masked_tiles} of them masked"
        )
    if len(picture.panels) > MOST_PANELS:
        lines.append(f"{len(picture.panels) - MOST_PANELS} more patterns, of other heads, are not drawn")
    if picture.extra_tokens:
        lines.append(f"{picture.extra_tokens} extra tokens, which see and are seen by all, are not drawn")
    lines.append(f"distinct masks of tiles: {picture.distinct_masks}")
    if picture.kept_keys is not None:
        lines[-1] += f"; keys that a cache keeps of {picture.length}: {picture.kept_keys}"
    return lines


# ---- figure ------------------------------------------------------------------------------------------------------


def as_figure(picture: Visibility) -> Any:
    """A matplotlib figure: up to 4 panels, queries down, keys to the right.

    A cell has the mean colour of the parts that show its pairs, the paler the fewer of its pairs are visible.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ImportError("a PNG needs matplotlib: pip install hf-efficient[demo]") from None
    drawn = picture.panels[:MOST_PANELS]
    parts = [named_parts(panel.pattern, picture.length) for panel in drawn]
    palette: Any = colormaps["tab10"]
    colours = {name: palette(i % 10)[:3] for i, name in enumerate(dict.fromkeys(n for named in parts for n in named))}
    wide, high = min(len(drawn), 2), -(-len(drawn) // 2)
    figure = Figure(figsize=(1.2 + 4.4 * wide, 1.2 + 4.6 * high), layout="constrained")
    for number, (panel, named) in enumerate(zip(drawn, parts, strict=True), 1):
        axes = figure.add_subplot(high, wide, number)
        _paint(axes, picture, panel, named, torch.tensor([colours[name] for name in named]))
    figure.suptitle(textwrap.fill(title(picture), 62 * wide), fontsize=10)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 * wide, fontsize=8, frameon=False)
    return figure


def _paint(axes: Any, picture: Visibility, panel: Panel, named: dict[str, Pattern], colours: Tensor) -> None:
    n, cell = picture.length, cell_size(picture.length, FIGURE_CELLS)
    share = torch.stack([picture.shares(part, cell, cell) for part in named.values()], dim=-1)
    mixed = share @ colours.double() / share.sum(-1, keepdim=True).clamp(min=1e-12)
    seen = picture.shares(panel.pattern, cell, cell)[..., None]
    # thin lines stay visible
    strength = torch.where(seen > 0, 0.4 + 0.6 * seen, 0.0)
    image = (1 - strength * (1 - mixed)).clamp(0, 1)
    bottom, right = (size * cell for size in image.shape[:2])
    axes.imshow(image.numpy(), extent=(0, right, bottom, 0), interpolation="nearest")
    # a margin, so that the frame hides no first row or column
    axes.set(xlim=(-0.012 * n, 1.012 * n), ylim=(1.012 * n, -0.012 * n), xlabel="keys", ylabel="queries")
    axes.set_title(
        f"{head_names(panel.heads, picture.geometry.num_heads)}: {percent(panel.pairs / n**2)} of all pairs",
        fontsize=9,
    )


def named_parts(pattern: Pattern, length: int) -> dict[str, Pattern]:
    """The parts of one head's pattern by the names in the legend; together they show what the pattern shows."""
    named: dict[str, Pattern] = {}
    for whole in parts_of(pattern):
        kind = type(whole).__name__
        label = LABELS.get(kind, re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind).lower())
        pieces = _bigbird_parts(whole, length) if isinstance(whole, BigBirdBlocks) else {label: whole}
        for name, piece in pieces.items():
            number = 1
            while (name if number == 1 else f"{name} {number}") in named:
                number += 1
            named[name if number == 1 else f"{name} {number}"] = piece
    return named


def _bigbird_parts(pattern: BigBirdBlocks, length: int) -> dict[str, Pattern]:
    fixed = dataclasses.replace(pattern, num_random_blocks=0)
    near: Pattern = fixed
    parts: dict[str, Pattern] = {}
    if pattern.has_global_blocks:
        size, last = pattern.block_size, pattern.last_block(torch.tensor([length]))
        positions = {*range(min(size, length)), *(() if last is None else range(int(last) * size, length))}
        ends: Pattern = GlobalColumns(positions=tuple(sorted(positions)))
        if last is not None:
            ends = ends | GlobalRows(positions=tuple(sorted(positions)))
        near, parts["global blocks"] = Without(pattern=fixed, excluded=ends), ends
    if pattern.num_random_blocks:
        parts["random blocks"] = Without(pattern=pattern, excluded=fixed)
    return {"neighbouring blocks": near} | parts
