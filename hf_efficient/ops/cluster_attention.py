"""Clusters of directions: spherical k-means, balanced membership, and exact attention within clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.block_sparse.attention import block_sparse_attention
from hf_efficient.ops.block_sparse.windows import window_sides
from hf_efficient.ops.choice import first_largest, indices, largest, rounding
from hf_efficient.ops.graph import is_tracing
from hf_efficient.ops.query_clusters import rows_at
from hf_efficient.ops.softmax import additive_mask, attend
from hf_efficient.patterns.kinds import Window

if TYPE_CHECKING:
    from hf_efficient.ops.context import AttentionContext

# ---- finding clusters --------------------------------------------------------------------------------------------


def spherical_kmeans(points: Tensor, count: int, *, seed: int = 0, steps: int = 16) -> Tensor:
    """`count` unit vectors that the directions of `points` crowd around, separately for each head.

    Starts from k-means++ (each next start is drawn with probability 1 - cosine to the nearest so far); a step gives every
    point to the nearest centroid by cosine, and makes a centroid the direction of its points' sum. A centroid without points
    moves to the point of the largest cluster that is farthest from its own centroid.

    Args:
        points: (H, T, D), any lengths; T ≥ `count`.
        seed: of the start; the result depends on nothing else.

    Returns:
        (H, count, D) in fp32 at least. O(steps · H · T · count · D) time.

    Raises:
        ValueError: fewer points than clusters.

    Source: Dhillon & Modha 2001, "Concept decompositions", §3; the start: Arthur & Vassilvitskii 2007, "k-means++".
    """
    if points.shape[1] < count:
        raise ValueError(f"{points.shape[1]} tokens can't be put into {count} clusters: give more text.")
    points = F.normalize(wide(points), dim=-1)
    centroids = _spread_points(points, count, torch.Generator().manual_seed(seed))
    for _ in range(steps):
        similarity = points @ centroids.transpose(-1, -2)
        own = first_largest(similarity, rounding(similarity.new_ones(())))
        near = similarity.gather(-1, own[..., None])[..., 0]
        member = F.one_hot(own, count).to(points.dtype)
        centroids = torch.where(
            member.sum(1)[..., None] > 0, F.normalize(member.transpose(-1, -2) @ points, dim=-1), centroids
        )
        _fill_empty(centroids, points, near.clone(), own)
    return centroids


def _spread_points(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(H, count, D) of the points, by k-means++."""
    heads, total, _ = points.shape
    row = torch.arange(heads, device=points.device)
    draws = torch.rand(count, heads, generator=generator, device="cpu").to(points.device, points.dtype)
    chosen = points[row, (draws[0] * total).long().clamp(max=total - 1)][:, None]
    distance = torch.full(points.shape[:2], 2.0, dtype=points.dtype, device=points.device)
    for draw in draws[1:]:
        new = 1 - (points @ chosen[:, -1:].transpose(-1, -2)).squeeze(-1)
        # a point that is taken is not taken again
        distance = torch.minimum(distance, torch.where(new > rounding(new.new_ones(())), new, 0.0))
        mass = distance.cumsum(-1)
        following = torch.searchsorted(mass, draw[:, None] * mass[:, -1:], right=True).clamp(max=total - 1)
        chosen = torch.cat([chosen, points[row[:, None], following]], dim=1)
    return chosen


def _fill_empty(centroids: Tensor, points: Tensor, near: Tensor, own: Tensor) -> None:
    """Move, in place, each centroid without points."""
    counts = F.one_hot(own, centroids.shape[1]).sum(1)
    for head, cluster in (counts == 0).nonzero().tolist():
        inside = own[head] == counts[head].argmax()
        distance = -near[head].masked_fill(~inside, float("inf"))
        farthest = first_largest(distance, rounding(near.new_ones(())))
        centroids[head, cluster] = points[head, farthest]
        # the next one must not move there, too
        near[head, farthest] = float("inf")


def wide(x: Tensor) -> Tensor:
    """In fp32 at least: choices made in half precision would differ from call to call."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def moved_centroids(centroids: Tensor, sums: Tensor, decay: float) -> Tensor:
    """One step of a moving average of (H, k, D) unit centroids towards the means of (H, k, D + 1) `cluster_sums`."""
    total, count = sums[..., :-1], sums[..., -1:]
    moved = torch.lerp(total / count.clamp(min=1), centroids, decay)
    return torch.where(count > 0, F.normalize(moved, dim=-1), centroids)


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """(B, H, N) index of the (H, k, D) centroid with the largest product with each of (B, H, N, D), of equal ones the
    first. No gradient."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, centroids = wide(x), wide(centroids)
        close = rounding(x.norm(dim=-1, keepdim=True) * centroids.norm(dim=-1).amax(-1)[:, None, None])
        return first_largest(x @ centroids.transpose(-1, -2), close)


def cluster_sums(x: Tensor, centroids: Tensor, token_mask: Tensor | None) -> Tensor:
    """(H, k, D + 1): the sum over all real tokens nearest to each centroid, and in the last column their number.

    Args:
        x: (B, H, N, D). centroids: (H, k, D). token_mask: (B, N) bool; `None` = all real.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        member = F.one_hot(nearest(x, centroids), centroids.shape[1]).to(wide(x).dtype)
        if token_mask is not None:
            member = member * token_mask[:, None, :, None]
        # padding may hold anything
        x = torch.where(member.sum(-1, keepdim=True) > 0, wide(x), 0.0)
        return torch.einsum("bhnk,bhnd->hkd", member, F.pad(x, (0, 1), value=1.0))


# ---- balanced clusters -------------------------------------------------------------------------------------------


class Members(NamedTuple):
    """The tokens that each cluster took.

    Attributes:
        tokens: (B, H, k, w) in the order of their positions. real: (B, H, k, w) bool, False = padding.
        entry: (B, H, k, N) where `tokens` has a token; w = the cluster did not take it.
    """

    tokens: Tensor
    real: Tensor
    entry: Tensor


def best_members(x: Tensor, centroids: Tensor, size: int, token_mask: Tensor | None) -> Members:
    """The `size` real tokens whose directions are closest to each centroid; the earlier one of two that are as close.

    Where a model has no position table, repeats of a token are equal up to rounding: see `ops.choice`.

    Args:
        x: (B, H, N, D). centroids: (H, k, D). token_mask: (B, N) bool; `None` = all real.

    O(N · k · D) time, O(N · k) memory. No gradient.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        cosine = (F.normalize(wide(x), dim=-1) @ wide(centroids).transpose(-1, -2)).transpose(-1, -2)
        if token_mask is None:
            token_mask = torch.ones_like(cosine[:, 0, 0], dtype=torch.bool)
        visible = token_mask[:, None, None].expand(cosine.shape)
        size = min(size, cosine.shape[-1])
        taken = largest(cosine.masked_fill(~visible, float("-inf")), size, rounding(cosine.new_ones(())))
        entry, index = torch.where(taken, taken.cumsum(-1) - 1, size), indices(taken, size)
        return Members(index, visible.gather(-1, index), torch.where(visible, entry, size))


def coverage(x: Tensor, centroids: Tensor, size: int, length: int, wanted: float = 0.8) -> tuple[float, int]:
    """Share of tokens that some cluster of `size` takes in texts of `length` tokens, and the least size with `wanted`.

    Args:
        x: (H, T, D) tokens, cut into texts of that length; of fewer tokens clusters take as small a share.
    """
    count = max(1, x.shape[1] // length)
    n = min(length, x.shape[1] // count)
    texts = x[:, : count * n].unflatten(1, (count, n)).transpose(0, 1)

    def share(size: int) -> float:
        here = max(1, min(n, round(size * n / length)))
        taken = best_members(texts, centroids, here, None).entry < here
        return float(taken.any(2).double().mean())

    found = needed = size
    while share(needed) < wanted and needed < length:
        needed = min(length, needed + max(1, needed // 8))
    return share(found), needed


def cluster_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Members,
    keys: Members,
    *,
    near: int,
    context: AttentionContext,
) -> Tensor:
    """`y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j` over the keys j of all clusters that took query i, and its window.

    The window shows `near // 2` keys on each side and i itself; 0 = no window. A pair that several clusters or the window
    show counts once. Encoders only: whom a cluster takes depends on all tokens.

    Args:
        query, key, value: (B, H, N, D). queries, keys: the members of the same k clusters, w of each.

    Returns:
        (B, H, N, D); 0 for a query that sees nothing. O(k · w² · (D + k) + N · (k + near · D)) time, O(k · w² + N · (k + D))
        memory. Sums are made in a fixed order, forward and backward.
    """
    q, k, v = (_at(x, m.tokens) for x, m in ((query, queries), (key, keys), (value, keys)))
    logits = _tile_logits(queries, keys, near, context, query.dtype)
    tiles = (x.flatten(0, 1) for x in (q, k, v, logits))
    found, lse = attend(*tiles, scaling=context.scaling, dropout=context.dropout, return_lse=True)
    assert lse is not None
    found, lse = (x.unflatten(0, query.shape[:2]) for x in (found, lse))
    # (B, H, k, N): what each cluster has of each token
    sums = F.pad(lse, (0, 1), value=float("-inf")).gather(-1, queries.entry)
    if not near:
        weights = _shares(sums)
        return _spread(found, weights, queries).to(query.dtype)
    left, right = window_sides(near, is_causal=False)
    near_keys = Window(left=left, right=right)
    window, last = block_sparse_attention(query, key, value, near_keys, context, return_lse=True)
    weights = _shares(torch.cat([sums, last[:, :, None].to(sums.dtype)], dim=2))
    return (_spread(found, weights[:, :, :-1], queries) + weights[:, :, -1, :, None] * window).to(query.dtype)


def _tile_logits(queries: Members, keys: Members, near: int, context: AttentionContext, dtype: torch.dtype) -> Tensor:
    """(B, H, k, w, w) additive: the bias, -inf for padding and for pairs that the window or an earlier cluster shows."""
    offset = keys.tokens[..., None, :] - queries.tokens[..., :, None]
    visible = keys.real[..., None, :].expand(offset.shape)
    if near:
        visible = visible & (offset.abs() > near // 2)
    count = offset.shape[2]
    if count > 1:
        earlier = torch.arange(count, device=offset.device)
        earlier = (earlier[:, None] > earlier)[..., None]
        # (B, H, k, k', w): which tokens of cluster k an earlier cluster k' took as well
        also = [
            (m.entry < m.tokens.shape[-1])[:, :, None]
            .expand(-1, -1, count, -1, -1)
            .gather(-1, m.tokens[:, :, :, None].expand(-1, -1, -1, count, -1))
            for m in (queries, keys)
        ]
        with torch.autocast(offset.device.type, enabled=False):
            shown = (also[0] & earlier).float().transpose(-1, -2) @ also[1].float()
        visible = visible & (shown == 0)
    logits = additive_mask(visible, dtype)
    return logits if context.relative_bias is None else logits + context.relative_bias.per_head(offset, 1).to(dtype)


def _shares(sums: Tensor) -> Tensor:
    """softmax over axis 2 of log-sum-exps; 0, with gradient 0, where all of them are -inf."""
    top = sums.detach().amax(2, keepdim=True)
    parts = (sums - torch.where(top == float("-inf"), 0.0, top)).exp()
    total = parts.sum(2, keepdim=True)
    return parts / torch.where(total > 0, total, 1.0)


def _spread(found: Tensor, weights: Tensor, queries: Members) -> Tensor:
    """(B, H, N, D) sum of the clusters' results (B, H, k, w, D), each weighed by (B, H, k, N) weights."""
    own = weights.gather(-1, queries.tokens)[..., None]
    entries = own * found.to(own.dtype)
    sums = _sum if is_tracing() else _Sum.apply
    return sums(entries, queries.tokens, weights.shape[-1]).to(entries.dtype)


def _sum(entries: Tensor, index: Tensor, length: int) -> Tensor:
    batch, heads, _, _, width = entries.shape
    total = wide(entries.new_zeros(batch * heads * length, width))
    first = length * torch.arange(batch * heads, device=index.device).view(batch, heads, 1)
    # cluster by cluster, none of which has a token twice: so the order of additions is fixed on every device
    for own, at in zip(entries.unbind(2), index.unbind(2), strict=True):
        total.index_add_(0, (first + at).flatten(), own.flatten(0, 2).to(total.dtype))
    return total.view(batch, heads, length, width)


def _at(x: Tensor, index: Tensor) -> Tensor:
    # a graph for other runtimes has no gradient, and can't hold functions of Python
    return rows_at(x, index) if is_tracing() else _At.apply(x, index)


class _At(torch.autograd.Function):
    """(B, H, k, w, D) tokens of all clusters; gradients are added up in a fixed order, as those of `gather` are not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = x.shape[2]
        return rows_at(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grad, ctx.saved_tensors[0], ctx.length).to(grad.dtype), None


class _Sum(torch.autograd.Function):
    """(B, H, N, D) sums over the clusters' entries for each token: the transpose of `_At`."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, index: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(index)
        return _sum(entries, index, length).to(entries.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return rows_at(grad, ctx.saved_tensors[0]), None, None
