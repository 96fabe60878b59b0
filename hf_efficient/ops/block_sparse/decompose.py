"""Taking a pattern apart by length, head and stride into pieces with a fast form, and merging their results exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_efficient.ops.block_sparse.windows import extra_attention, fold, unfold
from hf_efficient.ops.context import AttentionCall, ExtraKeys
from hf_efficient.ops.graph import is_captured
from hf_efficient.ops.grouped_heads import expand_heads
from hf_efficient.ops.padding import real_length
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.ops.softmax import Result, merge_attention
from hf_efficient.patterns.kinds import Full, GlobalColumns, Strided, Summary, Window
from hf_efficient.patterns.parse import parse_pattern
from hf_efficient.patterns.pattern import Intersection, Pattern, Union, parts_of
from hf_efficient.patterns.sets import Without

Backend = Callable[[Tensor, Tensor, Tensor, Pattern, AttentionCall], Result]


def without(pattern: Pattern, *kinds: type[Pattern]) -> Pattern | None:
    """The union of the parts that are of none of these kinds; `None` where nothing is left."""
    rest = tuple(part for part in parts_of(pattern) if not isinstance(part, kinds))
    return None if not rest else rest[0] if len(rest) == 1 else Union(parts=rest)


def by_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    call: AttentionCall,
    backend: Backend,
) -> Result:
    """Heads with the same pattern together, each group in its own fast form."""
    groups: dict[Pattern, list[int]] = {}
    for head in range(pattern.num_heads):
        groups.setdefault(pattern.head(head), []).append(head)
    outputs, sums = [], []
    for single, heads in groups.items():

        def own(x: Tensor, heads: list[int] = heads) -> Tensor:
            return _heads_of(x, heads, pattern.num_heads)

        def pair(x: tuple[Tensor, Tensor] | None, own: Callable[[Tensor], Tensor] = own) -> Any:
            return None if x is None else (own(x[0]), own(x[1]))

        extra, bias = call.extra, call.relative_bias
        if extra is not None:
            extra = extra._replace(
                key=own(extra.key), value=own(extra.value), bias=None if extra.bias is None else own(extra.bias)
            )
        if bias is not None:
            bias = RelativeBias(own(bias.table), bias.bucket, bias.saturation)
        part = dataclasses.replace(
            call, extra=extra, relative_bias=bias, segments=pair(call.segments), positions=pair(call.positions)
        )
        out, lse = backend(own(query), own(key), own(value), single, part)
        outputs.append(out)
        sums += [] if lse is None else [lse]
    order = torch.tensor([head for heads in groups.values() for head in heads], device=query.device).argsort()
    out, *rest = (torch.cat(x, dim=1).index_select(1, order) for x in (outputs, sums) if x)
    return out, rest[0] if rest else None


def _heads_of(x: Tensor, heads: list[int], num_heads: int) -> Tensor:
    """The entries of `x` (B, 1 or a divisor of `num_heads`, …) that belong to these heads of queries, in their order.

    Heads of keys that several heads of queries share stay shared where each is shared by equally many of these.
    """
    if x.shape[1] == 1:
        return x
    index = [head * x.shape[1] // num_heads for head in heads]
    distinct = list(dict.fromkeys(index))
    if index == [owner for owner in distinct for _ in range(len(index) // len(distinct))]:
        index = distinct
    return x.index_select(1, torch.tensor(index, device=x.device))


def by_length(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall, backend: Backend
) -> Result:
    """Rows with the same number of real tokens together, each group with its own pattern.

    Raises:
        ValueError: while compiling, where lengths are not known.
    """
    n = query.shape[2]
    if call.key_padding_mask is None:
        return backend(query, key, value, pattern.at_length(n), call)
    if is_captured():
        raise ValueError(
            "this pattern depends on each row's number of tokens, which compiled code does not know: give batches without "
            "padding, or run it uncompiled."
        )
    groups: dict[Pattern, list[int]] = {}
    for row, length in enumerate(real_length(call.key_padding_mask).tolist()):
        groups.setdefault(pattern.at_length(max(1, length)), []).append(row)
    parts = []
    for single, rows in groups.items():
        index = torch.tensor(rows, device=query.device)
        q, k, v = (x.index_select(0, index) for x in (query, key, value))
        parts.append(backend(q, k, v, single, _for_rows(call, index)))
    order = torch.tensor([row for rows in groups.values() for row in rows], device=query.device).argsort()
    out = torch.cat([part[0] for part in parts]).index_select(0, order)
    sums = [lse for _, lse in parts if lse is not None]
    return out, torch.cat(sums).index_select(0, order) if sums else None


def _for_rows(call: AttentionCall, index: Tensor) -> AttentionCall:
    """The call for some rows of the batch."""

    def own(x: Any) -> Any:
        if isinstance(x, (tuple, list)) and not isinstance(x, Tensor):
            return type(x)(*map(own, x)) if hasattr(x, "_fields") else tuple(map(own, x))
        return x if x is None or x.shape[0] == 1 else x.index_select(0, index)

    names = ("key_padding_mask", "extra", "segments", "positions")
    return dataclasses.replace(call, **{name: own(getattr(call, name)) for name in names})


def _columns(part: Pattern) -> tuple[int, ...] | None:
    """The positions of the keys beyond which the part shows none; `None` where it is not made of columns."""
    inside = part.parts if isinstance(part, Intersection) else (part,)
    return next((p.positions for p in inside if isinstance(p, GlobalColumns)), None)


def as_window(pattern: Pattern) -> tuple[Window, tuple[int, ...], int | None] | None:
    """(window, columns, stride left out) if the pattern is a window with at most these; else `None`.

    Columns may be seen by every query, or by those of which an intersection says so.
    """
    skip = None
    if isinstance(pattern, Without) and isinstance(pattern.excluded, Strided):
        skip, pattern = pattern.excluded.stride, pattern.pattern
    windows = [part for part in parts_of(pattern) if isinstance(part, Window)]
    rest = [_columns(part) for part in parts_of(pattern) if not isinstance(part, Window)]
    if len(windows) != 1 or None in rest:
        return None
    columns = {p for positions in rest if positions is not None for p in positions}
    if columns and skip is not None:
        return None
    return windows[0], tuple(sorted(columns)), skip


def columns_as_keys(
    key: Tensor,
    value: Tensor,
    columns: tuple[int, ...],
    call: AttentionCall,
    pattern: Pattern | None = None,
    window: Window | None = None,
) -> ExtraKeys:
    """The keys at `columns` as extra keys of every query; causal: of later queries.

    With `pattern`, only of the queries to which it shows them; with `window`, of those that do not have them there.
    """
    index = torch.tensor(columns, device=key.device)
    position = torch.arange(key.shape[2], device=key.device)[:, None]
    offset = index - position
    shown = torch.ones_like(offset, dtype=torch.bool) if pattern is None else pattern.visible(position, index)
    shown = shown if window is None else shown & ~window.visible(position, index)
    shown = (shown & (offset <= 0) if call.is_causal else shown)[None]
    if call.key_padding_mask is not None:
        shown = shown & call.key_padding_mask[:, None, index]
    bias = None if call.relative_bias is None else call.relative_bias.at(offset)[None]
    return _joined(call.extra, ExtraKeys(key[:, :, index], value[:, :, index], shown, bias))


def _joined(first: ExtraKeys | None, second: ExtraKeys) -> ExtraKeys:
    if first is None:
        return second
    batch, n = first.key.shape[0], max(first.keep.shape[1], second.keep.shape[1])
    keep = torch.cat([x.keep.expand(batch, n, -1) for x in (first, second)], dim=-1)
    bias = None
    if given := [x.bias for x in (first, second) if x.bias is not None]:
        heads = max(x.shape[1] for x in given)
        both = (first.key.new_zeros(1, 1, 1, 1) if x.bias is None else x.bias for x in (first, second))
        sizes = (x.keep.shape[-1] for x in (first, second))
        bias = torch.cat([b.expand(batch, heads, n, size) for b, size in zip(both, sizes, strict=True)], dim=-1)
    widest = max(first.key, second.key, key=lambda x: x.shape[1])
    keys, values = (
        [expand_heads(widest, x)[0] for x in pair] for pair in ((first.key, second.key), (first.value, second.value))
    )
    return ExtraKeys(torch.cat(keys, dim=2), torch.cat(values, dim=2), keep, bias)


@lru_cache(maxsize=256)
def _summary_keys(spec: str, length: int) -> tuple[int, ...]:
    position = torch.arange(length)
    return tuple(parse_pattern(spec).visible(position, position).nonzero().flatten().tolist())


def _positions(spec: str, length: int) -> tuple[int, ...]:
    return _summary_keys(spec, length)


_positions._dynamo_marked_constant = True  # type: ignore[attr-defined]


def summaries_of(pattern: Pattern, n: int) -> tuple[int, ...]:
    """Positions of the keys that the summary parts show everyone."""
    summaries = tuple(part for part in parts_of(pattern) if isinstance(part, Summary))
    # compiled code is specialised to the length
    return _positions(Union(parts=summaries).spec(), len(range(n))) if summaries else ()


def with_summaries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rest: Pattern | None,
    columns: tuple[int, ...],
    call: AttentionCall,
    backend: Backend,
) -> Result:
    """Summaries as a short sequence of further keys: their tiles would mostly hold keys that nobody sees."""
    extra = columns_as_keys(key, value, columns, call)
    keep = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
    keep = keep if call.key_padding_mask is None else call.key_padding_mask
    twins = torch.isin(torch.arange(key.shape[2], device=key.device), torch.tensor(columns, device=key.device))
    call = dataclasses.replace(call, key_padding_mask=keep & ~twins, extra=extra)
    return extra_only(query, call) if rest is None else backend(query, key, value, rest, call)


def left_out(pattern: Pattern) -> tuple[Pattern, tuple[Strided, ...]] | None:
    """(what is shown, strides left out of it); `None` where something else is left out."""
    if not isinstance(pattern, Without):
        return pattern, ()
    out = tuple(part for part in parts_of(pattern.excluded) if isinstance(part, Strided))
    return (pattern.pattern, out) if len(out) == len(parts_of(pattern.excluded)) else None


def stride_of(pattern: Pattern) -> Strided | None:
    """The first strided part, which folds into residue classes; also where other strides are left out."""
    found = left_out(pattern)
    return None if found is None else next((p for p in parts_of(found[0]) if isinstance(p, Strided)), None)


def fold_call(call: AttentionCall, key: Tensor, step: int) -> AttentionCall:
    """The call for the residue classes of `step`, folded into the batch by `windows.fold`; without extra keys."""
    keep = call.key_padding_mask
    keep = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device) if keep is None else keep
    bias = None
    if (whole := call.relative_bias) is not None:
        bias = RelativeBias(whole.table, lambda o: whole.bucket(o * step), -(-whole.saturation // step))
    keep = fold(keep.expand(key.shape[0], -1), step, 1)
    return dataclasses.replace(call, key_padding_mask=keep, relative_bias=bias)


def with_stride(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    strided: Strided,
    call: AttentionCall,
    backend: Backend,
) -> Result:
    """The residue classes of the stride as short dense sequences, merged with all other keys.

    Source: Child et al. 2019 (arXiv 1904.10509), §4.3, where the strided heads attend within transposed blocks.
    """
    step, n = strided.stride, query.shape[2]
    found = left_out(pattern)
    assert found is not None
    shown, out_before = found
    others = tuple(part for part in parts_of(shown) if part is not strided)
    rest = None if not others else others[0] if len(others) == 1 else Union(parts=others)
    both = rest is not None or call.extra is not None
    folded = dataclasses.replace(fold_call(call, key, step), extra=None, return_lse=both or call.return_lse)
    q, k, v = (fold(x, step, 2) for x in (query, key, value))
    # of a residue class, every so many tokens are multiples of another stride apart
    every = tuple(Strided(stride=other.stride // math.gcd(other.stride, step)) for other in out_before)
    inside = Without(pattern=Full(), excluded=Union(parts=every)) if every else Full()
    out, lse = backend(q, k, v, inside, folded)
    out = unfold(out, step)[:, :, :n]
    lse = None if lse is None else unfold(lse[..., None], step)[:, :, :n, 0]
    if not both:
        return out, lse
    near = dataclasses.replace(call, return_lse=True)
    excluded = Union(parts=(*out_before, strided)) if out_before else strided
    other = Without(pattern=rest, excluded=excluded) if rest is not None else None
    parts = [(out, lse), backend(query, key, value, other, near) if other is not None else extra_only(query, near)]
    merged = merge_attention(*parts)  # type: ignore[arg-type]
    return merged if call.return_lse else (merged[0], None)


def extra_only(query: Tensor, call: AttentionCall) -> Result:
    """Attention over the extra keys alone."""
    assert call.extra is not None
    out, lse = extra_attention(query, call.extra, **call.options)
    return out, lse if call.return_lse else None
