"""What stands between the matrix products of `chunked.py`, in one pass each, compiled when first called.

Every kernel takes [start, stop) of its outermost places. Loops write one array each, of few others: before LLVM takes
vector instructions it compares the places of all that a loop writes and reads, and of more than eight pairs it takes
none.
"""

from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numba.np.numpy_support import carray

from ops import native_team
from ops.native_math import exp

EXACT: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract", "nsz"}, "error_model": "numpy"}
SUMS = {**EXACT, "fastmath": {"contract", "nsz", "reassoc"}}  # not where exp is


@njit(**SUMS)
def _sum(row):
    total = row.dtype.type(0)
    for i in range(len(row)):
        total += row[i]
    return total


@njit(**SUMS)
def _dot(one, other):
    total = one.dtype.type(0)
    for i in range(len(one)):
        total += one[i] * other[i]
    return total


@njit(**EXACT)
def _shift(sums, more):
    for i in range(len(sums)):
        sums[i] += more


@njit(**EXACT)
def _exp_of(sums, more, into):
    for i in range(len(into)):
        into[i] = exp(sums[i] + more)


@njit(**EXACT)
def _multiply(one, other, into):
    for i in range(len(into)):
        into[i] = one[i] * other[i]


@njit(**EXACT)
def _add_product(one, other, into):
    for i in range(len(into)):
        into[i] += one[i] * other[i]


@njit(**EXACT)
def _scale(row, factor, into):
    for i in range(len(into)):
        into[i] = factor * row[i]


@njit(**EXACT)
def _add(row, into):
    for i in range(len(into)):
        into[i] += row[i]


@njit(**EXACT)
def _copy(row, into):
    for i in range(len(into)):
        into[i] = row[i]


@njit(**EXACT)
def _scale_onto(base, row, factor, into):
    for i in range(len(into)):
        into[i] = base[i] + factor * row[i]


@njit(**EXACT)
def _next_weights(t, decays, before, sums, weights, itself):
    """The weights of tokens 0 to t for token t: sums[s] are the log decays between, carried along from token to token,
    never a difference of sums."""
    kind = decays.dtype.type
    if t:
        _shift(sums[: t - 1], decays[t - 1])
        sums[t - 1] = kind(0)
    _exp_of(sums[:t], before, weights[:t])
    weights[t] = kind(itself)


@njit(**EXACT)
def weigh(start, stop, scores, log_decay, before, seen, read, keep, total, itself):
    """Decays between the tokens of chunks, see `chunked.weigh`. scores [x, m, c, c], log_decay [m, r, c]."""
    several, _, chunk, _ = scores.shape
    heads = log_decay.shape[1]
    kind = log_decay.dtype.type
    sums, weights = np.empty(chunk, log_decay.dtype), np.empty(chunk, log_decay.dtype)
    for m in range(start, stop):
        for r in range(heads):
            decays = log_decay[m, r]
            for t in range(chunk):
                _next_weights(t, decays, before[m, r, t], sums, weights, itself)
                for x in range(several):
                    into = seen[x, m, r, t]
                    _multiply(scores[x, m, t, : t + 1], weights[: t + 1], into[: t + 1])
                    into[t + 1 :] = kind(0)
            so_far = kind(0)
            for t in range(chunk):
                sums[t] = before[m, r, t] + so_far
                so_far += decays[t]
            _exp_of(sums, kind(0), read[m, r])
            so_far = kind(0)
            for t in range(chunk - 1, -1, -1):
                sums[t] = so_far
                so_far += decays[t]
            _exp_of(sums, kind(0), keep[m, r])
            sums[0] = so_far
            _exp_of(sums[:1], kind(0), total[m, r : r + 1])


@njit(**EXACT)
def weigh_back(
    start,
    stop,
    dseen,
    dread,
    dkeep,
    dtotal,
    log_decay,
    before,
    seen,
    read,
    keep,
    total,
    dscores,
    ddecay,
    dbefore,
    itself,
):
    """The gradient, from what `weigh` gave. The log decay of token j counts in seen[t, s] for s < j < t."""
    several, _, chunk, _ = dscores.shape
    heads = log_decay.shape[1]
    kind = log_decay.dtype.type
    sums, weights = np.empty(chunk, log_decay.dtype), np.empty(chunk, log_decay.dtype)
    slopes = np.empty((chunk, chunk), log_decay.dtype)
    for m in range(start, stop):
        for r in range(heads):
            for t in range(chunk):
                _next_weights(t, log_decay[m, r], before[m, r, t], sums, weights, itself)
                for x in range(several):
                    given, into = dseen[x, m, r, t], dscores[x, m, t]
                    if r:
                        _add_product(given[: t + 1], weights[: t + 1], into[: t + 1])
                    else:
                        _multiply(given[: t + 1], weights[: t + 1], into[: t + 1])
                        into[t + 1 :] = kind(0)
                    if x:
                        _add_product(given[:t], seen[x, m, r, t, :t], slopes[t, :t])
                    else:
                        _multiply(given[:t], seen[x, m, r, t, :t], slopes[t, :t])
            ahead = dtotal[m, r] * total[m, r]  # slopes of all that j lies in, by where that starts and ends
            for t in range(chunk):
                ddecay[m, r, t] = ahead
                ahead += dkeep[m, r, t] * keep[m, r, t]
            sums[:] = kind(0)
            behind = kind(0)
            for t in range(chunk - 1, -1, -1):
                ddecay[m, r, t] += _sum(sums[:t]) + behind
                _add(slopes[t, :t], sums[:t])
                own = dread[m, r, t] * read[m, r, t]
                behind += own
                dbefore[m, r, t] = _sum(slopes[t, :t]) + own


ROWS = 32  # of a state that are carried along together


@njit(**EXACT)
def carry(start, stop, add, decay, state, states, final):
    """Blocks of ROWS rows: add [b, n, rows, v], decay [b, n, rows], state [b, rows, v]."""
    _, chunks, rows, _ = add.shape
    blocks = (rows + ROWS - 1) // ROWS
    for place in range(start, stop):
        b, low = place // blocks, place % blocks * ROWS
        high = min(low + ROWS, rows)
        for i in range(low, high):
            _copy(state[b, i], states[b, 0, i])
        for n in range(chunks):
            for i in range(low, high):
                into = states[b, n + 1, i] if n + 1 < chunks else final[b, i]
                _scale_onto(add[b, n, i], states[b, n, i], decay[b, n, i], into)


@njit(**EXACT)
def carry_back(start, stop, dstates, dfinal, decay, states, dadd, ddecay, dstate):
    """The gradient; what a chunk adds has that of the state behind it."""
    _, chunks, rows, _ = dstates.shape
    blocks = (rows + ROWS - 1) // ROWS
    for place in range(start, stop):
        b, low = place // blocks, place % blocks * ROWS
        high = min(low + ROWS, rows)
        for i in range(low, high):
            _copy(dfinal[b, i], dadd[b, chunks - 1, i])
        for n in range(chunks - 1, -1, -1):
            for i in range(low, high):
                into = dadd[b, n - 1, i] if n else dstate[b, i]
                ddecay[b, n, i] = _dot(dadd[b, n, i], states[b, n, i])
                _scale_onto(dstates[b, n, i], dadd[b, n, i], decay[b, n, i], into)


@njit(**EXACT)
def dots(start, stop, one, other, into):
    """Of rows [places, v]."""
    for i in range(start, stop):
        into[i] = _dot(one[i], other[i])


# For values: a place is a chunk of a group; heads apart [m, r, c, v] and side by side [m, c, r, v]; as the caller has
# them [b, time, across], of whose last dimension the first groups · heads · v are taken.


@njit(**EXACT)
def values(start, stop, v, keep, apart, kept, chunks):
    """v with its heads apart, and times `keep` [m, r, c] side by side; zeros behind the end."""
    time = v.shape[1]
    heads, chunk = keep.shape[1:]
    groups, width = len(keep) // (len(v) * chunks), apart.shape[3]
    zero = keep.dtype.type(0)
    for m in range(start, stop):
        b, first, g = m // (chunks * groups), m // groups % chunks * chunk, m % groups
        for i in range(chunk):
            for r in range(heads):
                if first + i < time:
                    low = (g * heads + r) * width
                    row = v[b, first + i, low : low + width]
                    _copy(row, apart[m, r, i])
                    _scale(row, keep[m, r, i], kept[m, i, r])
                else:
                    apart[m, r, i, :] = zero
                    kept[m, i, r, :] = zero


@njit(**EXACT)
def values_back(start, stop, dapart, dkept, v, keep, dv, dkeep, chunks):
    time = v.shape[1]
    heads, chunk = keep.shape[1:]
    groups, width = len(keep) // (len(v) * chunks), dapart.shape[3]
    for m in range(start, stop):
        b, first, g = m // (chunks * groups), m // groups % chunks * chunk, m % groups
        for i in range(chunk):
            for r in range(heads):
                if first + i < time:
                    low = (g * heads + r) * width
                    high = low + width
                    dkeep[m, r, i] = _dot(dkept[m, i, r], v[b, first + i, low:high])
                    _scale_onto(dapart[m, r, i], dkept[m, i, r], keep[m, r, i], dv[b, first + i, low:high])
                else:
                    dkeep[m, r, i] = keep.dtype.type(0)


@njit(**EXACT)
def combine(start, stop, inner, aside, read, y, chunks):
    """y = inner (heads apart) + read [m, r, c] · aside (heads side by side)."""
    time = y.shape[1]
    heads, chunk = read.shape[1:]
    groups, width = len(read) // (len(y) * chunks), inner.shape[3]
    for m in range(start, stop):
        b, first, g = m // (chunks * groups), m // groups % chunks * chunk, m % groups
        for i in range(min(chunk, time - first)):
            for r in range(heads):
                low = (g * heads + r) * width
                into = y[b, first + i, low : low + width]
                _scale_onto(inner[m, r, i], aside[m, i, r], read[m, r, i], into)


@njit(**EXACT)
def combine_back(start, stop, dy, aside, read, dinner, daside, dread, chunks):
    time = dy.shape[1]
    heads, chunk = read.shape[1:]
    groups, width = len(read) // (len(dy) * chunks), dinner.shape[3]
    zero = read.dtype.type(0)
    for m in range(start, stop):
        b, first, g = m // (chunks * groups), m // groups % chunks * chunk, m % groups
        for i in range(chunk):
            for r in range(heads):
                if first + i < time:
                    low = (g * heads + r) * width
                    row = dy[b, first + i, low : low + width]
                    _copy(row, dinner[m, r, i])
                    _scale(row, read[m, r, i], daside[m, i, r])
                    dread[m, r, i] = _dot(row, aside[m, i, r])
                else:
                    dinner[m, r, i, :] = zero
                    daside[m, i, r, :] = zero
                    dread[m, r, i] = zero


# On torch's threads, each of which takes pieces till none is left: for float32, in which models run. A job's numbers:
# how many places there are, into how many pieces they go, the next piece; then sizes; then addresses.


@njit(**EXACT)
def _piece(job, count, pieces):
    """The places of the next piece; none when none is left."""
    piece = native_team.take(job + 16)
    if piece >= pieces:
        return 0, 0
    return count * piece // pieces, count * (piece + 1) // pieces


@cfunc(types.void(types.intp), **EXACT)
def _take_weigh(job: Any) -> None:
    count, pieces, _, several, heads, chunk, itself, scores, log_decay, before, seen, read, keep, total = carray(
        native_team.words(job), (14,)
    )
    scores_ = carray(native_team.floats(scores), (several, count, chunk, chunk))
    log_decay_ = carray(native_team.floats(log_decay), (count, heads, chunk))
    before_ = carray(native_team.floats(before), (count, heads, chunk))
    seen_ = carray(native_team.floats(seen), (several, count, heads, chunk, chunk))
    read_ = carray(native_team.floats(read), (count, heads, chunk))
    keep_ = carray(native_team.floats(keep), (count, heads, chunk))
    total_ = carray(native_team.floats(total), (count, heads))
    start, stop = _piece(job, count, pieces)
    while start < stop:
        weigh(start, stop, scores_, log_decay_, before_, seen_, read_, keep_, total_, itself)
        start, stop = _piece(job, count, pieces)


@cfunc(types.void(types.intp), **EXACT)
def _take_weigh_back(job: Any) -> None:
    (
        count,
        pieces,
        _,
        several,
        heads,
        chunk,
        itself,
        dseen,
        dread,
        dkeep,
        dtotal,
        log_decay,
        before,
        seen,
        read,
        keep,
        total,
        dscores,
        ddecay,
        dbefore,
    ) = carray(native_team.words(job), (20,))
    dseen_ = carray(native_team.floats(dseen), (several, count, heads, chunk, chunk))
    dread_ = carray(native_team.floats(dread), (count, heads, chunk))
    dkeep_ = carray(native_team.floats(dkeep), (count, heads, chunk))
    dtotal_ = carray(native_team.floats(dtotal), (count, heads))
    log_decay_ = carray(native_team.floats(log_decay), (count, heads, chunk))
    before_ = carray(native_team.floats(before), (count, heads, chunk))
    seen_ = carray(native_team.floats(seen), (several, count, heads, chunk, chunk))
    read_ = carray(native_team.floats(read), (count, heads, chunk))
    keep_ = carray(native_team.floats(keep), (count, heads, chunk))
    total_ = carray(native_team.floats(total), (count, heads))
    dscores_ = carray(native_team.floats(dscores), (several, count, chunk, chunk))
    ddecay_ = carray(native_team.floats(ddecay), (count, heads, chunk))
    dbefore_ = carray(native_team.floats(dbefore), (count, heads, chunk))
    start, stop = _piece(job, count, pieces)
    while start < stop:
        weigh_back(
            start,
            stop,
            dseen_,
            dread_,
            dkeep_,
            dtotal_,
            log_decay_,
            before_,
            seen_,
            read_,
            keep_,
            total_,
            dscores_,
            ddecay_,
            dbefore_,
            itself,
        )
        start, stop = _piece(job, count, pieces)


@cfunc(types.void(types.intp), **EXACT)
def _take_carry(job: Any) -> None:
    count, pieces, _, batch, chunks, rows, width, add, decay, state, states, final = carray(
        native_team.words(job), (12,)
    )
    add_ = carray(native_team.floats(add), (batch, chunks, rows, width))
    decay_ = carray(native_team.floats(decay), (batch, chunks, rows))
    state_ = carray(native_team.floats(state), (batch, rows, width))
    states_ = carray(native_team.floats(states), (batch, chunks, rows, width))
    final_ = carray(native_team.floats(final), (batch, rows, width))
    start, stop = _piece(job, count, pieces)
    while start < stop:
        carry(start, stop, add_, decay_, state_, states_, final_)
        start, stop = _piece(job, count, pieces)


@cfunc(types.void(types.intp), **EXACT)
def _take_carry_back(job: Any) -> None:
    count, pieces, _, batch, chunks, rows, width, dstates, dfinal, decay, states, dadd, ddecay, dstate = carray(
        native_team.words(job), (14,)
    )
    dstates_ = carray(native_team.floats(dstates), (batch, chunks, rows, width))
    dfinal_ = carray(native_team.floats(dfinal), (batch, rows, width))
    decay_ = carray(native_team.floats(decay), (batch, chunks, rows))
    states_ = carray(native_team.floats(states), (batch, chunks, rows, width))
    dadd_ = carray(native_team.floats(dadd), (batch, chunks, rows, width))
    ddecay_ = carray(native_team.floats(ddecay), (batch, chunks, rows))
    dstate_ = carray(native_team.floats(dstate), (batch, rows, width))
    start, stop = _piece(job, count, pieces)
    while start < stop:
        carry_back(start, stop, dstates_, dfinal_, decay_, states_, dadd_, ddecay_, dstate_)
        start, stop = _piece(job, count, pieces)


@cfunc(types.void(types.intp), **EXACT)
def _take_values(job: Any) -> None:
    count, pieces, _, batch, chunks, heads, chunk, width, time, across, v, keep, apart, kept = carray(
        native_team.words(job), (14,)
    )
    v_ = carray(native_team.floats(v), (batch, time, across))
    keep_ = carray(native_team.floats(keep), (count, heads, chunk))
    apart_ = carray(native_team.floats(apart), (count, heads, chunk, width))
    kept_ = carray(native_team.floats(kept), (count, chunk, heads, width))
    start, stop = _piece(job, count, pieces)
    while start < stop:
        values(start, stop, v_, keep_, apart_, kept_, chunks)
        start, stop = _piece(job, count, pieces)


@cfunc(types.void(types.intp), **EXACT)
def _take_values_back(job: Any) -> None:
    count, pieces, _, batch, chunks, heads, chunk, width, time, across, dapart, dkept, v, keep, dv, dkeep = carray(
        native_team.words(job), (16,)
    )
    dapart_ = carray(native_team.floats(dapart), (count, heads, chunk, width))
    dkept_ = carray(native_team.floats(dkept), (count, chunk, heads, width))
    v_ = carray(native_team.floats(v), (batch, time, across))
    keep_ = carray(native_team.floats(keep), (count, heads, chunk))
    dv_ = carray(native_team.floats(dv), (batch, time, count // (batch * chunks) * heads * width))
    dkeep_ = carray(native_team.floats(dkeep), (count, heads, chunk))
    start, stop = _piece(job, count, pieces)
    while start < stop:
        values_back(start, stop, dapart_, dkept_, v_, keep_, dv_, dkeep_, chunks)
        start, stop = _piece(job, count, pieces)


@cfunc(types.void(types.intp), **EXACT)
def _take_combine(job: Any) -> None:
    count, pieces, _, batch, chunks, heads, chunk, width, time, _, inner, aside, read, y = carray(
        native_team.words(job), (14,)
    )
    inner_ = carray(native_team.floats(inner), (count, heads, chunk, width))
    aside_ = carray(native_team.floats(aside), (count, chunk, heads, width))
    read_ = carray(native_team.floats(read), (count, heads, chunk))
    y_ = carray(native_team.floats(y), (batch, time, count // (batch * chunks) * heads * width))
    start, stop = _piece(job, count, pieces)
    while start < stop:
        combine(start, stop, inner_, aside_, read_, y_, chunks)
        start, stop = _piece(job, count, pieces)


@cfunc(types.void(types.intp), **EXACT)
def _take_combine_back(job: Any) -> None:
    count, pieces, _, batch, chunks, heads, chunk, width, time, across, dy, aside, read, dinner, daside, dread = carray(
        native_team.words(job), (16,)
    )
    dy_ = carray(native_team.floats(dy), (batch, time, across))
    aside_ = carray(native_team.floats(aside), (count, chunk, heads, width))
    read_ = carray(native_team.floats(read), (count, heads, chunk))
    dinner_ = carray(native_team.floats(dinner), (count, heads, chunk, width))
    daside_ = carray(native_team.floats(daside), (count, chunk, heads, width))
    dread_ = carray(native_team.floats(dread), (count, heads, chunk))
    start, stop = _piece(job, count, pieces)
    while start < stop:
        combine_back(start, stop, dy_, aside_, read_, dinner_, daside_, dread_, chunks)
        start, stop = _piece(job, count, pieces)


@cfunc(types.void(types.intp), **EXACT)
def _take_dots(job: Any) -> None:
    count, pieces, _, width, one, other, into = carray(native_team.words(job), (7,))
    one_ = carray(native_team.floats(one), (count, width))
    other_ = carray(native_team.floats(other), (count, width))
    into_ = carray(native_team.floats(into), (count,))
    start, stop = _piece(job, count, pieces)
    while start < stop:
        dots(start, stop, one_, other_, into_)
        start, stop = _piece(job, count, pieces)


_all_weigh = native_team.team("zoo_linear_attention_weigh", _take_weigh)
_all_weigh_back = native_team.team("zoo_linear_attention_weigh_back", _take_weigh_back)
_all_carry = native_team.team("zoo_linear_attention_carry", _take_carry)
_all_carry_back = native_team.team("zoo_linear_attention_carry_back", _take_carry_back)
_all_dots = native_team.team("zoo_linear_attention_dots", _take_dots)
_all_values = native_team.team("zoo_linear_attention_values", _take_values)
_all_values_back = native_team.team("zoo_linear_attention_values_back", _take_values_back)
_all_combine = native_team.team("zoo_linear_attention_combine", _take_combine)
_all_combine_back = native_team.team("zoo_linear_attention_combine_back", _take_combine_back)


@njit(**EXACT)
def weigh_on(threads, job):
    _all_weigh(job.ctypes.data, threads)
    assert job[2] >= job[1]  # and so the job is kept till here


@njit(**EXACT)
def weigh_back_on(threads, job):
    _all_weigh_back(job.ctypes.data, threads)
    assert job[2] >= job[1]  # and so the job is kept till here


@njit(**EXACT)
def carry_on(threads, job):
    _all_carry(job.ctypes.data, threads)
    assert job[2] >= job[1]  # and so the job is kept till here


@njit(**EXACT)
def carry_back_on(threads, job):
    _all_carry_back(job.ctypes.data, threads)
    assert job[2] >= job[1]  # and so the job is kept till here


@njit(**EXACT)
def dots_on(threads, job):
    _all_dots(job.ctypes.data, threads)
    assert job[2] >= job[1]  # and so the job is kept till here


@njit(**EXACT)
def values_on(threads, job):
    _all_values(job.ctypes.data, threads)
    assert job[2] >= job[1]  # and so the job is kept till here


@njit(**EXACT)
def values_back_on(threads, job):
    _all_values_back(job.ctypes.data, threads)
    assert job[2] >= job[1]  # and so the job is kept till here


@njit(**EXACT)
def combine_on(threads, job):
    _all_combine(job.ctypes.data, threads)
    assert job[2] >= job[1]  # and so the job is kept till here


@njit(**EXACT)
def combine_back_on(threads, job):
    _all_combine_back(job.ctypes.data, threads)
    assert job[2] >= job[1]  # and so the job is kept till here
