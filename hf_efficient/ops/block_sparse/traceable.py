"""Block-sparse attention as a graph whose batch and length stay open: `torch.export`, ONNX, `torch.jit.trace`.

Blocks of a size that follows from the pattern gather the keys that they may see, by index; the rest is a matrix product, a
comparison of positions and a softmax. There is no loop over blocks, nothing that is kept, and no size that can be 0 or 1,
which compilers take for cases of their own. It computes more than the other forms and copies each key for every block that
may see it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.block_sparse.decompose import by_head, without
from hf_efficient.ops.block_sparse.torch_backend import written
from hf_efficient.ops.context import AttentionCall
from hf_efficient.ops.grouped_heads import expand_heads
from hf_efficient.ops.padding import real_length, real_tokens
from hf_efficient.ops.softmax import Result
from hf_efficient.patterns.kinds import (
    BlockList,
    BlockWindow,
    Full,
    GlobalColumns,
    GlobalRows,
    Strided,
    Summary,
    Window,
)
from hf_efficient.patterns.pattern import Intersection, Pattern, Union, parts_of
from hf_efficient.patterns.sets import PerHead, Without

COLUMNS = (GlobalColumns, Summary)
LARGEST_BLOCK = 256
# keys of a block beyond which one dense tile is taken, where nobody says how long inputs become
LARGEST_SPAN = 2**14


class _Keys(NamedTuple):
    """Keys beside each other in one softmax, for queries in blocks.

    Attributes:
        scores: (B, H, R, h, K) products of queries and keys. visible: broadcastable to them. bias: likewise, or `None`.
    """

    scores: Tensor
    visible: Tensor
    bias: Tensor | None


def is_traceable(pattern: Pattern) -> bool:
    """Whether `traceable_attention` can compute a pattern."""
    if isinstance(pattern, PerHead):
        return all(is_traceable(part) for part in pattern.parts)
    if isinstance(pattern, BlockList):
        return True
    parts = parts_of(pattern)
    strides = [part for part in parts if isinstance(part, Strided)]
    others = (*COLUMNS, GlobalRows, Full, Strided)
    return len(strides) <= 1 and all(_is_near(part) or isinstance(part, others) for part in parts)


def _is_near(part: Pattern) -> bool:
    """Keys within a fixed distance, by a comparison of positions alone."""
    return part.reach is not None and not _holds_lists(part)


def _holds_lists(pattern: Pattern) -> bool:
    inside: tuple[Pattern, ...] = ()
    if isinstance(pattern, (Union, Intersection, PerHead)):
        inside = pattern.parts
    elif isinstance(pattern, Without):
        inside = (pattern.pattern, pattern.excluded)
    return isinstance(pattern, BlockList) or pattern.depends_on_length or any(_holds_lists(part) for part in inside)


def traceable_attention(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall) -> Result:
    """`block_sparse_attention` with an open batch and length, for whole rows.

    Args:
        query: (B, H, N, D); key, value: (B, HK, N, D). pattern: one that `is_traceable`.
        call: all of it but `segments` and `positions`.

    Returns:
        (B, H, N, D), and the log-sum-exp (B, H, N) or `None`; a query that sees nothing gives 0 and -inf. O(N K) time and
        memory, K the keys of the block that sees most.
    """
    if not isinstance(pattern, BlockList) and pattern.num_heads > 1:
        return by_head(query, key, value, pattern, call, traceable_attention)
    key, value = expand_heads(query, key, value)
    if isinstance(pattern, BlockList):
        return _listed(query, key, value, pattern, call)
    rows = sorted({p for part in parts_of(pattern) if isinstance(part, GlobalRows) for p in part.positions})
    result = _near(query, key, value, without(pattern, GlobalRows) or GlobalColumns(positions=()), call)
    if not rows:
        return result
    index = torch.tensor(rows, device=query.device)[None]
    exists, index = index < query.shape[2], index.clamp(max=query.shape[2] - 1)
    return written(*result, index, exists, _rows(_at(query, index, 2), key, value, index, None, call))


# windows, blocks and columns


def _near(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall) -> Result:
    """All of a pattern but rows that see everything."""
    n, parts = query.shape[2], parts_of(pattern)
    span = sum(_span(without(pattern, *COLUMNS, Strided), call.is_causal))
    if span >= (_longest(n) or LARGEST_SPAN) or any(isinstance(part, Full) for part in parts):
        return _rows(query, key, value, torch.arange(n, device=query.device)[None], pattern, call)
    strided = next((part for part in parts if isinstance(part, Strided)), None)
    if strided is None:
        return _in_windows(query, key, value, pattern, None, call)
    apart = dataclasses.replace(call, return_lse=True)
    far = _in_classes(query, key, value, strided.stride, dataclasses.replace(apart, extra=None))
    rest = without(pattern, Strided)
    if rest is not None or call.extra is not None:
        far = _merged(far, _in_windows(query, key, value, rest or GlobalColumns(positions=()), strided, apart))
    return far if call.return_lse else (far[0], None)


def _in_windows(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, hidden: Pattern | None, call: AttentionCall
) -> Result:
    """Keys near each block of queries, columns and extra keys, without those that `hidden` shows."""
    n, device = query.shape[2], query.device
    near = without(pattern, *COLUMNS)
    size, left, right = _span(near, call.is_causal)
    # one block more than needed, as one alone would be a case of its own
    start = torch.arange((n - 1) // size + 2, device=device) * size
    ours, theirs = torch.arange(size, device=device), torch.arange(-left, size + right, device=device)
    own, keys = start[:, None] + ours, start[:, None] + theirs  # (R, h), (R, K)
    at = keys.clamp(0, n - 1)
    real = real_tokens(call.key_padding_mask, key)[:, at]
    seen = (real & (keys >= 0) & (keys < n))[:, None, :, None]
    offset = theirs - ours[:, None]
    shown = torch.zeros_like(offset, dtype=torch.bool)[None]
    if near is not None:
        where = (ours[:, None], theirs) if near.shift_invariant else (own[:, :, None], keys[:, None])
        shown = near.visible(*where)
        shown = shown if shown.dim() == 3 else shown[None]
    if hidden is not None:
        shown = shown & ~hidden.visible(ours[:, None], theirs)
    if call.is_causal:
        shown = shown & (offset <= 0)
    q = _blocks(query, own) * call.scaling
    k, v = (_blocks(x, at) for x in (key, value))
    bias = None if call.relative_bias is None else call.relative_bias.at(offset)[None, :, None]
    parts, values = [_Keys(q @ k.transpose(-1, -2), seen & shown, bias)], [v]
    for found, more in _columns(q, own, key, value, pattern, hidden, call):
        parts.append(found)
        values.append(more)
    if call.extra is not None:
        found, more = _extra(q, lambda x, dim: _in_blocks(x, own, dim), call)
        parts.append(found)
        values.append(more)
    return _softmax(parts, values, torch.arange(n, device=device), call)


def _columns(
    query: Tensor,
    own: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    hidden: Pattern | None,
    call: AttentionCall,
) -> Iterator[tuple[_Keys, Tensor]]:
    """The columns of the pattern, for (B, H, R, h, D) queries at (R, h)."""
    n = key.shape[2]
    for index, shown in _positions(pattern, own, hidden, n):
        at = index.clamp(max=n - 1)
        offset = index - own[..., None]  # (R, h, G)
        shown = shown & (offset <= 0) if call.is_causal else shown.expand(offset.shape)
        seen = real_tokens(call.key_padding_mask, key).index_select(1, at)[:, None, None, None] & shown
        bias = None if call.relative_bias is None else call.relative_bias.at(offset)[None]
        k, v = (x.index_select(2, at)[:, :, None] for x in (key, value))
        yield _Keys(query @ k.transpose(-1, -2), seen, bias), v


def _positions(pattern: Pattern, own: Tensor, hidden: Pattern | None, n: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions (G,) of columns of the pattern, and (R, h or 1, G or 1) whether queries (R, h) see them by these alone."""
    before = [part for part in (without(pattern, *COLUMNS), hidden) if part is not None]
    fixed = sorted({p for part in parts_of(pattern) if isinstance(part, GlobalColumns) for p in part.positions})
    columns: list[tuple[Pattern, Tensor]] = []
    if fixed:
        columns.append((GlobalColumns(positions=tuple(fixed)), torch.tensor(fixed, device=own.device)))
    for part in parts_of(pattern):
        if isinstance(part, Summary):
            block = torch.arange((n - 1) // part.stride + 2, device=own.device)[:, None] * part.stride
            last = torch.arange(part.stride - part.size, part.stride, device=own.device)
            columns.append((part, (block + last).flatten()))
    for part, index in columns:
        shown = (index < n)[None, None]
        for other in before:
            shown = shown & ~other.visible(own[..., None], index)
        yield index, shown
        before.append(part)


def _in_classes(query: Tensor, key: Tensor, value: Tensor, stride: int, call: AttentionCall) -> Result:
    """Every stride-th key, the query's own among them: the residue classes as short dense sequences."""
    n, device = query.shape[2], query.device
    row = torch.arange((n - 1) // stride + 2, device=device) * stride
    at = torch.arange(stride, device=device)[:, None] + row  # (stride, M)
    offset = row - row[:, None]
    real = real_tokens(call.key_padding_mask, key)[:, at.clamp(max=n - 1)]
    seen = (real & (at < n))[:, None, :, None]
    seen = seen & (offset <= 0) if call.is_causal else seen.expand(-1, -1, -1, at.shape[1], -1)
    q, k, v = (_blocks(x, at) for x in (query, key, value))
    bias = None if call.relative_bias is None else call.relative_bias.at(offset)[None, :, None]
    token = torch.arange(n, device=device)
    place = token % stride * at.shape[1] + token // stride
    return _softmax([_Keys((q * call.scaling) @ k.transpose(-1, -2), seen, bias)], [v], place, call)


def _merged(first: Result, second: Result) -> Result:
    """What `ops.softmax.merge_attention` computes, in operators that every runtime has."""
    (one, a), (other, b) = first, second
    assert a is not None and b is not None
    sums = torch.stack([a, b], dim=-1)
    exists = sums > float("-inf")
    sums = torch.where(exists, sums, torch.finfo(sums.dtype).min / 2)
    share = sums.softmax(-1).to(one.dtype)
    out = one * share[..., :1] + other * share[..., 1:]
    return out, torch.where(exists.any(-1), sums.logsumexp(-1), float("-inf"))


def _span(pattern: Pattern | None, is_causal: bool) -> tuple[int, int, int]:
    """(tokens of a block, keys before its first and behind its last token)."""
    parts = () if pattern is None else parts_of(pattern)
    sizes = {part.block_size for part in parts if isinstance(part, BlockWindow) and part.start == 0}
    size = sizes.pop() if len(sizes) == 1 else 0
    left = right = 0
    for part in parts:
        if isinstance(part, Window):
            sides = part.left * part.dilation, part.right * part.dilation
        elif isinstance(part, BlockWindow) and part.block_size == size and part.start == 0:
            sides = part.before, part.after
        else:
            sides = part.reach or 0, part.reach or 0
        left, right = max(left, sides[0]), max(right, sides[1])
    right = 0 if is_causal and not size else right
    return size or min(LARGEST_BLOCK, max(16, (left + right) // 2)), left, right


def _longest(n: Any) -> int | None:
    """The largest length that a graph is made for; `None` = not known."""
    if isinstance(n, int):
        return n
    if not isinstance(n, torch.SymInt):
        return None
    upper = n.node.shape_env.bound_sympy(n.node.expr).upper
    return int(upper) if getattr(upper, "is_Integer", False) else None


def _extra(query: Tensor, of_queries: Callable[[Tensor, int], Tensor], call: AttentionCall) -> tuple[_Keys, Tensor]:
    """The extra keys for (B, H, R, h, D) queries; `of_queries` brings an axis of all queries, or of one, to theirs."""
    extra = call.extra
    assert extra is not None
    k, v = (x[:, :, None] for x in expand_heads(query, extra.key, extra.value))
    bias = None if extra.bias is None else of_queries(extra.bias, 2)
    return _Keys(query @ k.transpose(-1, -2), of_queries(extra.keep, 1)[:, None], bias), v


def _in_blocks(x: Tensor, own: Tensor, dim: int) -> Tensor:
    """Axis `dim`, of all queries or 1, as two axes: blocks and their queries, or 1 and 1."""
    if x.shape[dim] == 1:
        return x.unsqueeze(dim)
    at = own.clamp(max=x.shape[dim] - 1)
    return x[:, at] if dim == 1 else x[:, :, at]


def _at(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """The entries `index` (B or 1, M) of axis `dim` of (B or 1, …)."""
    if index.shape[0] == 1:
        return x.index_select(dim, index[0])
    shape = [index.shape[0], *(1,) * (dim - 1), index.shape[1], *(1,) * (x.dim() - dim - 1)]
    sizes = [index.shape[0], *x.shape[1:dim], index.shape[1], *x.shape[dim + 1 :]]
    return x.expand(index.shape[0], *x.shape[1:]).gather(dim, index.view(shape).expand(sizes))


def _blocks(x: Tensor, at: Tensor) -> Tensor:
    """(B, H, R, K, D): the entries `at` (R, K) of (B, H, N, D); positions behind the end repeat the last."""
    # by index: to split an axis asks whether the size of one part divides it
    return x[:, :, at.clamp(max=x.shape[2] - 1)]


def _softmax(parts: Sequence[_Keys], values: Sequence[Tensor], rows: Tensor, call: AttentionCall) -> Result:
    """One softmax over all parts, and of the queries of all blocks, one behind the other, those at `rows`."""
    dtype = parts[0].scores.dtype
    lowest = torch.finfo(dtype).min / 2  # an infinite one would make rows that see nothing 0 / 0
    logits, some = [], []
    for scores, visible, bias in parts:
        if call.softcap is not None:
            scores = call.softcap * (scores / call.softcap).tanh()
        scores = scores if bias is None else scores + bias.to(dtype)
        logits.append(torch.where(visible, scores, lowest))
        some.append(visible.any(-1, keepdim=True))
    every = torch.cat(logits, dim=-1)
    sees = some[0]
    for other in some[1:]:
        sees = sees | other
    weights = every.softmax(-1)
    weights = F.dropout(weights, call.dropout) if call.dropout else weights
    shares = weights.split([part.scores.shape[-1] for part in parts], dim=-1) if len(parts) > 1 else (weights,)
    out = shares[0] @ values[0]
    for share, value in zip(shares[1:], values[1:], strict=True):
        out = out + share @ value
    out = _picked(torch.where(sees, out, 0.0), rows)
    if not call.return_lse:
        return out, None
    wide = every.to(torch.promote_types(dtype, torch.float32))
    lse = torch.where(sees, wide.logsumexp(-1, keepdim=True), float("-inf"))
    return out, _picked(lse, rows)[..., 0]


def _picked(x: Tensor, rows: Tensor) -> Tensor:
    # a slice would ask whether it is the whole
    return x.flatten(2, 3).index_select(2, rows)


# rows that may see every key


def _rows(
    rows: Tensor, key: Tensor, value: Tensor, index: Tensor, pattern: Pattern | None, call: AttentionCall
) -> Result:
    """Attention of (B, H, M, D) queries at `index` (B or 1, M) over all keys that a pattern shows them; `None` = all."""
    every = torch.arange(key.shape[2], device=key.device)
    offset = every - index[..., None]  # (B or 1, M, n)
    shown = real_tokens(call.key_padding_mask, key)[:, None]
    if pattern is not None:
        shown = shown & pattern.visible(index[..., None], every)
    if call.is_causal:
        shown = shown & (offset <= 0)
    shown = shown.expand(-1, rows.shape[2], -1)[:, None, None]
    bias = None if call.relative_bias is None else call.relative_bias.per_head(offset[:, None], 1)[:, :, None]
    q = (rows * call.scaling)[:, :, None]  # one block
    k, v = key[:, :, None], value[:, :, None]
    parts, values = [_Keys(q @ k.transpose(-1, -2), shown, bias)], [v]
    if call.extra is not None:
        found, more = _extra(q, lambda x, dim: (x if x.shape[dim] == 1 else _at(x, index, dim)).unsqueeze(dim), call)
        parts.append(found)
        values.append(more)
    return _softmax(parts, values, torch.arange(rows.shape[2], device=key.device), call)


# lists of blocks that depend on each row's length


def _listed(query: Tensor, key: Tensor, value: Tensor, pattern: BlockList, call: AttentionCall) -> Result:
    (batch, heads, n, _), size, device = query.shape, pattern.block_size, query.device
    real = real_tokens(call.key_padding_mask, key).expand(batch, -1)
    # at least as many blocks as a list has entries that are chosen among them
    count = (n - 1) // size + 1 + max(1, getattr(pattern, "num_random_blocks", 0))
    length = real_length(real)
    columns = pattern.columns(count, length, call.is_causal).expand(batch, heads, -1, -1)
    own = torch.arange(count, device=device)[:, None] * size + torch.arange(size, device=device)
    q = _blocks(query, own) * call.scaling
    block = columns.clamp(min=0)
    row, head = (
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(heads, device=device)[:, None, None],
    )

    def listed(x: Tensor) -> Tensor:
        """(B, H, R, K, D): the entries of each block's list of blocks, from (B, H, N, D)."""
        return _blocks(x, own)[row, head, block].flatten(3, 4)

    there = real[:, own.clamp(max=n - 1)] & (own < n)
    seen = (there[row, block] & (columns >= 0)[..., None]).flatten(3)
    visible = seen[:, :, :, None]
    position = own[block].flatten(3)  # (B, H, R, K)
    offset = position[:, :, :, None] - own[:, :, None]
    if call.is_causal:
        visible = visible & (offset <= 0)
    bias = None if call.relative_bias is None else call.relative_bias.per_head(offset, 1)
    parts, values = [_Keys(q @ listed(key).transpose(-1, -2), visible, bias)], [listed(value)]
    if call.extra is not None:
        found, more = _extra(q, lambda x, dim: _in_blocks(x, own, dim), call)
        parts.append(found)
        values.append(more)
    result = _softmax(parts, values, torch.arange(n, device=device), call)
    full = pattern.full_rows(n, length, call.is_causal)
    if full is None:
        return result
    return written(*result, *full, _rows(_at(query, full[0], 2), key, value, full[0], None, call))
