"""Causal linear attention from log-features in Triton, forward.

    y_i = Σ_j Σ_r exp(x_ir + a_jr) v_j / Σ_j Σ_r exp(x_ir + a_jr),    j ≤ i,    lse_i = log of the denominator

with log-features x of queries and a of keys. Tokens are cut into chunks of C. What a query sees is taken from three places,
each with a divisor that no visible pair exceeds:

- keys of earlier chunks, from a state per chunk: `chunk_states` sums a chunk, `scan` adds up all chunks before each one.
  Features of a state are divided by their own running maximum;
- keys of earlier tiles of 16 in the same chunk, as products of tiles: keys are divided by their tile's maximum per feature;
- keys of the query's own tile, pair by pair, one exponential for each feature of each pair.

Exponents are measured from the largest visible one of the query, which is found first. So every exponential is at most 1,
the largest visible one is 1, what vanishes is smaller than that by e^-87, and no key that a query does not see, however
large, changes a bit of its output. There is no gap between features that this does not hold for.

Features are read as logarithms, in slices of BK, and no state is carried from chunk to chunk in registers. Conventions are
those of `block_sparse`; sums are float32.

Sources: Katharopoulos et al. 2020 (arXiv 2006.16236) eq. 9; Yang et al. 2024 (arXiv 2312.06635) §4, tiles within chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

# tokens whose pairs are computed one by one; the smallest tile of a product
TILE = tl.constexpr(16)
NEVER = tl.constexpr(float("-inf"))
# that a length or the number of heads is 1 or a multiple of 16 makes no kernel faster: none is compiled anew for it
LENGTHS = ("N", "chunks", "slots", "count", "H")


@triton.jit
def locate(chunks, H):
    """This program's chunk, its place in the batch, and its batch entry and head, 64 bits each; the grid has one axis."""
    chunk = tl.program_id(0) % chunks
    place = (tl.program_id(0) // chunks).to(tl.int64)
    return chunk, place, place // H, place % H


@triton.jit
def load_rows(X, rows, stride, count, first, W: tl.constexpr, BW: tl.constexpr, fill: tl.constexpr):
    """[R, BW] columns from `first` on of the [R] rows, as float32; `fill` in rows from `count` and columns from W on."""
    columns = first + tl.arange(0, BW)
    mask = (rows < count)[:, None]
    if W % BW != 0:
        mask = mask & (columns < W)[None, :]
    return tl.load(X + rows[:, None] * stride + columns[None, :], mask=mask, other=fill).to(tl.float32)


@triton.jit
def load_features(X, first, W: tl.constexpr, BW: tl.constexpr, fill: tl.constexpr):
    """[BW] float32 from `first` on; `fill` from W on."""
    columns = first + tl.arange(0, BW)
    return tl.load(X + columns, mask=columns < W, other=fill)


@triton.jit
def store_rows(X, x, rows, stride, count, first, W: tl.constexpr, BW: tl.constexpr):
    """Store what `load_rows` would read."""
    columns = first + tl.arange(0, BW)
    mask = (rows < count)[:, None]
    if W % BW != 0:
        mask = mask & (columns < W)[None, :]
    tl.store(X + rows[:, None] * stride + columns[None, :], x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def finite(maximum):
    """What is all exp(-inf) = 0 is divided by 1; the other side of its products still takes -inf: it must not overflow."""
    return tl.where(maximum == NEVER, 0.0, maximum)


@triton.jit(do_not_specialize=LENGTHS)
def chunk_states(A, LSE, V, WEIGHT, SUMS, ONES, TOPS, sab, sah, sa, svb, svh, sv, N, chunks, slots, count,
                 H, C: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                 LAST_FIRST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Per feature r of one chunk: TOPS = max_j a_jr, SUMS = Σ_j exp(a_jr - TOPS) v_j and ONES the same of WEIGHT or of 1.

    Grid (count · slices of features · B·H). Chunk number t, from the end with LAST_FIRST, goes into slot t + 1 of
    (B·H, slots, M, D) and (B·H, slots, M). With LSE (B, H, N), natural, it is subtracted from a.
    """
    slices = (M + BK - 1) // BK
    number = tl.program_id(0) // slices % count
    m = tl.program_id(0) % slices * BK
    place = (tl.program_id(0) // slices // count).to(tl.int64)
    b = place // H
    h = place % H
    chunk = number
    if LAST_FIRST:
        chunk = chunks - 1 - number
    start = chunk.to(tl.int64) * C
    left = N - start
    row = tl.arange(0, C)
    a = load_rows(A + b * sab + h * sah + start * sa, row, sa, left, m, M, BK, NEVER)
    if LSE is not None:
        a -= load_lse(LSE + place * N + start, row, left)[:, None]
    v = load_rows(V + b * svb + h * svh + start * sv, row, sv, left, 0, D, BD, 0.0)
    top = tl.max(a, 0)
    k = tl.exp(a - finite(top)[None, :])
    if WEIGHT is not None:
        w = tl.load(WEIGHT + place * N + start + row, mask=row < left, other=0.0)
        ones = tl.sum(k * w[:, None], 0)
    else:
        ones = tl.sum(k, 0)
    at = (place * slots + number + 1) * M
    feature = m + tl.arange(0, BK)
    sums = tl.dot(tl.trans(k), v, input_precision=PRECISION)
    store_rows(SUMS + at * D, sums, feature, D, M, 0, D, BD)
    tl.store(ONES + at + feature, ones, mask=feature < M)
    tl.store(TOPS + at + feature, top, mask=feature < M)


@triton.jit
def load_lse(LSE, rows, count):
    """[R] log-sum-exps; +inf for rows that saw nothing, so that all their weights become 0."""
    lse = tl.load(LSE + rows, mask=rows < count, other=0.0)
    return tl.where(lse == NEVER, float("inf"), lse)


@triton.jit(do_not_specialize=LENGTHS)
def scan(SUMS, ONES, TOPS, slots, M: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Add to every slot all slots before it. Grid (blocks of R features · B·H); one program walks over all slots."""
    blocks = (M + R - 1) // R
    place = (tl.program_id(0) // blocks).to(tl.int64)
    feature = tl.program_id(0) % blocks * R + tl.arange(0, R)
    SUMS += place * slots * M * D
    ONES += place * slots * M
    TOPS += place * slots * M
    exists = feature < M
    sums = load_rows(SUMS, feature, D, M, 0, D, BD, 0.0)
    ones = tl.load(ONES + feature, mask=exists, other=0.0)
    top = tl.load(TOPS + feature, mask=exists, other=0.0)
    for _ in range(1, slots):
        SUMS += M * D
        ONES += M
        TOPS += M
        new = tl.load(TOPS + feature, mask=exists, other=0.0)
        both = tl.maximum(top, new)
        kept = tl.exp(top - finite(both))
        added = tl.exp(new - finite(both))
        sums = sums * kept[:, None] + load_rows(SUMS, feature, D, M, 0, D, BD, 0.0) * added[:, None]
        ones = ones * kept + tl.load(ONES + feature, mask=exists, other=0.0) * added
        top = both
        store_rows(SUMS, sums, feature, D, M, 0, D, BD)
        tl.store(ONES + feature, ones, mask=exists)
        tl.store(TOPS + feature, top, mask=exists)


@triton.jit
def largest_pair(X, A, TOPS, row, sx, sa, left, C: tl.constexpr, M: tl.constexpr, BK: tl.constexpr):
    """[C] largest exponent x_ir + a_jr that each query of a chunk sees; -inf if it sees none."""
    tile = row // TILE
    top = tl.full([C], NEVER, tl.float32)
    for m in range(0, M, BK):
        seen = tl.full([C, BK], NEVER, tl.float32)
        if TOPS is not None:
            seen = tl.maximum(seen, load_features(TOPS, m, M, BK, NEVER)[None, :])
        for j in range(0, C // TILE - 1):
            a = tl.max(load_rows(A, tl.arange(0, TILE) + j * TILE, sa, left, m, M, BK, NEVER), 0)
            seen = tl.maximum(seen, tl.where((tile > j)[:, None], a[None, :], NEVER))
        for t in range(0, TILE):
            a = load_rows(A, tile * TILE + t, sa, left, m, M, BK, NEVER)
            seen = tl.maximum(seen, tl.where((row % TILE >= t)[:, None], a, NEVER))
        top = tl.maximum(top, tl.max(load_rows(X, row, sx, left, m, M, BK, NEVER) + seen, 1))
    return top


@triton.jit(do_not_specialize=LENGTHS)
def forward(X, A, V, SUMS, ONES, TOPS, OUT, LSE, sxb, sxh, sx, sab, sah, sa, svb, svh, sv, sob, soh, so, N, chunks, slots,
            H, C: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Grid (chunks · B·H). Writes OUT, and LSE (B, H, N). Slot t of the states holds what chunk t sees of earlier keys."""
    chunk, place, b, h = locate(chunks, H)
    start = chunk.to(tl.int64) * C
    left = N - start
    row = tl.arange(0, C)
    tile = row // TILE
    X += b * sxb + h * sxh + start * sx
    A += b * sab + h * sah + start * sa
    V += b * svb + h * svh + start * sv
    if SUMS is not None:
        SUMS += (place * slots + chunk) * M * D
        ONES += (place * slots + chunk) * M
        TOPS += (place * slots + chunk) * M
    top = largest_pair(X, A, TOPS, row, sx, sa, left, C, M, BK)
    pivot = finite(top)
    num = tl.zeros([C, BD], tl.float32)
    den = tl.zeros([C], tl.float32)
    for m in range(0, M, BK):
        x = load_rows(X, row, sx, left, m, M, BK, NEVER) - pivot[:, None]
        if SUMS is not None:
            q = tl.exp(x + load_features(TOPS, m, M, BK, NEVER)[None, :])
            s = load_rows(SUMS, m + tl.arange(0, BK), D, M, 0, D, BD, 0.0)
            num = tl.dot(q, s, num, input_precision=PRECISION)
            den += tl.sum(q * load_features(ONES, m, M, BK, 0.0)[None, :], 1)
        for j in range(0, C // TILE - 1):
            other = tl.arange(0, TILE) + j * TILE
            a = load_rows(A, other, sa, left, m, M, BK, NEVER)
            v = load_rows(V, other, sv, left, 0, D, BD, 0.0)
            most = tl.max(a, 0)[None, :]
            q = tl.exp(tl.where((tile > j)[:, None], x + most, NEVER))
            w = tl.dot(q, tl.trans(tl.exp(a - finite(most))), input_precision=PRECISION)
            num = tl.dot(w, v, num, input_precision=PRECISION)
            den += tl.sum(w, 1)
        for t in range(0, TILE):
            other = tile * TILE + t
            a = load_rows(A, other, sa, left, m, M, BK, NEVER)
            v = load_rows(V, other, sv, left, 0, D, BD, 0.0)
            w = tl.sum(tl.exp(tl.where((row % TILE >= t)[:, None], x + a, NEVER)), 1)
            num += w[:, None] * v
            den += w
    safe = tl.where(den == 0.0, 1.0, den)
    store_rows(OUT + b * sob + h * soh + start * so, num / safe[:, None], row, so, left, 0, D, BD)
    lse = tl.where(den == 0.0, NEVER, pivot + tl.log(safe))
    tl.store(LSE + place * N + start + row, lse, mask=row < left)
