"""Rotary positions, for keys and queries that a mechanism projects itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rotation(NamedTuple):
    """Turns pairs of entries by the angles of their token: (a, b) ↦ (a cos θ - b sin θ, b cos θ + a sin θ).

    The pairs are the entries (i, i + R / 2) of the first R ones, or, interleaved, (0, 1), (2, 3), …; all further entries
    stay. `q_i·k_j` then depends on positions by j - i alone. Source: Su et al. 2021 (arXiv 2104.09864), §3.4.

    Attributes:
        cos_sin: (B or 1, N, 2 R) cosines of each token, then its sines, one for each entry; scaled as the host has them.
    """

    cos_sin: Tensor
    interleaved: bool = False

    def at(self, index: Tensor) -> Rotation:
        """Of the tokens `index` (B or 1, G) alone."""
        return self._replace(cos_sin=_gather(self.cos_sin, index))

    def between(self, low: Tensor, high: Tensor) -> Rotation:
        """Halfway between the tokens `low` and `high` (B or 1, G), which are the same or neighbours.

        The angle in the middle is that of the sum of both unit vectors, as neighbours differ by less than half a turn.
        """
        one, other = (_gather(self.cos_sin, index) for index in (low, high))
        cos, sin = (one + other).chunk(2, dim=-1)
        length = torch.linalg.vector_norm(torch.stack(one.chunk(2, dim=-1)), dim=0)
        scale = length / torch.linalg.vector_norm(torch.stack([cos, sin]), dim=0)
        return self._replace(cos_sin=torch.cat([cos * scale, sin * scale], dim=-1))

    def __call__(self, x: Tensor) -> Tensor:
        """(B, H, N, D) vectors of the tokens, rotated."""
        cos, sin = self.cos_sin[:, None].chunk(2, dim=-1)
        part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if self.interleaved:
            turned = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
        else:
            first, second = part.chunk(2, dim=-1)
            turned = torch.cat([-second, first], dim=-1)
        return torch.cat([(part * cos + turned * sin).to(x.dtype), rest], dim=-1)


def side_by_side(cos: Tensor, sin: Tensor, *, dim: int, interleaved: bool, rows: int, unrotated: int = 0) -> Tensor:
    """(rows, N, 2 · dim) from a host's (B or 1, N, dim) or (N, dim) cosines and sines, or (…, dim / 2): one for each pair.

    Args:
        unrotated: tokens in front that have none and do not turn.

    Raises:
        ValueError: they have another width or form.
    """
    if cos.dim() not in (2, 3) or cos.shape != sin.shape or cos.shape[-1] not in (dim, dim // 2):
        raise ValueError(f"cosines {tuple(cos.shape)} and sines {tuple(sin.shape)} are not (batch, tokens, {dim}).")
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    cos, sin = F.pad(cos, (0, 0, unrotated, 0), value=1.0), F.pad(sin, (0, 0, unrotated, 0))
    if cos.shape[-1] != dim:
        cos, sin = (x.repeat_interleave(2, dim=-1) if interleaved else torch.cat([x, x], dim=-1) for x in (cos, sin))
    return torch.cat([cos, sin], dim=-1).expand(rows, -1, -1)


def _gather(cos_sin: Tensor, index: Tensor) -> Tensor:
    # no length by `len` or `max`, which would fix that of a graph
    rows = index.shape[0] if cos_sin.shape[0] == 1 else cos_sin.shape[0]
    return cos_sin.expand(rows, -1, -1).gather(1, index[..., None].expand(rows, -1, cos_sin.shape[-1]))
