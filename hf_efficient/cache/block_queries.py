"""The cache of attention to sorted blocks: all keys, and the first query of every block."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.cache.recurrent import RecurrentLayer
from hf_efficient.ops.block_sorting import tokens_at
from hf_efficient.patterns.kinds import Full


class BlockStarts(NamedTuple):
    """`queries` (B, H, T, D) of the first real tokens of all blocks seen."""

    queries: Tensor


class BlockStartLayer(RecurrentLayer):
    """Cache layer that keeps all keys, and of every block the query of its first real token, which chooses other blocks.

    Every old block may be chosen, so nothing is forgotten, and `crop` can go back to any token: blocks that start behind it
    get their query anew. O(S · D) per head, of which queries are 1 / block_size.
    """

    state: BlockStarts | None

    def __init__(self) -> None:
        super().__init__(Full())

    def _prune(self) -> None:
        """Nothing."""

    def prepare(self, row_start: Tensor, global_mask: Tensor | None) -> None:
        """See `BoundedLayer`.

        Raises:
            ValueError: rows start elsewhere than before, so that their blocks would be others.
        """
        before = row_start if self.row_start is None else self.row_start
        if self.state is not None and bool(((row_start != before) & (row_start.minimum(before) < self.seen)).any()):
            raise ValueError(
                "attention_mask says that rows start at other tokens than when the cache was filled: give the mask of all "
                "tokens seen so far with every call."
            )
        super().prepare(row_start, global_mask)

    def append(self, query: Tensor, first: Tensor, offset: int) -> Tensor:
        """Keep what is new among the first queries of blocks; returns those of all blocks, (B, H, T, D).

        Args:
            query: (B, H, N, D) new ones, from token `offset` on. first: (B, T) token that each block starts with.
        """
        queries = tokens_at(query.detach(), (first - offset).clamp(0, query.shape[2] - 1))
        if self.state is not None:
            old = self.state.queries
            old = F.pad(old, (0, 0, 0, max(0, first.shape[1] - old.shape[2])))[:, :, : first.shape[1]]
            queries = torch.where((first >= offset)[:, None, :, None], queries, old)
        self.state = BlockStarts(queries)
        return queries
