"""Patterns as data, and their tables of tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fresh
import pytest
import torch
from pattern_cases import BIGBIRD, BY_LENGTH, GRID, HEADS, PATTERNS, dense
from torch import Tensor

from hf_efficient.attention.image_local import GridBlocks
from hf_efficient.patterns.kinds import (
    BlockList,
    BlockWindow,
    Full,
    GlobalColumns,
    GlobalRows,
    ShiftedBlock,
    Strided,
    Summary,
    Window,
)
from hf_efficient.patterns.parse import parse_pattern
from hf_efficient.patterns.pattern import _KINDS as KINDS
from hf_efficient.patterns.pattern import Intersection, Pattern, Union
from hf_efficient.patterns.random_blocks import BigBirdBlocks
from hf_efficient.patterns.sets import PerHead, Without
from hf_efficient.patterns.tile_table import TileList, TileTable, tile_table

each = pytest.mark.parametrize("name", PATTERNS)


def sees(pattern: Any, i: int, j: int) -> bool:
    """The definitions in words of one head, pair by pair."""
    if isinstance(pattern, Full):
        return True
    if isinstance(pattern, Window):
        steps, rest = divmod(j - i, pattern.dilation)
        return rest == 0 and -pattern.left <= steps <= pattern.right
    if isinstance(pattern, (GlobalColumns, GlobalRows)):
        return (j if isinstance(pattern, GlobalColumns) else i) in pattern.positions
    if isinstance(pattern, Strided):
        return (i - j) % pattern.stride == 0
    if isinstance(pattern, Summary):
        return j % pattern.stride >= pattern.stride - pattern.size
    if isinstance(pattern, BlockWindow):
        start = i - (i - pattern.start) % pattern.block_size
        return start - pattern.before <= j < start + pattern.block_size + pattern.after
    if isinstance(pattern, ShiftedBlock):
        block, shift = i // pattern.block_size, pattern.shift
        back = block - shift if block >= shift else block
        target = back if pattern.count is None else (block + shift) % pattern.count
        return j // pattern.block_size == target
    if isinstance(pattern, Union):
        return any(sees(part, i, j) for part in pattern.parts)
    if isinstance(pattern, Intersection):
        return all(sees(part, i, j) for part in pattern.parts)
    if isinstance(pattern, Without):
        return sees(pattern.pattern, i, j) and not sees(pattern.excluded, i, j)
    assert isinstance(pattern, GridBlocks)
    i, j = i - pattern.start, j - pattern.start
    if min(i, j) < 0 < pattern.start:
        return False
    (y, x), (v, u) = divmod(i, pattern.columns), divmod(j, pattern.columns)
    height, width = pattern.height, pattern.width
    top, left = y - y % height, x - x % width
    inside = -pattern.above <= v - top < height + pattern.below
    inside = inside and -pattern.beside <= u - left < width + pattern.beside
    mine, other = ((r // height, c // width, r % height, c % width) for r, c in ((y, x), (v, u)))
    return inside and (other <= mine or not pattern.by_block)


def draws(seed: int, count: int) -> Iterator[tuple[int, int, int, int, int, bool]]:
    """Numbers of queries and keys, offset, block sizes, causality."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    yield 40, 80, 5, 8, 8, False  # tiles as wide as blocks, which they do not line up with
    for index in range(count):
        num_queries, offset = (1, 0) if index == 0 else (pick(1, 140), pick(0, 60) * (index % 2))
        num_keys = pick(1, 200) if index % 3 else num_queries + offset
        yield num_queries, num_keys, offset, 8 * 2 ** pick(0, 4), 8 * 2 ** pick(0, 4), bool(pick(0, 2))


# ---- patterns ----------------------------------------------------------------------------------------------------


def test_every_kind_of_pattern_is_tested():
    def kinds(pattern: Any) -> set[str]:
        names = [n for n in ("pattern", "excluded", "window") if hasattr(pattern, n)]
        inner = [*getattr(pattern, "parts", ()), *(getattr(pattern, n) for n in names)]
        return {pattern.kind}.union(*map(kinds, inner))

    found = set().union(*(kinds(pattern) for pattern, _ in PATTERNS.values()), *map(kinds, BY_LENGTH.values()))
    of_the_library = {k for k, cls in KINDS.items() if cls.__module__.startswith("hf_efficient")}
    assert found == of_the_library - {"BlockList"}
    assert {"Columns", "Rows"} <= found, "the names that saved patterns have"


@each
def test_visible_is_the_definition(name: str):
    pattern, _ = PATTERNS[name]
    actual = dense(pattern, 75, 90, offset=20)
    for head in range(pattern.num_heads):
        if "BigBirdBlocks" not in (single := pattern.head(head)).spec():
            expected = torch.tensor([[sees(single, i, j) for j in range(90)] for i in range(20, 95)])
            assert torch.equal(actual[head], expected), f"head {head}"


@pytest.mark.parametrize("name", [*PATTERNS, *BY_LENGTH])
def test_patterns_travel_as_text(name: str):
    pattern = BY_LENGTH[name] if name in BY_LENGTH else PATTERNS[name][0]
    assert parse_pattern(pattern.spec()) == pattern
    assert hash(parse_pattern(pattern.spec())) == hash(pattern)
    assert parse_pattern(Full().spec()) != pattern or name == "full"


def test_text_is_read_where_no_pattern_was_made_before():
    spec = BigBirdBlocks(**BIGBIRD, num_random_blocks=2, is_causal=True).spec()
    code = f"from hf_efficient.patterns.parse import parse_pattern; assert parse_pattern({spec!r}).spec() == {spec!r}"
    fresh.python("-c", code).check_returncode()
    with pytest.raises(ValueError, match=r"no pattern of kind 'Diagonal' is known; import .* Known are BigBirdBlocks"):
        parse_pattern('{"kind":"Diagonal"}')


@each
def test_shift_invariance_is_as_stated(name: str):
    pattern, _ = PATTERNS[name]
    whole = dense(pattern, 150, 150)
    moved = all(torch.equal(whole[:, :100, :100], whole[:, s : s + 100, s : s + 100]) for s in (1, 4, 25))
    assert moved == pattern.shift_invariant


@each
def test_what_is_not_needed_is_not_seen_again(name: str):
    """Brute force: a key that `needed` gives up is visible to no causal query from there on."""
    pattern, _ = PATTERNS[name]
    length, later = 160, 420
    seen = dense(pattern, later, length, is_causal=True).any(0)  # (later, length)
    for following in range(1, length + 1):
        needed = pattern.needed(torch.arange(following), following)
        still = seen[following:, :following].any(0)
        assert not (still & ~needed).any(), f"from query {following} on"
    row = pattern.needed(torch.arange(100), torch.tensor([[90], [100]]))
    assert torch.equal(row[1], pattern.needed(torch.arange(100), 100))


@each
def test_bounded_means_that_memory_stops_growing(name: str):
    pattern, bounded = PATTERNS[name]
    most = [
        max(int(pattern.needed(torch.arange(n), n).sum()) for n in range(start, start + 130)) for start in (2000, 4000)
    ]
    assert (most[0] == most[1]) == bounded
    assert pattern.is_bounded == bounded


@pytest.mark.parametrize("size", [5, 10, 12, 100, 1000])
def test_bounded_at_every_block_size(size: int):
    assert BlockWindow(block_size=size, before=3).is_bounded
    assert ShiftedBlock(block_size=size, shift=2).is_bounded
    assert GridBlocks(columns=size, height=3, width=1, above=1, below=0, beside=1).is_bounded
    assert not (BlockWindow(block_size=size) | Strided(stride=size)).is_bounded


@pytest.mark.parametrize("name", ["cyclic", "cyclic, one for all", "bigbird"])
def test_lists_of_blocks_are_their_pattern_at_a_length(name: str):
    """`columns` and `full_rows`, for several lengths at once, show what `at_length(length)` shows."""
    pattern = BY_LENGTH[name]
    assert isinstance(pattern, BlockList)
    lengths, size, n = torch.tensor([1, 9, 16, 40, 63, 97]), pattern.block_size, 97
    rows = -(-n // size)
    columns = pattern.columns(rows, lengths, False)
    full = pattern.full_rows(n, lengths, False)
    for row, length in enumerate(lengths.tolist()):
        expected = dense(pattern.at_length(length), length, length).expand(HEADS, -1, -1)
        blocks = torch.zeros(HEADS, rows, rows + 1, dtype=torch.bool)
        listed = columns[row].expand(HEADS, -1, -1)
        blocks.scatter_(2, torch.where(listed < 0, rows, listed), True)
        distinct = [c for c in listed.reshape(-1, listed.shape[-1]).tolist()]
        assert all(len({c for c in k if c >= 0}) == sum(c >= 0 for c in k) for k in distinct), (
            "a block is listed twice"
        )
        actual = blocks[:, :, :rows].repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :n, :n]
        if full is not None:
            actual[:, full[0][row][full[1][row]]] = True
        assert torch.equal(actual[:, :length, :length], expected), f"length {length}"


# ---- tables of tiles ---------------------------------------------------------------------------------------------


def by_lists(table: TileTable, tiles: TileList, is_rows: bool) -> Tensor:
    """(heads, N, S) from one direction's work items; each tile is named once, each block at least once."""
    block, other = (table.block_q, table.block_k) if is_rows else (table.block_k, table.block_q)
    sizes = (table.num_queries, table.num_keys) if is_rows else (table.num_keys, table.num_queries)
    blocks, others = -(-sizes[0] // block), -(-sizes[1] // other)
    masks = (table.masks if is_rows else table.masks_t).bool()
    out = torch.zeros(table.heads, blocks, others, block, other, dtype=torch.bool)
    named, owners, slots = torch.zeros(len(tiles.other), dtype=torch.long), set(), []
    for head, at, slow0, slow1, fast0, fast1, slot in tiles.work.tolist():
        owners.add((head, at))
        slots += [slot] if slot >= 0 else []
        for first, last, is_slow in ((slow0, slow1, True), (fast0, fast1, False)):
            named[first:last] += 1
            index = tiles.other[first:last].long()
            out[head, at, index] = masks[tiles.mask[first:last].long()] if is_slow else True
    assert (named == 1).all()
    assert owners == {(h, b) for h in range(table.heads) for b in range(blocks)}
    assert sorted(slots) == list(range(tiles.num_slots))
    ranges = [slot for _, _, first, last in tiles.split.tolist() for slot in range(first, last)]
    assert sorted(ranges) == sorted(slots)
    out = out.transpose(2, 3).reshape(table.heads, blocks * block, others * other)[:, : sizes[0], : sizes[1]]
    return out if is_rows else out.transpose(1, 2)


@each
def test_tables_are_the_definition_in_both_directions(name: str):
    pattern, _ = PATTERNS[name]
    for num_queries, num_keys, offset, block_q, block_k, causal in draws(len(name), 14):
        for radius in (None, 9):
            table = tile_table(
                pattern,
                num_queries,
                num_keys,
                block_q,
                block_k,
                radius=radius,
                query_offset=offset,
                is_causal=causal,
                cap=3,
            )
            expected = dense(pattern, num_queries, num_keys, offset, causal)
            label = f"{num_queries} × {num_keys} from {offset}, tiles {block_q} × {block_k}, causal {causal}"
            assert torch.equal(table.to_dense().expand_as(expected), expected), label
            for tiles, is_rows in ((table.rows, True), (table.columns, False)):
                assert torch.equal(by_lists(table, tiles, is_rows).expand_as(expected), expected), label
                assert int((tiles.work[:, 3:6:2] - tiles.work[:, 2:5:2]).sum(1).max()) <= 3


@each
def test_bias_classes_hold_where_they_claim_to(name: str):
    """Tiles without a mask lie beyond the radius on one side; near ones know their distance."""
    pattern, _ = PATTERNS[name]
    radius = 11
    for num_queries, num_keys, offset, block_q, block_k, causal in draws(7, 4):
        table = tile_table(
            pattern, num_queries, num_keys, block_q, block_k, radius=radius, query_offset=offset, is_causal=causal
        )
        classes = table.class_start.shape[1] - 1
        for head in range(table.heads):
            for kind in range(classes):
                part = slice(*table.class_start[head, kind : kind + 2].tolist())
                start = table.class_column[part] * block_k - table.class_row[part] * block_q - offset
                if kind == 0:
                    assert (start + block_k - 1 <= -radius).all()
                elif kind == 1:
                    assert (start - block_q + 1 >= radius).all()
                else:
                    assert (start == table.near[kind - 2]).all()
                    assert (table.class_mask[part] >= 0).all()


def test_a_table_of_a_mask_is_that_mask():
    generator = torch.Generator().manual_seed(0)
    for heads, n, s in ((1, 1, 1), (1, 40, 70), (3, 65, 33)):
        mask = torch.rand(heads, n, s, generator=generator) < 0.3
        mask[:, :16, :16] = True
        for radius in (None, 5):
            table = TileTable.from_dense(mask, 16, 8, radius)
            assert torch.equal(table.to_dense().expand_as(mask), mask)


def test_a_table_of_nothing():
    table = tile_table(GlobalColumns(positions=(90,)), 40, 40, 16, 16)
    assert table.num_tiles == 0
    assert not table.to_dense().any()
    assert len(table.rows.work) == len(table.columns.work) == 3
    with pytest.raises(ValueError, match="every size must be at least 1"):
        tile_table(Full(), 0, 4, 16, 16)


LONG = {
    "bigbird in a window": BigBirdBlocks(
        block_size=64, seed=0, layer=0, heads=1, num_random_blocks=9, is_causal=False, length=65536
    )
    & Window(left=512, right=512),
    "fixed in a window": (BlockWindow(block_size=128) | Summary(stride=128, size=9)) & Window(left=300, right=300),
    "window": Window(left=256, right=256),
    "dilated": Window(left=64, right=64, dilation=4),
    "longformer": Window(left=256, right=256) | GlobalColumns(positions=(0, 9000)) | GlobalRows(positions=(0, 9000)),
    "blocks": BlockWindow(block_size=100, before=50, after=50),
    "blocks behind": ShiftedBlock(block_size=256, shift=3),
    "blocks ahead": ShiftedBlock(block_size=128, shift=1, count=512),
    "grid": GridBlocks(columns=64, height=8, width=64, above=4, below=4, beside=8),
    "causal grid": GridBlocks(columns=128, height=2, width=32, above=1, below=0, beside=32, by_block=True),
    "bigbird": BigBirdBlocks(
        block_size=64, seed=0, layer=0, heads=1, num_random_blocks=0, is_causal=False, length=65536
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_long_tables_are_built_in_proportion_to_their_tiles(name: str, monkeypatch):
    """65536 tokens: tiles looked at, and elements evaluated, which the tiles that look alike share."""
    pattern, n, block = LONG[name], 65536, 64
    counts = {"elements": 0}
    visible = type(pattern).visible

    def counting(self: Pattern, query: Tensor, key: Tensor) -> Tensor:
        seen = visible(self, query, key)
        counts["elements"] += seen.numel()
        return seen

    monkeypatch.setattr(type(pattern), "visible", counting)
    is_causal = "causal" in name
    candidates = len(pattern.tiles(n, n, block, block, 0)[0])
    tile_table.cache_clear()
    table = tile_table(pattern, n, n, block, block, is_causal=is_causal)
    assert 1024 <= table.num_tiles < 30 * 1024
    assert candidates <= 4 * table.num_tiles
    assert counts["elements"] <= block * block * 150, "tiles that look alike are evaluated one by one"


def test_intersections_fold():
    """Windows, strides and everything do not stay intersections, which have no fast form of their own."""
    near = Window(left=6, right=9)
    assert near & Window(left=8, right=2) == Window(left=6, right=2)
    assert near & Window(left=2, right=4, dilation=3) == Window(left=2, right=3, dilation=3)
    assert near & Strided(stride=4) == Window(left=1, right=2, dilation=4)
    assert near & Strided(stride=10) == Window(left=0, right=0)
    assert Strided(stride=4) & Strided(stride=6) == Strided(stride=12)
    assert Full() & GRID == GRID & Full() == GRID
    assert (Strided(stride=4) | GRID) & near == (Strided(stride=4) & near) | (GRID & near)
    assert len((GRID & near & BlockWindow(block_size=16)).parts) == 3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Window(left=-1, right=0), "Window: left=-1 is not possible; it must be at least 0"),
        (lambda: Window(left=1, right=1, dilation=0), "dilation=0"),
        (lambda: BlockWindow(block_size=0), "block_size=0"),
        (lambda: Summary(stride=4, size=0), "size=0"),
        (lambda: ShiftedBlock(block_size=4, shift=1, count=0), "count=0"),
        (lambda: Union(parts=()), "a union needs parts"),
        (lambda: PerHead(parts=(Full(), Full())) | PerHead(parts=(Full(),) * 3), r"not \[2, 3\]"),
        (lambda: Intersection(parts=(Full(),)), "an intersection needs two parts"),
        (lambda: PerHead(parts=(PerHead(parts=(Full(), Full())), Full())), "single head each"),
    ],
)
def test_patterns_that_contradict_themselves_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
