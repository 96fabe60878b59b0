"""Relative position bias as a table over offsets: looked up per tile, never built as an N×N tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.graph import is_captured


class RelativeBias:
    """Lazy additive bias `b_h(o)` over offsets `o = key position - query position` (T5: Raffel et al. 2020, §2.1).

    Args:
        table: (buckets, H) learned values, or a function that gets them from the module that owns them. It is called at
            once, where what brings in that module's weights (offloading, sharding) has seen to it; gradients reach the
            owner through every lookup.
        bucket: maps a tensor of integer offsets to bucket ids of the same shape.
        saturation: `b_h(o)` is constant for `o ≥ saturation` and, separately, for `o ≤ -saturation`.
    """

    def __init__(self, table: Tensor | Callable[[], Tensor], bucket: Callable[[Tensor], Tensor], saturation: int):
        self._read = None if isinstance(table, Tensor) else table
        self._table = table if isinstance(table, Tensor) else table()
        self._with_gradients = torch.is_grad_enabled()
        self.bucket = bucket
        self.saturation = saturation

    @property
    def table(self) -> Tensor:
        """(buckets, H) learned values."""
        # a reentrant checkpoint makes this without gradients, and wants them when later layers are computed again
        if self._read is not None and torch.is_grad_enabled() and not self._with_gradients:
            return self._read()
        return self._table

    def at(self, offsets: Tensor) -> Tensor:
        """(H, *offsets.shape) bias at arbitrary offsets."""
        # layers of one stack may lie on several devices, the table lies on the first
        ids = self.bucket(offsets).to(self.table.device)
        return F.embedding(ids, self.table).movedim(-1, 0).to(offsets.device)

    def per_head(self, offsets: Tensor, dim: int) -> Tensor:
        """Bias at integer offsets that may differ from head to head: (…, H or 1, …) with the heads on axis `dim`, H of them
        in the result."""
        if offsets.shape[dim] == 1:
            return self.at(offsets.squeeze(dim)).movedim(0, dim)
        low = -self.saturation
        values = self.at(torch.arange(low, self.saturation + 1, device=offsets.device))
        heads, count = values.shape
        index = offsets.clamp(low, self.saturation) - low
        head = torch.arange(heads, device=offsets.device).view(heads, *(1,) * (offsets.dim() - dim - 1))
        return F.embedding(index + count * head, values.reshape(-1, 1))[..., 0]

    def reach(self, is_causal: bool) -> int:
        """Smallest offset from which on the bias is constant, in each direction (causal: into the past); ≤ saturation."""
        # models are also built on the meta device, where nothing can be looked up
        offsets = torch.arange(self.saturation + 1, device="cpu")
        buckets = [self.bucket(-offsets)] if is_causal else [self.bucket(-offsets), self.bucket(offsets)]
        return max(int((ids != ids[-1]).sum()) for ids in buckets)

    def toeplitz(
        self, rows: int, columns: int, first: int, step: int = 1, device: torch.device | None = None
    ) -> Tensor:
        """(H, rows, columns) tile whose entry (r, c) is `b_h(step * (first + c - r))`."""
        low = first - (rows - 1)
        offsets = step * torch.arange(low, low + rows + columns - 1, device=device or self.table.device)
        # row r of the tile is the slice that starts (rows - 1 - r) into the vector of offsets
        return self.at(offsets).unfold(-1, columns, 1).flip(1)

    def dense(self, num_queries: int, num_keys: int, query_offset: int, device: torch.device | None = None) -> Tensor:
        """(1, H, N, S) materialised bias, for layers that keep exact attention."""
        return self.toeplitz(num_queries, num_keys, -query_offset, device=device)[None]

    def pooled(self, weights: Tensor) -> Tensor:
        """Bias of pooled keys: `out[b, h, i, r] = Σ_j weights[b, h, r, j] · b_h(j - i)`.

        Args:
            weights: (B or 1, H or 1, R, n) pooling weights over the n key positions.

        Returns:
            (B or 1, H, n, R). Far keys enter by prefix sums, since their bias is constant, near ones by one
            correlation: O(n · R · saturation · H) time, O(n · R · H) memory.
        """
        batch, heads, rank, n = weights.shape
        reach = self.saturation
        total = F.pad(weights, (reach, reach)).cumsum(-1)
        past = total[..., :n]  # Σ_{j ≤ i - reach}
        future = total[..., -1:] - total[..., 2 * reach - 1 : 2 * reach - 1 + n]  # Σ_{j ≥ i + reach}
        offsets = torch.arange(-reach, reach + 1, device=weights.device)
        values = self.at(offsets).to(weights.dtype)  # (H, 2·reach + 1)
        kernel = values[:, None, 1:-1]
        num_heads = kernel.shape[0]
        padded = F.pad(weights, (reach - 1, reach - 1))
        if heads == 1:
            near = F.conv1d(padded.reshape(batch * rank, 1, -1), kernel)
        else:
            near = F.conv1d(padded.transpose(1, 2).reshape(batch * rank, heads, -1), kernel, groups=heads)
        near = near.view(batch, rank, num_heads, n).permute(0, 2, 3, 1)
        far = values[None, :, :1, None] * past.transpose(-1, -2) + values[None, :, -1:, None] * future.transpose(
            -1, -2
        )
        return near + far


def mean_group_bias(bias: RelativeBias, token_mask: Tensor, n: int) -> Tensor:
    """(B or 1, H, N, G) mean bias of the real tokens of each group at n queries; rows and groups begin at the same token.

    Args:
        token_mask: (B, G, c) bool, which tokens are real.

    O(N · G) time and memory, and O(N · c) time for each group that is real in part.
    """
    count, size = token_mask.shape[1:]
    real = token_mask.sum(-1)
    # of whole groups the mean depends on the offset of the first token alone
    offsets = torch.arange(1 - n, count * size + (1 - n) % size, device=token_mask.device)
    means = (
        bias.at(torch.arange(1 - n, offsets.shape[0] - n + size, device=token_mask.device))
        .unfold(-1, size, 1)
        .mean(-1)
    )
    # offsets of one remainder by c at a time: there steps of c are steps of 1, and no tensor has N² elements
    steps = means.unflatten(-1, (-1, size)).transpose(-1, -2).unfold(-1, count, 1)
    whole = steps.transpose(1, 2).flatten(1, 2)[:, :n].flip(1)[None]
    in_part = (real > 0) & (real < size)
    most = count if is_captured() else int(in_part.sum(-1).max())
    if not most:
        return whole
    group = in_part.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    weights = _mean_weights(token_mask, bias).gather(1, group[..., None].expand(-1, -1, size))
    first = group[:, None] * size - torch.arange(n, device=token_mask.device)[:, None]
    parts = (bias.at(first + r) * weights[:, None, :, r] for r in range(size))
    total = next(parts)
    for part in parts:
        total = total + part
    whole = whole.to(total.dtype).expand(token_mask.shape[0], -1, -1, -1)
    return whole.scatter(-1, group[:, None, None].expand(-1, *whole.shape[1:3], -1), total.transpose(0, 1))


def _mean_weights(token_mask: Tensor, bias: RelativeBias) -> Tensor:
    """(…, c) weights of the mean over the real tokens of a group, in fp32 at least."""
    kind = torch.promote_types(bias.table.dtype, torch.float32)
    return token_mask.to(kind) / token_mask.sum(-1, keepdim=True).clamp(min=1)


def block_bias(bias: RelativeBias, g: int) -> Tensor:
    """(buckets, H): for each bucket of block offsets, the mean bias between the tokens of two blocks of g at such an offset.

    A bucket that no offset falls into gets the mean of the table.
    """
    num_buckets, heads = bias.table.shape
    device = bias.table.device
    # block offsets beyond this lie in the two saturated buckets, as token offsets beyond it have a constant bias
    reach = bias.saturation + 1
    offsets = torch.arange(-reach, reach + 1, device=device)
    within = torch.arange(1 - g, g, device=device)
    share = (g - within.abs()).to(torch.float32) / g**2  # how many of the g² pairs are this far from the mean offset
    means = (bias.at(offsets[:, None] * g + within).float() @ share).T  # (offsets, H)
    ids = bias.bucket(offsets)
    total = torch.zeros(num_buckets, heads, device=device).index_add(0, ids, means)
    count = torch.zeros(num_buckets, device=device).index_add(0, ids, torch.ones_like(ids, dtype=torch.float32))
    return torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], bias.table.float().mean(0))
