"""The tiles of a pattern: which blocks of keys a block of queries computes, and which of their elements count.

Built in closed form from a pattern, never from an N×N mask: candidates are enumerated per row, tiles that look alike are
evaluated once, empty ones dropped, full ones marked, and equal element masks stored once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_efficient.patterns.pattern import Pattern

# elements evaluated at a time while building, and tiles per work item of a kernel
EVALUATION_BUDGET = 2**24
WORK_CAP = 64
# side of the tiles in which pairs are counted
COUNTED = 64


class TileList(NamedTuple):
    """The tiles of one direction, sorted by (head, block, masked tiles first, other block).

    Attributes:
        other: (T,) int32, key block of each tile (rows) or query block (columns).
        mask: (T,) int32, index into the table's masks; meaningful for masked ("slow") tiles only.
        bias: (T,) int32, bias class: 0 far left, 1 far right, 2 and more the near ones.
        work: (W, 7) int32, items (head, block, slow0, slow1, fast0, fast1, slot), longest first; slot -1 = not split.
            Every block has an item, also one without tiles.
        split: (P, 4) int32, (head, block, slot0, slot1) of the blocks whose work is split.
        num_slots: number of partial results of split blocks.
    """

    other: Tensor
    mask: Tensor
    bias: Tensor
    work: Tensor
    split: Tensor
    num_slots: int


class Tiles(NamedTuple):
    """The tiles of one head: (T,) blocks, and each tile's mask among `masks` (U, block_q, block_k), -1 = all visible."""

    row: Tensor
    column: Tensor
    mask: Tensor
    masks: Tensor

    @property
    def pairs(self) -> int:
        """Visible pairs."""
        area = self.masks.shape[1] * self.masks.shape[2]
        counts = torch.cat([self.masks.flatten(1).sum(1), torch.tensor([area])])
        return int(counts[self.mask].sum())


@dataclass(frozen=True, eq=False)
class TileTable:
    """All tiles of a pattern for one length, in both directions.

    Attributes:
        num_queries, num_keys, block_q, block_k: sizes; the last blocks may be short.
        heads: 1 = all heads share the tiles, else one set per head.
        query_offset: position of the first query.
        radius: offsets at which a relative bias is constant, or `None` without a bias: near tiles are then masked ones.
        rows, columns: the tiles by query block, and transposed.
        masks, masks_t: (U, block_q, block_k) uint8 element masks of partial tiles, each once, and their transposes.
        near: (NB - 2,) int32, first key position - first query position of each near bias class.
        class_start: (heads, NB + 1) int32; class_row, class_column, class_mask: (T,) int32, tiles grouped by head and bias
            class, mask -1 = all visible.
    """

    num_queries: int
    num_keys: int
    block_q: int
    block_k: int
    heads: int
    query_offset: int
    radius: int | None
    rows: TileList
    columns: TileList
    masks: Tensor
    masks_t: Tensor
    near: Tensor
    class_start: Tensor
    class_row: Tensor
    class_column: Tensor
    class_mask: Tensor

    @property
    def num_tiles(self) -> int:
        return len(self.rows.other)

    @property
    def density(self) -> float:
        """Computed pairs over all pairs."""
        return self.num_tiles * self.block_q * self.block_k / (self.heads * self.num_queries * self.num_keys)

    def to_dense(self) -> Tensor:
        """(heads, N, S) bool: what the table shows. For tests and pictures: O(N·S)."""
        rows, columns = -(-self.num_queries // self.block_q), -(-self.num_keys // self.block_k)
        dense = torch.zeros(self.heads, rows, columns, self.block_q, self.block_k, dtype=torch.bool)
        masks = torch.cat([self.masks.cpu().bool(), torch.ones(1, self.block_q, self.block_k, dtype=torch.bool)])
        head = torch.arange(self.heads).repeat_interleave(self.class_start[:, -1].cpu() - self.class_start[:, 0].cpu())
        dense[head, self.class_row.cpu().long(), self.class_column.cpu().long()] = masks[self.class_mask.cpu().long()]
        dense = dense.transpose(2, 3).reshape(self.heads, rows * self.block_q, columns * self.block_k)
        return dense[:, : self.num_queries, : self.num_keys]

    @classmethod
    def from_dense(cls, mask: Tensor, block_q: int, block_k: int, radius: int | None = None) -> TileTable:
        """The table of a (N, S) or (H, N, S) bool mask, for tests: O(N·S)."""
        mask = mask if mask.dim() == 3 else mask[None]
        heads, num_queries, num_keys = mask.shape
        shape = _Shape(num_queries, num_keys, block_q, block_k, 0, False)

        def tiles_of(head: int) -> Tiles:
            every = Pattern().tiles(num_queries, num_keys, block_q, block_k, 0)
            return _evaluate(
                *every, shape, lambda q, k: mask[head][q.clamp(max=num_queries - 1), k.clamp(max=num_keys - 1)]
            )

        return _assemble([tiles_of(head) for head in range(heads)], shape, radius, WORK_CAP, torch.device("cpu"))


class _Shape(NamedTuple):
    num_queries: int
    num_keys: int
    block_q: int
    block_k: int
    offset: int
    is_causal: bool


# a table takes about 40 bytes per tile and 8 KB per distinct mask, far less than the tokens' own tensors: so a number of
# tables is bound enough, and one that is built anew in every step would cost more than it frees
@lru_cache(maxsize=256)
def tile_table(
    pattern: Pattern,
    num_queries: int,
    num_keys: int,
    block_q: int,
    block_k: int,
    *,
    radius: int | None = None,
    query_offset: int = 0,
    is_causal: bool = False,
    device: torch.device | str = "cpu",
    cap: int = WORK_CAP,
) -> TileTable:
    """The tiles of `pattern` for `num_queries` queries at positions from `query_offset`, against `num_keys` keys.

    Args:
        radius: saturation of the relative bias that goes with it, see `TileTable`.
        is_causal: additionally key ≤ query.
        cap: most tiles of one work item.

    Raises:
        ValueError: a size that is not positive.

    O(tiles) time and memory; kept for the same arguments.
    """
    if min(num_queries, num_keys, block_q, block_k, cap) < 1 or query_offset < 0:
        raise ValueError(
            f"no tiles of {block_q} × {block_k} for {num_queries} queries from {query_offset} and {num_keys} keys: "
            "every size must be at least 1."
        )
    shape = _Shape(num_queries, num_keys, block_q, block_k, query_offset, is_causal)
    known: dict[Pattern, Tiles] = {}
    heads = []
    # whatever the default device is, and for training also if first made for inference
    with torch.inference_mode(False), torch.device("cpu"):
        for head in range(pattern.num_heads):
            single = pattern.head(head)
            if single not in known:
                known[single] = _tiles_of(single, shape)
            heads.append(known[single])
        return _assemble(heads, shape, radius, cap, torch.device(device))


@lru_cache(maxsize=4096)
def visible_pairs(
    pattern: Pattern, num_queries: int, num_keys: int, *, query_offset: int = 0, is_causal: bool = False
) -> float:
    """(query, key) pairs that `pattern` shows, the mean over its heads. O(tiles) time and memory; see `tile_table`."""
    shape = _Shape(num_queries, num_keys, COUNTED, COUNTED, query_offset, is_causal)
    heads = [pattern.head(head) for head in range(pattern.num_heads)]
    with torch.inference_mode(False), torch.device("cpu"):
        found = {single: _tiles_of(single, shape) for single in dict.fromkeys(heads)}
    pairs = {single: tiles.pairs for single, tiles in found.items()}
    return sum(pairs[single] for single in heads) / len(heads)


def _tiles_of(pattern: Pattern, shape: _Shape) -> Tiles:
    row, column = pattern.tiles(*shape[:5])
    if shape.is_causal:
        last_query = ((row + 1) * shape.block_q).clamp(max=shape.num_queries) - 1 + shape.offset
        row, column = (x[column * shape.block_k <= last_query] for x in (row, column))
    columns = -(-shape.num_keys // shape.block_k)
    flat = torch.unique(row * columns + column)
    row, column = flat // columns, flat % columns
    query, key = row * shape.block_q + shape.offset, column * shape.block_k
    keys = pattern.tile_key(query, key, shape.block_q, shape.block_k)
    if keys is None:
        return _evaluate(row, column, shape, pattern.visible)
    keys = [k for k in keys if k.dim()]
    keys.append((shape.num_queries + shape.offset - query).clamp(max=shape.block_q))
    keys.append((shape.num_keys - key).clamp(max=shape.block_k))
    if shape.is_causal:
        keys.append((key - query).clamp(min=-shape.block_k))
    group = torch.zeros_like(row)
    for entry in keys:
        entry = entry - entry.min() if len(entry) else entry
        group = torch.unique(group * (int(entry.max()) + 1 if len(entry) else 1) + entry, return_inverse=True)[1]
    first = torch.full((int(group.max()) + 1 if len(group) else 0,), len(row)).scatter_reduce(
        0, group, torch.arange(len(row)), "amin"
    )
    found = _evaluate(row[first], column[first], shape, pattern.visible, keep_empty=True)
    mask = found.mask[group]
    kept = mask > -2
    return Tiles(row[kept], column[kept], mask[kept], found.masks)


def _evaluate(
    row: Tensor, column: Tensor, shape: _Shape, visible: Callable[[Tensor, Tensor], Tensor], keep_empty: bool = False
) -> Tiles:
    """Element masks of the given tiles; mask -1 = all visible, -2 = nothing (dropped unless `keep_empty`)."""
    known: dict[bytes, int] = {}
    masks: list[Tensor] = []
    ids = []
    step = max(1, EVALUATION_BUDGET // (shape.block_q * shape.block_k))
    for rows, columns in zip(row.split(step), column.split(step), strict=True):
        query = (rows[:, None] * shape.block_q + torch.arange(shape.block_q) + shape.offset)[:, :, None]
        key = (columns[:, None] * shape.block_k + torch.arange(shape.block_k))[:, None, :]
        seen = visible(query, key) & (query < shape.num_queries + shape.offset) & (key < shape.num_keys)
        if shape.is_causal:
            seen = seen & (key <= query)
        count = seen.flatten(1).sum(1)
        index = torch.where(count == shape.block_q * shape.block_k, -1, torch.where(count == 0, -2, 0))
        for at in (index == 0).nonzero().flatten().tolist():
            content = seen[at].numpy().tobytes()
            if content not in known:
                known[content] = len(masks)
                masks.append(seen[at].clone())
            index[at] = known[content]
        ids.append(index)
    mask = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.long)
    stacked = torch.stack(masks) if masks else torch.zeros(0, shape.block_q, shape.block_k, dtype=torch.bool)
    if keep_empty:
        return Tiles(row, column, mask, stacked)
    kept = mask > -2
    return Tiles(row[kept], column[kept], mask[kept], stacked)


def _assemble(heads: list[Tiles], shape: _Shape, radius: int | None, cap: int, device: torch.device) -> TileTable:
    if all(tiles is heads[0] for tiles in heads):
        heads = heads[:1]
    masks, mask = _shared_masks(heads)
    head = torch.cat([torch.full_like(tiles.row, h) for h, tiles in enumerate(heads)])
    row, column = (torch.cat([getattr(tiles, name) for tiles in heads]) for name in ("row", "column"))
    distance = column * shape.block_k - row * shape.block_q - shape.offset
    bias, near = _bias_classes(distance, shape, radius)
    slow = (mask >= 0) | (bias >= 2)
    if bool((slow & (mask < 0)).any()):
        # a near tile without a mask of its own gets the mask that shows everything
        masks = torch.cat([masks, torch.ones(1, *masks.shape[1:], dtype=torch.bool)])
        mask = torch.where(slow & (mask < 0), len(masks) - 1, mask)
    num_rows, num_columns = -(-shape.num_queries // shape.block_q), -(-shape.num_keys // shape.block_k)
    order = torch.argsort((head * (len(near) + 2) + bias) * (num_rows * num_columns) + row * num_columns + column)
    edges = torch.arange(len(heads) * (len(near) + 2) + 1)
    starts = torch.searchsorted((head * (len(near) + 2) + bias)[order].contiguous(), edges)
    index = torch.arange(len(heads))[:, None] * (len(near) + 2) + torch.arange(len(near) + 3)

    def int32(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=torch.int32)

    def tile_list(block: Tensor, other: Tensor, blocks: int, others: int) -> TileList:
        at = torch.argsort(((head * blocks + block) * 2 + (~slow).long()) * others + other)
        owner = (head * blocks + block)[at]
        total = torch.bincount(owner, minlength=len(heads) * blocks)
        masked = torch.bincount(owner, weights=slow[at].double(), minlength=len(heads) * blocks).long()
        work, split, num_slots = _work_items(total, masked, blocks, cap)
        return TileList(int32(other[at]), int32(mask[at]), int32(bias[at]), int32(work), int32(split), num_slots)

    return TileTable(
        num_queries=shape.num_queries,
        num_keys=shape.num_keys,
        block_q=shape.block_q,
        block_k=shape.block_k,
        heads=len(heads),
        query_offset=shape.offset,
        radius=radius,
        rows=tile_list(row, column, num_rows, num_columns),
        columns=tile_list(column, row, num_columns, num_rows),
        masks=masks.to(device, torch.uint8),
        masks_t=masks.transpose(1, 2).contiguous().to(device, torch.uint8),
        near=int32(near),
        class_start=int32(starts[index]),
        class_row=int32(row[order]),
        class_column=int32(column[order]),
        class_mask=int32(mask[order]),
    )


def _shared_masks(heads: list[Tiles]) -> tuple[Tensor, Tensor]:
    """One (U, block_q, block_k) set of distinct masks for all heads, and every tile's index into it."""
    known: dict[bytes, int] = {}
    kept: list[Tensor] = []
    ids = []
    for tiles in heads:
        index = torch.empty(len(tiles.masks) + 1, dtype=torch.long)
        index[-1] = -1
        for at, mask in enumerate(tiles.masks):
            content = mask.numpy().tobytes()
            if content not in known:
                known[content] = len(kept)
                kept.append(mask)
            index[at] = known[content]
        ids.append(index[tiles.mask])
    return torch.stack(kept) if kept else heads[0].masks[:0], torch.cat(ids)


def _bias_classes(distance: Tensor, shape: _Shape, radius: int | None) -> tuple[Tensor, Tensor]:
    """Each tile's bias class, and the distances of the near classes."""
    if radius is None:
        return torch.zeros_like(distance), distance[:0]
    left = distance + shape.block_k - 1 <= -radius
    right = distance - (shape.block_q - 1) >= radius
    near, inverse = torch.unique(distance[~left & ~right], return_inverse=True)
    bias = torch.where(right, 1, 0)
    bias[~left & ~right] = 2 + inverse
    return bias, near


def _work_items(total: Tensor, masked: Tensor, blocks: int, cap: int) -> tuple[Tensor, Tensor, int]:
    """Work items and split blocks of one direction, from each (head, block)'s number of tiles and of masked tiles."""
    pieces = (-(-total // cap)).clamp(min=1)
    base = total.cumsum(0) - total
    owner = torch.arange(len(total)).repeat_interleave(pieces)
    piece = torch.arange(len(owner)) - (pieces.cumsum(0) - pieces)[owner]
    # equal pieces, so that no last one is short
    start = total[owner] * piece // pieces[owner]
    end = total[owner] * (piece + 1) // pieces[owner]
    slow, first = masked[owner], base[owner]
    is_split = pieces[owner] > 1
    slot = torch.where(is_split, is_split.long().cumsum(0) - 1, -1)
    columns = [
        torch.minimum(start, slow),
        torch.minimum(end, slow),
        torch.maximum(start, slow),
        torch.maximum(end, slow),
    ]
    work = torch.stack([owner // blocks, owner % blocks, *(first + c for c in columns), slot], dim=1)
    work = work[torch.argsort(start - end, stable=True)]
    heavy = (pieces > 1).nonzero().flatten()
    slots = pieces[heavy].cumsum(0)
    split = torch.stack([heavy // blocks, heavy % blocks, slots - pieces[heavy], slots], dim=1)
    return work, split, int(is_split.sum())
