"""Block-sparse attention in Triton, forward.

    logit_ij = scaling · q_i · k_j + bias_h(j - i),    p = softmax over the visible j,    out_i = Σ_j p_ij v_j

or with capped logits c · tanh(scaling · q_i · k_j / c) in place of the product.

One program computes one work item of a `TileTable`: a block of queries and a range of the tiles that it sees, first the slow
ones (element mask, bias tile), then the fast ones (neither). Long rows are split into several items, whose partial results
lie in slots and are merged by `combine`. Exponents are to base 2 inside; the log-sum-exp that leaves is natural.

Arguments in capitals are pointers or compile-time constants; a pointer that is `None` removes its code. Pointers are moved
with 64 bits between blocks and with 32 bits inside a block.

Sources: Dao et al. 2022 (arXiv 2205.14135), the online softmax in tiles; Tillet et al. 2019, Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(WORK, items, FIELDS: tl.constexpr, H: tl.constexpr, PER_HEAD: tl.constexpr):
    """This program's work item, its place in the batch, and its batch entry and head, 64 bits each.

    The grid has one axis, all items of place 0 first: CUDA bounds the other axes to 65535. There are B·H places, or with
    tables per head B, and the item names the head.
    """
    item = WORK + tl.program_id(0) % items * FIELDS
    place = (tl.program_id(0) // items).to(tl.int64)
    if PER_HEAD:
        b = place
        h = tl.load(item).to(tl.int64)
    else:
        b = place // H
        h = place % H
    return item, place, b, h


@triton.jit
def load_tile(
    X, stride, count, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, UP: tl.constexpr
):
    """[R, BD] rows from X on; zeros in columns past D and, unless EVEN, in rows past `count`."""
    r = tl.arange(0, R)[:, None]
    d = tl.arange(0, BD)[None, :]
    if EVEN:
        if D == BD:
            x = tl.load(X + r * stride + d)
        else:
            x = tl.load(X + r * stride + d, mask=d < D, other=0.0)
    else:
        x = tl.load(X + r * stride + d, mask=(r < count) & (d < D), other=0.0)
    if UP:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_tile(X, x, stride, count, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr):
    """Store [R, BD] rows at X without columns past D and, unless EVEN, without rows past `count`."""
    r = tl.arange(0, R)[:, None]
    d = tl.arange(0, BD)[None, :]
    x = x.to(X.dtype.element_ty)
    if EVEN:
        if D == BD:
            tl.store(X + r * stride + d, x)
        else:
            tl.store(X + r * stride + d, x, mask=d < D)
    else:
        tl.store(X + r * stride + d, x, mask=(r < count) & (d < D))


@triton.jit
def load_vector(X, count, other, R: tl.constexpr, EVEN: tl.constexpr):
    """[R] values from X on, `other` past `count`."""
    r = tl.arange(0, R)
    if EVEN:
        x = tl.load(X + r)
    else:
        x = tl.load(X + r, mask=r < count, other=other)
    return x


@triton.jit
def store_vector(X, x, count, R: tl.constexpr, EVEN: tl.constexpr):
    """Store [R] values at X, unless EVEN only the first `count`."""
    r = tl.arange(0, R)
    if EVEN:
        tl.store(X + r, x)
    else:
        tl.store(X + r, x, mask=r < count)


@triton.jit
def scores(left, right, qk_scale, cap, PRECISION: tl.constexpr):
    """[R, C] scores to base 2, left · right · qk_scale; with a cap `cap · tanh(u)`, where that product is 2 u log₂ e."""
    s = tl.dot(left, tl.trans(right), input_precision=PRECISION) * qk_scale
    if cap is not None:
        s = cap - 2.0 * cap / (1.0 + tl.exp2(s))
    return s


@triton.jit
def hidden(s, MASKS, BIAS, keep, q_pos, k_pos, q_seg, k_seg,
           R: tl.constexpr, C: tl.constexpr, SLOW: tl.constexpr, KEYS_FIRST: tl.constexpr):  # fmt: skip
    """[R, C] logits to base 2, -inf in place of whatever the element mask, padding, positions or segments hide.

    Rows are queries and columns keys, or with KEYS_FIRST the other way round. MASKS points at this tile's mask, which a fast
    tile lacks, and BIAS at its bias, which in a fast tile is one number.
    """
    never = -float("inf")
    if SLOW:
        at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
        if BIAS is not None:
            s += tl.load(BIAS + at)
        s = tl.where(tl.load(MASKS + at) != 0, s, never)
    elif BIAS is not None:
        s += tl.load(BIAS)
    if KEYS_FIRST:
        if keep is not None:
            s = tl.where(keep[:, None] != 0, s, never)
        if q_pos is not None:
            s = tl.where(k_pos[:, None] <= q_pos[None, :], s, never)
        if q_seg is not None:
            s = tl.where(k_seg[:, None] == q_seg[None, :], s, never)
    else:
        if keep is not None:
            s = tl.where(keep[None, :] != 0, s, never)
        if q_pos is not None:
            s = tl.where(k_pos[None, :] <= q_pos[:, None], s, never)
        if q_seg is not None:
            s = tl.where(k_seg[None, :] == q_seg[:, None], s, never)
    return s


@triton.jit
def row_tile(q, t, OTHER, MASK, CLASS, MASKS, BIAS, K, V, KEEP, q_pos, KPOS, q_seg, KSEG, sk, sv, S, qk_scale, cap,
             BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
             SLOW: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """Keys, values, [BM, BN] scores and hidden logits of tile t of a query block; pointers stand at their head."""
    start = tl.load(OTHER + t).to(tl.int64) * BN
    count = S - start
    k = load_tile(K + start * sk, sk, count, BN, D, BD, EVEN, UP)
    v = load_tile(V + start * sv, sv, count, BN, D, BD, EVEN, UP)
    masks = MASKS
    if SLOW:
        masks = MASKS + tl.load(MASK + t).to(tl.int64) * (BM * BN)
    bias = BIAS
    if BIAS is not None:
        bias = BIAS + tl.load(CLASS + t) * (BM * BN)
    keep = KEEP
    if KEEP is not None:
        keep = load_vector(KEEP + start, count, 0, BN, EVEN)
    k_pos = KPOS
    if KPOS is not None:
        k_pos = load_vector(KPOS + start, count, 0, BN, EVEN)
    k_seg = KSEG
    if KSEG is not None:
        k_seg = load_vector(KSEG + start, count, 0, BN, EVEN)
    x = scores(q, k, qk_scale, cap, PRECISION)
    return k, v, x, hidden(x, masks, bias, keep, q_pos, k_pos, q_seg, k_seg, BM, BN, SLOW, False)


@triton.jit
def attend_tile(acc, top, total, k, v, s, PRECISION: tl.constexpr):
    """One step of the online softmax; `top` is the row maximum so far, `total` the sum of weights relative to it."""
    new_top = tl.maximum(top, tl.max(s, 1))
    pivot = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen nothing yet
    p = tl.exp2(s - pivot[:, None])
    shrink = tl.exp2(top - pivot)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def finish(acc, top, total):
    """Normalised output and base-2 log-sum-exp; 0 and -inf for rows that saw nothing."""
    safe = tl.where(total == 0.0, 1.0, total)
    return acc / safe[:, None], tl.where(total == 0.0, -float("inf"), top + tl.log2(safe))


@triton.jit
def forward(Q, K, V, OUT, LSE, PART, PART_LSE, WORK, OTHER, MASK, CLASS, MASKS, BIAS, KEEP, QPOS, KPOS, QSEG, KSEG,
            sqb, sqh, sq, skb, skh, sk, svb, svh, sv, sob, soh, so,
            N, S, items, slots, classes, pos_heads, seg_heads, qk_scale, cap,
            H: tl.constexpr, HK: tl.constexpr, PER_HEAD: tl.constexpr, EVEN_N: tl.constexpr, EVEN_S: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
            PRECISION: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """Grid (work items · B·H, or · B with tables per head). Writes OUT and LSE (B, H, N), or the item's slot.

    WORK holds rows of 7: head, query block, first and last slow tile, first and last fast tile, slot or -1.
    """
    item, place, b, h = locate(WORK, items, 7, H, PER_HEAD)
    start = tl.load(item + 1).to(tl.int64) * BM
    slot = tl.load(item + 6)
    q = load_tile(Q + b * sqb + h * sqh + start * sq, sq, N - start, BM, D, BD, EVEN_N, UP)
    K += b * skb + (h // (H // HK)) * skh
    V += b * svb + (h // (H // HK)) * svh
    if BIAS is not None:
        BIAS += h * classes * (BM * BN)
    if KEEP is not None:
        KEEP += b * S
    q_pos, q_seg = QPOS, QSEG
    if QPOS is not None:
        q_pos = load_vector(QPOS + (b * pos_heads + h % pos_heads) * N + start, N - start, 0, BM, EVEN_N)
        KPOS += (b * pos_heads + h % pos_heads) * S
    if QSEG is not None:
        q_seg = load_vector(QSEG + (b * seg_heads + h % seg_heads) * N + start, N - start, 0, BM, EVEN_N)
        KSEG += (b * seg_heads + h % seg_heads) * S
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for t in range(tl.load(item + 2), tl.load(item + 3)):
        k, v, _, s = row_tile(q, t, OTHER, MASK, CLASS, MASKS, BIAS, K, V, KEEP, q_pos, KPOS, q_seg, KSEG, sk, sv, S,
                              qk_scale, cap, BM, BN, D, BD, True, EVEN_S, PRECISION, UP)  # fmt: skip
        acc, top, total = attend_tile(acc, top, total, k, v, s, PRECISION)
    for t in range(tl.load(item + 4), tl.load(item + 5)):
        k, v, _, s = row_tile(q, t, OTHER, MASK, CLASS, MASKS, BIAS, K, V, KEEP, q_pos, KPOS, q_seg, KSEG, sk, sv, S,
                              qk_scale, cap, BM, BN, D, BD, False, True, PRECISION, UP)  # fmt: skip
        acc, top, total = attend_tile(acc, top, total, k, v, s, PRECISION)
    out, lse = finish(acc, top, total)
    if slot < 0:
        store_tile(OUT + b * sob + h * soh + start * so, out, so, N - start, BM, D, BD, EVEN_N)
        store_vector(LSE + (b * H + h) * N + start, lse * LN2, N - start, BM, EVEN_N)
    elif PART is not None:
        at = place * slots + slot
        store_tile(PART + at * (BM * D), out, D, BM, BM, D, BD, True)
        store_vector(PART_LSE + at * BM, lse, BM, BM, True)


@triton.jit
def combine(OUT, LSE, PART, PART_LSE, SPLIT, sob, soh, so, N, items, slots,
            H: tl.constexpr, PER_HEAD: tl.constexpr, EVEN_N: tl.constexpr,
            BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Merge the slots of split query blocks by their log-sum-exps, in slot order.

    Grid as `forward`, over split blocks; SPLIT holds rows of 4: head, query block, first and last slot.
    """
    item, place, b, h = locate(SPLIT, items, 4, H, PER_HEAD)
    start = tl.load(item + 1).to(tl.int64) * BM
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for slot in range(tl.load(item + 2), tl.load(item + 3)):
        at = place * slots + slot
        lse = tl.load(PART_LSE + at * BM + tl.arange(0, BM))
        out = load_tile(PART + at * (BM * D), D, BM, BM, D, BD, True, False)
        new_top = tl.maximum(top, lse)
        pivot = tl.where(new_top == -float("inf"), 0.0, new_top)
        shrink, weight = tl.exp2(top - pivot), tl.exp2(lse - pivot)
        acc = acc * shrink[:, None] + out * weight[:, None]
        total = total * shrink + weight
        top = new_top
    out, lse = finish(acc, top, total)
    store_tile(OUT + b * sob + h * soh + start * so, out, so, N - start, BM, D, BD, EVEN_N)
    store_vector(LSE + (b * H + h) * N + start, lse * LN2, N - start, BM, EVEN_N)
