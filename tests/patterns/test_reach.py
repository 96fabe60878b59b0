"""How far patterns reach, against brute force."""

from __future__ import annotations

import pytest
import torch

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
from hf_efficient.patterns.sets import PerHead, Without

NEAR, BLOCKS = Window(left=20, right=3), BlockWindow(block_size=12, before=5, after=9)
BOUNDED: list[Pattern] = [
    NEAR,
    Window(left=3, right=5, dilation=4),
    BLOCKS,
    BlockWindow(block_size=12, before=9),
    ShiftedBlock(block_size=10, shift=0),
    ShiftedBlock(block_size=10, shift=2),
    NEAR | BLOCKS,
    Without(pattern=NEAR, excluded=Strided(stride=7)),
    (Strided(stride=5) | GlobalColumns(positions=(3,))) & Window(left=10, right=7),
    (BLOCKS | Strided(stride=2)) & Window(left=90, right=90),
    PerHead(parts=(NEAR, BLOCKS)),
    PerHead(parts=(NEAR, BLOCKS)) & Window(left=9, right=9),
]
UNBOUNDED: list[Pattern] = [
    Full(),
    GlobalColumns(positions=(0,)),
    GlobalRows(positions=(0,)),
    Strided(stride=7),
    Summary(stride=9, size=1),
    ShiftedBlock(block_size=10, shift=1, count=3),
    NEAR | GlobalColumns(positions=(0,)),
    PerHead(parts=(NEAR, Full())),
    Without(pattern=Full(), excluded=NEAR),
]


@pytest.mark.parametrize("pattern", [*BOUNDED, *UNBOUNDED], ids=lambda pattern: pattern.spec()[:60])
def test_no_key_is_farther_than_the_reach(pattern: Pattern):
    place = torch.arange(400)
    query, key = pattern.visible_per_head(place[:, None], place).any(0).nonzero(as_tuple=True)
    farthest = int((query - key).abs().max())
    assert pattern.reach == (farthest if pattern in BOUNDED else None)
    assert (farthest > 300) == (pattern in UNBOUNDED)
