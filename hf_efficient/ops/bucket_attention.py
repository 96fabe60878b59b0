"""Attention by content: tokens that share a label see each other, and a local window; every pair once, in one softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.block_sparse.attention import block_sparse_attention
from hf_efficient.ops.block_sparse.windows import window_sides
from hf_efficient.ops.bucket_decoding import BucketRule, decode_buckets
from hf_efficient.ops.softmax import Partial, additive_mask, attend, merge_attention
from hf_efficient.patterns.kinds import Window

if TYPE_CHECKING:
    from hf_efficient.ops.context import AttentionContext

# far from every code: a hidden key differs from each query by more than any reach
FAR = 2**29
# the label of padding, behind all others
PRIVATE = 2**31
# log-weight of a query's own key where it comes last
LEAST = -1e5
# elements of one group of tiles' mask: bounds working memory, not results
MASK_BUDGET = 2**23


def bucket_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    labels: Tensor,
    *,
    size: int,
    near: int,
    context: AttentionContext,
    own_last: bool = False,
) -> Tensor:
    """`y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j` over the keys j that a round of labels or the window shows query i.

    Round r shows i the real tokens j of its own label whose rank among these differs from that of i by at most `size // 2`;
    causal: j ≤ i, and by less than `size`, so that these are the last `size` tokens of that label, i itself included. What
    i sees then depends on no later token. The window shows `near // 2` keys on each side and i itself; causal: the last
    `near` keys, i included; 0 = no window. A pair that several of them show counts once. Padding has no rank.

    Args:
        query: (B, H, N, D). key, value: (B, H, S, D); S > N while decoding, where the last N keys are the queries' own.
        labels: (B, H, R, S) int64 ≥ 0, one label per token, head and round. They are constants: no gradient reaches them.
        context: its `is_causal`, `scaling`, `key_padding_mask`, `relative_bias` and `dropout` are honoured.
        own_last: a query sees its own key only where it sees no other.

    Returns:
        (B, H, N, D); 0 for a query that may see nothing. O(N log N + R · N · size · D) time, O(N · size) memory per round;
        while decoding O(R · S + (R · size + near) · D) per new token.

    Raises:
        ValueError: labels of another shape, or fewer queries than keys where these are no past.

    Source: Kitaev et al. 2020 (arXiv 2001.04451), §2; Roy et al. 2021 (arXiv 2003.05997), §4. Departure: a causal query sees
    the last tokens of its label, in place of chunks or a cluster's best tokens, whose choice depends on later tokens.
    """
    n, s = query.shape[2], key.shape[2]
    _check(query, labels, s)
    rule = _rule(size, near, own_last, context, s)
    if n < s:
        if not context.is_causal:
            raise ValueError(
                f"{n} queries and {s} keys: only causal attention can decode; give as many keys as queries."
            )
        return decode_buckets(query, key, value, labels, rule)
    rounds = [_by_label(label, rule.size, context) for label in labels.unbind(2)]
    return _over_rounds(query, key, value, rounds, rule)


def paired_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    *,
    size: int,
    near: int,
    context: AttentionContext,
    own_last: bool = False,
    chunks_before: int = 0,
) -> Tensor:
    """`bucket_attention` of encoders with labels of queries and of keys: equal chunks of both in the order of their labels.

    Round r sorts the real queries by (label, position), the real keys by theirs, and shows a query in chunk c of `size`
    queries the keys in the chunks c - `chunks_before`, …, c of `size` keys; before the first chunk comes the last one that
    holds a real key. Padding comes behind and moves no chunk.

    Args:
        query, key, value: (B, H, N, D).
        query_labels, key_labels: (B, H, R, N) int64 ≥ 0.

    Returns:
        (B, H, N, D), with time and memory of `bucket_attention` for keys of `size · (1 + chunks_before)`.

    Raises:
        ValueError: labels of another shape, or a causal context: chunks depend on later tokens.

    Source: Daras et al. 2020 (arXiv 2010.05315), §3; with equal labels, one round and `chunks_before=1` the chunks of
    Kitaev et al. 2020 (arXiv 2001.04451), §2, in a circle as in its code.
    """
    if context.is_causal:
        raise ValueError("paired chunks can't be causal, since they depend on later tokens: use bucket_attention.")
    for labels in (query_labels, key_labels):
        _check(query, labels, key.shape[2])
    both = zip(query_labels.unbind(2), key_labels.unbind(2), strict=True)
    n = key.shape[2]
    size = min(size, n)
    before = min(chunks_before, -(-n // size) - 1)
    rounds = [_by_rank(*labels, size, before, context) for labels in both]
    return _over_rounds(query, key, value, rounds, _rule(size * (1 + before), near, own_last, context, n))


def _check(query: Tensor, labels: Tensor, length: int) -> None:
    if labels.shape[:2] != query.shape[:2] or labels.shape[3] != length:
        raise ValueError(f"labels {tuple(labels.shape)} must be {(*query.shape[:2], 'rounds', length)}, one per key.")


def _rule(size: int, near: int, own_last: bool, context: AttentionContext, length: int) -> BucketRule:
    # no more than shows all of `length` keys: codes of 32 bits hold no reach without end
    return BucketRule(min(size, 2 * length), min(near, 2 * length), own_last, context)


def _over_rounds(query: Tensor, key: Tensor, value: Tensor, rounds: list[_Round], rule: BucketRule) -> Tensor:
    """All rounds and the window, each without the pairs that came before it."""
    n, context = query.shape[2], rule.context
    token = torch.arange(n, device=query.device)
    own = [_window(token, 1, context)] if rule.own_last else []
    window = [_window(token, rule.near, context)] if rule.near else []
    if window and own:
        raise ValueError(f"near={rule.near} shows every query its own key: own_last needs near=0.")
    # up to this length one dense tile computes no more scores than sorted ones
    if n <= 2 * rule.size:
        parts = [_one_tile(query, key, value, window + [found.codes for found in rounds], own, context)]
    else:
        parts = [_near(query, key, value, rule.near, context)] if window else []
        earlier = own + window
        for found in rounds:
            parts.append(_round(query, key, value, found, earlier, context))
            earlier = [*earlier, found.codes]
    if own:
        parts.append(_last_resort(value, context))
    return merge_attention(*parts)[0]


class _Codes(NamedTuple):
    """A set of visible pairs: query i sees key j iff `-right ≤ query_i - key_j ≤ left`.

    Attributes:
        query, key: (B or 1, H or 1, N) int32; hidden keys lie `FAR` off.
        left: one number, or (B,) int32.
        circle: (B,) int32, codes modulo which this holds as well, with `right` = 0; `None` = it does not.
    """

    query: Tensor
    key: Tensor
    left: int | Tensor
    right: int
    circle: Tensor | None = None

    def visible(self) -> Tensor:
        """(…, N, K) bool."""
        distance = self.query[..., :, None] - self.key[..., None, :]
        per_row = (-1, *(1,) * (distance.ndim - 1))
        left = self.left.view(per_row) if isinstance(self.left, Tensor) else self.left
        seen = (distance >= -self.right) & (distance <= left)
        return seen if self.circle is None else seen | (distance <= left - self.circle.view(per_row))

    def at(self, queries: Tensor, keys: Tensor) -> _Codes:
        """The same pairs for queries and keys in other orders, (B, H, …) each."""
        both = ((self.query, queries), (self.key, keys))
        query, key = (x.expand(*order.shape[:2], -1).gather(-1, order) for x, order in both)
        return self._replace(query=query, key=key)

    def padded(self, queries: tuple[int, int], keys: tuple[int, int]) -> _Codes:
        """With more queries, and keys that none sees, before and behind."""
        return self._replace(query=F.pad(self.query, queries), key=F.pad(self.key, keys, value=-FAR))


class _Round(NamedTuple):
    """Queries and keys of one round, each in the order of their labels, padding behind.

    Attributes:
        queries, keys: (order, rank), each (B, H, N): the tokens in sorted order, and the rank of each token in it.
        front: (B, H, F) further tokens, whose keys stand before those of rank 0.
        codes: whom the round shows whom, by token.
        tiles: the same for queries in sorted order, and for the keys of `front` and then in theirs: each key once.
        block: queries of a tile, whose keys have the same ranks, and `reach` before and behind.
    """

    queries: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]
    front: Tensor
    codes: _Codes
    tiles: _Codes
    block: int
    reach: tuple[int, int]


def _hidden(key: Tensor, token_mask: Tensor | None) -> Tensor:
    return key if token_mask is None else torch.where(token_mask[:, None], key, -FAR)


def _window(token: Tensor, near: int, context: AttentionContext) -> _Codes:
    code = token.to(torch.int32)[None, None]
    return _Codes(code, _hidden(code, context.key_padding_mask), *window_sides(near, context.is_causal))


def _sorted(labels: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(order, rank, label at each rank) of (B, H, N) labels, sorted by label and position."""
    n = labels.shape[-1]
    token = torch.arange(n, device=labels.device)
    labels = labels if token_mask is None else torch.where(token_mask[:, None], labels, PRIVATE)
    # distinct, so that every sort is stable
    order = (labels * n + token).argsort(dim=-1)
    rank = torch.empty_like(order).scatter_(-1, order, token.expand_as(order))
    return order, rank, labels.gather(-1, order)


def _by_label(labels: Tensor, size: int, context: AttentionContext) -> _Round:
    """Codes are ranks, with a gap between labels that no reach bridges."""
    left, right = window_sides(size, context.is_causal)
    order, rank, ordered = _sorted(labels, context.key_padding_mask)
    change = F.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0)).cumsum(-1)
    code = (rank + (max(left, right) + 1) * change.gather(-1, rank)).to(torch.int32)
    codes = _Codes(code, _hidden(code, context.key_padding_mask), left, right)
    block = min(256, max(16, -(-(left + right) // 32) * 16))
    both = (order, rank)
    return _Round(both, both, order[..., :0], codes, codes.at(order, order), block, (left, right))


def _by_rank(query_labels: Tensor, key_labels: Tensor, size: int, before: int, context: AttentionContext) -> _Round:
    """Codes are numbers of chunks; the chunks of a row's real keys are a circle."""
    token_mask, (batch, _, n) = context.key_padding_mask, key_labels.shape
    queries, keys = (_sorted(labels, token_mask)[:2] for labels in (query_labels, key_labels))
    query, key = ((rank // size).to(torch.int32) for _, rank in (queries, keys))
    real = key.new_full((batch,), n) if token_mask is None else token_mask.sum(-1, dtype=torch.int32)
    count = (real + (size - 1)) // size
    codes = _Codes(query, _hidden(key, token_mask), before, 0, count if before else None)
    # ranks from before rank 0 on, which the last chunks have as well
    rank = torch.arange(-before * size, n, device=key.device, dtype=torch.int32)
    number = rank.div(size, rounding_mode="floor")
    found = torch.where(rank < 0, rank + (count * size)[:, None], rank)
    exists = (found >= 0) & (found < real[:, None])
    front = keys[0].gather(-1, found[:, None, : before * size].clamp(0, n - 1).long().expand(-1, keys[0].shape[1], -1))
    # few chunks come round to themselves
    left = (count - 1).clamp(max=before)
    tiles = _Codes(number[None, None, before * size :], torch.where(exists, number, -FAR)[:, None], left, 0)
    return _Round(queries, keys, front, codes, tiles, size, (before * size, 0))


def _one_tile(
    query: Tensor, key: Tensor, value: Tensor, parts: list[_Codes], without: list[_Codes], context: AttentionContext
) -> Partial:
    visible = parts[0].visible()
    for part in parts[1:]:
        visible = visible | part.visible()
    for part in without:
        visible = visible & ~part.visible()
    logits = additive_mask(visible, query.dtype)
    if context.relative_bias is not None:
        logits = logits + context.relative_bias.dense(query.shape[2], key.shape[2], 0, query.device).to(query.dtype)
    out, lse = attend(
        query, key, value, logits, scaling=context.scaling, dropout=context.dropout, return_lse=bool(without)
    )
    return out, out.new_zeros(()) if lse is None else lse


def _last_resort(value: Tensor, context: AttentionContext) -> Partial:
    """Every token's own value, with a weight that only counts where there is nothing else."""
    weight = value.new_full(value.shape[:3], LEAST, dtype=torch.promote_types(value.dtype, torch.float32))
    if (token_mask := context.key_padding_mask) is None:
        return value, weight
    gone = ~token_mask[:, None]
    return value.masked_fill(gone[..., None], 0.0), weight.masked_fill(gone, float("-inf"))


def _near(query: Tensor, key: Tensor, value: Tensor, near: int, context: AttentionContext) -> Partial:
    left, right = window_sides(near, context.is_causal)
    pattern = Window(left=left, right=right)
    return block_sparse_attention(query, key, value, pattern, context, return_lse=True)


def _round(
    query: Tensor, key: Tensor, value: Tensor, found: _Round, earlier: list[_Codes], context: AttentionContext
) -> Partial:
    """Blocks of sorted queries against (overlapping) spans of sorted keys, without the pairs that `earlier` shows."""
    (batch, heads, n), (left, right), block = query.shape[:3], found.reach, found.block
    rows, span = -(-n // block), left + block + right
    behind, ends = (0, rows * block - n), (left - found.front.shape[-1], rows * block + right - n)

    def spans(x: Tensor, first: int, last: int) -> Tensor:
        """Of rows `first` … `last - 1`; cut before the overlapping view is made: its gradient has the size of the cut."""
        return x[:, :, first * block : (last - 1) * block + span].unfold(2, span, block).transpose(1, 2)

    def blocks(x: Tensor, first: int, last: int) -> Tensor:
        return x[:, :, first * block : last * block].unflatten(2, (-1, block)).transpose(1, 2)

    q = F.pad(_Permuted.apply(query, *found.queries), (0, 0, *behind))
    k, v = (F.pad(_in_front(x, found.front, _Permuted.apply(x, *found.keys)), (0, 0, *ends)) for x in (key, value))
    orders = found.queries[0], torch.cat([found.front, found.keys[0]], dim=-1)
    own, other = (F.pad(order, pad).to(torch.int32) for order, pad in zip(orders, (behind, ends), strict=True))
    codes = [part.padded(behind, ends) for part in (found.tiles, *(part.at(*orders) for part in earlier))]
    group = max(1, MASK_BUDGET // (batch * heads * block * span))
    outputs, sums = [], []
    for first in range(0, rows, group):
        here = (first, min(first + group, rows))
        tiles = [part._replace(query=blocks(part.query, *here), key=spans(part.key, *here)) for part in codes]
        visible = tiles[0].visible()
        for part in tiles[1:]:
            visible = visible & ~part.visible()
        logits = additive_mask(visible, query.dtype)
        if context.relative_bias is not None:
            offset = spans(other, *here)[..., None, :] - blocks(own, *here)[..., None]
            logits = logits + context.relative_bias.per_head(offset, 2).to(query.dtype)
        keys, values = (spans(x, *here).transpose(-1, -2).flatten(0, 1) for x in (k, v))
        facts: dict[str, Any] = dict(scaling=context.scaling, dropout=context.dropout)
        out, lse = attend(blocks(q, *here).flatten(0, 1), keys, values, logits.flatten(0, 1), return_lse=True, **facts)
        assert lse is not None
        outputs.append(out.unflatten(0, (batch, -1)))
        sums.append(lse.unflatten(0, (batch, -1)))
    out, lse = (torch.cat(x, dim=1).transpose(1, 2).flatten(2, 3)[:, :, :n] for x in (outputs, sums))
    return _Permuted.apply(out, *found.queries[::-1]), lse.gather(2, found.queries[1])


def _in_front(x: Tensor, tokens: Tensor, ordered: Tensor) -> Tensor:
    """The entries (B, H, F, D) of some tokens of x, and then `ordered`."""
    if not tokens.shape[-1]:
        return ordered
    return torch.cat([x.gather(2, tokens[..., None].expand(-1, -1, -1, x.shape[-1])), ordered], dim=2)


class _Permuted(torch.autograd.Function):
    """Entry j of the result along axis 2 is entry `order[j]`; the gradient goes the way back without adding anything up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.gather(2, order[..., None].expand_as(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.gather(2, inverse[..., None].expand_as(gradient)), None, None
