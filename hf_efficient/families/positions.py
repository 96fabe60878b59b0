"""Rows of learned tables of positions, for another number of positions."""

from __future__ import annotations

import torch
from torch import Tensor

POSITION_METHODS = ("tile", "interpolate")


def resize_rows(rows: Tensor, count: int, method: str) -> Tensor:
    """(count, width) position rows made from (n, width) learned ones: see `ModelFamily.resize_positions`."""
    n = len(rows)
    if method == "tile":
        return rows[torch.arange(count, device=rows.device) % n].clone()
    if method != "interpolate":
        raise ValueError(f"positions={method!r} is not possible; it must be one of {', '.join(POSITION_METHODS)}.")
    if count % n and n % count:
        raise ValueError(
            f"interpolating {n} positions to {count} can't be undone; give a multiple of {n}, or positions='tile'."
        )
    if count < n:
        return rows[:: n // count].clone()
    factor = count // n
    at = torch.arange(count, device=rows.device)
    low = at // factor
    share = ((at % factor) / factor)[:, None].to(rows.dtype)
    return torch.where(share == 0, rows[low], torch.lerp(rows[low], rows[(low + 1).clamp(max=n - 1)], share))
