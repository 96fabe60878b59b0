"""Windows on the CPU: strided calls of PyTorch's fused attention kernel on the original keys, as one torch operator.

Queries go in blocks of R rows. Block u has the queries `uR … uR + R - 1` and sees a part of the keys `uR - left … uR + R - 1
+ right`; one additive tile says which, the same for all blocks. Blocks whose keys all exist are *one* call, on views whose
keys overlap, so nothing is copied or padded; those at the ends are calls of their own with a cut tile. Further keys are one
more call. All calls share the log-sum-exp of the whole softmax in the backward, so each is exact without the others.

The operator is opaque to `torch.compile`: a graph holds one node for any length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efficient.kernels import cpu_attention
from hf_efficient.kernels.common import dense, refuse_second_derivatives, token_major

# rows of a block: fewer compute fewer pairs outside the window, more run faster per pair, and have fewer gradients to add
FORWARD_ROWS, BACKWARD_ROWS = 64, 128
# in windows narrower than this, half as many rows
NARROW = 256
# elements of one call's mask, where keys are hidden one by one: bounds working memory, not results
MASK_BUDGET = 2**23
INF = float("-inf")


class Strip(NamedTuple):
    """`blocks` blocks of `rows` queries from `first` on.

    The first block sees the keys `start + cut … start + stop - 1`, where `start` is that of the uncut window of its first
    query; each later block stands `rows` keys further.
    """

    first: int
    rows: int
    blocks: int
    start: int
    cut: int
    stop: int

    @property
    def end(self) -> int:
        return self.first + self.blocks * self.rows


def strips(queries: range, keys: int, rows: int, left: int, right: int, offset: int) -> Iterator[Strip]:
    """Blocks that cover `queries`, of which query i sees the keys `i + offset - left … i + offset + right` of `keys` keys.

    O((left + right) / rows) strips, whatever the number of queries.
    """
    low, high = queries.start, queries.stop
    start = low + offset - left
    inner = range(max(0, -(start // rows)), min((high - low) // rows, (keys - start - left - right) // rows))
    block = 0
    while (first := low + block * rows) < high:
        count = len(inner) if inner and block == inner.start else 1
        own, begin = min(rows, high - first), start + block * rows
        yield Strip(first, own, count, begin, max(0, -begin), min(begin + own + left + right, keys) - begin)
        block += count


def window_tile(rows: int, span: int, shown: Tensor) -> Tensor:
    """(1, 1 or H, rows, rows + span - 1): `shown` (1 or H, span), one column further in each row; -inf elsewhere."""
    padded = torch.nn.functional.pad(shown, (rows - 1, rows - 1), value=INF)
    return padded.unfold(-1, rows + span - 1, 1).flip(1)[None]


@lru_cache(maxsize=32)
def _plain_tile(rows: int, span: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a kept tile must serve training also
        return window_tile(rows, span, torch.zeros(1, span, dtype=dtype)).contiguous()


class _Rows(NamedTuple):
    """Rows of the batch whose visible keys lie between the same two keys, and -inf for those between that are hidden."""

    rows: slice
    low: int
    high: int
    hidden: Tensor | None


def _rows_of(keep: Tensor | None, batch: int, keys: int, dtype: torch.dtype) -> list[_Rows]:
    if keep is None:
        return [_Rows(slice(0, batch), 0, keys, None)]
    found: list[_Rows] = []
    count = keep.sum(-1).tolist()
    first = keep.int().argmax(-1).tolist()
    last = (keys - keep.flip(-1).int().argmax(-1)).tolist()
    for row, size in enumerate(count):
        low, high = (first[row], last[row]) if size else (0, 0)
        hidden = None
        if size < high - low:
            own = keep[row, low:high]
            hidden = torch.zeros(high - low, dtype=dtype).masked_fill_(~own, INF)
        before = found[-1] if found else None
        if before and before[1:] == (low, high, None) and hidden is None:
            found[-1] = before._replace(rows=slice(before.rows.start, row + 1))
        else:
            found.append(_Rows(slice(row, row + 1), low, high, hidden))
    # one mask for all rows of the batch
    return [found[0]._replace(rows=slice(0, batch))] if len(count) == 1 else found


class _Call(NamedTuple):
    """One call of the kernel: a strip, the row of the batch (or all of `rows`), the mask."""

    rows: slice
    strip: Strip
    mask: Tensor | None


class _Band:
    """What a window shows: `shown` (1 or H, left + 1 + right) additive logits of its offsets, or `None` = all 0."""

    def __init__(self, left: int, right: int, offset: int, shown: Tensor | None, rows: int, query: Tensor):
        self.left, self.right, self.offset, self.shown = left, right, offset, shown
        self.queries, self.dtype = query.shape[2], query.dtype
        self.rows = min(rows if left + right >= NARROW else rows // 2, self.queries)

    @cached_property
    def tile(self) -> Tensor:
        span = self.left + 1 + self.right
        return (
            _plain_tile(self.rows, span, self.dtype)
            if self.shown is None
            else window_tile(self.rows, span, self.shown)
        )

    def seeing(self, part: _Rows) -> range:
        """The queries whose window holds some of the keys `part.low … part.high - 1`."""
        low, high = part.low - self.offset - self.right, part.high - self.offset + self.left
        return range(max(0, low), max(0, low, min(self.queries, high)) if part.high > part.low else max(0, low))

    def calls(self, part: _Rows) -> Iterator[_Call]:
        """Calls that cover the queries that see something."""
        offset, keys = self.offset - part.low, part.high - part.low
        queries, rows = self.seeing(part), self.rows
        if (
            self.shown is None
            and self.left >= queries.stop - 1 + offset
            and self.right >= keys - 1 - queries.start - offset
        ):
            rows = max(1, len(queries))  # everyone sees everything
        for strip in strips(queries, keys, rows, self.left, self.right, offset):
            sees_all = strip.rows - 1 <= strip.cut and strip.stop - 1 <= self.left + self.right
            tile = None
            if self.shown is not None or not sees_all:
                tile = self.tile[:, :, : strip.rows, strip.cut : strip.stop]
            if part.hidden is not None:
                yield from self._hiding(part, strip, tile)
            elif strip.blocks == 1:
                yield _Call(part.rows, strip, tile)
            else:  # strides of rows and of blocks do not fold into one
                yield from (_Call(slice(b, b + 1), strip, tile) for b in range(part.rows.start, part.rows.stop))

    def may_hide_all(self, part: _Rows) -> bool:
        """Some query may see nothing although keys stand in its window."""
        return self.shown is not None or part.hidden is not None

    def _hiding(self, part: _Rows, strip: Strip, mask: Tensor | None) -> Iterator[_Call]:
        hidden, size = part.hidden, strip.stop - strip.cut
        assert hidden is not None
        heads = 1 if mask is None else mask.shape[1]
        step = max(1, MASK_BUDGET // (heads * strip.rows * size))
        for block in range(0, strip.blocks, step):
            count = min(step, strip.blocks - block)
            own = strip._replace(
                first=strip.first + block * strip.rows, start=strip.start + block * strip.rows, blocks=count
            )
            here = hidden[own.start + own.cut :].as_strided((count, 1, 1, size), (strip.rows, 1, 1, 1))
            yield _Call(part.rows, own, here if mask is None else here + mask)


def _view(x: Tensor, start: int, length: int, strip: Strip) -> Tensor:
    """(blocks, H, length, D) overlapping views of one row (1, H, N, D); of several rows (B, H, length, D)."""
    if strip.blocks == 1:
        return x[:, :, start : start + length]
    _, h, n, d = x.stride()
    shape, steps = (strip.blocks, x.shape[1], length, x.shape[3]), (strip.rows * n, h, n, d)
    return x.as_strided(shape, steps, x.storage_offset() + start * n)


def _views(call: _Call, low: int, *tensors: Tensor) -> list[Tensor]:
    """Queries, keys and values of one call, then whatever else lies like the queries."""
    strip, rows = call.strip, [x[call.rows] for x in tensors]
    first, size = low + strip.start + strip.cut, strip.stop - strip.cut
    keys = [_view(x, first, size, strip) for x in rows[1:3]]
    mine = [_view(x, strip.first, strip.rows, strip) for x in (rows[0], *rows[3:])]
    return [mine[0], *keys, *mine[1:]]


def _seen_rows(logits: Tensor, queries: int) -> range:
    """The queries of which some extra key may be seen, without those before the first and behind the last."""
    if logits.shape[2] == 1:
        return range(queries)
    seen = (logits > INF).any(-1).flatten(0, 1).any(0).nonzero()
    return range(int(seen[0]), int(seen[-1]) + 1) if len(seen) else range(0)


def _extra_mask(logits: Tensor | None, queries: range) -> Tensor | None:
    if logits is None:
        return None
    own = logits[:, :, queries.start : queries.stop] if logits.shape[2] > 1 else logits
    return own if bool((own != 0).any()) else None


def _hide_empty(lse: Tensor, mask: Tensor | None) -> Tensor:
    return lse if mask is None else torch.where(mask.amax(-1) == INF, INF, lse)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    shown: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_logits: Tensor | None,
    left: int,
    right: int,
    offset: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    query, key, value = (dense(x) for x in (query, key, value))
    out, lse = _empty_results(query)
    band, n = _Band(left, right, offset, shown, FORWARD_ROWS, query), query.shape[2]
    for part in _rows_of(keep, query.shape[0], key.shape[2], query.dtype):
        seeing = band.seeing(part)
        for rest in (range(0, seeing.start), range(seeing.stop, n)):
            if rest:
                here = slice(rest.start, rest.stop)
                out[part.rows, :, here], lse[part.rows, :, here] = 0.0, INF
        for call in band.calls(part):
            q, k, v, o, total = _views(call, part.low, query, key, value, out, lse[..., None])
            y, sums = cpu_attention.forward(q, k, v, call.mask, scaling)
            o.copy_(y)
            total[..., 0] = _hide_empty(sums, call.mask) if band.may_hide_all(part) else sums
    if extra_key is not None and extra_value is not None:
        rows = range(n) if extra_logits is None else _seen_rows(extra_logits, n)
        if rows:
            here = slice(rows.start, rows.stop)
            mask = _extra_mask(extra_logits, rows)
            y, sums = cpu_attention.forward(query[:, :, here], extra_key, extra_value, mask, scaling)
            _merge_into(out[:, :, here], lse[:, :, here], y, _hide_empty(sums, mask))
    return out, lse


def _merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Into (out, lse) the softmax over further keys: `L = log(e^a + e^b)`, `o = a's + e^(b - L) (b's - a's)`."""
    both = torch.logaddexp(lse, other_lse)
    share = (other_lse - torch.where(both == INF, 0.0, both)).exp_()
    out.lerp_(other, share[..., None].to(out.dtype))
    lse.copy_(both)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs_shown: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    shown: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_logits: Tensor | None,
    left: int,
    right: int,
    offset: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, key, value = (dense(x) for x in (query, key, value))
    dq, dk, dv = (token_major(x).zero_() for x in (query, key, value))
    grad_out = _by_tokens(grad_out)
    # finite where nothing was seen: there every score is -inf, and its weight 0
    lse = _by_tokens(torch.where(lse == INF, 0.0, lse)[..., None])
    sums = None if grad_lse is None else _by_tokens(grad_lse.to(lse.dtype)[..., None])
    d_shown = query.new_zeros(0) if shown is None or not needs_shown else torch.zeros_like(shown, dtype=lse.dtype)
    band, n = _Band(left, right, offset, shown, BACKWARD_ROWS, query), query.shape[2]
    for part in _rows_of(keep, query.shape[0], key.shape[2], query.dtype):
        for call in band.calls(part):
            q, k, v, g, o, total, *d_total = _views(
                call, part.low, query, key, value, grad_out, out, lse, *(() if sums is None else (sums,))
            )
            d_sums = d_total[0][..., 0] if d_total else None
            own = cpu_attention.backward(g, d_sums, q, k, v, o, total[..., 0], call.mask, scaling)
            _add(call, part.low, (dq, dk, dv), own)
            if d_shown.numel():
                _add_shown(d_shown, call, left + right, g, d_sums, q, k, v, o, total, scaling)
    d_extra = [query.new_zeros(0) if x is None else torch.zeros_like(x) for x in (extra_key, extra_value)]
    if extra_key is not None and extra_value is not None:
        rows = range(n) if extra_logits is None else _seen_rows(extra_logits, n)
        if rows:
            here = slice(rows.start, rows.stop)
            q, o, g = (x[:, :, here] for x in (query, out, grad_out))
            d_sums = None if sums is None else sums[:, :, here, :][..., 0]
            mask = _extra_mask(extra_logits, rows)
            a, *d_extra = cpu_attention.backward(
                g, d_sums, q, extra_key, extra_value, o, lse[:, :, here, :][..., 0], mask, scaling
            )
            dq[:, :, here] += a
    return dq, dk, dv, d_shown.to(query.dtype), d_extra[0], d_extra[1]


def _by_tokens(x: Tensor) -> Tensor:
    """(B, H, N, D) laid out as (B, N, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _add(call: _Call, low: int, totals: tuple[Tensor, ...], own: tuple[Tensor, ...]) -> None:
    """Gradients of one call to those of all tokens. Of overlapping keys, `rows` columns of all blocks at a time are one
    gapless run: no scatter, and the same bits every time."""
    strip, size = call.strip, call.strip.stop - call.strip.cut
    dq, dk, dv = (x[call.rows] for x in totals)
    _view(dq, strip.first, strip.rows, strip).add_(own[0])
    first = low + strip.start + strip.cut
    step = size if strip.blocks == 1 else strip.rows
    for column in range(0, size, step):
        end = min(column + step, size)
        for total, x in ((dk, own[1]), (dv, own[2])):
            _view(total, first + column, end - column, strip).add_(x[:, :, column:end])


def _add_shown(
    total: Tensor,
    call: _Call,
    reach: int,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scaling: float,
) -> None:
    """The gradient of the logits of each offset: the scores' gradient, summed along diagonals."""
    rows, size, cut = call.strip.rows, call.strip.stop - call.strip.cut, call.strip.cut
    # half precision would round the sums
    query, key, value, grad_out, out = (x.to(lse.dtype) for x in (query, key, value, grad_out, out))
    delta = (grad_out * out).sum(-1, keepdim=True)
    delta = delta if grad_lse is None else delta - grad_lse[..., None]
    place = torch.arange(cut, cut + size) - torch.arange(rows)[:, None]
    inside = (place >= 0) & (place <= reach)
    group = query.shape[1] // key.shape[1]
    step = max(1, MASK_BUDGET // (query.shape[1] * rows * size))
    for part in (slice(b, b + step) for b in range(0, len(query), step)):
        k, v = (x[part].repeat_interleave(group, dim=1) if group > 1 else x[part] for x in (key, value))
        scores = (query[part] @ k.transpose(-1, -2)) * scaling
        if call.mask is not None:
            scores = scores + (call.mask[part] if len(call.mask) > 1 else call.mask)
        weights = (scores - lse[part]).exp_()
        grad = weights.mul_(grad_out[part] @ v.transpose(-1, -2) - delta[part]).sum(0)
        grad = grad if len(total) > 1 else grad.sum(0, keepdim=True)
        total.index_add_(1, place[inside], grad[:, inside].to(total.dtype))


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, n, _ = query.shape
    lse = query.new_empty(batch, n, heads, dtype=torch.promote_types(query.dtype, torch.float32)).transpose(1, 2)
    return token_major(query), lse


# ---- registration ------------------------------------------------------------------------------------------------

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? keep, Tensor? shown, Tensor? extra_key, Tensor? extra_value, "
    "Tensor? extra_logits, SymInt left, SymInt right, SymInt offset, float scaling"
)
_LIBRARY = torch.library.Library("hf_efficient", "FRAGMENT")
_LIBRARY.define(f"band_attention({_INPUTS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"band_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool needs_shown, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("band_attention", _forward, "CPU")
_LIBRARY.impl("band_attention_backward", _backward, "CPU")


@torch.library.register_fake("hf_efficient::band_attention", lib=_LIBRARY)
def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(query)


@torch.library.register_fake("hf_efficient::band_attention_backward", lib=_LIBRARY)
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs_shown: bool, *inputs: Any
) -> tuple[Tensor, ...]:
    query, key, value, _, shown, extra_key, extra_value = inputs[:7]
    nothing = query.new_empty(0)
    extra = (nothing if x is None else torch.empty_like(x) for x in (extra_key, extra_value))
    d_shown = torch.empty_like(shown) if shown is not None and needs_shown else nothing
    return *(token_major(x) for x in (query, key, value)), d_shown, *extra


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.numbers = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *inputs, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    operator = torch.ops.hf_efficient.band_attention_backward
    dq, dk, dv, d_shown, d_key, d_value = operator(
        grad_out, grad_lse, out, lse, ctx.needs_input_grad[4], *inputs, *ctx.numbers
    )
    has_extra = inputs[5] is not None
    d_shown = d_shown if ctx.needs_input_grad[4] else None
    return dq, dk, dv, None, d_shown, *((d_key, d_value) if has_extra else (None, None)), *[None] * 5


torch.library.register_autograd(
    "hf_efficient::band_attention", _differentiate, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd("hf_efficient::band_attention_backward", refuse_second_derivatives, lib=_LIBRARY)
