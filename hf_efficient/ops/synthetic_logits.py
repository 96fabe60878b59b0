"""Learned attention logits that read no key: from the query, from both positions, or from factors of either.

Each is a module with parameters per head, called with queries (B, H, N, D), the positions of these (a slice, or (B, N)
integers) and a number S: it gives (B or 1, H, N, S), the logits of keys at positions 0 … S - 1, in the queries' dtype.
`reset` sets its parameters to their start, of which `origin` says what it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# of a start whose zero would leave what lies before it without a gradient
SLIGHT = 0.02


class DenseLogits(nn.Module):
    """`f(q) = W₂ max(W₁ q + b₁, 0) + b₂` for L keys; O(N S D) time.

    Args:
        heads, width: H and D; the hidden layer has 2D units. size: L. level: what b₂ starts at.
    """

    origin = "hidden layer [I, -I], slight waves over the positions of keys"

    def __init__(self, heads: int, width: int, size: int, level: float = 0.0):
        super().__init__()
        self.level = level
        self.hidden_weight = nn.Parameter(torch.empty(heads, 2 * width, width))
        self.hidden_bias = nn.Parameter(torch.empty(heads, 2 * width))
        self.weight = nn.Parameter(torch.empty(heads, size, 2 * width))
        self.bias = nn.Parameter(torch.empty(heads, size))

    @torch.no_grad()
    def reset(self) -> None:
        _, size, hidden = self.weight.shape
        eye = torch.eye(hidden // 2)
        self.hidden_weight.copy_(torch.cat([eye, -eye]))
        self.hidden_bias.zero_()
        self.weight.copy_(SLIGHT * _waves(size, hidden))
        self.bias.fill_(self.level)

    def forward(self, query: Tensor, rows: slice | Tensor, size: int) -> Tensor:
        dtype = query.dtype
        first, second = (x.to(dtype).transpose(-1, -2) for x in (self.hidden_weight, self.weight[:, :size]))
        hidden = (query @ first + self.hidden_bias.to(dtype)[:, None]).relu()
        return hidden @ second + self.bias[:, None, :size].to(dtype)


class FactorizedDenseLogits(nn.Module):
    """`f_a(q)_(j mod a) · f_b(q)_⌊j / a⌋` for a · b keys, f dense; O(N ((a + S / a) D + S)) time."""

    origin = f"{DenseLogits.origin}; 1 within blocks"

    def __init__(self, heads: int, width: int, factors: tuple[int, int]):
        super().__init__()
        self.block = factors[0]
        self.within = DenseLogits(heads, width, factors[0], level=1.0)
        self.blocks = DenseLogits(heads, width, factors[1])

    def reset(self) -> None:
        self.within.reset()
        self.blocks.reset()

    def forward(self, query: Tensor, rows: slice | Tensor, size: int) -> Tensor:
        within, blocks = self.within(query, rows, self.block), self.blocks(query, rows, -(-size // self.block))
        return (blocks[..., None] * within[..., None, :]).flatten(-2)[..., :size]


class RandomLogits(nn.Module):
    """A table over both positions, (L, L) per head; starts at `-slope_h |i - j|`.

    Args:
        slopes: (H,). size: L.
    """

    origin = "minus the distance, times a slope per head"

    def __init__(self, slopes: list[float], size: int):
        super().__init__()
        self.slopes = slopes
        self.table = nn.Parameter(torch.empty(len(slopes), size, size))

    @torch.no_grad()
    def reset(self) -> None:
        position = torch.arange(self.table.shape[1])
        self.table.copy_(-torch.tensor(self.slopes)[:, None, None] * (position - position[:, None]).abs())

    def forward(self, query: Tensor, rows: slice | Tensor, size: int) -> Tensor:
        return _by_row(self.table[:, rows, :size]).to(query.dtype)


class FactorizedRandomLogits(nn.Module):
    """`Σ_r A_ir B_jr`, a table over both positions of rank R; A and B of (L, R) per head; O(N S R) time.

    Starts as close to `-slope_h |i - j|` as its leading terms come. With L positions in all, and up to what is the same for
    all keys of a query, which the softmax does not see:

        where j ≤ i:    -|i - j| = j
        everywhere:     -|i - j| = j (L - 1 - j) / L + Σ_k cos(π k (i + ½) / L) cos(π k (j + ½) / L) / (L sin²(π k / 2L))

    Args:
        slopes: (H,). size: L. rank: R ≤ L. is_causal: only j ≤ i matter.
    """

    origin = f"{RandomLogits.origin}, as close as the rank allows"

    def __init__(self, slopes: list[float], size: int, rank: int, is_causal: bool):
        super().__init__()
        self.slopes, self.is_causal = slopes, is_causal
        shape = (len(slopes), size, rank)
        self.query_factor, self.key_factor = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))

    @torch.no_grad()
    def reset(self) -> None:
        _, size, rank = self.query_factor.shape
        position, waves = torch.arange(size, dtype=torch.float64), _waves(size, rank - 1)
        if self.is_causal:
            # one factor of the other terms is 0: they take part as soon as it learns
            column, query_waves = position, torch.zeros_like(waves)
        else:
            column = position * (size - 1 - position) / size
            waves = waves / (math.sqrt(size) * torch.sin(math.pi / (2 * size) * torch.arange(1, rank)))
            query_waves = waves
        balance = math.sqrt(size)
        query_factor = torch.cat([torch.full((size, 1), balance), query_waves], dim=1)
        key_factor = torch.cat([column[:, None] / balance, waves], dim=1)
        root = torch.tensor(self.slopes).sqrt()[:, None, None]
        self.query_factor.copy_(root * query_factor)
        self.key_factor.copy_(root * key_factor)

    def forward(self, query: Tensor, rows: slice | Tensor, size: int) -> Tensor:
        factor = _by_row(self.query_factor[:, rows]).to(query.dtype)
        return factor @ self.key_factor[:, :size].to(query.dtype).transpose(-1, -2)


def _by_row(picked: Tensor) -> Tensor:
    """(B or 1, H, N, …) of what positions (N,) or (B, N) picked from a parameter: (H, N, …) or (H, B, N, …)."""
    return picked[None] if picked.dim() == 3 else picked.transpose(0, 1)


def _waves(length: int, count: int) -> Tensor:
    """(length, count) in fp64: cos(π k (j + ½) / length) at position j, for k = 1 … count."""
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return torch.cos(math.pi * position[:, None] * torch.arange(1, count + 1))
