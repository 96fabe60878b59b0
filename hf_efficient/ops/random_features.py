"""Random projections for feature maps: orthogonal in blocks, the same on every process and after every reload."""

from __future__ import annotations

import torch
from torch import Tensor


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
