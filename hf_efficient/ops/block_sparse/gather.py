"""Block-sparse attention in plain PyTorch: each block of queries gathers the blocks of keys that it sees."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.context import AttentionCall
from hf_efficient.ops.softmax import Result, additive_mask, attend, bool_all
from hf_efficient.patterns.parse import parse_pattern
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.tile_table import tile_table

# elements of the keys that one call gathers: bounds working memory, not results
GATHER_BUDGET = 2**22
# query blocks of one call: few enough that those with more key blocks do not make the others pay
GROUP = 16


class BlockPlan(NamedTuple):
    """Which key blocks each query block gathers, as tensors.

    Attributes:
        groups: query blocks (U,) of each group, with their key blocks (B or 1, H or 1, U, K), -1 = none, or `None` where
            they see every key, and the index (H or 1, U, K) of each tile's element mask, or `None` where every tile is all
            visible.
        masks: (M, block, block) bool; index -1 of a group is all False, -2 all True.
        order: (rows,) where each query block stands among the concatenated groups; `None` = in order.
    """

    groups: list[tuple[Tensor, Tensor | None, Tensor | None]]
    masks: Tensor
    order: Tensor | None


@lru_cache(maxsize=64)
def _plan(spec: str, length: int, block: int, is_causal: bool, device: str) -> BlockPlan:
    """The plan of a pattern for `length` tokens: query blocks with similarly many key blocks share a group."""
    # a plan is kept: it must serve training also if it was made for inference, and on any default device
    with torch.inference_mode(False), torch.device("cpu"):
        return _planned(spec, length, block, is_causal, device)


def _planned(spec: str, length: int, block: int, is_causal: bool, device: str) -> BlockPlan:
    table = tile_table(parse_pattern(spec), length, length, block, block, is_causal=is_causal)
    rows = -(-length // block)
    heads = table.heads
    head = torch.arange(heads).repeat_interleave((table.class_start[:, -1] - table.class_start[:, 0]).long())
    row, column, mask = (x.long() for x in (table.class_row, table.class_column, table.class_mask))
    owner = head * rows + row
    at = torch.argsort(owner * rows + column)
    owner, column, mask = owner[at], column[at], mask[at]
    count = torch.bincount(owner, minlength=heads * rows)
    within = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
    most = count.view(heads, rows).amax(0)
    width = max(1, int(most.max()))
    columns = torch.full((heads * rows, width), -1)
    masks = torch.full((heads * rows, width), -1)
    columns[owner, within], masks[owner, within] = column, torch.where(mask < 0, -2, mask)
    columns, masks = columns.view(heads, rows, width), masks.view(heads, rows, width)
    heavy = most > 2 * most.double().median()
    parts = [
        part for kind in (~heavy, heavy) for part in kind.nonzero().flatten().split(1 if kind is heavy else GROUP)
    ]
    groups: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    for part in parts:
        if not len(part):
            continue
        k = max(1, int(most[part].max()))
        index = masks[:, part, :k]
        partial_tiles = None if bool((index == -2).all()) else index.to(device)
        groups.append((part.to(device), columns[None, :, part, :k].to(device), partial_tiles))
    order = torch.cat(parts).argsort()
    in_order = bool((order == torch.arange(rows)).all())
    return BlockPlan(groups, table.masks.bool().to(device), None if in_order else order.to(device))


def _constant_plan(spec: str, length: int, block: int, is_causal: bool, device: str) -> Any:
    plan = _plan(spec, length, block, is_causal, device)
    return plan.groups, plan.masks, plan.order


# a plan depends on nothing but its arguments: while compiling it is a constant, not something to trace
_constant_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


def pattern_block(pattern: Pattern) -> int:
    """The tile size at which a pattern is computed here: its own blocks where they are of a handy size."""
    size = getattr(pattern, "block_size", 64)
    return size if 16 <= size <= 256 else 64


def table_attention(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall) -> Result:
    """Attention in which each query sees the keys that `pattern` shows it; see `block_list_attention`."""
    block = pattern_block(pattern)
    # compiled code is specialised to the length: tables of tiles have no symbolic form
    length = len(range(query.shape[2]))
    plan = BlockPlan(*_constant_plan(pattern.spec(), length, block, call.is_causal, str(query.device)))
    return block_list_attention(query, key, value, plan, call, block_size=block)


def block_list_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, call: AttentionCall, *, block_size: int
) -> Result:
    """Softmax attention in which each query block sees exactly the key blocks, and their elements, of `plan`.

    Args:
        query: (B, H, N, D). key, value: (B, HK, N, D), H a multiple of HK. The last block may be short.
        call: all of it but `extra`; causality and the bias go by the order of the tokens, N = S.

    Returns:
        (B, H, N, D), and the log-sum-exp (B, H, N) or `None`. 0 for a query that may see nothing. O(N · K ·
        block_size) time; the gathered keys of one call are bounded, so memory beyond the result is O(1) in N without
        gradients.

    Source: Zaheer et al. 2020 (arXiv 2007.14062), App. D.
    """
    batch, heads, n, width = query.shape
    rows, whole = -(-n // block_size), (key, value)
    padding = rows * block_size - n
    if padding:
        query, key, value = (F.pad(x, (0, 0, 0, padding)) for x in (query, key, value))
    query, key, value = (x.unflatten(2, (rows, block_size)) for x in (query, key, value))
    gathered = _Gathered(key, value, heads, n, call)
    logits_of = _Logits(plan.masks, block_size, call, query.dtype)
    options = call.options | {"return_lse": call.return_lse}
    outputs, sums = [], []
    for members, columns, tile_masks in plan.groups:
        per_block = batch * heads * block_size * max(width, block_size) * (1 if columns is None else columns.shape[-1])
        step = len(members) if columns is None else max(1, GATHER_BUDGET // per_block)
        for first in range(0, len(members), step):
            part = slice(first, first + step)
            own = members[part]
            q = query.index_select(2, own) if len(own) < rows else query
            if columns is None:
                out, lse = attend(q.flatten(2, 3), whole[0], whole[1], None, **options)
                outputs.append(out.unflatten(2, (-1, block_size)))
                sums += [] if lse is None else [lse.unflatten(2, (-1, block_size))]
                continue
            index = columns[:, :, part]
            k, v, keep = gathered(index)
            mask = logits_of(own, index, keep, None if tile_masks is None else tile_masks[:, part], gathered)
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            out, lse = attend(q, k, v, _fold(mask, batch, heads), **options)
            outputs.append(out.unflatten(0, (batch, heads)))
            sums += [] if lse is None else [lse.unflatten(0, (batch, heads))]
    out, *rest = (_in_order(x, plan.order).flatten(2, 3)[:, :, :n] for x in (outputs, sums) if x)
    return out, rest[0] if rest else None


def _fold(mask: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """(B or 1, H or 1, …) to (B · H or 1, …), without a copy where all rows and heads share it."""
    if mask is None or mask.shape[:2] == (1, 1):
        return None if mask is None else mask[0]
    return mask.expand(batch, heads, -1, -1, -1).flatten(0, 1)


def _in_order(parts: list[Tensor], order: Tensor | None) -> Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return whole if order is None else whole.index_select(2, order)


class _Gathered:
    """Keys, values and per-key facts by block."""

    def __init__(self, key: Tensor, value: Tensor, heads: int, n: int, call: AttentionCall):
        batch, kv_heads, rows, block_size, width = key.shape
        self.shape = batch, heads, rows, block_size, width
        # whole blocks as rows of a matrix: gathering them is a plain copy of memory
        self.key, self.value = (x.contiguous().view(-1, block_size * width) for x in (key, value))
        # where the blocks start of that head of keys which a head of queries shares with others
        first = rows * torch.arange(batch * kv_heads, device=key.device).view(batch, kv_heads, 1, 1)
        self.first = first.repeat_interleave(heads // kv_heads, dim=1)
        self.padding = rows * block_size - n
        self.keep, keep = None, call.key_padding_mask
        if keep is not None or self.padding:
            keep = torch.ones(1, n, dtype=torch.bool, device=key.device) if keep is None else keep
            self.keep = F.pad(keep, (0, self.padding)).unflatten(1, (rows, block_size))
        self.segments, self.positions = (
            None if x is None else self.blocks(x[1]) for x in (call.segments, call.positions)
        )

    def blocks(self, x: Tensor) -> Tensor:
        """(B, 1 or H, N) to (B, 1 or H, rows, block)."""
        return F.pad(x, (0, self.padding), value=-1).unflatten(2, (self.shape[2], -1))

    def __call__(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, H, U, K · block, D) keys and values, and (B or 1, H or 1, U, K · block) which of them are there."""
        batch, heads = self.shape[:2]
        index = columns.clamp(min=0)
        flat = (self.first + index).flatten()
        shape = (batch, heads, columns.shape[2], -1, self.shape[-1])
        k, v = (x.index_select(0, flat).view(shape) for x in (self.key, self.value))
        if self.keep is None:
            return k, v, None
        at = torch.arange(self.keep.shape[0], device=k.device)[:, None, None, None]
        return k, v, self.keep[at, index].flatten(3, 4)

    def facts(self, x: Tensor, columns: Tensor) -> Tensor:
        """(B, 1 or H, U, K · block) of per-key numbers (B, 1 or H, rows, block)."""
        b = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
        h = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        return x[b, h, columns.clamp(min=0)].flatten(3, 4)


class _Logits:
    """What is added to the scores of a group of query blocks: element masks, padding, causality, bias."""

    def __init__(self, masks: Tensor, block_size: int, call: AttentionCall, dtype: torch.dtype):
        self.block_size, self.is_causal, self.relative_bias = block_size, call.is_causal, call.relative_bias
        self.dtype = dtype
        size = (1, block_size, block_size)
        ends = (masks.new_ones(size), masks.new_zeros(size))
        self.masks = torch.cat([masks, *ends])  # so that -1 is all False and -2 all True
        self.queries = call.segments, call.positions

    def __call__(
        self, members: Tensor, columns: Tensor, keep: Tensor | None, tile_masks: Tensor | None, gathered: _Gathered
    ) -> Tensor | None:
        """(B or 1, H or 1, U, block, K · block) additive, or `None` where everything is visible."""
        size = self.block_size
        mask: Any = None if keep is None else keep[..., None, :]
        if tile_masks is None:
            # lists of whole blocks: which entries are there, and where causal also which elements
            there = (columns >= 0).repeat_interleave(size, -1)[..., None, :]
            mask = there if mask is None else mask & there
        else:
            tiles = self.masks[tile_masks].transpose(-3, -2).flatten(-2)[None]
            mask = tiles if mask is None else mask & tiles
        within = torch.arange(size, device=columns.device)
        own = members[:, None] * size + within
        offset = None
        if (self.is_causal and tile_masks is None) or self.relative_bias is not None:
            key_position = (columns.clamp(min=0)[..., None] * size + within).flatten(3, 4)
            offset = key_position[..., None, :] - own[..., None]
            if self.is_causal and tile_masks is None:
                mask = mask & (offset <= 0)
        for pair, numbers in zip(self.queries, (gathered.segments, gathered.positions), strict=True):
            if pair is not None and numbers is not None:
                mine = gathered.blocks(pair[0])[:, :, members][..., None]
                other = gathered.facts(numbers, columns)[..., None, :]
                mask = mask & ((mine == other) if pair is self.queries[0] else (other <= mine))
        if self.relative_bias is None or offset is None:
            return None if bool_all(mask) else additive_mask(mask, self.dtype)
        bias = self.relative_bias.per_head(offset, 1).to(self.dtype)
        return torch.where(mask, bias, float("-inf"))
