"""Block-sparse attention in Triton, backward: every weight is computed again from the saved log-sum-exp.

    p_ij = exp(logit_ij - lse_i),    δ_i = dout_i · out_i - dlse_i,    ds_ij = p_ij (dout_i · v_j - δ_i)
    dq_i = scaling · Σ_j ds_ij k_j,  dk_j = scaling · Σ_i ds_ij q_i,  dv_j = Σ_i p_ij dout_i,
    dbias_h(o) = Σ_{j - i = o} ds_ij

With capped logits dq and dk get ds_ij (1 - t_ij²), t_ij = tanh(scaling · q_i · k_j / c).

Queries, keys and bias have a kernel each, which reads the tiles by query block, by key block and by bias class. No sum is
shared between programs, so nothing is atomic and two runs give the same bits. Conventions are those of `block_sparse`.

Source: Dao et al. 2022 (arXiv 2205.14135), appendix B.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_efficient.kernels.block_sparse import (
    LOG2E,
    hidden,
    load_tile,
    load_vector,
    locate,
    row_tile,
    scores,
    store_tile,
    store_vector,
)


@triton.jit
def load_lse(LSE, count, R: tl.constexpr, EVEN: tl.constexpr):
    """[R] log-sum-exps to base 2; +inf for rows that saw nothing, so that all their weights become 0."""
    lse = load_vector(LSE, count, -float("inf"), R, EVEN)
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)


@triton.jit
def row_delta(OUT, DOUT, LSE, DLSE, DELTA, sob, soh, so, sgb, sgh, sg, slb, slh, sl, N, blocks,
              H: tl.constexpr, EVEN_N: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """DELTA (B, H, N) = Σ dout · out - dlse, and 0 for rows that saw nothing. Grid (query blocks · B·H)."""
    place = (tl.program_id(0) // blocks).to(tl.int64)
    b = place // H
    h = place % H
    start = (tl.program_id(0) % blocks).to(tl.int64) * BM
    count = N - start
    out = load_tile(OUT + b * sob + h * soh + start * so, so, count, BM, D, BD, EVEN_N, True)
    dout = load_tile(DOUT + b * sgb + h * sgh + start * sg, sg, count, BM, D, BD, EVEN_N, True)
    delta = tl.sum(out * dout, 1)
    if DLSE is not None:
        r = tl.arange(0, BM)
        delta -= tl.load(DLSE + b * slb + h * slh + (start + r) * sl, mask=r < count, other=0.0)
    at = (b * H + h) * N + start
    lse = load_vector(LSE + at, count, 0.0, BM, EVEN_N)
    # whoever merges log-sum-exps may hand back NaN for a row of -inf
    store_vector(DELTA + at, tl.where(lse == -float("inf"), 0.0, delta), count, BM, EVEN_N)


@triton.jit
def before_cap(ds, x, cap):
    """The gradient of scores from that of `x`, what a cap made of them; without a cap they are `x`."""
    if cap is not None:
        t = x * (1.0 / cap)
        ds *= 1.0 - t * t
    return ds


@triton.jit
def query_step(dq, do, lse, delta, k, v, x, s, cap, PRECISION: tl.constexpr):
    """dq with one more tile's share."""
    p = tl.exp2(s - lse[:, None])
    ds = before_cap(p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]), x, cap)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def query_gradient(Q, K, V, DOUT, LSE, DELTA, DQ, PART, WORK, OTHER, MASK, CLASS, MASKS, BIAS, KEEP, QPOS, KPOS, QSEG, KSEG,
                   sqb, sqh, sq, skb, skh, sk, svb, svh, sv, sgb, sgh, sg, sdb, sdh, sd,
                   N, S, items, slots, classes, pos_heads, seg_heads, qk_scale, cap, scaling,
                   H: tl.constexpr, HK: tl.constexpr, PER_HEAD: tl.constexpr, EVEN_N: tl.constexpr, EVEN_S: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                   PRECISION: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """dq of one work item of the tiles by query block; grid and tables as `forward`."""
    item, place, b, h = locate(WORK, items, 7, H, PER_HEAD)
    start = tl.load(item + 1).to(tl.int64) * BM
    count = N - start
    slot = tl.load(item + 6)
    q = load_tile(Q + b * sqb + h * sqh + start * sq, sq, count, BM, D, BD, EVEN_N, UP)
    do = load_tile(DOUT + b * sgb + h * sgh + start * sg, sg, count, BM, D, BD, EVEN_N, UP)
    K += b * skb + (h // (H // HK)) * skh
    V += b * svb + (h // (H // HK)) * svh
    if BIAS is not None:
        BIAS += h * classes * (BM * BN)
    if KEEP is not None:
        KEEP += b * S
    q_pos, q_seg = QPOS, QSEG
    if QPOS is not None:
        q_pos = load_vector(QPOS + (b * pos_heads + h % pos_heads) * N + start, count, 0, BM, EVEN_N)
        KPOS += (b * pos_heads + h % pos_heads) * S
    if QSEG is not None:
        q_seg = load_vector(QSEG + (b * seg_heads + h % seg_heads) * N + start, count, 0, BM, EVEN_N)
        KSEG += (b * seg_heads + h % seg_heads) * S
    lse = load_lse(LSE + (b * H + h) * N + start, count, BM, EVEN_N)
    delta = load_vector(DELTA + (b * H + h) * N + start, count, 0.0, BM, EVEN_N)
    dq = tl.zeros([BM, BD], tl.float32)
    for t in range(tl.load(item + 2), tl.load(item + 3)):
        k, v, x, s = row_tile(q, t, OTHER, MASK, CLASS, MASKS, BIAS, K, V, KEEP, q_pos, KPOS, q_seg, KSEG, sk, sv, S,
                              qk_scale, cap, BM, BN, D, BD, True, EVEN_S, PRECISION, UP)  # fmt: skip
        dq = query_step(dq, do, lse, delta, k, v, x, s, cap, PRECISION)
    for t in range(tl.load(item + 4), tl.load(item + 5)):
        k, v, x, s = row_tile(q, t, OTHER, MASK, CLASS, MASKS, BIAS, K, V, KEEP, q_pos, KPOS, q_seg, KSEG, sk, sv, S,
                              qk_scale, cap, BM, BN, D, BD, False, True, PRECISION, UP)  # fmt: skip
        dq = query_step(dq, do, lse, delta, k, v, x, s, cap, PRECISION)
    dq *= scaling
    if slot < 0:
        store_tile(DQ + b * sdb + h * sdh + start * sd, dq, sd, count, BM, D, BD, EVEN_N)
    elif PART is not None:
        at = place * slots + slot
        store_tile(PART + at * (BM * D), dq, D, BM, BM, D, BD, True)


@triton.jit
def column_tile(dk, dv, k, v, t, OTHER, MASK, CLASS, MASKS, BIAS, Q, DOUT, LSE, DELTA, keep, QPOS, k_pos, QSEG, k_seg,
                sq, sg, N, qk_scale, cap, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                SLOW: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """dk and dv with the share of tile t of a key block, computed transposed; pointers stand at their head."""
    start = tl.load(OTHER + t).to(tl.int64) * BM
    count = N - start
    q = load_tile(Q + start * sq, sq, count, BM, D, BD, EVEN, UP)
    do = load_tile(DOUT + start * sg, sg, count, BM, D, BD, EVEN, UP)
    lse = load_lse(LSE + start, count, BM, EVEN)
    delta = load_vector(DELTA + start, count, 0.0, BM, EVEN)
    masks = MASKS
    if SLOW:
        masks = MASKS + tl.load(MASK + t).to(tl.int64) * (BM * BN)
    bias = BIAS
    if BIAS is not None:
        bias = BIAS + tl.load(CLASS + t) * (BM * BN)
    q_pos = QPOS
    if QPOS is not None:
        q_pos = load_vector(QPOS + start, count, 0, BM, EVEN)
    q_seg = QSEG
    if QSEG is not None:
        q_seg = load_vector(QSEG + start, count, 0, BM, EVEN)
    x = scores(k, q, qk_scale, cap, PRECISION)
    s = hidden(x, masks, bias, keep, q_pos, k_pos, q_seg, k_seg, BN, BM, SLOW, True)
    p = tl.exp2(s - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = before_cap(p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :]), x, cap)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def key_gradient(Q, K, V, DOUT, LSE, DELTA, DK, DV, PART_K, PART_V, WORK, OTHER, MASK, CLASS, MASKS, BIAS,
                 KEEP, QPOS, KPOS, QSEG, KSEG,
                 sqb, sqh, sq, skb, skh, sk, svb, svh, sv, sgb, sgh, sg, sdb, sdh, sd,
                 N, S, items, slots, classes, pos_heads, seg_heads, qk_scale, cap, scaling,
                 H: tl.constexpr, HK: tl.constexpr, PER_HEAD: tl.constexpr, EVEN_N: tl.constexpr, EVEN_S: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                 PRECISION: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """The share of one query head in dk and dv (equal strides, H heads), of one work item of the tiles by key block.

    Grid as `forward`. MASKS and BIAS hold the transposed tiles. Heads that share keys have programs of their own: summed up
    inside one, they would spill registers and leave multiprocessors idle.
    """
    item, place, b, h = locate(WORK, items, 7, H, PER_HEAD)
    start = tl.load(item + 1).to(tl.int64) * BN
    count = S - start
    slot = tl.load(item + 6)
    k = load_tile(K + b * skb + (h // (H // HK)) * skh + start * sk, sk, count, BN, D, BD, EVEN_S, UP)
    v = load_tile(V + b * svb + (h // (H // HK)) * svh + start * sv, sv, count, BN, D, BD, EVEN_S, UP)
    Q += b * sqb + h * sqh
    DOUT += b * sgb + h * sgh
    LSE += (b * H + h) * N
    DELTA += (b * H + h) * N
    if BIAS is not None:
        BIAS += h * classes * (BM * BN)
    keep, k_pos, k_seg = KEEP, KPOS, KSEG
    if KEEP is not None:
        keep = load_vector(KEEP + b * S + start, count, 0, BN, EVEN_S)
    if QPOS is not None:
        QPOS += (b * pos_heads + h % pos_heads) * N
        k_pos = load_vector(KPOS + (b * pos_heads + h % pos_heads) * S + start, count, 0, BN, EVEN_S)
    if QSEG is not None:
        QSEG += (b * seg_heads + h % seg_heads) * N
        k_seg = load_vector(KSEG + (b * seg_heads + h % seg_heads) * S + start, count, 0, BN, EVEN_S)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for t in range(tl.load(item + 2), tl.load(item + 3)):
        dk, dv = column_tile(dk, dv, k, v, t, OTHER, MASK, CLASS, MASKS, BIAS, Q, DOUT, LSE, DELTA, keep, QPOS, k_pos, QSEG,
                             k_seg, sq, sg, N, qk_scale, cap, BM, BN, D, BD, True, EVEN_N, PRECISION, UP)  # fmt: skip
    for t in range(tl.load(item + 4), tl.load(item + 5)):
        dk, dv = column_tile(dk, dv, k, v, t, OTHER, MASK, CLASS, MASKS, BIAS, Q, DOUT, LSE, DELTA, keep, QPOS, k_pos, QSEG,
                             k_seg, sq, sg, N, qk_scale, cap, BM, BN, D, BD, False, True, PRECISION, UP)  # fmt: skip
    dk *= scaling
    if slot < 0:
        to = b * sdb + h * sdh + start * sd
        store_tile(DK + to, dk, sd, count, BN, D, BD, EVEN_S)
        store_tile(DV + to, dv, sd, count, BN, D, BD, EVEN_S)
    elif PART_K is not None:
        at = (place * slots + slot) * (BN * D)
        store_tile(PART_K + at, dk, D, BN, BN, D, BD, True)
        store_tile(PART_V + at, dv, D, BN, BN, D, BD, True)


@triton.jit
def sum_slots(X, PART, SPLIT, sxb, sxh, sx, length, items, slots,
              H: tl.constexpr, PER_HEAD: tl.constexpr, EVEN: tl.constexpr,
              R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Gradients of split blocks of R tokens: the sum of their slots, in slot order. Grid (split blocks · B·H, or · B)."""
    item, place, b, h = locate(SPLIT, items, 4, H, PER_HEAD)
    start = tl.load(item + 1).to(tl.int64) * R
    acc = tl.zeros([R, BD], tl.float32)
    for slot in range(tl.load(item + 2), tl.load(item + 3)):
        at = place * slots + slot
        acc += load_tile(PART + at * (R * D), D, R, R, D, BD, True, False)
    store_tile(X + b * sxb + h * sxh + start * sx, acc, sx, length - start, R, D, BD, EVEN)


@triton.jit
def bias_gradient(Q, K, V, DOUT, LSE, DELTA, DBIAS, START, ROW, COLUMN, MASK, MASKS, BIAS, KEEP, QSEG, KSEG,
                  sqb, sqh, sq, skb, skh, sk, svb, svh, sv, sgb, sgh, sg,
                  N, S, classes, pieces, batch, seg_heads, qk_scale, cap,
                  H: tl.constexpr, HK: tl.constexpr, PER_HEAD: tl.constexpr, EVEN_N: tl.constexpr, EVEN_S: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                  PRECISION: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """Σ ds over the tiles of one bias class and over the batch, element by element. Grid (classes · pieces, H).

    A class's tiles are dealt to `pieces` programs. START (heads, classes + 1) are the tile ranges in ROW, COLUMN and MASK
    (-1 = all visible); DBIAS is (pieces, H, classes, BM, BN).
    """
    cls = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    h = tl.program_id(1).to(tl.int64)
    ranges = START + cls
    if PER_HEAD:
        ranges += h * (classes + 1)
    first = tl.load(ranges)
    tiles = (tl.load(ranges + 1) - first).to(tl.int64)
    low = first + (tiles * piece // pieces).to(tl.int32)
    high = first + (tiles * (piece + 1) // pieces).to(tl.int32)
    at = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    Q += h * sqh
    DOUT += h * sgh
    K += h // (H // HK) * skh
    V += h // (H // HK) * svh
    bias = BIAS + (h * classes + cls) * (BM * BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for t in range(low, high):
        start_q = tl.load(ROW + t).to(tl.int64) * BM
        start_k = tl.load(COLUMN + t).to(tl.int64) * BN
        mask = tl.load(MASK + t).to(tl.int64)
        # a tile without a mask reads none: there may be no mask at all
        masked = tl.zeros([BM, BN], tl.int64) + mask >= 0
        seen = tl.load(MASKS + tl.maximum(mask, 0) * (BM * BN) + at, mask=masked, other=1) != 0
        added = tl.where(seen, tl.load(bias + at), -float("inf"))
        for entry in range(0, batch):
            b = tl.cast(entry, tl.int64)
            q = load_tile(Q + b * sqb + start_q * sq, sq, N - start_q, BM, D, BD, EVEN_N, UP)
            do = load_tile(DOUT + b * sgb + start_q * sg, sg, N - start_q, BM, D, BD, EVEN_N, UP)
            k = load_tile(K + b * skb + start_k * sk, sk, S - start_k, BN, D, BD, EVEN_S, UP)
            v = load_tile(V + b * svb + start_k * sv, sv, S - start_k, BN, D, BD, EVEN_S, UP)
            lse = load_lse(LSE + (b * H + h) * N + start_q, N - start_q, BM, EVEN_N)
            delta = load_vector(DELTA + (b * H + h) * N + start_q, N - start_q, 0.0, BM, EVEN_N)
            keep, q_seg, k_seg = KEEP, QSEG, KSEG
            if KEEP is not None:
                keep = load_vector(KEEP + b * S + start_k, S - start_k, 0, BN, EVEN_S)
            if QSEG is not None:
                head = b * seg_heads + h % seg_heads
                q_seg = load_vector(QSEG + head * N + start_q, N - start_q, 0, BM, EVEN_N)
                k_seg = load_vector(KSEG + head * S + start_k, S - start_k, 0, BN, EVEN_S)
            s = scores(q, k, qk_scale, cap, PRECISION)
            s = hidden(s, None, None, keep, None, None, q_seg, k_seg, BM, BN, False, False)
            p = tl.exp2(s + added - lse[:, None])
            acc += p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    tl.store(DBIAS + ((piece * H + h) * classes + cls) * (BM * BN) + at, acc)
