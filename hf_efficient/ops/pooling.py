"""Means of neighbouring tokens, in rows of a batch or of packed sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.packing import PackedSequences
from hf_efficient.ops.padding import first_real_token, shift_rows
from hf_efficient.ops.relative_bias import RelativeBias


@dataclass(frozen=True)
class PoolingWindow:
    """Every `size` neighbouring tokens are pooled into one: token i of a row into number `(i + lead) // size`.

    Attributes:
        size: tokens per window; 1 = no pooling.
        first_apart: the first token has a window of its own (lead = size - 1); otherwise lead = 0.
    """

    size: int
    first_apart: bool = False

    @property
    def lead(self) -> int:
        return self.size - 1 if self.first_apart else 0

    def number(self, n: int) -> int:
        """Windows of a row of n tokens, the last one possibly not full."""
        return -(-(n + self.lead) // self.size)

    def _cut(self, rows: Tensor, dim: int) -> Tensor:
        """Split the axis of n tokens in two, (windows, size); entries without a token are 0."""
        n = rows.shape[dim]
        tail = self.number(n) * self.size - self.lead - n
        rows = F.pad(rows, (0, 0) * (-1 - dim) + (self.lead, tail))
        return rows.unflatten(dim, (self.number(n), self.size))

    def counts(self, n: int, token_mask: Tensor | None, device: torch.device) -> Tensor | None:
        """(B or 1, windows) how many of n tokens are in each, in fp32; `None` = as many in all.

        Args:
            token_mask: (B, n) bool, True = real token; `None` = all real.
        """
        if token_mask is None:
            if not self.lead and n % self.size == 0:
                return None
            token_mask = torch.ones(1, n, dtype=torch.bool, device=device)
        return self._cut(token_mask.float(), -1).sum(-1)

    def means(self, rows: Tensor, token_mask: Tensor | None) -> Tensor:
        """(B, …, windows, W) means of the real tokens of (B, …, n, W); 0 where a window has none. O(B · n · W)."""
        if self.size == 1:
            return rows
        n = rows.shape[-2]
        shape = (-1, *(1,) * (rows.dim() - 3))
        # sums of many tokens would round in half precision
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if token_mask is not None:
            wide = wide.masked_fill(~token_mask.view(*shape, n, 1), 0.0)
        counts = self.counts(n, token_mask, rows.device)
        total = self._cut(wide, -2).sum(-2)
        total = total / (self.size if counts is None else counts.clamp(min=1).view(*shape, counts.shape[-1], 1))
        return total.to(rows.dtype)

    def repeat(self, pooled: Tensor, n: int) -> Tensor:
        """(B, …, n, W): each of n tokens gets the entry of its window in (B, …, windows, W)."""
        if self.size == 1:
            return pooled
        return pooled.repeat_interleave(self.size, dim=-2)[..., self.lead : self.lead + n, :]


def pooled_bias(
    bias: RelativeBias, queries: PoolingWindow, keys: PoolingWindow, n: int, device: torch.device
) -> Tensor:
    """(1, H, query windows, key windows) relative bias between the pooled queries and keys of n tokens.

    A query stands at the middle token of its window (the left one of two), and the bias of a key is the mean over its
    window: `mean_a b(start_j + a - middle_i)`. Every window counts as full here, also the first token's and the last one.
    The size of key windows divides that of query windows. O(query windows · key windows) memory.
    """
    rows, columns, step = queries.number(n), keys.number(n), queries.size // keys.size
    shift = queries.lead - keys.lead - (queries.size - 1) // 2
    first = -step * (rows - 1)
    offsets = torch.arange(keys.size * first + shift, keys.size * columns + shift, device=device)
    means = bias.at(offsets).unflatten(-1, (-1, keys.size)).mean(-1)
    # row i of the tile is the slice that starts step · (rows - 1 - i) into the vector of means
    return means.unfold(-1, columns, step).flip(1)[None]


class Pooling(NamedTuple):
    """How a layer's queries are pooled, which is how its states are, and its keys, whose windows may be smaller."""

    queries: PoolingWindow
    keys: PoolingWindow


class RowGroup(NamedTuple):
    """Rows of one length: how many, their tokens, and (rows, tokens) which of these are real; `None` = all."""

    rows: int
    tokens: int
    token_mask: Tensor | None


class PackedRows:
    """The rows of one call, each from its first real token on: those of the batch, or the packed sequences.

    Pooled tokens of all rows travel as one tensor: (B, windows, W) of a batch; of packed sequences, which come in groups of
    similar length, (1, windows of all groups, W).

    Args:
        states: (B, N, W) of the batch. token_mask: (B, N) bool, True = real token; `None` = all real.
        sequences: the packed sequences, where there are any.
    """

    def __init__(self, states: Tensor, token_mask: Tensor | None, sequences: PackedSequences | None):
        self.sequences = sequences
        self.start: Tensor | None = None
        if sequences is not None:
            self.groups = [
                RowGroup(len(tokens), tokens.shape[1], None if token_mask is None else token_mask.to(states.device))
                for tokens, token_mask in sequences.groups
            ]
            return
        if token_mask is not None:
            self.start = first_real_token(token_mask)
            token_mask = shift_rows(token_mask, self.start, 1)
        self.groups = [RowGroup(states.shape[0], states.shape[1], token_mask)]

    def means(self, states: Tensor, window: PoolingWindow) -> Tensor:
        """(B, windows, W) or (1, all windows, W) means of (B, N, W) states."""
        if self.sequences is not None:
            rows = [self.sequences.split(states, group) for group in self.sequences.groups]
        else:
            rows = [states if self.start is None else shift_rows(states, self.start, 1)]
        return self.join([window.means(x, group.token_mask) for x, group in zip(rows, self.groups, strict=True)])

    def repeat(self, states: Tensor, window: PoolingWindow) -> Tensor:
        """(B, N, W): every token gets the entry of its window; 0 at padding of packed rows."""
        parts = zip(self.split(states, window), self.groups, strict=True)
        rows = [window.repeat(x, group.tokens) for x, group in parts]
        if self.sequences is not None:
            return self.sequences.join(rows)
        return rows[0] if self.start is None else shift_rows(rows[0], -self.start, 1)

    def split(self, tensor: Tensor, window: PoolingWindow) -> list[Tensor]:
        """One tensor (rows, …, windows, W) per group, from (B, …, windows, W) or (1, …, all windows, W)."""
        if self.sequences is None:
            return [tensor]
        sizes = [(group.rows, window.number(group.tokens)) for group in self.groups]
        pieces = tensor[0].split([rows * number for rows, number in sizes], dim=-2)
        return [piece.unflatten(-2, size).movedim(-3, 0) for piece, size in zip(pieces, sizes, strict=True)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Undo `split`."""
        if self.sequences is None:
            return parts[0]
        return torch.cat([part.movedim(0, -3).flatten(-3, -2) for part in parts], dim=-2)[None]
