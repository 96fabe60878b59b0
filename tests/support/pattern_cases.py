"""Patterns of every kind, for tests of patterns and of attention over them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hf_efficient.attention.base.pattern import with_prefix
from hf_efficient.attention.blockwise import CyclicBlocks
from hf_efficient.attention.image_local import GridBlocks
from hf_efficient.patterns.kinds import (
    BlockWindow,
    Full,
    GlobalColumns,
    GlobalRows,
    ShiftedBlock,
    Strided,
    Summary,
    Window,
)
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.random_blocks import BigBirdBlocks
from hf_efficient.patterns.sets import PerHead, Without

HEADS, WIDTH = 4, 8
GRID = GridBlocks(columns=10, height=3, width=4, above=2, below=2, beside=1)
CAUSAL_GRID = GridBlocks(columns=9, height=2, width=5, above=3, below=0, beside=2, by_block=True)
BIGBIRD: dict[str, Any] = dict(block_size=8, seed=1, layer=0, heads=HEADS)
MIXED = PerHead(
    parts=(Window(left=2, right=2), Strided(stride=3), Window(left=2, right=2), BlockWindow(block_size=16) | GRID)
)
NEAR, ROWS = Window(left=25, right=12), GlobalRows(positions=(0, 33))
# name: (pattern, whether causal queries need a bounded number of keys)
PATTERNS: dict[str, tuple[Pattern, bool]] = {
    "full": (Full(), False),
    "window": (Window(left=8, right=8), True),
    "wide window": (Window(left=90, right=90), True),
    "past": (Window(left=20, right=0), True),
    "dilated": (Window(left=3, right=2, dilation=3), True),
    "columns": (GlobalColumns(positions=(0, 5, 70)), True),
    "rows": (GlobalRows(positions=(0, 33)), True),
    "strided": (Strided(stride=7), False),
    "summary": (Summary(stride=10, size=2), False),
    "blocks": (BlockWindow(block_size=10), True),
    "blocks and memory": (BlockWindow(block_size=12, before=5, after=3), True),
    "blocks behind": (ShiftedBlock(block_size=10, shift=2), True),
    "aligned blocks behind": (ShiftedBlock(block_size=16, shift=1), True),
    "blocks ahead": (ShiftedBlock(block_size=10, shift=3, count=7), False),
    "grid": (GRID, True),
    "causal grid": (CAUSAL_GRID, True),
    "blocks behind a prefix": (BlockWindow(block_size=12, before=5, after=3, start=7), True),
    "grid behind a prefix": (with_prefix(dataclasses.replace(GRID, start=5), 5), True),
    "longformer": (Window(left=8, right=8) | GlobalColumns(positions=(0, 1)) | GlobalRows(positions=(0, 1)), True),
    "merged strided": (Window(left=6, right=6) | Strided(stride=7), False),
    "merged fixed": (BlockWindow(block_size=10) | Summary(stride=10, size=1), False),
    "summary and itself": (Summary(stride=9, size=2) | Window(left=0, right=0), False),
    "axial": (BlockWindow(block_size=10) | Strided(stride=10) | GlobalColumns(positions=(0,)), False),
    "many": (Window(left=4, right=4) | Strided(stride=6) | Strided(stride=9) | Summary(stride=20, size=3), False),
    "three strides": (Window(left=2, right=1) | Strided(stride=4) | Strided(stride=6) | Strided(stride=9), False),
    "without": (Without(pattern=Window(left=9, right=9), excluded=Strided(stride=5)), True),
    "per head": (MIXED, False),
    "shifted heads": (PerHead(parts=tuple(ShiftedBlock(block_size=10, shift=s) for s in (0, 0, 2, 1))), True),
    "union with heads": (MIXED | GlobalColumns(positions=(3,)), False),
    "causal bigbird": (BigBirdBlocks(**BIGBIRD, num_random_blocks=2, is_causal=True), False),
    "causal bigbird, not random": (BigBirdBlocks(**BIGBIRD, num_random_blocks=0, is_causal=True), True),
    "dilated in a window": (Window(left=5, right=5, dilation=3) & Window(left=10, right=4), True),
    "strided in a window": ((Window(left=6, right=2) | Strided(stride=7)) & Window(left=30, right=30), True),
    "columns in a window": ((Window(left=8, right=8) | GlobalColumns(positions=(0, 5, 70))) & NEAR, True),
    "longformer in a window": ((Window(left=5, right=50) | GlobalColumns(positions=(0,)) | ROWS) & NEAR, True),
    "fixed in a window": ((BlockWindow(block_size=10) | Summary(stride=10, size=1)) & NEAR, True),
    "blocks of a grid": (GRID & BlockWindow(block_size=16, before=20), True),
    "per head in a window": (NEAR & MIXED, True),
    "causal bigbird in a window": (BigBirdBlocks(**BIGBIRD, num_random_blocks=2, is_causal=True) & NEAR, True),
}
# these ask for the number of a row's tokens
BY_LENGTH: dict[str, Pattern] = {
    "cyclic": CyclicBlocks(block_size=10, shifts=(0, 1, 0, 2)),
    "cyclic, one for all": CyclicBlocks(block_size=16, shifts=(1,)),
    "bigbird": BigBirdBlocks(**BIGBIRD, num_random_blocks=2, is_causal=False),
    "cyclic and window": CyclicBlocks(block_size=10, shifts=(0, 1, 0, 2)) | Window(left=3, right=3),
    "bigbird in a window": BigBirdBlocks(**BIGBIRD, num_random_blocks=2, is_causal=False) & NEAR,
    "cyclic in a window": CyclicBlocks(block_size=10, shifts=(0, 1, 0, 2)) & NEAR,
    "cyclic in some heads": PerHead(
        parts=(Strided(stride=5), *(CyclicBlocks(block_size=10, shifts=(s,)) for s in (0, 1)), Window(left=3, right=3))
    ),
}


def dense(pattern: Pattern, num_queries: int, num_keys: int, offset: int = 0, is_causal: bool = False) -> Tensor:
    """(H or 1, N, S) bool."""
    query, key = torch.arange(offset, offset + num_queries)[:, None], torch.arange(num_keys)
    seen = pattern.visible_per_head(query, key)
    return seen & (key <= query) if is_causal else seen
