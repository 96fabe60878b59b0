"""Patterns of whole blocks with random ones among them, drawn by a fixed hash."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_efficient.patterns.kinds import BlockList
from hf_efficient.patterns.pattern import Pattern

MASK31 = 2**31 - 1
# block rows whose priorities over all blocks are drawn at once: bounds working memory, not results
PRIORITY_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class BigBirdBlocks(BlockList):
    """Neighbouring and random blocks, and with `has_global_blocks` the first and the last one; see `BigBirdAttention`.

    `length` and `single` fix the number of tokens and one head; encoders depend on the length, by their last block.
    """

    num_random_blocks: int
    seed: int
    layer: int
    heads: int
    is_causal: bool
    has_global_blocks: bool = True
    length: int | None = None
    single: int | None = None

    @property
    def depends_on_length(self) -> bool:  # type: ignore[override]
        return not self.is_causal and self.length is None

    @property
    def num_heads(self) -> int:
        return self.heads if self.single is None and self.num_random_blocks else 1

    def head(self, index: int) -> Pattern:
        return self if self.single is not None else dataclasses.replace(self, single=index)

    def at_length(self, length: int) -> Pattern:
        # only the last block matters, so that rows of similar length share their tables
        return dataclasses.replace(self, length=-(-length // self.block_size) * self.block_size)

    def last_block(self, length: Tensor) -> Tensor | None:
        """(B or 1,) the block of each row's last token; `None` in causal layers, which must not know it."""
        return None if self.is_causal else (length - 1).clamp(min=0) // self.block_size

    def columns(self, num_blocks: int, length: Tensor, is_causal: bool) -> Tensor:
        rows = torch.arange(num_blocks, device=length.device)[None]
        return self.blocks_of(rows, self.last_block(length), num_blocks)

    def full_rows(self, n: int, length: Tensor, is_causal: bool) -> tuple[Tensor, Tensor] | None:
        last = self.last_block(length)
        if last is None or not self.has_global_blocks:
            return None
        within = torch.arange(self.block_size, device=length.device)
        # where the last block is the first one too, its rows are named once
        end = torch.where(last[:, None] > 0, last[:, None] * self.block_size + within, n)
        index = torch.cat([within.expand(last.shape[0], -1), end], dim=-1)
        return index.clamp(max=n - 1), index < n

    def blocks_of(self, rows: Tensor, last: Tensor | None, num_blocks: int) -> Tensor:
        """(B or 1, H or 1, U, K) key blocks of the query blocks `rows` (B or 1, U), -1 = none."""
        limit = rows if last is None else last[:, None]  # last real block, or the diagonal
        near = [rows - 1, rows] if last is None else [rows - 1, rows, rows + 1]
        # the global blocks are listed once, apart from the window
        low, high = (1, limit if last is None else limit - 1) if self.has_global_blocks else (0, limit)
        fixed = [torch.where((c >= low) & (c <= high), c, -1) for c in near]
        if self.has_global_blocks:
            fixed.append(torch.zeros_like(fixed[0]))
            if last is not None:
                fixed.append(torch.where(limit > 0, limit, -1).expand_as(fixed[0]))
        columns = torch.stack(fixed, -1)[:, None]
        if self.num_random_blocks == 0:
            return columns
        # a graph with an open number of blocks has no loop over them
        parts = rows.split(PRIORITY_ROWS, -1) if type(num_blocks) is int else (rows,)
        random = torch.cat([self.random_blocks(part, last, num_blocks) for part in parts], 2)
        return torch.cat([columns.expand(-1, random.shape[1], -1, -1), random], dim=-1)

    def random_blocks(self, rows: Tensor, last: Tensor | None, num_blocks: int) -> Tensor:
        """(B or 1, H or 1, U, r) the blocks of highest priority among those that a row may draw, -1 = none left."""
        device = rows.device
        column = torch.arange(num_blocks, device=device)
        row = rows[..., None]
        low = 1 if self.has_global_blocks else 0
        if last is None:
            eligible = (column >= low) & (column < row - 1)
        else:
            eligible = (column >= low) & (column <= last[:, None, None] - low) & ((column - row).abs() > 1)
        heads = range(self.heads) if self.single is None else (self.single,)
        head = torch.tensor(list(heads), device=device)[:, None, None]
        state = _mix(_mix(_mix(torch.tensor(self.seed & MASK31, device=device)) + self.layer) + head)
        priority = _mix(_mix(state + row[:, None]) + column)
        # the column itself breaks ties, so that no two blocks are equal
        priority = torch.where(eligible[:, None], priority * num_blocks + column, -1)
        best, index = priority.topk(min(self.num_random_blocks, num_blocks), dim=-1)
        return torch.where(best >= 0, index, -1)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Of one head, and for encoders of one length; positions before 0 stand for no token."""
        return self._visible(query, key)[0]

    def visible_per_head(self, query: Tensor, key: Tensor) -> Tensor:
        return self._visible(query, key).movedim(0, -3)

    def _visible(self, query: Tensor, key: Tensor) -> Tensor:
        """(H or 1, *broadcast shape): all heads' blocks are drawn at once."""
        row, column = query.clamp(min=0) // self.block_size, key.clamp(min=0) // self.block_size
        last = None if self.length is None else self.last_block(torch.tensor([self.length], device=query.device))
        unique, index = torch.unique(row, return_inverse=True)
        num_blocks = int(torch.maximum(row.max(), column.max())) + 1
        if last is not None:
            num_blocks = max(num_blocks, int(last) + 1)
        columns = self.blocks_of(unique[None], last, num_blocks)[0]  # (H or 1, U, K)
        listed = torch.zeros(*columns.shape[:2], num_blocks + 1, dtype=torch.bool, device=row.device)
        # -1 lands in the spare column
        seen = listed.scatter(-1, columns % (num_blocks + 1), True)[:, index, column]
        return seen if last is None or not self.has_global_blocks else seen | (row == 0) | (row == last)

    def tiles(self, num_queries: int, num_keys: int, block_q: int, block_k: int, offset: int) -> tuple[Tensor, Tensor]:
        num_blocks = -(-max(num_queries + offset, num_keys) // self.block_size)
        last = None if self.length is None else self.last_block(torch.tensor([self.length]))
        columns = self.blocks_of(torch.arange(num_blocks)[None], last, num_blocks)[0, 0]
        row = torch.arange(num_blocks)[:, None].expand_as(columns)[columns >= 0]
        column = columns[columns >= 0]
        if last is not None and self.has_global_blocks:
            ends = torch.unique(torch.tensor([0, int(last)]))
            row = torch.cat([row, ends.repeat_interleave(num_blocks)])
            column = torch.cat([column, torch.arange(num_blocks).repeat(len(ends))])
        rows, in_rows = _covering(row, self.block_size, block_q, offset, num_queries)
        others, in_columns = _covering(column, self.block_size, block_k, 0, num_keys)
        inside = in_rows[:, :, None] & in_columns[:, None]
        rows, others = torch.broadcast_tensors(rows[:, :, None], others[:, None])
        return rows[inside], others[inside]

    def tile_key(self, query: Tensor, key: Tensor, block_q: int, block_k: int) -> list[Tensor] | None:
        if self.block_size % block_q or self.block_size % block_k or not len(query) or bool((query % block_q).any()):
            return None
        return [self.visible(query, key).long()]

    def needed(self, key: Tensor, following: Tensor | int) -> Tensor:
        if self.num_random_blocks:
            return super().needed(key, following)
        size = self.block_size
        return (key < size) | (key >= (following // size - 1) * size)


def _covering(block: Tensor, size: int, tile: int, offset: int, length: int) -> tuple[Tensor, Tensor]:
    """(T, K) tiles that blocks of `size` positions overlap, and which of the entries are tiles of this sequence."""
    first = (block * size - offset).div(tile, rounding_mode="floor")
    last = (block * size + size - 1 - offset).div(tile, rounding_mode="floor")
    found = first[:, None] + torch.arange(-(-size // tile) + 1)
    return found, (found <= last[:, None]) & (found >= 0) & (found * tile < length)


def _mix(x: Tensor) -> Tensor:
    """Integer hash to 31 bits; every product stays below 2**63."""
    x = x & MASK31
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & MASK31
    x = ((x ^ (x >> 15)) * 0x45D9F3B) & MASK31
    return x ^ (x >> 16)
