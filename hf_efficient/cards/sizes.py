"""How options that stand for a share of the input would have to grow with it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hf_efficient.attention.base.registry import get_mechanism
from hf_efficient.cards.markdown import table

LENGTHS = (512, 4096, 16384)


def sizes_table(mechanism: str) -> str:
    """Markdown: what share of 512, 4096 and 16384 tokens the default of each of `sizes` is, and which value keeps the first.

    The share is the option times its unit in tokens over the length. Keeping it costs time in the square of the length.
    """
    config: Any = get_mechanism(mechanism).Config
    defaults: dict[str, Any] = {field.name: field.default for field in fields(config)}
    rows = []
    for option, unit in config.sizes.items():
        size, tokens = defaults[option], defaults[unit] if unit else 1
        shares = [f"{100 * size * tokens / length:.3g} %" for length in LENGTHS]
        keeping = [f"`{size * length // LENGTHS[0]}`" for length in LENGTHS[1:]]
        rows.append([f"`{option}`", f"`{size}`", *shares, *keeping])
    shown = [f"share of {length}" for length in LENGTHS]
    kept = [f"as much of {length}" for length in LENGTHS[1:]]
    return table(["option", "default", *shown, *kept], rows)
