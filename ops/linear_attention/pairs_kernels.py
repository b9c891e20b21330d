"""The pairs of `pairs.py` in compiled loops, for a decay a key channel, and no tensor between.

Tokens meet by halves down to blocks of BASE: those of the right half of a block see those of the left by a product of
what each is decayed by to the middle. Within BASE, queries walk back together, a token at a time, past the keys before
them, and take one more decay in at each. Every factor is at most 1, and log decays are never added up but where their
sum is what is wanted.

Shapes: q [readers, groups, c, d], k [writers, groups, c, d], log_decay and read [groups, heads, c, d], seen [readers,
writers, groups, heads, c, c]; c is a power of two.
"""

import numpy as np
from numba import njit

from ops.linear_recurrence.kernels import OPTIONS
from ops.native_math import exp

BASE = 8  # tokens

# An exp in parts must not be added up in another order.
EXACT = {"nogil": True, "cache": True, "fastmath": {"contract", "nsz"}, "error_model": "numpy"}


# Rows are loops within loops: flattening a few rows takes longer than what is done with them. No loop writes where it
# reads but in one place, or LLVM takes no vector instructions.


@njit(**EXACT)
def _exp(x, out):
    for t in range(len(x)):
        for i in range(x.shape[1]):
            out[t, i] = exp(x[t, i])


@njit(**OPTIONS)
def _add(total, more):
    for i in range(total.size):
        total[i] += more[i]


@njit(**OPTIONS)
def _add_to_rows(total, more):
    for t in range(len(total)):
        for i in range(total.shape[1]):
            total[t, i] += more[t, i]


@njit(**OPTIONS)
def _scale(rows, by):
    for t in range(len(rows)):
        for i in range(rows.shape[1]):
            rows[t, i] *= by[t, i]


@njit(**OPTIONS)
def _scaled(rows, by, into):
    for t in range(len(rows)):
        for i in range(rows.shape[1]):
            into[t, i] = rows[t, i] * by[t, i]


@njit(**OPTIONS)
def _sum_from(log_decay, logs):
    """logs[t] = Σ_{j<t} log_decay_j."""
    logs[0] = 0
    for t in range(1, len(logs)):
        for i in range(logs.shape[1]):
            logs[t, i] = logs[t - 1, i] + log_decay[t - 1, i]


@njit(**OPTIONS)
def _sum_to(log_decay, logs):
    """logs[s] = Σ_{j>s} log_decay_j."""
    logs[-1] = 0
    for s in range(len(logs) - 2, -1, -1):
        for i in range(logs.shape[1]):
            logs[s, i] = logs[s + 1, i] + log_decay[s + 1, i]


@njit(**OPTIONS)
def _weights(log_decay, before, logs, read, keep, total):
    """exp(before_t + Σ_{j<t} log_decay_j), exp(Σ_{j>s} log_decay_j) and, [1, d], exp of all."""
    _sum_to(log_decay, logs)
    _exp(logs, keep)
    _add(logs[0], log_decay[0])
    _exp(logs[:1], total)
    _sum_from(log_decay, logs)
    _add_to_rows(logs, before)
    _exp(logs, read)


@njit(**OPTIONS)
def _dot(one, other):
    total = one.dtype.type(0)
    for i in range(one.size):
        total += one[i] * other[i]
    return total


@njit(**OPTIONS)
def _products(left, right, into):
    """into = left rightᵀ, row by row."""
    for t in range(len(left)):
        for s in range(len(right)):
            into[t, s] = _dot(left[t], right[s])


@njit(**OPTIONS)
def _to_the_middle(log_decay, before, middle, half, logs, weights):
    """Into rows [middle − half, middle + half) of `weights`: what keys are decayed by to the middle, and queries from
    it."""
    low, high = middle - half, middle + half
    _sum_to(log_decay[low:middle], logs[low:middle])
    _sum_from(log_decay[middle:high], logs[middle:high])
    _add_to_rows(logs[middle:high], before[middle:high])
    _exp(logs[low:high], weights[low:high])


@njit(**OPTIONS)
def pairs(start, stop, q, k, log_decay, before, itself, seen, read, keep, total):
    """Writes what `pairs.pairs` returns, of the groups from `start` to `stop`."""
    c, d = q.shape[2:]
    base = min(BASE, c)
    decay, first = np.empty((c, d), q.dtype), np.empty((c, d), q.dtype)
    space, weights, scaled = np.empty((c, d), q.dtype), np.empty((c, d), q.dtype), np.empty((c, d), q.dtype)
    keys = np.empty((len(k), c, d), q.dtype)
    query = np.empty((base, d), q.dtype)
    for group in range(start, stop):
        for head in range(log_decay.shape[1]):
            own, begin = log_decay[group, head], before[group, head]
            _weights(own, begin, space, read[group, head], keep[group, head], total[group, head])
            _exp(own, decay)
            _exp(begin, first)
            for reader in range(len(q)):
                for writer in range(len(k)):
                    into = seen[reader, writer, group, head]
                    for t in range(c):
                        into[t, t:] = 0
                        if itself:
                            into[t, t] = _dot(q[reader, group, t], k[writer, group, t])
                for low in range(0, c, base):
                    _scaled(q[reader, group, low : low + base], first[low : low + base], query)
                    for back in range(1, base):
                        for writer in range(len(k)):
                            key, into = k[writer, group], seen[reader, writer, group, head]
                            for t in range(back, base):
                                into[low + t, low + t - back] = _dot(query[t], key[low + t - back])
                        _scale(query[back:], decay[low : low + base - back])
            half = base
            while half < c:
                for middle in range(half, c, 2 * half):
                    low, high = middle - half, middle + half
                    _to_the_middle(own, begin, middle, half, space, weights)
                    for writer in range(len(k)):
                        _scaled(k[writer, group, low:middle], weights[low:middle], keys[writer, low:middle])
                    for reader in range(len(q)):
                        _scaled(q[reader, group, middle:high], weights[middle:high], scaled[middle:high])
                        for writer in range(len(k)):
                            into = seen[reader, writer, group, head, middle:high, low:middle]
                            _products(scaled[middle:high], keys[writer, low:middle], into)
                half *= 2


@njit(**OPTIONS)
def _carry(total, decay, weights, key, kept):
    """kept = decay ⊙ total; total = kept + weights · key, row by row."""
    for t in range(len(total)):
        weight = weights[t]
        for i in range(total.shape[1]):
            part = decay[t, i] * total[t, i]
            kept[t, i] = part
            total[t, i] = part + weight * key[t, i]


@njit(**OPTIONS)
def _return(query, decay, weights, kept, dlog_decay, dkey):
    """The gradients of keys and log decays that queries meet; these then take in the decays."""
    for t in range(len(query)):
        weight = weights[t]
        for i in range(query.shape[1]):
            dlog_decay[t, i] += query[t, i] * kept[t, i]
            dkey[t, i] += weight * query[t, i]
    _scale(query, decay)


@njit(**OPTIONS)
def _dfirst(first, total, query, dquery, dbefore):
    """The gradients of queries and of the logarithm of what they begin with, from the sum of what they saw."""
    for t in range(len(query)):
        for i in range(query.shape[1]):
            part = first[t, i] * total[t, i]
            dquery[t, i] += part
            dbefore[t, i] += query[t, i] * part


@njit(**OPTIONS)
def _add_rows(weights, x, total):
    for t in range(len(x)):
        weight = weights[t]
        for i in range(x.shape[1]):
            total[t, i] += weight * x[t, i]


@njit(**OPTIONS)
def _dweights(dread, dkeep, dtotal, read, keep, total, sums, dlog_decay, dbefore):
    """Adds the gradients that come by `_weights`."""
    c = len(dread)
    for i in range(sums.size):
        sums[i] = dtotal[i] * total[i]
    for t in range(c):
        _add(dlog_decay[t], sums)
        for i in range(sums.size):
            sums[i] += dkeep[t, i] * keep[t, i]
    sums[:] = 0
    for t in range(c - 1, -1, -1):
        _add(dlog_decay[t], sums)
        for i in range(sums.size):
            part = dread[t, i] * read[t, i]
            dbefore[t, i] += part
            sums[i] += part


@njit(**OPTIONS)
def _add_rows_of(weights, x, total):
    """total += weights x, whose rows are many: four at a time."""
    whole = len(x) // 4 * 4
    for t in range(len(total)):
        for s in range(0, whole, 4):
            a, b, c, d = weights[t, s], weights[t, s + 1], weights[t, s + 2], weights[t, s + 3]
            for i in range(x.shape[1]):
                total[t, i] += a * x[s, i] + b * x[s + 1, i] + c * x[s + 2, i] + d * x[s + 3, i]
        for s in range(whole, len(x)):
            a = weights[t, s]
            for i in range(x.shape[1]):
                total[t, i] += a * x[s, i]


@njit(**OPTIONS)
def _through(dscaled, scaled, weights, dgiven, dlog):
    """Adds, from the gradient of scaled = given · weights, those of `given` and of the weights' logarithms."""
    for t in range(len(dscaled)):
        for i in range(dscaled.shape[1]):
            dgiven[t, i] += dscaled[t, i] * weights[t, i]
            dlog[t, i] += dscaled[t, i] * scaled[t, i]


@njit(**OPTIONS)
def _from_the_middle(dlog, middle, half, sums, dlog_decay, dbefore):
    """The gradient of `_to_the_middle`, from that of the logarithms."""
    sums[:] = 0
    for s in range(middle - half, middle):  # what a token keeps of all keys before it
        _add(dlog_decay[s], sums)
        _add(sums, dlog[s])
    _add_to_rows(dbefore[middle : middle + half], dlog[middle : middle + half])
    sums[:] = 0
    for t in range(middle + half - 1, middle - 1, -1):  # and what all queries behind it see through it
        _add(dlog_decay[t], sums)
        _add(sums, dlog[t])


@njit(**OPTIONS)
def pairs_backward(
    start, stop, dseen, dread, dkeep, dtotal, q, k, log_decay, before, read, keep, total, itself,
    dq, dk, dlog_decay, dbefore,
):  # fmt: skip
    """Adds to the gradients, which are 0 before, those of the groups from `start` to `stop`."""
    c, d = q.shape[2:]
    base = min(BASE, c)
    decay, first = np.empty((c, d), q.dtype), np.empty((c, d), q.dtype)
    space, weights, dlogs = np.empty((c, d), q.dtype), np.empty((c, d), q.dtype), np.empty((c, d), q.dtype)
    scaled, turned = np.empty((c, d), q.dtype), np.empty((c, c), q.dtype)
    keys, dkeys = np.empty((len(k), c, d), q.dtype), np.empty((len(k), c, d), q.dtype)
    query, slopes = np.empty((base, d), q.dtype), np.empty(base, q.dtype)
    kept = np.empty((base, base, d), q.dtype)  # of each distance
    for group in range(start, stop):
        for head in range(log_decay.shape[1]):
            dlog, dfirst = dlog_decay[group, head], dbefore[group, head]
            own, begin = log_decay[group, head], before[group, head]
            _dweights(
                dread[group, head], dkeep[group, head], dtotal[group, head, 0], read[group, head], keep[group, head],
                total[group, head, 0], query[0], dlog, dfirst,
            )  # fmt: skip
            _exp(own, decay)
            _exp(begin, first)
            for reader in range(len(q)):
                for writer in range(len(k)):
                    given = dseen[reader, writer, group, head]
                    for low in range(0, c, base):
                        high = low + base
                        mine, dquery = q[reader, group, low:high], dq[reader, group, low:high]
                        key, dkey = k[writer, group, low:high], dk[writer, group, low:high]
                        query[:] = 0
                        for back in range(base - 1, 0, -1):
                            rows = base - back
                            for t in range(rows):
                                slopes[t] = given[low + t + back, low + t]
                            _carry(query[back:], decay[low : low + rows], slopes, key[:rows], kept[back, :rows])
                        _dfirst(first[low:high], query, mine, dquery, dfirst[low:high])
                        _scaled(mine, first[low:high], query)
                        for back in range(1, base):
                            rows = base - back
                            for t in range(rows):
                                slopes[t] = given[low + t + back, low + t]
                            _return(
                                query[back:], decay[low : low + rows], slopes, kept[back, :rows],
                                dlog[low : low + rows], dkey[:rows],
                            )  # fmt: skip
                        if itself:
                            for t in range(base):
                                slopes[t] = given[low + t, low + t]
                            _add_rows(slopes, key, dquery)
                            _add_rows(slopes, mine, dkey)
            half = base
            while half < c:
                for middle in range(half, c, 2 * half):
                    low, high = middle - half, middle + half
                    _to_the_middle(own, begin, middle, half, space, weights)
                    dlogs[low:high] = 0
                    for writer in range(len(k)):
                        _scaled(k[writer, group, low:middle], weights[low:middle], keys[writer, low:middle])
                        dkeys[writer, low:middle] = 0
                    for reader in range(len(q)):
                        _scaled(q[reader, group, middle:high], weights[middle:high], scaled[middle:high])
                        space[middle:high] = 0
                        for writer in range(len(k)):
                            given = dseen[reader, writer, group, head, middle:high, low:middle]
                            _add_rows_of(given, keys[writer, low:middle], space[middle:high])
                            for t in range(half):
                                for s in range(half):
                                    turned[s, t] = given[t, s]
                            _add_rows_of(turned[:half, :half], scaled[middle:high], dkeys[writer, low:middle])
                        _through(
                            space[middle:high], scaled[middle:high], weights[middle:high],
                            dq[reader, group, middle:high], dlogs[middle:high],
                        )  # fmt: skip
                    for writer in range(len(k)):
                        _through(
                            dkeys[writer, low:middle], keys[writer, low:middle], weights[low:middle],
                            dk[writer, group, low:middle], dlogs[low:middle],
                        )  # fmt: skip
                    _from_the_middle(dlogs, middle, half, query[0], dlog, dfirst)
                half *= 2
