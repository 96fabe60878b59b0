"""Random projections for feature maps: orthogonal in blocks, the same on every process and after every reload."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_efficient.attention.base.geometry import AttentionGeometry


def drawn_features(count: int, seed: int, geometry: AttentionGeometry, redraws: int = 0) -> Tensor:
    """(count, D) `orthogonal_features` that seed, stack, layer and the number of redraws alone decide."""
    sides = {"encoder": 0, "decoder": 1}
    key = (seed, sides[geometry.side], geometry.layer, redraws)
    own = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")
    return orthogonal_features(count, geometry.head_dim, torch.Generator().manual_seed(own))


def orthogonal_features(count: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, width) rows ω ~ N(0, I) marginally, orthogonal within blocks of `width` rows.

    QR of Gaussian blocks, each column multiplied by the sign of R's diagonal (without it Q is not Haar distributed and
    single-sign features are biased), rows scaled to the norms of independent Gaussian vectors.
    """
    blocks = []
    for _ in range(-(-count // width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu"))
        blocks.append((q * r.diagonal().sign()).T)
    norms = torch.randn(count, width, generator=generator, dtype=torch.float64, device="cpu").norm(
        dim=-1, keepdim=True
    )
    return torch.cat(blocks)[:count] * norms
