"""Patterns as data, their tables of tiles, and block-sparse attention in plain PyTorch against its definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fresh
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_efficient.attention.blockwise import CyclicBlocks
from hf_efficient.attention.image_local import GridBlocks
from hf_efficient.ops.block_sparse import gather as blocks
from hf_efficient.ops.block_sparse import torch_backend as torch_attention
from hf_efficient.ops.block_sparse.attention import block_sparse_attention, reference_attention
from hf_efficient.ops.context import AttentionCall, ExtraKeys
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.ops.softmax import attend, merge_attention
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
from hf_efficient.patterns.pattern import Pattern, Union
from hf_efficient.patterns.random_blocks import BigBirdBlocks
from hf_efficient.patterns.sets import PerHead, Within, Without, within
from hf_efficient.patterns.tile_table import TileList, TileTable, tile_table
from hf_efficient.profiling.counters import LargestTensor, flops
from hf_efficient.testing import assert_close

HEADS, WIDTH = 4, 8
GRID = GridBlocks(columns=10, height=3, width=4, above=2, below=2, beside=1)
CAUSAL_GRID = GridBlocks(columns=9, height=2, width=5, above=3, below=0, beside=2, by_block=True)
BIGBIRD: dict[str, Any] = dict(block_size=8, seed=1, layer=0, heads=HEADS)
MIXED = PerHead(
    parts=(Window(left=2, right=2), Strided(stride=3), Window(left=2, right=2), BlockWindow(block_size=16) | GRID)
)
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
    "longformer": (Window(left=8, right=8) | GlobalColumns(positions=(0, 1)) | GlobalRows(positions=(0, 1)), True),
    "merged strided": (Window(left=6, right=6) | Strided(stride=7), False),
    "merged fixed": (BlockWindow(block_size=10) | Summary(stride=10, size=1), False),
    "summary and itself": (Summary(stride=9, size=2) | Window(left=0, right=0), False),
    "axial": (BlockWindow(block_size=10) | Strided(stride=10) | GlobalColumns(positions=(0,)), False),
    "many": (Window(left=4, right=4) | Strided(stride=6) | Strided(stride=9) | Summary(stride=20, size=3), False),
    "three strides": (Window(left=2, right=1) | Strided(stride=4) | Strided(stride=6) | Strided(stride=9), False),
    "without": (Without(pattern=Window(left=9, right=9), excluded=Strided(stride=5)), True),
    "within": (within(Strided(stride=5) | GlobalColumns(positions=(3,)), Window(left=12, right=7)), True),
    "heads within": (within(MIXED, Window(left=9, right=9)), True),
    "per head": (MIXED, False),
    "shifted heads": (PerHead(parts=tuple(ShiftedBlock(block_size=10, shift=s) for s in (0, 0, 2, 1))), True),
    "union with heads": (MIXED | GlobalColumns(positions=(3,)), False),
    "causal bigbird": (BigBirdBlocks(**BIGBIRD, num_random_blocks=2, is_causal=True), False),
    "causal bigbird, not random": (BigBirdBlocks(**BIGBIRD, num_random_blocks=0, is_causal=True), True),
}
# these ask for the number of a row's tokens
BY_LENGTH: dict[str, Pattern] = {
    "cyclic": CyclicBlocks(block_size=10, shifts=(0, 1, 0, 2)),
    "cyclic, one for all": CyclicBlocks(block_size=16, shifts=(1,)),
    "bigbird": BigBirdBlocks(**BIGBIRD, num_random_blocks=2, is_causal=False),
    "bigbird within": within(
        BigBirdBlocks(**BIGBIRD, num_random_blocks=1, is_causal=False), Window(left=20, right=20)
    ),
    "cyclic and window": CyclicBlocks(block_size=10, shifts=(0, 1, 0, 2)) | Window(left=3, right=3),
    "cyclic in some heads": PerHead(
        parts=(Strided(stride=5), *(CyclicBlocks(block_size=10, shifts=(s,)) for s in (0, 1)), Window(left=3, right=3))
    ),
}
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
        start = i - i % pattern.block_size
        return start - pattern.before <= j < start + pattern.block_size + pattern.after
    if isinstance(pattern, ShiftedBlock):
        block, shift = i // pattern.block_size, pattern.shift
        back = block - shift if block >= shift else block
        target = back if pattern.count is None else (block + shift) % pattern.count
        return j // pattern.block_size == target
    if isinstance(pattern, Union):
        return any(sees(part, i, j) for part in pattern.parts)
    if isinstance(pattern, (Within, Without)):
        rest = sees(pattern.window, i, j) if isinstance(pattern, Within) else not sees(pattern.excluded, i, j)
        return rest and sees(pattern.pattern, i, j)
    (y, x), (v, u) = divmod(i, pattern.columns), divmod(j, pattern.columns)
    height, width = pattern.height, pattern.width
    top, left = y - y % height, x - x % width
    inside = -pattern.above <= v - top < height + pattern.below
    inside = inside and -pattern.beside <= u - left < width + pattern.beside
    mine, other = ((r // height, c // width, r % height, c % width) for r, c in ((y, x), (v, u)))
    return inside and (other <= mine or not pattern.by_block)


def dense(pattern: Pattern, num_queries: int, num_keys: int, offset: int = 0, is_causal: bool = False) -> Tensor:
    """(H or 1, N, S) bool."""
    query, key = torch.arange(offset, offset + num_queries)[:, None], torch.arange(num_keys)
    seen = pattern.visible_per_head(query, key)
    return seen & (key <= query) if is_causal else seen


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
        if not isinstance(single := pattern.head(head), BigBirdBlocks):
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


# ---- attention ---------------------------------------------------------------------------------------------------


class Problem:
    """Random heads in fp64 for three rows: all real, padded behind, and padded in front and with a hole."""

    def __init__(self, n: int, kv_heads: int = HEADS):
        generator = torch.Generator().manual_seed(n)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shapes = [(3, heads, n, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
        self.heads = [normal(*shape).requires_grad_() for shape in shapes]
        self.keep = torch.ones(3, n, dtype=torch.bool)
        self.keep[1, n - n // 3 :] = False
        self.keep[2, : n // 4] = self.keep[2, n // 2 : n // 2 + n // 8] = False
        self.table = normal(11, HEADS).requires_grad_()
        self.bias = RelativeBias(self.table, lambda offsets: offsets.clamp(-5, 5) + 5, 5)
        self.segment = torch.randint(0, 2, (3, HEADS, n), generator=generator)
        self.position = torch.randint(0, n, (3, 1, n), generator=generator)
        self.weights = normal(3, HEADS, n, WIDTH), normal(3, HEADS, n)
        self.extra = normal(2, 3, HEADS, 2, WIDTH)

    def results(self, function: Any, pattern: Pattern, **options: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Output, log-sum-exp, and the gradients of both together."""
        out, lse = function(*self.heads, pattern, call_of(**options), return_lse=True)
        finite = torch.where(lse.isfinite(), lse, 0.0)
        loss = (out * self.weights[0]).sum() + (finite * self.weights[1]).sum()
        leaves = [*self.heads, self.table]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return out, lse, [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def call_of(**facts: Any) -> AttentionCall:
    return AttentionCall(**dict(is_causal=False, scaling=WIDTH**-0.5) | facts)


def by_row(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """The definition for each row with the pattern of its own number of tokens."""
    keep, parts = call.key_padding_mask, []
    assert keep is not None and return_lse
    for row in range(len(query)):
        length = int(keep[row].nonzero().max()) + 1
        segments = None if call.segments is None else tuple(x[row : row + 1] for x in call.segments)
        own = replace(call, key_padding_mask=keep[row : row + 1], segments=segments)
        heads = (x[row : row + 1] for x in (query, key, value))
        parts.append(reference_attention(*heads, pattern.at_length(length), own, return_lse=True))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def assert_same_results(actual: Any, expected: Any, label: str) -> None:
    assert torch.equal(actual[1].isinf(), expected[1].isinf()), label
    assert_close(actual[0], expected[0], 1e-9, f"output, {label}")
    assert (actual[0][expected[1].isinf()] == 0).all(), f"an empty row is not 0, {label}"
    there = expected[1].isfinite()
    if there.any():
        assert_close(actual[1][there], expected[1][there], 1e-9, f"lse, {label}")
    for which, a, e in zip("qkvb", actual[2], expected[2], strict=True):
        if e.any():
            assert_close(a, e, 1e-9, f"gradient of {which}, {label}")
        else:
            assert a.abs().max() < 1e-9, f"gradient of {which}, {label}"


@pytest.fixture(params=["pieces", "dense"])
def route(request, monkeypatch):
    """One dense tile never, or wherever it can serve."""
    monkeypatch.setattr(torch_attention, "DENSE_SHARE", 9.0 if request.param == "pieces" else -1.0)


@pytest.mark.parametrize("is_causal", [False, True])
@each
def test_attention_is_its_definition(name: str, is_causal: bool, route):
    pattern, _ = PATTERNS[name]
    for n in (1, 2, 63, 110):
        problem = Problem(n)
        vectors = dict(segments=(problem.segment, problem.segment), positions=(problem.position, problem.position))
        for kind, facts in (("plain", {}), ("bias", dict(relative_bias=problem.bias)), ("vectors", vectors)):
            options: dict[str, Any] = dict(is_causal=is_causal, key_padding_mask=problem.keep, **facts)
            if kind == "plain" and n == 63:
                options.pop("key_padding_mask")
            expected = problem.results(reference_attention, pattern, **options)
            actual = problem.results(block_sparse_attention, pattern, **options)
            assert_same_results(actual, expected, f"{n} tokens, {kind}")
            if kind == "bias":
                plain = block_sparse_attention(*problem.heads, pattern, call_of(**options))
                assert_close(plain, expected[0], 1e-9, f"{n} tokens, without log-sum-exp")


@pytest.mark.parametrize("name", BY_LENGTH)
def test_attention_by_length_is_its_definition(name: str, route):
    for n in (1, 2, 63, 110):
        problem = Problem(n)
        for facts in ({}, dict(relative_bias=problem.bias), dict(segments=(problem.segment, problem.segment))):
            options: dict[str, Any] = dict(key_padding_mask=problem.keep, **facts)
            expected = problem.results(by_row, BY_LENGTH[name], **options)
            assert_same_results(problem.results(block_sparse_attention, BY_LENGTH[name], **options), expected, f"{n}")


@each
def test_extra_keys_join_the_softmax(name: str, route):
    """Against the definition: two more keys of their own, seen by some queries only, one with an additive logit."""
    pattern, _ = PATTERNS[name]
    n = 70
    problem = Problem(n)
    query, key, value = (x.detach() for x in problem.heads)
    shown = torch.ones(3, n, 2, dtype=torch.bool)
    shown[1, ::3, 0] = shown[2, :, 1] = False
    bias = torch.linspace(-1, 1, HEADS * n * 2, dtype=torch.float64).view(1, HEADS, n, 2)
    extra = ExtraKeys(*problem.extra, shown, bias)
    call = call_of(scaling=0.4, key_padding_mask=problem.keep, extra=extra, is_causal=True)
    out, lse = block_sparse_attention(query, key, value, pattern, call, return_lse=True)
    scores = 0.4 * query @ torch.cat([problem.extra[0], key], 2).mT
    seen = dense(pattern, n, n, is_causal=True) & problem.keep[:, None, None]
    seen = torch.cat([shown[:, None].expand(-1, HEADS, -1, -1), seen.expand(-1, HEADS, -1, -1)], -1)
    scores = (scores + torch.cat([bias, torch.zeros(1, HEADS, n, n)], -1)).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0.0) @ torch.cat([problem.extra[1], value], 2)
    assert_close(out, expected, 1e-9)
    there = seen.any(-1)
    assert_close(lse[there], scores.logsumexp(-1)[there], 1e-9)


@pytest.mark.parametrize("name", ["window", "axial", "merged fixed", "per head", "longformer"])
def test_grouped_queries_share_keys(name: str, route):
    pattern, _ = PATTERNS[name]
    problem = Problem(90, kv_heads=2)
    expected = problem.results(reference_attention, pattern, relative_bias=problem.bias)
    actual = problem.results(block_sparse_attention, pattern, relative_bias=problem.bias)
    assert_same_results(actual, expected, name)
    query, key, value = problem.heads
    whole = [x[:, [0, 0, 1, 1]] for x in (key, value)]
    again = block_sparse_attention(query, *whole, pattern, call_of(relative_bias=problem.bias))
    assert_close(again, actual[0], 1e-12)


def test_merged_parts_are_one_softmax():
    """Three disjoint sets of keys, with queries that see nothing in some or all of them; values and gradients."""
    problem = Problem(40)
    query, key, value = problem.heads
    seen = torch.rand(3, 1, 40, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[:, :, 5] = seen[0, :, 6, :30] = seen[1, :, 7, 10:] = False
    logits = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)

    def over(part: slice) -> tuple[Tensor, Tensor]:
        out, lse = attend(query, key[:, :, part], value[:, :, part], logits[..., part], scaling=0.3, return_lse=True)
        assert lse is not None
        return out, lse

    def merged(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return merge_attention(over(slice(0, 10)), over(slice(10, 30)), over(slice(30, 40)))

    def whole(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return over(slice(0, 40))

    assert_same_results(problem.results(merged, Full()), problem.results(whole, Full()), "merged")
    by_formula = (0.3 * query @ key.mT + logits).logsumexp(-1)
    there = by_formula.isfinite()
    assert_close(whole()[1][there], by_formula[there], 1e-12)
    assert (whole()[0][:, :, 5] == 0).all()


@each
def test_new_tokens_see_what_the_definition_shows(name: str):
    """Some queries against a cache; later keys are hidden from the earlier ones among them."""
    pattern, _ = PATTERNS[name]
    problem = Problem(70)
    query, key, value = (x.detach() for x in problem.heads)
    for first in (69, 60, 5):
        call = AttentionCall(scaling=0.4, is_causal=True, relative_bias=problem.bias, query_offset=first)
        expected = reference_attention(query[:, :, first:], key, value, pattern, call)
        actual = block_sparse_attention(query[:, :, first:], key, value, pattern, call)
        assert_close(actual, expected, 1e-9, f"from {first}")


@pytest.mark.parametrize("name", ["blocks and memory", "causal bigbird"])
def test_tables_made_for_inference_or_elsewhere_serve_training(name: str):
    pattern, _ = PATTERNS[name]
    for cached in (tile_table, blocks._plan):
        cached.cache_clear()
    tokens = torch.randn(1, HEADS, 600, WIDTH)
    with torch.inference_mode(), torch.device("meta"):
        expected = block_sparse_attention(tokens, tokens, tokens, pattern, call_of(is_causal=True))
    tokens.requires_grad_()
    out = block_sparse_attention(tokens, tokens, tokens, pattern, call_of(is_causal=True))
    assert torch.equal(out, expected)
    out.sum().backward()
    assert tokens.grad is not None and tokens.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_sum_exps_of_half_precision_are_those_of_its_inputs(dtype: torch.dtype, autocast: bool):
    """Large logits and many values: only the result is rounded."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 300, 64, generator=generator).mul(4).to(dtype) for _ in range(3))
    with torch.autocast("cpu", dtype, enabled=autocast):
        out, lse = attend(query, key, value, None, scaling=0.125, return_lse=True)
    exact = attend(query.double(), key.double(), value.double(), None, scaling=0.125, return_lse=True)
    assert lse is not None and lse.dtype == torch.float32 and out.dtype == dtype
    assert_close(out.double(), exact[0], torch.finfo(dtype).eps)
    assert_close(lse.double(), exact[1], 1e-5)
    many = torch.full((1, 1, 8192, 2), 10.0, dtype=dtype)
    assert (attend(many[:, :, :1] * 0, many, many, None, scaling=1.0, return_lse=True)[0] == 10).all()


def test_lengths_with_the_same_last_block_share_a_pattern():
    pattern = BY_LENGTH["bigbird"]
    assert pattern.at_length(33) == pattern.at_length(40) != pattern.at_length(41)


@pytest.mark.parametrize("name", ["merged fixed", "merged strided", "two strides"])
def test_root_n_patterns_cost_root_n(name: str):
    """At 4 × the length and twice the stride, work and the largest tensor grow 8 ×; full attention's would grow 16 ×."""
    cost = {}
    for n in (1024, 4096):
        stride = int(n**0.5)
        near = BlockWindow(block_size=stride) if "fixed" in name else Window(left=stride - 1, right=0)
        far = Summary(stride=stride, size=1) if "fixed" in name else Strided(stride=stride)
        far = far | Strided(stride=stride + 3) if name == "two strides" else far
        q, k, v = torch.randn(3, 1, 1, n, 16, requires_grad=True)

        def step(pattern: Pattern = near | far, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            block_sparse_attention(q, k, v, pattern, call_of(is_causal=True)).sum().backward()

        with sdpa_kernel(SDPBackend.MATH):
            with LargestTensor() as recorder:
                step()
            cost[n] = recorder.numel, flops(step)
    for before, after in zip(cost[1024], cost[4096], strict=True):
        assert after <= 9 * before, cost


# ---- what is refused ---------------------------------------------------------------------------------------------


def _call(query: Any = None, key: Any = None, value: Any = None, pattern: Any = None, **options: Any) -> Any:
    tokens = torch.zeros(2, HEADS, 10, WIDTH)
    query = tokens if query is None else query
    key = tokens if key is None else key
    pattern = Window(left=1, right=1) if pattern is None else pattern
    own = {name: options.pop(name) for name in ("return_lse", "implementation") if name in options}
    return block_sparse_attention(query, key, key if value is None else value, pattern, call_of(**options), **own)


SOME = torch.zeros(2, HEADS, 10, WIDTH)
NUMBERS = (torch.zeros(2, 1, 10, dtype=torch.long),) * 2
BIAS = RelativeBias(torch.zeros(3, HEADS), lambda offsets: offsets.clamp(-1, 1) + 1, 1)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dtypes": (dict(key=SOME.double()), "one dtype on one device, not torch.float32 on cpu, torch.float64"),
    "devices": (dict(key=SOME.to("meta")), "one dtype on one device, not .* on meta"),
    "heads of the pattern": (dict(pattern=PerHead(parts=(Full(),) * 3)), "made for 3 heads, but there are 4"),
    "three axes": (dict(query=SOME[0]), "do not fit"),
    "values": (dict(value=SOME[:, :, :5]), r"value \(2, 4, 5, 8\) do not fit"),
    "key heads": (dict(key=torch.zeros(2, 3, 10, WIDTH)), r"key \(2, 3, 10, 8\).*do not fit"),
    "widths": (dict(key=torch.zeros(2, HEADS, 10, 4)), "do not fit"),
    "mask of numbers": (
        dict(key_padding_mask=torch.ones(2, 10)),
        r"of torch.float32 \(2, 10\) must be bool \(2, 10\)",
    ),
    "mask of another length": (
        dict(key_padding_mask=torch.ones(2, 9, dtype=torch.bool)),
        r"\(2, 9\) must be bool \(2, 10\)",
    ),
    "positions with a bias": (dict(positions=NUMBERS, relative_bias=BIAS), "does not go with `positions`"),
    "encoder while decoding": (dict(query=SOME[:, :, :2]), "2 queries and 10 keys: only a causal"),
    "segments while decoding": (dict(query=SOME[:, :, :2], is_causal=True, segments=NUMBERS), "takes no segments"),
    "log-sum-exp while decoding": (
        dict(query=SOME[:, :, :2], is_causal=True, return_lse=True, pattern=Full()),
        "no log-sum-exp",
    ),
    "more queries than keys": (dict(key=SOME[:, :, :5]), "10 queries and 5 keys: every query needs a key of its own"),
    "kernels while decoding": (
        dict(query=SOME[:, :, :2], is_causal=True, implementation="triton"),
        "implementation='triton' can't take this call: queries of new tokens .* use 'auto' or 'torch'",
    ),
    "flex while decoding": (
        dict(query=SOME[:, :, :2], is_causal=True, implementation="flex", pattern=Full()),
        "implementation='flex' can't take this call",
    ),
    "implementation": (dict(implementation="cuda"), "implementation='cuda' is not possible"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_do_not_fit_are_refused(name: str):
    options, message = REFUSED[name]
    _call()
    with pytest.raises(ValueError, match=message):
        _call(**options)


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
        (lambda: PerHead(parts=(PerHead(parts=(Full(), Full())), Full())), "single head each"),
    ],
)
def test_patterns_that_contradict_themselves_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
