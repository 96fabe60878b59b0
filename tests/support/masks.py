"""Which keys a query of each mechanism sees, pair by pair: the definitions, written without the library's patterns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def row_extent(keep: Tensor) -> list[tuple[int, int]]:
    """(first real token, one past the last) of each row."""
    return [(min(real), max(real) + 1) for real in (row.nonzero().flatten().tolist() for row in keep)]


def pairs(n: int, sees: Callable[[int, int], bool]) -> Tensor:
    return torch.tensor([[sees(i, j) for j in range(n)] for i in range(n)])


def in_window(i: int, j: int, window: int, dilation: int, causal: bool) -> bool:
    steps, rest = divmod(j - i, dilation)
    return rest == 0 and (-window < steps <= 0 if causal else abs(steps) <= window // 2)


def local_mask(mechanism: Any, keep: Tensor, causal: bool) -> Tensor:
    config = mechanism.config
    rows = []
    for start, _ in row_extent(keep):

        def sees(i: int, j: int, start: int = start) -> bool:
            sink = 0 <= j - start < config.sink_tokens and (j <= i or not causal)
            return sink or in_window(i, j, config.attention_window, config.dilation, causal)

        rows.append(pairs(keep.shape[1], sees))
    return torch.stack(rows)[:, None]


def longformer_mask(mechanism: Any, keep: Tensor, causal: bool) -> Tensor:
    config = mechanism.config
    window = config.attention_window
    window = window[mechanism.geometry.layer] if isinstance(window, tuple) else window
    relative = {"none": (), "first": (0,)}.get(config.global_tokens, config.global_tokens)
    dilations = config.dilation if isinstance(config.dilation, tuple) else (config.dilation,)
    rows = []
    for start, _ in row_extent(keep):
        tokens = {start + position for position in relative}
        heads = []
        for dilation in dilations:

            def sees(i: int, j: int, tokens: set[int] = tokens, dilation: int = dilation) -> bool:
                near = in_window(i, j, window, dilation, causal)
                return near or (j in tokens and (j <= i or not causal)) or (i in tokens and not causal)

            heads.append(pairs(keep.shape[1], sees))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def bigbird_mask(mechanism: Any, keep: Tensor, causal: bool) -> Tensor:
    """Which random blocks were drawn is taken from the mechanism; the tests further down judge the drawing."""
    size, n = mechanism.config.block_size, keep.shape[1]
    rows = []
    for start, stop in row_extent(keep):
        count = -(-n // size)
        end = (stop - start - 1) // size
        drawn = random_blocks(mechanism, count, None if causal else end)
        heads = []
        for head in range(mechanism.geometry.num_heads):

            def sees(i: int, j: int, head: int = head, start: int = start, drawn: Any = drawn, end: int = end) -> bool:
                if min(i, j) < start:
                    return False
                u, c = (i - start) // size, (j - start) // size
                if causal:
                    return j <= i and (c in (0, u - 1, u) or c in drawn[head][u])
                return u in (0, end) or c in (0, u - 1, u, u + 1, end) or c in drawn[head][u]

            heads.append(pairs(n, sees))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def random_blocks(mechanism: Any, count: int, end: int | None) -> list[list[list[int]]]:
    """[head][block row] → random blocks, for `count` block rows; `end` None = causal."""
    if mechanism.config.num_random_blocks == 0:
        return [[[] for _ in range(count)] for _ in range(mechanism.geometry.num_heads)]
    last = None if end is None else torch.tensor([end])
    columns = mechanism.pattern.random_blocks(torch.arange(count)[None], last, count)[0]
    return [[[c for c in row if c >= 0] for row in head] for head in columns.tolist()]


def by_row(keep: Tensor, heads: int, sees: Callable[[int, int, int, int], bool]) -> Tensor:
    """(B, H, N, N) of `sees(head, i, j, length)`, positions counted from each row's first real token."""
    n, rows = keep.shape[1], []
    for start, stop in row_extent(keep):

        def shows(head: int, start: int = start, length: int = stop - start) -> Tensor:
            return pairs(n, lambda i, j: min(i, j) >= start and sees(head, i - start, j - start, length))

        rows.append(torch.stack([shows(head) for head in range(heads)]))
    return torch.stack(rows)


def near_or_far(mechanism: Any, policy: str, near: bool, far: bool, head: int) -> bool:
    """One part per half of the heads or per layer, or both parts."""
    if policy == "split":
        return near if head < mechanism.geometry.num_heads / 2 else far
    if policy == "interleaved":
        return (near, far)[mechanism.geometry.layer % 2]
    return near or far


def sparse_transformer_mask(mechanism: Any, keep: Tensor, causal: bool) -> Tensor:
    config = mechanism.config
    stride = config.stride

    def sees(head: int, i: int, j: int, length: int) -> bool:
        if config.pattern == "strided":
            near, far = abs(i - j) < stride, (i - j) % stride == 0
        else:
            near, far = i // stride == j // stride, j % stride >= stride - config.summary_size
            far = far or (config.head_policy != "merged" and i == j)
        return (j <= i or not causal) and near_or_far(mechanism, config.head_policy, near, far, head)

    return by_row(keep, mechanism.geometry.num_heads, sees)


def axial_mask(mechanism: Any, keep: Tensor, causal: bool) -> Tensor:
    width = mechanism.config.row_length

    def sees(head: int, i: int, j: int, length: int) -> bool:
        (y, x), (v, u) = divmod(i, width), divmod(j, width)
        return (j <= i or not causal) and near_or_far(mechanism, mechanism.config.form, y == v, x == u, head)

    return by_row(keep, mechanism.geometry.num_heads, sees)


def blockwise_mask(mechanism: Any, keep: Tensor, causal: bool) -> Tensor:
    """The heads are cut into as many shares as there are shifts."""
    size, shifts, heads = mechanism.config.block_size, mechanism.config.shifts, mechanism.geometry.num_heads

    def sees(head: int, i: int, j: int, length: int) -> bool:
        share = max(s for s in range(len(shifts)) if s * heads < (head + 1) * len(shifts))
        block, shift = i // size, shifts[share]
        if causal:
            target = block - shift if block >= shift else block
            return j <= i and j // size == target
        return j // size == (block + shift) % -(-length // size)

    return by_row(keep, heads, sees)


def image_local_mask(mechanism: Any, keep: Tensor, causal: bool) -> Tensor:
    config = mechanism.config
    if not isinstance(config.grid, tuple):
        size, memory = config.block_size, config.memory_size

        def sees(head: int, i: int, j: int, length: int) -> bool:
            start = i - i % size
            return start - memory <= j <= (i if causal else start + size + memory - 1)

        return by_row(keep, 1, sees)
    width = config.grid[1]
    (height_q, width_q), (height_m, width_m) = (
        x if isinstance(x, tuple) else (x, x) for x in (config.block_size, config.memory_size)
    )

    def rank(y: int, x: int) -> tuple[int, ...]:
        """Order in which blocks are generated one after the other."""
        return y // height_q, x // width_q, y % height_q, x % width_q

    def sees_in_grid(head: int, i: int, j: int, length: int) -> bool:
        (y, x), (v, u) = divmod(i, width), divmod(j, width)
        top, left = y - y % height_q, x - x % width_q
        below = 0 if causal else height_m
        inside = top - height_m <= v < top + height_q + below and left - width_m <= u < left + width_q + width_m
        return inside and (not causal or (j <= i and rank(v, u) <= rank(y, x)))

    return by_row(keep, 1, sees_in_grid)


def combined_mask(mechanism: Any, keep: Tensor, causal: bool) -> Tensor:
    config, geometry = mechanism.config, mechanism.geometry
    masks = []
    for number, part in enumerate(config.patterns):
        heads = geometry.num_heads
        if config.heads is not None:
            heads = heads * config.heads[number] // sum(config.heads)
        place = dataclasses.replace(geometry, num_heads=heads, num_key_value_heads=heads)
        alone = SimpleNamespace(config=part, geometry=place, pattern=part.visible_keys(place))
        mask = PATTERNS[part.mechanism](alone, keep, causal)
        mask = mask if mask.dim() == 4 else mask[None, None]
        masks.append(mask.expand(len(keep), heads, -1, -1))
    return torch.stack(masks).any(0) if config.heads is None else torch.cat(masks, 1)


PATTERNS = {
    "axial": axial_mask,
    "bigbird": bigbird_mask,
    "blockwise": blockwise_mask,
    "combined": combined_mask,
    "image_local": image_local_mask,
    "local": local_mask,
    "longformer": longformer_mask,
    "sparse_transformer": sparse_transformer_mask,
}
