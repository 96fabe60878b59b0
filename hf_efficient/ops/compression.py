"""How a compressive memory pools keys and values: by means, maxima, convolutions, or a choice of those most used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.ops.choice import indices, largest, rounding
from hf_efficient.ops.padding import first_real_token, real_tokens, shift_rows
from hf_efficient.ops.pooled_keys import in_groups, log_count, strided_convolution
from hf_efficient.ops.relative_bias import RelativeBias, _mean_weights

DILATION = 2
"""Tokens from one tap of a dilated convolution to the next."""


class Span(NamedTuple):
    """Whole blocks of tokens, and the queries of the segments that read them last.

    Attributes:
        query, key, value: (B, H, L, D), queries M tokens later than keys; `None` = not needed.
        token_mask, read: (B, L) bool, which keys and which queries are real.
        first: (B or 1,) number of the first block.
        start: index of its first token among the keys of rows that begin at theirs, ≤ 0.
    """

    query: Tensor | None
    key: Tensor
    value: Tensor
    token_mask: Tensor
    read: Tensor
    first: Tensor
    start: int = 0


def cut(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """Entries `start` … `start + length - 1` along `dim`, zeros where there are none."""
    low, high = max(start, 0), min(start + length, x.shape[dim])
    part = x.narrow(dim, min(low, x.shape[dim]), max(0, high - low))
    front = min(max(0, -start), length)
    return F.pad(part, (0, 0) * (x.dim() - 1 - dim) + (front, length - front - part.shape[dim]))


def span_of_rows(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, size: int, memory: int
) -> Span:
    """The blocks that leave the memory of (B, H, N, D) rows aligned to the left; at least one.

    Args:
        key_padding_mask: (B, N) bool. size, memory: T and M.
    """
    n, first = key.shape[2], memory // size
    start, length = first * size - memory, size * max(1, n // size - first)
    key_padding_mask = real_tokens(key_padding_mask, key).expand(key.shape[0], -1)
    token_mask, read = (cut(key_padding_mask, 1, begin, length) for begin in (start, first * size))
    keys, values = (cut(x, 2, start, length) for x in (key, value))
    number = torch.tensor([first], device=key.device)
    return Span(cut(query, 2, first * size, length), keys, values, token_mask, read, number, start)


def span_of_cache(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    token: Tensor,
    token_mask: Tensor,
    read: Tensor,
    size: int,
    memory: int,
) -> tuple[Span, Callable[[Tensor, int], Tensor]]:
    """The blocks of what a cache kept: of each row a run of tokens that begins with its first, or with a block.

    Args:
        query: (B, H, S, D), those of the keys; `None` = not needed. key, value: (B, H, S, D).
        token: (B, S) index of each key in its row, negative = no key. token_mask, read: (B, S) bool, which keys and
            queries are real. size, memory: T and M.

    Returns:
        The blocks, complete or not, and a function that brings anything (B, …, S, …) along an axis into their order.
    """
    front, count = memory % size, key.shape[2]
    begin = first_real_token(token >= 0)
    index = token.gather(1, begin[:, None])[:, 0].clamp(min=0) + memory
    shift, length = begin + front - index % size, -(-(count + front) // size) * size

    def local(x: Tensor, dim: int, start: int = 0) -> Tensor:
        return cut(shift_rows(cut(x, dim, -front, count + front), shift, dim), dim, start, length)

    queries = None if query is None else local(query, 2, memory)
    span = Span(queries, local(key, 2), local(value, 2), local(token_mask, 1), local(read, 1, memory), index // size)
    return span, local


def compressed(
    key: Tensor, value: Tensor, token_mask: Tensor, rate: int, kind: str, weights: list[Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pooled keys and values of `rate` tokens each.

    Args:
        key, value: (B, H, L, D), L a multiple of `rate` (dilated: of twice that). token_mask: (B, L) bool, which are real.
        kind: "mean", "max", "conv" or "dilated". weights: (H, rate, D, D) of keys and of values, for convolutions.

    Returns:
        keys and values (B, H, G, D), zeros where no token is real; (B, 1, G, rate) which of its tokens are real; and
        (1, 1, G, rate) their indices. O(L · D) time, convolutions O(L · D²).
    """
    token = torch.arange(key.shape[2], device=key.device)[None]
    if kind == "dilated":
        key, value, token_mask, token = (
            _dilated(x, dim, rate) for x, dim in ((key, 2), (value, 2), (token_mask, 1), (token, 1))
        )
    real, index = (in_groups(x, rate) for x in (token_mask, token))
    if kind == "max":
        keys, values = (_largest(x, real) for x in (key, value))
    else:
        if kind == "mean":
            weights = [key.new_full((1, rate, key.shape[-1]), 1 / rate)] * 2
        keys, values = (strided_convolution(x, token_mask, w) for x, w in zip((key, value), weights, strict=True))
    return keys, values, real[:, None], index[:, None]


def _dilated(x: Tensor, dim: int, rate: int) -> Tensor:
    """Every run of `DILATION · rate` tokens in the order 0, 2, 4, …, 1, 3, 5, …."""
    return x.unflatten(dim, (-1, rate, DILATION)).transpose(dim + 1, dim + 2).flatten(dim, dim + 2)


def _largest(x: Tensor, real: Tensor) -> Tensor:
    """(B, H, G, D) largest entries of (B, G, c) real tokens, per channel."""
    real = real[:, None, :, :, None]
    tokens = x.unflatten(2, (-1, real.shape[3])).masked_fill(~real, torch.finfo(x.dtype).min)
    return torch.where(real.any(3), tokens.amax(3), 0.0)


@torch.no_grad()
def attention_received(
    query: Tensor, key: Tensor, token_mask: Tensor, read: Tensor, block: int, scaling: float
) -> Tensor:
    """(B, H, L) `Σ_i softmax_j(s · q_i·k_j)` over the real tokens j of a block and the real queries i of the same number.

    In fp32 at least; -1 for what is no real token. O(L · block) time and memory.

    Args:
        query, key: (B, H, L, D), blocks of `block` tokens. token_mask, read: (B, L) bool, which keys and queries are real.
    """
    wide = torch.promote_types(key.dtype, torch.float32)
    q, k = (x.to(wide).unflatten(2, (-1, block)) for x in (query, key))
    real, reads = (x.unflatten(1, (-1, block))[:, None] for x in (token_mask, read))
    with torch.autocast(key.device.type, enabled=False):
        # a finite lowest logit: a block without real tokens must not become NaN
        logits = (scaling * q @ k.transpose(-1, -2)).masked_fill(~real[..., None, :], torch.finfo(wide).min)
        received = (logits.softmax(-1) * reads[..., None]).sum(-2)
    return received.masked_fill(~real, -1.0).flatten(2)


def most_used(
    key: Tensor, value: Tensor, token_mask: Tensor, used: Tensor, block: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every `block` tokens, for each head the `count` with the largest (B, H, L) `used`, in their order.

    Returns:
        keys and values (B, H, G, D), (B, H, G, 1) whether they are real, and (B, H, G, 1) the index of their tokens.
    """
    used = used.unflatten(2, (-1, block))
    best = indices(largest(used, count, rounding(used.abs().amax(-1, keepdim=True))), count)
    first = block * torch.arange(best.shape[2], device=key.device)
    index = (best + first[:, None]).flatten(2)
    keys, values = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (key, value))
    real = token_mask[:, None].expand(-1, key.shape[1], -1).gather(2, index)
    return keys, values, real[..., None], index[..., None]


def reconstruction_error(span: Span, pooled: tuple[Tensor, Tensor, Tensor], block: int, scaling: float) -> Tensor:
    """`Σ ‖attn(q, k, v) - attn(q, k̃, ṽ)‖² / Σ ‖attn(q, k, v)‖²`, each block of queries over its block of keys alone.

    Only the pooled keys and values take a gradient: queries, keys and values are cut off.

    Args:
        pooled: keys and values (B, H, G, D), and (B, 1, G, c) which of their tokens are real.
    """
    assert span.query is not None
    wide = torch.promote_types(span.key.dtype, torch.float32)
    count = pooled[0].shape[2] * block // span.key.shape[2]
    # attention kernels take no five axes: blocks join the rows
    q, k, v = (_blocks(x.detach(), block).to(wide) for x in (span.query, span.key, span.value))
    far_k, far_v = (_blocks(x, count).to(wide) for x in pooled[:2])
    real, reads = (x.unflatten(1, (-1, block)).flatten(0, 1) for x in (span.token_mask, span.read))
    counts = log_count(pooled[2].sum(-1), wide).unflatten(2, (-1, count)).transpose(1, 2).flatten(0, 1).to(wide)
    near = torch.zeros_like(real, dtype=wide).masked_fill(~real, float("-inf"))[:, None, None]
    with torch.autocast(span.key.device.type, enabled=False):
        with torch.no_grad():
            expected = F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=scaling)
        actual = F.scaled_dot_product_attention(q, far_k, far_v, attn_mask=counts[:, :, None], scale=scaling)
    where = (reads & real.any(-1, keepdim=True))[:, None, :, None]
    error, size = (torch.where(where, x, 0.0).square().sum() for x in (actual - expected, expected))
    return error / size.clamp(min=torch.finfo(wide).tiny)


def _blocks(x: Tensor, block: int) -> Tensor:
    """(B · blocks, H, block, D) of (B, H, L, D)."""
    return x.unflatten(2, (-1, block)).transpose(1, 2).flatten(0, 1)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.like = weight, loss
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.weight), None


def with_loss(out: Tensor, loss: Tensor, weight: float) -> Tensor:
    """`out`, through which backward also adds the gradient of `weight · loss`, whatever is made of `out`.

    So a loss of a single layer needs no word of the loop that trains the model, and meets accumulation over processes,
    checkpointing of activations, and clipping as every gradient does. Not scaled by a loss scaler for float16.
    """
    result: Tensor = _WithLoss.apply(out, loss, weight)
    return result


class CompressedMemory(NamedTuple):
    """Pooled keys and values that stand for tokens of the past, in order of their tokens.

    Attributes:
        keys, values: (B, H, G, D).
        token_mask: (B, 1 or H, G, c) bool, which tokens of a pooled key are real; one without any does not exist.
        tokens: (B, 1 or H, G, c) index of these tokens, counted from their row's first real one.
        number: (B, G) index of the pooled key in its row.
    """

    keys: Tensor
    values: Tensor
    token_mask: Tensor
    tokens: Tensor
    number: Tensor

    def expanded(self, batch: int) -> CompressedMemory:
        """For each of `batch` rows, also where they are the same."""
        return CompressedMemory(*(x.expand(batch, *x.shape[1:]) for x in self))

    def followed_by(self, other: CompressedMemory) -> CompressedMemory:
        """The pooled keys of both, those of `other` last."""
        pairs = zip(self, other, _AXES, strict=True)
        return CompressedMemory(*(torch.cat([first, second], dim=dim) for first, second, dim in pairs))

    def last(self, wanted: Tensor, count: int) -> CompressedMemory:
        """Of each row the last `count` that are (B, G) `wanted`, in order, behind others where these are fewer."""
        order = wanted.int().argsort(dim=1, stable=True)[:, wanted.shape[1] - count :]
        return CompressedMemory(*(_chosen(x, order, dim) for x, dim in zip(self, _AXES, strict=True)))


_AXES = (2, 2, 2, 2, 1)


def _chosen(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """The entries (B, K) `order` of every row along `dim`."""
    index = order.view(order.shape[0], *(1,) * (dim - 1), -1, *(1,) * (x.dim() - dim - 1))
    return x.gather(dim, index.expand(*x.shape[:dim], -1, *x.shape[dim + 1 :]))


def mean_bias(bias: RelativeBias, memory: CompressedMemory, rows: Tensor) -> Tensor:
    """(B or 1, H, N, G) mean bias of the real tokens of each pooled key at (B or 1, N) `rows`. O(N · G · c)."""
    offset = memory.tokens[:, :, None] - rows[:, None, :, None, None]
    weights = _mean_weights(memory.token_mask, bias)
    return (bias.per_head(offset, 1) * weights[:, :, None]).sum(-1)


def compressed_keys_shown(length: int, segment: int, memory: int, rate: int, most: int) -> float:
    """Pooled keys of `rate` tokens that a token sees, the mean over a row; segments see the `most` newest."""
    shown = 0
    for start in range(0, length, segment):
        # pooled key g holds tokens from g rate - memory on: the first ones hold none
        pooled = start // rate - max(0, -(-(memory - rate + 1) // rate))
        shown += max(0, min(pooled, most)) * min(segment, length - start)
    return shown / length
