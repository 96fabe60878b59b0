"""Causal linear attention from log-features in Triton, backward: every weight is computed again from the log-sum-exp.

    p_ijr = exp(x_ir + a_jr - lse_i),    δ_i = dout_i · out_i - dlse_i,    g_ij = dout_i · v_j - δ_i
    dx_ir = Σ_{j≤i} p_ijr g_ij,    da_jr = Σ_{i≥j} p_ijr g_ij,    dv_j = Σ_{i≥j} Σ_r p_ijr dout_i

Queries take the sums over earlier chunks from the states of the forward pass, made again. Keys take theirs over later
chunks from states of the same kind, in which queries, x_i - lse_i, stand for keys and [dout_i, -δ_i] for [v_j, 1]. As
forward, tiles of 16 tokens meet in products and the tokens of one tile pair by pair, and every exponential is at most 1: the
query with the largest x_ir - lse_i sees the key. No sum is shared between programs, so nothing is atomic and two runs give
the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_efficient.kernels.linear_attention import (
    LENGTHS,
    NEVER,
    TILE,
    finite,
    load_features,
    load_lse,
    load_rows,
    locate,
    store_rows,
)


@triton.jit
def load_vector(X, rows, count):
    """[R] values, 0 from row `count` on."""
    return tl.load(X + rows, mask=rows < count, other=0.0)


@triton.jit(do_not_specialize=LENGTHS)
def query_gradient(X, A, V, DOUT, LSE, DELTA, SUMS, ONES, TOPS, DX,
                   sxb, sxh, sx, sab, sah, sa, svb, svh, sv, sgb, sgh, sg, sdb, sdh, sd, N, chunks, slots,
                   H, C: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """dx of one chunk; grid and states as `forward`."""
    chunk, place, b, h = locate(chunks, H)
    start = chunk.to(tl.int64) * C
    left = N - start
    row = tl.arange(0, C)
    tile = row // TILE
    X += b * sxb + h * sxh + start * sx
    A += b * sab + h * sah + start * sa
    V += b * svb + h * svh + start * sv
    DX += b * sdb + h * sdh + start * sd
    if SUMS is not None:
        SUMS += (place * slots + chunk) * M * D
        ONES += (place * slots + chunk) * M
        TOPS += (place * slots + chunk) * M
    do = load_rows(DOUT + b * sgb + h * sgh + start * sg, row, sg, left, 0, D, BD, 0.0)
    lse = load_lse(LSE + place * N + start, row, left)
    delta = load_vector(DELTA + place * N + start, row, left)
    for m in range(0, M, BK):
        x = load_rows(X, row, sx, left, m, M, BK, NEVER) - lse[:, None]
        dx = tl.zeros([C, BK], tl.float32)
        if SUMS is not None:
            s = load_rows(SUMS, m + tl.arange(0, BK), D, M, 0, D, BD, 0.0)
            dx = tl.dot(do, tl.trans(s), input_precision=PRECISION)
            dx -= delta[:, None] * load_features(ONES, m, M, BK, 0.0)[None, :]
            dx *= tl.exp(x + load_features(TOPS, m, M, BK, NEVER)[None, :])
        for j in range(0, C // TILE - 1):
            other = tl.arange(0, TILE) + j * TILE
            a = load_rows(A, other, sa, left, m, M, BK, NEVER)
            v = load_rows(V, other, sv, left, 0, D, BD, 0.0)
            most = tl.max(a, 0)[None, :]
            q = tl.exp(tl.where((tile > j)[:, None], x + most, NEVER))
            g = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
            dx += q * tl.dot(g, tl.exp(a - finite(most)), input_precision=PRECISION)
        for t in range(0, TILE):
            other = tile * TILE + t
            a = load_rows(A, other, sa, left, m, M, BK, NEVER)
            v = load_rows(V, other, sv, left, 0, D, BD, 0.0)
            p = tl.exp(tl.where((row % TILE >= t)[:, None], x + a, NEVER))
            dx += p * (tl.sum(do * v, 1) - delta)[:, None]
        store_rows(DX, dx, row, sd, left, m, M, BK)


@triton.jit(do_not_specialize=LENGTHS)
def key_gradient(X, A, V, DOUT, LSE, DELTA, SUMS, ONES, TOPS, DA, DV,
                 sxb, sxh, sx, sab, sah, sa, svb, svh, sv, sgb, sgh, sg, sdb, sdh, sd, seb, seh, se, N, chunks, slots,
                 H, C: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """da and dv of one chunk; grid as `forward`. Slot t of the states holds what follows the last chunk but t."""
    chunk, place, b, h = locate(chunks, H)
    start = chunk.to(tl.int64) * C
    left = N - start
    row = tl.arange(0, C)
    tile = row // TILE
    X += b * sxb + h * sxh + start * sx
    A += b * sab + h * sah + start * sa
    DOUT += b * sgb + h * sgh + start * sg
    LSE += place * N + start
    DELTA += place * N + start
    DA += b * sdb + h * sdh + start * sd
    if SUMS is not None:
        slot = place * slots + chunks - 1 - chunk
        SUMS += slot * M * D
        ONES += slot * M
        TOPS += slot * M
    V += b * svb + h * svh + start * sv
    dv = tl.zeros([C, BD], tl.float32)
    for m in tl.range(0, M, BK, disable_licm=True):
        a = load_rows(A, row, sa, left, m, M, BK, NEVER)
        da = tl.zeros([C, BK], tl.float32)
        if SUMS is not None:
            s = load_rows(SUMS, m + tl.arange(0, BK), D, M, 0, D, BD, 0.0)
            seen = tl.exp(a + load_features(TOPS, m, M, BK, NEVER)[None, :])
            v = load_rows(V, row, sv, left, 0, D, BD, 0.0)
            da = tl.dot(v, tl.trans(s), input_precision=PRECISION) + load_features(ONES, m, M, BK, 0.0)[None, :]
            da *= seen
            dv = tl.dot(seen, s, dv, input_precision=PRECISION)
        for i in tl.range(1, C // TILE, disable_licm=True):
            other = tl.arange(0, TILE) + i * TILE
            x = load_rows(X, other, sx, left, m, M, BK, NEVER) - load_lse(LSE, other, left)[:, None]
            do = load_rows(DOUT, other, sg, left, 0, D, BD, 0.0)
            most = tl.max(x, 0)[None, :]
            q = tl.exp(x - finite(most))
            k = tl.exp(tl.where((tile < i)[:, None], a + most, NEVER))
            w = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            dv = tl.dot(w, do, dv, input_precision=PRECISION)
            v = load_rows(V, row, sv, left, 0, D, BD, 0.0)
            g = tl.dot(v, tl.trans(do), input_precision=PRECISION) - load_vector(DELTA, other, left)[None, :]
            da += k * tl.dot(g, q, input_precision=PRECISION)
        for t in tl.range(0, TILE, disable_licm=True):
            other = tile * TILE + t
            x = load_rows(X, other, sx, left, m, M, BK, NEVER) - load_lse(LSE, other, left)[:, None]
            do = load_rows(DOUT, other, sg, left, 0, D, BD, 0.0)
            p = tl.exp(tl.where((row % TILE <= t)[:, None], a + x, NEVER))
            dv += tl.sum(p, 1)[:, None] * do
            v = load_rows(V, row, sv, left, 0, D, BD, 0.0)
            da += p * (tl.sum(v * do, 1) - load_vector(DELTA, other, left))[:, None]
        store_rows(DA, da, row, sd, left, m, M, BK)
    store_rows(DV + b * seb + h * seh + start * se, dv, row, se, left, 0, D, BD)
