"""Triton kernels of the delta rule: pairs within chunks and their gradients, the inverse of each chunk's triangular
system, and the state carried from chunk to chunk.

A chunk is C tokens of one row and head, M chunks in all, contiguous. Readers Q [2, M, C, K] are q̃ and a of
`ops.delta_rule.common`, writers X [1 or 2, M, C, K] are b and k (EXTRA); LOG [M, C, 1 or K] holds log decays, FORM
tells none (0), one a token (1) or one a key channel (2). A log decay of FLOOR or less is one of FLOOR, whose
exponential is 0.

Sums of log decays are made without cancellation, as in `ops.linear_attention`: one a token in multiples of 1/1024,
whose sums are exact, and a small rest; one a key channel by halves (`ops.linear_attention.pairs`).
"""

import triton
import triton.language as tl

# Sizes of 1 stay values: as constants they would compile, and tune, every kernel anew.
SIZES = ["M", "N", "BH"]


@triton.jit
def tile(P, row, stride, col, inside):
    """P[row, col], 0 where not inside; row and col are a column and a row or the other way round."""
    return tl.load(P + row * stride + col, mask=inside, other=0.0)


@triton.jit
def between(g, SUM: tl.constexpr, C: tl.constexpr):
    """[reader, writer], and transposed: exp of the log decays of the tokens between, 0 unless the writer is earlier."""
    i = tl.arange(0, C)
    j = tl.arange(0, C)
    coarse = tl.floor(g * 1024.0 + 0.5) * (1.0 / 1024.0)
    fine = g - coarse
    upto = j[None, :] <= i[:, None]
    before = j[None, :] < i[:, None]
    total = tl.sum(tl.where(upto, coarse[None, :], 0.0), 1).to(SUM)
    total_rest = tl.sum(tl.where(upto, fine[None, :], 0.0), 1).to(SUM)
    read = tl.sum(tl.where(before, coarse[None, :], 0.0), 1).to(SUM)
    read_rest = tl.sum(tl.where(before, fine[None, :], 0.0), 1).to(SUM)
    exponent = (read[:, None] - total[None, :]) + (read_rest[:, None] - total_rest[None, :])
    exponentT = (read[None, :] - total[:, None]) + (read_rest[None, :] - total_rest[:, None])
    after = j[None, :] > i[:, None]
    decay = tl.where(before, tl.exp(tl.where(before, exponent, 0.0)), 0.0)
    return decay.to(SUM), tl.where(after, tl.exp(tl.where(after, exponentT, 0.0)), 0.0).to(SUM)


@triton.jit
def floored(g, FLOOR: tl.constexpr, SUM: tl.constexpr):
    g = g.to(SUM)
    return tl.where(g < FLOOR, FLOOR, g)  # not maximum(), which would hide a NaN


@triton.jit(do_not_specialize=SIZES)
def pairs(
    Q, X, LOG, SYSTEM, SEEN, M,
    K: tl.constexpr, FORM: tl.constexpr, EXTRA: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, SLOPE: tl.constexpr, FLOOR: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[reader, writer] Σ_d q x exp(log decays between) for earlier writers: of a and b to SYSTEM [M, C, C], of q and b,
    with EXTRA also of q and k and of a and k, to SEEN [1 or 3, M, C, C]. Grid (M, readers·writers)."""
    m = tl.program_id(0).to(tl.int64)
    writers = 2 if EXTRA else 1
    pair = tl.program_id(1)
    i = tl.arange(0, C)
    j = tl.arange(0, C)
    d = tl.arange(0, BK)
    Q += (pair // writers * M + m) * C * K
    X += (pair % writers * M + m) * C * K
    seen = tl.zeros([C, C], SUM)
    for first in range(0, K, BK):
        col = first + d
        q = tile(Q, i[:, None], K, col[None, :], col[None, :] < K)
        xT = tile(X, j[None, :], K, col[:, None], col[:, None] < K)
        if FORM == 2:
            g = floored(tile(LOG + m * C * K, i[:, None], K, col[None, :], col[None, :] < K), FLOOR, SUM)
            gT = floored(tile(LOG + m * C * K, j[None, :], K, col[:, None], col[:, None] < K), FLOOR, SUM)
            level = 0
            while (1 << level) < C:
                # Blocks of 2^level tokens: readers of every second one meet writers of the one before.
                block, other = i[:, None] >> level, j[None, :] >> level
                same = block == other
                read = tl.dot((same & (j[None, :] < i[:, None])).to(SUM), g, input_precision=EXACT, out_dtype=SUM)
                keepT = tl.dot(gT, (same & (i[:, None] > j[None, :])).to(SUM), input_precision=EXACT, out_dtype=SUM)
                reader = (q.to(SUM) * tl.exp(read)).to(q.dtype)
                writerT = (xT.to(SUM) * tl.exp(keepT)).to(q.dtype)
                met = tl.dot(reader, writerT, input_precision=PRECISION, out_dtype=SUM)
                seen += tl.where((block == other + 1) & ((block & 1) == 1), met, 0.0)
                level += 1
        else:
            seen += tl.dot(q, xT, input_precision=PRECISION, out_dtype=SUM)
    if FORM == 1:
        decay, _ = between(floored(tl.load(LOG + m * C + i), FLOOR, SUM), SUM, C)
        seen = seen * decay
    seen = tl.where(j[None, :] < i[:, None], seen, 0.0)
    place = i[:, None] * C + j[None, :]
    # Masks of a block alone: the interpreter turns a block and a scalar condition into integers.
    system = i[:, None] < tl.where(pair == writers, C, 0)
    rest = i[:, None] < tl.where(pair == writers, 0, C)
    number = tl.where(pair < writers, pair, pair - 1)
    tl.store(SYSTEM + m * C * C + place, seen, mask=system)
    tl.store(SEEN + (number * M + m) * C * C + place, seen.to(SEEN.dtype.element_ty), mask=rest)


@triton.jit
def both_ways(D, i, j, SUM: tl.constexpr, C: tl.constexpr):
    """D [C, C] and its transpose, each loaded: Triton may not transpose what a product gave."""
    return tl.load(D + i[:, None] * C + j[None, :]).to(SUM), tl.load(D + j[None, :] * C + i[:, None]).to(SUM)


@triton.jit
def _cross(part, partT, reader, writer, dot: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr):
    """Gradients of readers and writers [C, BK] from that of their products, and its transpose."""
    dreader = tl.dot(part.to(dot), writer.to(dot), input_precision=PRECISION, out_dtype=SUM)
    return dreader, tl.dot(partT.to(dot), reader.to(dot), input_precision=PRECISION, out_dtype=SUM)


@triton.jit
def _plain(
    q, x, X, D, decay, decayT, i, j, col,
    dot: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of a reader and a writer, and products [C, C] of the pairs and their gradients, of these channels."""
    part, partT = both_ways(D, i, j, SUM, C)
    part = part * decay
    dq, dx = _cross(part, partT * decayT, q, x, dot, PRECISION, SUM)
    if FORM == 1:
        xT = tile(X, j[None, :], K, col[:, None], col[:, None] < K)
        part = part * tl.dot(q, xT, input_precision=PRECISION, out_dtype=SUM)
    return dq, dx, part


@triton.jit
def _level(
    q, x, D, after, before, upper, lower, i, j,
    dot: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """As `_plain`, of the pairs that meet at one level."""
    part, partT = both_ways(D, i, j, SUM, C)
    part, partT = tl.where(upper, part, 0.0), tl.where(lower, partT, 0.0)
    dq, dx = _cross(part, partT, q.to(SUM) * after, x.to(SUM) * before, dot, PRECISION, SUM)
    return dq * after, dx * before


@triton.jit
def _wide_gradients(
    q, a, b, k, g, DQB, DAB, DQK, DAK, i, j,
    EXTRA: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, SLOPE: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of both readers, both writers and the log decays [C, BK]."""
    dq = tl.zeros([C, BK], SUM)
    da = tl.zeros([C, BK], SUM)
    db = tl.zeros([C, BK], SUM)
    dk = tl.zeros([C, BK], SUM)
    dg = tl.zeros([C, BK], SUM)
    level = 0
    while (1 << level) < C:
        # As in `pairs`: blocks of 2^level tokens.
        block, other = i[:, None] >> level, j[None, :] >> level
        same = block == other
        earlier = (same & (j[None, :] < i[:, None])).to(SUM)
        later = (same & (j[None, :] > i[:, None])).to(SUM)
        after = tl.exp(tl.dot(earlier, g, input_precision=EXACT, out_dtype=SUM))
        before = tl.exp(tl.dot(later, g, input_precision=EXACT, out_dtype=SUM))
        upper = (block == other + 1) & ((block & 1) == 1)
        lower = (other == block + 1) & ((other & 1) == 1)
        lq, lb = _level(q, b, DQB, after, before, upper, lower, i, j, q.dtype, SUM, PRECISION, C)
        la, more = _level(a, b, DAB, after, before, upper, lower, i, j, q.dtype, SUM, PRECISION, C)
        lb += more
        writes = b.to(SUM) * lb
        if EXTRA:
            more, lk = _level(q, k, DQK, after, before, upper, lower, i, j, q.dtype, SUM, PRECISION, C)
            lq += more
            more, more_k = _level(a, k, DAK, after, before, upper, lower, i, j, q.dtype, SUM, PRECISION, C)
            la += more
            lk += more_k
            writes += k.to(SUM) * lk
            dk += lk
        reads = q.to(SUM) * lq + a.to(SUM) * la
        # Log decay j lies in what later tokens of its block read, and in what keeps earlier ones.
        dg += tl.dot(later, reads, input_precision=SLOPE, out_dtype=SUM)
        dg += tl.dot(earlier, writes, input_precision=SLOPE, out_dtype=SUM)
        dq += lq
        da += la
        db += lb
        level += 1
    return dq, da, db, dk, dg


@triton.jit
def _plain_gradients(
    q, a, b, k, g, XB, XK, DQB, DAB, DQK, DAK, i, j, col,
    K: tl.constexpr, FORM: tl.constexpr, EXTRA: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    SLOPE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `_wide_gradients`, with one log decay a token [C], or none."""
    decay = tl.where(j[None, :] < i[:, None], 1.0, 0.0).to(SUM)
    decayT = tl.where(j[None, :] > i[:, None], 1.0, 0.0).to(SUM)
    if FORM == 1:
        decay, decayT = between(g, SUM, C)
    dk = tl.zeros([C, BK], SUM)
    dq, db, product = _plain(q, b, XB, DQB, decay, decayT, i, j, col, q.dtype, K, FORM, SUM, PRECISION, C)
    da, more, part = _plain(a, b, XB, DAB, decay, decayT, i, j, col, q.dtype, K, FORM, SUM, PRECISION, C)
    db += more
    product += part
    if EXTRA:
        more, dk, part = _plain(q, k, XK, DQK, decay, decayT, i, j, col, q.dtype, K, FORM, SUM, PRECISION, C)
        dq += more
        product += part
        more, more_k, part = _plain(a, k, XK, DAK, decay, decayT, i, j, col, q.dtype, K, FORM, SUM, PRECISION, C)
        da += more
        dk += more_k
        product += part
    dg = tl.zeros([C], SUM)
    if FORM == 1:
        # [t, j]: over writers before token j; then over the readers behind it.
        earlier = tl.dot(product, (i[:, None] < j[None, :]).to(SUM), input_precision=SLOPE, out_dtype=SUM)
        dg = tl.sum(tl.where(i[:, None] > j[None, :], earlier, 0.0), 0)
    return dq, da, db, dk, dg


@triton.jit(do_not_specialize=SIZES)
def pair_gradients(
    Q, X, LOG, DSYSTEM, DSEEN, DQ, DX, DLOG, M,
    K: tl.constexpr, FORM: tl.constexpr, EXTRA: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, SLOPE: tl.constexpr, FLOOR: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """DQ and DX as Q and X; DLOG as LOG, but [K / BK, M, C], to be summed, for FORM 1. Grid (M, K / BK)."""
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, C)
    j = tl.arange(0, C)
    col = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (i[:, None] >= 0) & (col[None, :] < K)
    place = m * C * K
    other = M.to(tl.int64) * C * K  # from q to a, and from b to k
    pair = M.to(tl.int64) * C * C
    q = tile(Q + place, i[:, None], K, col[None, :], inside)
    a = tile(Q + place + other, i[:, None], K, col[None, :], inside)
    b = tile(X + place, i[:, None], K, col[None, :], inside)
    k = b
    if EXTRA:
        k = tile(X + place + other, i[:, None], K, col[None, :], inside)
    DAB = DSYSTEM + m * C * C
    DQB = DSEEN + m * C * C
    at = place + i[:, None] * K + col[None, :]
    # Nothing flows where the decay is not the given number: below the floor.
    if FORM == 2:
        g = floored(tile(LOG + place, i[:, None], K, col[None, :], inside), FLOOR, SUM)
        dq, da, db, dk, dg = _wide_gradients(
            q, a, b, k, g, DQB, DAB, DQB + pair, DQB + 2 * pair, i, j, EXTRA, SUM, PRECISION, EXACT, SLOPE, C, BK,
        )  # fmt: skip
        tl.store(DLOG + at, tl.where(g > FLOOR, dg, 0.0), mask=inside)
    else:
        g = (i * 0).to(SUM)
        if FORM == 1:
            g = floored(tl.load(LOG + m * C + i), FLOOR, SUM)
        dq, da, db, dk, dg = _plain_gradients(
            q, a, b, k, g, X + place, X + place + other, DQB, DAB, DQB + pair, DQB + 2 * pair, i, j, col,
            K, FORM, EXTRA, SUM, PRECISION, SLOPE, C, BK,
        )  # fmt: skip
        if FORM == 1:
            dg = tl.where(tl.load(LOG + m * C + i).to(SUM) > FLOOR, dg, 0.0)
            tl.store(DLOG + (tl.program_id(1) * M.to(tl.int64) + m) * C + i, dg)
    tl.store(DQ + at, dq.to(DQ.dtype.element_ty), mask=inside)
    tl.store(DQ + at + other, da.to(DQ.dtype.element_ty), mask=inside)
    tl.store(DX + at, db.to(DX.dtype.element_ty), mask=inside)
    if EXTRA:
        tl.store(DX + at + other, dk.to(DX.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def invert(SYSTEM, INVERSE, SUM: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr):
    """INVERSE = (I - SYSTEM)⁻¹ of strictly lower triangles [M, C, C], by halves: of blocks [[P, 0], [R, Q]] it is
    [[P⁻¹, 0], [Q⁻¹ R P⁻¹, Q⁻¹]]. (Powers of a system of equal keys grow like binomials and would cancel.) Grid (M,)."""
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, C)
    j = tl.arange(0, C)
    place = m * C * C + i[:, None] * C + j[None, :]
    system = tl.load(SYSTEM + place).to(SUM)
    inverse = tl.where(i[:, None] == j[None, :], 1.0, 0.0).to(SUM)
    level = 0
    while (1 << level) < C:
        block, other = i[:, None] >> level, j[None, :] >> level
        corner = tl.where((block == other + 1) & ((block & 1) == 1), system, 0.0)
        left = tl.dot(inverse, corner, input_precision=EXACT, out_dtype=SUM)
        inverse += tl.dot(left, inverse, input_precision=EXACT, out_dtype=SUM)
        level += 1
    tl.store(INVERSE + place, inverse)


@triton.jit(do_not_specialize=SIZES)
def carry(
    READ, NEW, WRITE, TOTAL, MORE, VALUES, FIRST, U, STATES, LAST, N, BH,
    K: tl.constexpr, V: tl.constexpr, FORM: tl.constexpr, EXTRA: tl.constexpr, HAS_FIRST: tl.constexpr,
    BACK: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk, with S the state: U = NEW + READ S; STATES = S; then S = TOTAL ⊙ S + WRITEᵀ U, with EXTRA
    also + MOREᵀ VALUES. LAST is the state behind all. All [N, BH, ...]: READ, WRITE, MORE [C, K], NEW, VALUES,
    U [C, V], STATES [K, V], TOTAL [1 or K] by FORM; FIRST and LAST [BH, K, V]. Grid (V / BV, BH); a program holds
    all keys.

    With BACK from the last chunk to the first, which is the gradient: S of the state behind a chunk, NEW and U of u,
    READ is the writers and WRITE the readers; and VALUES [K, V] is added to S as it is."""
    h = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, C)
    row = tl.arange(0, BK)
    col = tl.program_id(0) * BV + tl.arange(0, BV)
    held = (row[:, None] < K) & (col[None, :] < V)
    values = (i[:, None] >= 0) & (col[None, :] < V)
    at = row[:, None] * V + col[None, :]
    s = tl.zeros([BK, BV], SUM)
    if HAS_FIRST:
        s = tl.load(FIRST + h * K * V + at, mask=held, other=0.0).to(SUM)
    for step in range(N):
        n = N - 1 - step if BACK else step
        m = n * BH.to(tl.int64) + h
        tl.store(STATES + m * K * V + at, s.to(STATES.dtype.element_ty), mask=held)
        reader = tile(READ + m * C * K, i[:, None], K, row[None, :], row[None, :] < K)
        u = tile(NEW + m * C * V, i[:, None], V, col[None, :], values).to(SUM)
        u += tl.dot(reader, s.to(reader.dtype), input_precision=PRECISION, out_dtype=SUM)
        small = u.to(reader.dtype)
        tl.store(U + m * C * V + i[:, None] * V + col[None, :], small, mask=values)
        if FORM == 1:
            s = s * tl.load(TOTAL + m).to(SUM)
        if FORM == 2:
            s = s * tl.load(TOTAL + m * K + row, mask=row < K, other=0.0).to(SUM)[:, None]
        writerT = tile(WRITE + m * C * K, i[None, :], K, row[:, None], row[:, None] < K)
        s += tl.dot(writerT, small, input_precision=PRECISION, out_dtype=SUM)
        if BACK:
            s += tl.load(VALUES + m * K * V + at, mask=held, other=0.0).to(SUM)
        elif EXTRA:
            moreT = tile(MORE + m * C * K, i[None, :], K, row[:, None], row[:, None] < K)
            more = tile(VALUES + m * C * V, i[:, None], V, col[None, :], values)
            s += tl.dot(moreT, more, input_precision=PRECISION, out_dtype=SUM)
    tl.store(LAST + h * K * V + at, s, mask=held)
