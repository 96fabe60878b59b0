"""The pieces of a pattern in plain PyTorch: windows as views, tables by gathering, strides by folding, dense rows apart."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efficient.ops.block_sparse.decompose import (
    as_window,
    by_head,
    by_length,
    columns_as_keys,
    extra_only,
    left_out,
    stride_of,
    summaries_of,
    with_stride,
    with_summaries,
    without,
)
from hf_efficient.ops.block_sparse.gather import BlockPlan, block_list_attention, pattern_block, table_attention
from hf_efficient.ops.block_sparse.windows import window_attention
from hf_efficient.ops.context import AttentionCall
from hf_efficient.ops.graph import is_captured
from hf_efficient.ops.padding import real_length
from hf_efficient.ops.softmax import Result, additive_mask, attend, bool_all, merge_attention
from hf_efficient.patterns.kinds import BlockList, GlobalRows, Strided, Summary, Window
from hf_efficient.patterns.parse import parse_pattern
from hf_efficient.patterns.pattern import Intersection, Pattern, parts_of
from hf_efficient.patterns.sets import Without
from hf_efficient.patterns.tile_table import tile_table

# above this share of computed pairs one dense tile is faster than pieces; beyond this length it would be too large
DENSE_SHARE = 0.4
DENSE_LIMIT = 4096
# pieces that are merged compute their softmax in plain operations; one dense tile is faster up to this many strides
DENSE_STRIDES = 8
# lists of blocks differ from head to head, so that their dense masks are large: most elements of one
BLOCK_MASK_LIMIT = 2**24
# up to this length dense masks are kept from call to call
KEPT_LENGTH = 2048


def torch_attention(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall) -> Result:
    """The pieces in plain PyTorch: windows as views, tables by gathering, strides by folding, dense rows apart."""
    if call.extra is not None:
        near, far = dataclasses.replace(call, extra=None, return_lse=True), dataclasses.replace(call, return_lse=True)
        parts = torch_attention(query, key, value, pattern, near), extra_only(query, far)
        merged = merge_attention(*parts)  # type: ignore[arg-type]
        return merged if call.return_lse else (merged[0], None)
    if isinstance(pattern, BlockList):
        return _block_list(query, key, value, pattern, call)
    if pattern.num_heads > 1:
        return by_head(query, key, value, pattern, call, torch_attention)
    if pattern.depends_on_length:
        return by_length(query, key, value, pattern, call, torch_attention)
    if rows := _dense_rows_of(pattern, query.shape[2]):
        return _with_rows(query, key, value, without(pattern, GlobalRows), rows, call)
    if _is_dense(pattern, query.shape[2], call.is_causal):
        return _dense(query, key, value, pattern, call)
    if not call.by_vectors:
        if summaries := summaries_of(pattern, query.shape[2]):
            rest = without(pattern, Summary)
            return with_summaries(query, key, value, rest, summaries, call, torch_attention)
        if stride := stride_of(pattern):
            return with_stride(query, key, value, pattern, stride, call, torch_attention)
        if (window := as_window(pattern)) is not None:
            return _window(query, key, value, pattern, *window, call)
    return table_attention(query, key, value, pattern, call)


# dense rows and dense tiles


def _dense_rows_of(pattern: Pattern, n: int) -> tuple[int, ...]:
    positions = {p for part in parts_of(pattern) if isinstance(part, GlobalRows) for p in part.positions if p < n}
    return tuple(sorted(positions))


def _with_rows(
    query: Tensor, key: Tensor, value: Tensor, rest: Pattern | None, rows: tuple[int, ...], call: AttentionCall
) -> Result:
    index = torch.tensor(rows, device=query.device)[None]
    dense = _rows(query, key, value, index, call)
    if rest is None:
        batch, heads, n, _ = query.shape
        out, lse = torch.zeros_like(query), None
        if call.return_lse:
            lse = query.new_full((batch, heads, n), float("-inf"), dtype=dense[1].dtype)  # type: ignore[union-attr]
    else:
        out, lse = torch_attention(query, key, value, rest, call)
    return written(out, lse, index, torch.ones_like(index, dtype=torch.bool), dense)


def _rows(query: Tensor, key: Tensor, value: Tensor, index: Tensor, call: AttentionCall) -> Result:
    """Full attention of the queries at `index` (B or 1, G)."""
    batch, heads, n, width = query.shape
    at = index.expand(batch, -1)
    rows = query.gather(2, at[:, None, :, None].expand(-1, heads, -1, width))
    offset = torch.arange(n, device=query.device) - index[..., None]  # (B or 1, G, n)
    mask = torch.ones_like(offset, dtype=torch.bool)[:, None]
    if call.is_causal:
        mask = mask & (offset <= 0)[:, None]
    if call.key_padding_mask is not None:
        mask = mask & call.key_padding_mask[:, None, None]
    for pair, compare in ((call.segments, torch.eq), (call.positions, torch.ge)):
        if pair is not None:
            mine = pair[0].gather(2, at[:, None].expand(-1, pair[0].shape[1], -1))
            mask = mask & compare(mine[..., None], pair[1][..., None, :])
    logits = additive_mask(mask, query.dtype)
    if call.relative_bias is not None:
        logits = logits + call.relative_bias.per_head(offset[:, None], 1).to(query.dtype)
    return attend(rows, key, value, logits, return_lse=call.return_lse, **call.options)


def written(out: Tensor, lse: Tensor | None, index: Tensor, exists: Tensor, dense: Result) -> Result:
    """`out` with the rows `index` (B or 1, G) replaced where they exist; each row at most once."""
    n = out.shape[2]
    # rows that do not exist go to a spare row, which is cut off: a second writer would double a gradient
    target = torch.where(exists, index, n).expand(out.shape[0], -1)[:, None]
    rows, row_lse = dense
    place = target[..., None].expand(-1, out.shape[1], -1, out.shape[3])
    out = torch.cat([out, out.new_zeros(*out.shape[:2], 1, out.shape[3])], dim=2).scatter(2, place, rows)[:, :, :n]
    if lse is not None and row_lse is not None:
        spare = torch.cat([lse, lse.new_zeros(*lse.shape[:2], 1)], dim=2)
        lse = spare.scatter(2, target.expand(-1, lse.shape[1], -1), row_lse)[:, :, :n]
    return out, lse


@lru_cache(maxsize=256)
def table_share(spec: str, n: int, is_causal: bool) -> float:
    """Pairs in the tiles that a pattern touches, over all pairs."""
    pattern = parse_pattern(spec)
    block = pattern_block(pattern)
    return tile_table(pattern, n, n, block, block, is_causal=is_causal).density


def _share(spec: str, n: int, is_causal: bool) -> float:
    return table_share(spec, n, is_causal)


_share._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_dense(pattern: Pattern, n: int, is_causal: bool) -> bool:
    """One dense tile costs less than the pieces, which would compute most pairs anyway."""
    # what is drawn can't be traced; tables of it are constants
    if n > DENSE_LIMIT or (is_captured() and _holds_lists(pattern)):
        return False
    if as_window(pattern) is not None:
        return False
    length = len(range(n))  # a plain number, also while compiling
    if (shown := left_out(pattern)) is not None:
        pattern = shown[0]
    share = sum(part.size / part.stride for part in parts_of(pattern) if isinstance(part, Summary))
    strides = [part.stride for part in parts_of(pattern) if isinstance(part, Strided)]
    is_merged = bool(strides) and len(parts_of(pattern)) > 1
    share += 1.0 if is_merged and n <= DENSE_STRIDES * min(strides) else sum(1 / stride for stride in strides)
    rest = without(pattern, Strided, Summary)
    return share + (0.0 if rest is None else _share(rest.spec(), length, is_causal)) > DENSE_SHARE


def _holds_lists(pattern: Pattern) -> bool:
    inside = (
        *getattr(pattern, "parts", ()),
        *([pattern.pattern, pattern.excluded] if isinstance(pattern, Without) else ()),
    )
    return isinstance(pattern, BlockList) or any(_holds_lists(part) for part in inside)


def _mask(pattern: Pattern, n: int, is_causal: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, 1, n, n) additive form of a pattern."""
    with torch.inference_mode(False):  # a kept mask must serve training also
        position = torch.arange(n, device=device)
        mask = pattern.visible(position[:, None], position)[None, None]
        return additive_mask(mask & (position <= position[:, None]) if is_causal else mask, dtype)


_kept_mask = lru_cache(maxsize=8)(_mask)


def _dense(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall) -> Result:
    n = query.shape[2]
    mask_of = _kept_mask if n <= KEPT_LENGTH and not is_captured() else _mask
    logits = mask_of(pattern, n, call.is_causal, query.device, query.dtype)
    if call.key_padding_mask is not None:
        logits = torch.where(call.key_padding_mask[:, None, None], logits, float("-inf"))
    for pair, compare in ((call.segments, torch.eq), (call.positions, torch.ge)):
        if pair is not None:
            logits = torch.where(compare(pair[0][..., None], pair[1][..., None, :]), logits, float("-inf"))
    if call.relative_bias is not None:
        logits = logits + call.relative_bias.dense(n, n, 0, query.device).to(query.dtype)
    return attend(query, key, value, logits, return_lse=call.return_lse, **call.options)


def _window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    window: Window,
    columns: tuple[int, ...],
    skip: int | None,
    call: AttentionCall,
) -> Result:
    here = tuple(p for p in columns if p < query.shape[2])
    if here:
        seen_by = pattern if any(isinstance(part, Intersection) for part in parts_of(pattern)) else None
        # columns that stand in a query's window are seen there
        call = dataclasses.replace(call, extra=columns_as_keys(key, value, here, call, seen_by, window))
    return window_attention(query, key, value, window, call, skip=skip)


# lists of blocks that depend on each row's length


class _Lists(NamedTuple):
    """Key blocks and full rows of `BlockList`; where one dense tile is cheaper, which blocks each block of queries sees."""

    columns: Tensor
    full: tuple[Tensor, Tensor] | None
    seen: Tensor | None
    sees_all: bool


def _lists(pattern: BlockList, n: int, is_causal: bool, device: torch.device, length: Tensor | None = None) -> _Lists:
    """For rows of (B,) real tokens; `None` = without padding."""
    with torch.inference_mode(False):  # kept lists must serve training also
        length = torch.full((1,), n, device=device) if length is None else length
        rows = -(-n // pattern.block_size)
        columns, full = pattern.columns(rows, length, is_causal), pattern.full_rows(n, length, is_causal)
        is_small = columns.shape[0] * columns.shape[1] * n * n <= BLOCK_MASK_LIMIT
        if not is_small or columns.shape[-1] < rows:
            return _Lists(columns, full, None, False)
        seen = _seen_blocks(columns, full, pattern.block_size)
        return _Lists(columns, full, seen, bool_all(seen))


_kept_lists = lru_cache(maxsize=64)(_lists)


@lru_cache(maxsize=64)
def _list_plan(spec: str, n: int, device: str) -> BlockPlan:
    """The plan of lists without padding: query blocks with equally many key blocks together, those that see all apart."""
    with torch.inference_mode(False), torch.device("cpu"):
        pattern = parse_pattern(spec)
        assert isinstance(pattern, BlockList)
        size, length = pattern.block_size, torch.tensor([n])
        rows = -(-n // size)
        columns = pattern.columns(rows, length, False)[0]
        columns = torch.where(columns < 0, rows, columns).sort(-1).values
        columns = torch.where(columns == rows, -1, columns)
        fewest, most = (columns >= 0).sum(-1).aminmax(dim=0)
        if (full := pattern.full_rows(n, length, False)) is not None:
            fewest[full[0][full[1]] // size] = rows
        groups: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        most = torch.where(fewest == rows, rows + 1, most)
        parts = [(most == count).nonzero().flatten() for count in most.unique()]
        for members in parts:
            width = max(1, int(most[members[0]]))
            listed = None if width > rows else columns[None, :, members, :width].to(device)
            groups.append((members.to(device), listed, None))
        order = torch.cat(parts).argsort()
        in_order = bool((order == torch.arange(rows)).all())
        no_masks = torch.zeros(0, size, size, dtype=torch.bool, device=device)
        return BlockPlan(groups, no_masks, None if in_order else order.to(device))


def _constant_list_plan(spec: str, n: int, device: str) -> Any:
    return tuple(_list_plan(spec, n, device))


_constant_list_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _block_list(query: Tensor, key: Tensor, value: Tensor, pattern: BlockList, call: AttentionCall) -> Result:
    n, size = query.shape[2], pattern.block_size
    rows = -(-n // size)
    if call.key_padding_mask is None:
        lists_of = _lists if is_captured() else _kept_lists
        lists = lists_of(pattern, n, call.is_causal, key.device)
    else:
        lists = _lists(pattern, n, call.is_causal, key.device, real_length(call.key_padding_mask))
    columns, full = lists.columns, lists.full
    if lists.seen is not None and not call.by_vectors:
        return _dense_blocks(query, key, value, lists.seen, lists.sees_all, size, call)
    if call.key_padding_mask is None and call.relative_bias is None and not call.is_causal and not call.by_vectors:
        plan = BlockPlan(*_constant_list_plan(pattern.spec(), len(range(n)), str(key.device)))
        return block_list_attention(query, key, value, plan, call, block_size=size)
    plan = BlockPlan(
        [(torch.arange(rows, device=key.device), columns, None)],
        torch.zeros(0, size, size, dtype=torch.bool, device=key.device),
        None,
    )
    out, lse = block_list_attention(query, key, value, plan, call, block_size=size)
    if full is None:
        return out, lse
    index, exists = full
    return written(out, lse, index, exists, _rows(query, key, value, index, call))


def _seen_blocks(columns: Tensor, full: tuple[Tensor, Tensor] | None, size: int) -> Tensor:
    """(B or 1, H or 1, rows, rows) bool: which blocks of keys each block of queries sees."""
    rows = columns.shape[2]
    seen = columns.new_zeros(*columns.shape[:3], rows + 1, dtype=torch.bool)
    seen = seen.scatter(3, columns % (rows + 1), True)[..., :rows]  # -1 falls into the spare column
    if full is None:
        return seen
    block = torch.where(full[1], full[0] // size, rows)
    everything = columns.new_zeros(block.shape[0], rows + 1, dtype=torch.bool).scatter(1, block, True)[:, :rows]
    return seen | everything[:, None, :, None]


def _dense_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    sees_all: bool,
    size: int,
    call: AttentionCall,
) -> Result:
    """Few blocks: one dense tile, without a mask where every block sees every block."""
    batch, heads, n, width = query.shape
    rows = seen.shape[-1]
    is_plain = not call.is_causal and call.relative_bias is None and not call.return_lse and not call.dropout
    # only kernels read the keys of several blocks of queries without copies of them
    is_plain = is_plain and call.softcap is None
    # backward would write the gradient of every key once per block of queries
    is_plain = is_plain and not (torch.is_grad_enabled() and key.requires_grad)
    if (
        is_plain
        and query.device.type == "cpu"
        and n == rows * size
        and (call.key_padding_mask is not None or not sees_all)
    ):
        # each block of queries as a head of its own: their one row of mask is not copied for every query
        visible = seen.repeat_interleave(size, -1)
        if call.key_padding_mask is not None:
            visible = visible & call.key_padding_mask[:, None, None]
        mask = additive_mask(visible, query.dtype).expand(batch, heads, -1, -1).reshape(batch * key.shape[1], -1, 1, n)
        blocks = query.reshape(batch * key.shape[1], -1, size, width)
        k, v = (x.flatten(0, 1)[:, None].expand(-1, blocks.shape[1], -1, -1) for x in (key, value))
        return attend(blocks, k, v, mask, **call.options)[0].reshape(batch, heads, n, width), None
    logits = None
    if not sees_all or call.is_causal or call.key_padding_mask is not None or call.relative_bias is not None:
        # every block becomes size × size equal entries in one copy
        blocks = additive_mask(seen, query.dtype)[:, :, :, None, :, None]
        logits = blocks.expand(-1, -1, -1, size, -1, size).flatten(4, 5).flatten(2, 3)[:, :, :n, :n]
        if call.is_causal:
            position = torch.arange(n, device=query.device)
            logits = torch.where(position <= position[:, None], logits, float("-inf"))
        if call.key_padding_mask is not None:
            logits = torch.where(call.key_padding_mask[:, None, None], logits, float("-inf"))
        if call.relative_bias is not None:
            logits = logits + call.relative_bias.dense(n, n, 0, query.device).to(query.dtype)
    return attend(query, key, value, logits, return_lse=call.return_lse, **call.options)
