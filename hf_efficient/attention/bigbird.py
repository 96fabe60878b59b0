"""BigBird (internal transformer construction): neighbouring, global and random blocks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import (
    AttentionContext,
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    MechanismFacts,
    register_mechanism,
)
from ..ops.alignment import real_length
from ..ops.blocks import block_list_attention

MASK31 = 2**31 - 1
# block rows whose priorities over all blocks are drawn at once: bounds working memory, not results
PRIORITY_ROWS = 64
# queries handled at once while decoding, where each may lie in another block
DECODE_QUERIES = 64


@dataclass(frozen=True, kw_only=True)
class BigBirdAttentionConfig(EfficientAttentionConfig):
    """Options of BigBird attention.

    Args:
        block_size: β, tokens per block.
        num_random_blocks: random key blocks per query block and head.
        seed: of the random blocks.
    """

    mechanism: ClassVar[str] = "bigbird"

    block_size: int = 64
    num_random_blocks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("block_size")
        for name in ("num_random_blocks", "seed"):
            value = getattr(self, name)
            self._require(name, type(value) is int and value >= 0, "an integer ≥ 0")


@register_mechanism
class BigBirdAttention(EfficientAttention):
    """Blocks of β tokens; the block of query i is u, that of key j is c, the last real block of the row is e.

        encoder: i sees j iff u ∈ {0, e} or c ∈ {0, u - 1, u, u + 1, e} ∪ R_h(u)
        causal:  i sees j iff j ≤ i and c ∈ {0, u - 1, u} ∪ R_h(u)

    R_h(u) are the `num_random_blocks` blocks of highest fixed pseudo-random priority (seed, layer, head, u, c) among the
    real blocks that u does not see already (causal: among 1 … u - 2). So they are the same in training and inference and
    depend neither on padding nor on the rest of the batch. Blocks count from a row's first real token.

    O(N β (5 + r)) time and memory; the two global blocks cost O(N β). No new parameters. Source: Zaheer et al. 2020
    (arXiv 2007.14062), §2 and App. D. Deviations: a causal form; random blocks never repeat blocks that are seen anyway;
    the last *real* block is global, where transformers takes the last padded one.
    """

    Config = BigBirdAttentionConfig
    config: BigBirdAttentionConfig
    facts = MechanismFacts(
        title="BigBird (ITC)",
        paper="arXiv 2007.14062",
        time="n·β·(5 + r)",
        memory="n·β·(5 + r)",
        exact_when="block_size ≥ n / 4 (causal: with num_random_blocks ≥ 1)",
        training="works untrained; training restores long range",
    )
    left_aligned = True

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(config, block_size=-(-length // 4), num_random_blocks=1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        n, s = query.shape[2], key.shape[2]
        if n < s:
            return self._decode(query, key, value, context)
        size, count = self.config.block_size, self.config.num_random_blocks
        rows = -(-n // size)
        keep = context.key_padding_mask
        last = None
        if not context.is_causal:
            length = torch.full((1,), n, device=key.device) if keep is None else real_length(keep)
            last = (length - 1).clamp(min=0) // size  # (B or 1,)
        block_rows = torch.arange(rows, device=key.device)[None]
        columns = self._columns(block_rows, last, rows)
        # up to here a dense tile computes no more scores than gathered blocks would
        if rows <= 5 + count:
            visible = self._dense_rows(columns, last, rows)
            visible = visible.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :n, :n]
            return _masked(query, key, value, visible, context)
        out = block_list_attention(
            query,
            key,
            value,
            columns,
            block_size=size,
            scaling=context.scaling,
            is_causal=context.is_causal,
            key_padding_mask=keep,
            relative_bias=context.relative_bias,
            dropout=context.dropout,
        )
        return out if last is None else self._global_rows(out, query, key, value, last, context)

    def _columns(self, rows: Tensor, last: Tensor | None, num_blocks: int) -> Tensor:
        """(B or 1, H, U, K) key blocks of the query blocks `rows` (B or 1, U), -1 = none; `last` = None is causal."""
        limit = rows if last is None else last[:, None]  # global end block, or the diagonal
        near = [rows - 1, rows] if last is None else [rows - 1, rows, rows + 1]
        fixed = [torch.zeros_like(rows + limit)]
        fixed += [torch.where((c > 0) & ((c <= rows) if last is None else (c < limit)), c, -1) for c in near]
        if last is not None:
            fixed.append(torch.where(limit > 0, limit, -1).expand_as(fixed[0]))
        heads = self.geometry.num_heads
        columns = torch.stack([c.expand_as(fixed[0]) for c in fixed], -1)[:, None].expand(-1, heads, -1, -1)
        if self.config.num_random_blocks == 0:
            return columns
        random = [self._random_columns(part, last, num_blocks) for part in rows.split(PRIORITY_ROWS, dim=-1)]
        return torch.cat([columns, torch.cat(random, dim=2)], dim=-1)

    def _random_columns(self, rows: Tensor, last: Tensor | None, num_blocks: int) -> Tensor:
        device = rows.device
        column = torch.arange(num_blocks, device=device)
        row = rows[..., None]
        if last is None:
            eligible = (column > 0) & (column < row - 1)
        else:
            eligible = (column > 0) & (column < last[:, None, None]) & ((column - row).abs() > 1)
        head = torch.arange(self.geometry.num_heads, device=device)[:, None, None]
        state = _mix(_mix(_mix(torch.tensor(self.config.seed & MASK31, device=device)) + self.geometry.layer) + head)
        priority = _mix(_mix(state + row[:, None]) + column)
        # the column itself breaks ties, so that no two blocks are equal
        priority = torch.where(eligible[:, None], priority * num_blocks + column, -1)
        best, index = priority.topk(min(self.config.num_random_blocks, num_blocks), dim=-1)
        return torch.where(best >= 0, index, -1)

    def _dense_rows(self, columns: Tensor, last: Tensor | None, num_blocks: int) -> Tensor:
        """(B or 1, H, rows, blocks) bool: which blocks each block row sees, global rows included."""
        batch, heads, rows, _ = columns.shape
        visible = torch.zeros(batch, heads, rows, num_blocks + 1, dtype=torch.bool, device=columns.device)
        visible = visible.scatter(3, columns % (num_blocks + 1), True)[..., :num_blocks]
        if last is not None:
            row = torch.arange(rows, device=columns.device)
            everything = (row == 0) | (row == last[:, None])
            visible = visible | everything[:, None, :, None]
        return visible

    def _global_rows(
        self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, last: Tensor, context: AttentionContext
    ) -> Tensor:
        """Replace the rows of the first and of the last real block, which see every key."""
        n, size = query.shape[2], self.config.block_size
        within = torch.arange(size, device=key.device)
        # where the last real block is the first one too, it is written once: a second writer would double its gradient
        end = torch.where(last[:, None] > 0, last[:, None] * size + within, n)
        index = torch.cat([within.expand(len(last), -1), end], -1)
        index = index.expand(query.shape[0], -1)
        clamped = index.clamp(max=n - 1)
        gather = clamped[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        rows = _masked(query.gather(2, gather), key, value, None, context, positions=clamped)
        # positions past the end of a short last block go to a spare row, which is cut off
        target = index.clamp(max=n)[:, None, :, None].expand_as(rows)
        return F.pad(out, (0, 0, 0, 1)).scatter(2, target, rows)[:, :, :n]

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """Few new queries against a cache: one masked tile per group of queries, O(N S) time, O(S) memory."""
        size, s = self.config.block_size, key.shape[2]
        start = torch.zeros(1, dtype=torch.long, device=key.device) if context.row_start is None else context.row_start
        position = torch.arange(s, device=key.device) - start[:, None]  # (B or 1, S)
        num_blocks = -(-s // size)
        outputs = []
        for first in range(0, query.shape[2], DECODE_QUERIES):
            q = query[:, :, first : first + DECODE_QUERIES]
            low = context.query_offset + first
            at = position[:, low : low + q.shape[2]]
            columns = self._columns(at.clamp(min=0) // size, None, num_blocks)
            blocks = self._dense_rows(columns, None, num_blocks)  # (B or 1, H, N, blocks)
            owner = (position.clamp(min=0) // size)[:, None, None].expand(-1, *blocks.shape[1:3], -1)
            visible = blocks.gather(3, owner) & (position >= 0)[:, None, None]
            positions = torch.arange(low, low + q.shape[2], device=key.device)[None]
            outputs.append(_masked(q, key, value, visible, context, positions=positions))
        return torch.cat(outputs, dim=2)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    context: AttentionContext,
    positions: Tensor | None = None,
) -> Tensor:
    """One dense tile: `visible` (B or 1, H, N, S) and the call's padding, causality and bias; queries at `positions`."""
    if positions is None:
        positions = torch.arange(query.shape[2], device=query.device)[None]
    offset = torch.arange(key.shape[2], device=key.device) - positions[..., None]  # (B or 1, N, S)
    if context.is_causal:
        past = (offset <= 0)[:, None]
        visible = past if visible is None else visible & past
    if context.key_padding_mask is not None:
        keep = context.key_padding_mask[:, None, None]
        visible = keep if visible is None else visible & keep
    mask = visible
    if context.relative_bias is not None:
        bias = context.relative_bias.at(offset).transpose(0, 1).to(query.dtype)
        mask = bias if visible is None else torch.where(visible, bias, float("-inf"))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=context.dropout, scale=context.scaling
    )


def _mix(x: Tensor) -> Tensor:
    """Integer hash to 31 bits; every product stays below 2**63."""
    x = x & MASK31
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & MASK31
    x = ((x ^ (x >> 15)) * 0x45D9F3B) & MASK31
    return x ^ (x >> 16)
