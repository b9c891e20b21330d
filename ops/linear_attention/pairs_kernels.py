"""The pairs of `pairs.py` in compiled loops, for a decay a key channel: c²/2 products of vectors a chunk instead of
matrix products, and no tensor between.

All queries of a chunk walk back together, a token at a time, past the keys before them, and take one more decay in at
each: every factor is at most 1, and log decays are never added up but where their sum is what is wanted. The loops run
over rows of c·d numbers, which is why all walk together.

Shapes: q [readers, groups, c, d], k [writers, groups, c, d], log_decay and read [groups, heads, c, d], seen [readers,
writers, groups, heads, c, c].
"""

import numpy as np
from numba import njit

from ops.linear_recurrence.kernels import OPTIONS
from ops.native_math import exp

# An exp in parts must not be added up in another order.
EXACT = {"nogil": True, "cache": True, "fastmath": {"contract", "nsz"}, "error_model": "numpy"}


@njit(**EXACT)
def _exp(x, out):
    for i in range(x.size):
        out[i] = exp(x[i])


@njit(**OPTIONS)
def _add(total, more):
    for i in range(total.size):
        total[i] += more[i]


@njit(**OPTIONS)
def _multiply(product, more):
    for i in range(product.size):
        product[i] *= more[i]


@njit(**OPTIONS)
def _dots(query, key, seen):
    zero = query.dtype.type(0)
    for t in range(len(query)):
        total = zero
        for i in range(query.shape[1]):
            total += query[t, i] * key[t, i]
        seen[t] = total


@njit(**OPTIONS)
def _weights(log_decay, before, sums, read, keep, total):
    """exp(before_t + Σ_{j<t} log_decay_j), exp(Σ_{j>s} log_decay_j) and exp of all."""
    c, d = log_decay.shape
    sums[:] = 0
    for t in range(c):
        for i in range(d):
            read[t, i] = before[t, i] + sums[i]
        _add(sums, log_decay[t])
        _exp(read[t], read[t])
    _exp(sums, total)
    sums[:] = 0
    for t in range(c - 1, -1, -1):
        _exp(sums, keep[t])
        _add(sums, log_decay[t])


@njit(**OPTIONS)
def pairs(start, stop, q, k, log_decay, before, itself, seen, read, keep, total):
    """Writes what `pairs.pairs` returns, of the groups from `start` to `stop`."""
    c, d = q.shape[2:]
    decay, query, found = np.empty((c, d), q.dtype), np.empty((c, d), q.dtype), np.empty(c, q.dtype)
    for group in range(start, stop):
        for head in range(log_decay.shape[1]):
            own = log_decay[group, head]
            _weights(
                own, before[group, head], query[0], read[group, head], keep[group, head], total[group, head, 0]
            )  # fmt: skip
            _exp(own.ravel(), decay.ravel())
            for reader in range(len(q)):
                _exp(before[group, head].ravel(), query.ravel())
                _multiply(query.ravel(), q[reader, group].ravel())
                for writer in range(len(k)):
                    _dots(q[reader, group], k[writer, group], found)
                    for t in range(c):
                        seen[reader, writer, group, head, t, t:] = 0
                        if itself:
                            seen[reader, writer, group, head, t, t] = found[t]
                for back in range(1, c):
                    for writer in range(len(k)):
                        _dots(query[back:], k[writer, group, : c - back], found)
                        for t in range(back, c):
                            seen[reader, writer, group, head, t, t - back] = found[t - back]
                    _multiply(query[back:].ravel(), decay[: c - back].ravel())


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
            query[t, i] *= decay[t, i]


@njit(**OPTIONS)
def _dfirst(first, total, query, dquery, dbefore):
    """The gradients of queries and of the logarithm of what they begin with, from the sum of what they saw."""
    for i in range(query.size):
        part = first[i] * total[i]
        dquery[i] += part
        dbefore[i] += query[i] * part


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
    sums[:] = dtotal
    _multiply(sums, total)
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
def pairs_backward(
    start, stop, dseen, dread, dkeep, dtotal, q, k, log_decay, before, read, keep, total, itself,
    dq, dk, dlog_decay, dbefore,
):  # fmt: skip
    """Adds to the gradients, which are 0 before, those of the groups from `start` to `stop`."""
    c, d = q.shape[2:]
    decay, first, query = np.empty((c, d), q.dtype), np.empty((c, d), q.dtype), np.empty((c, d), q.dtype)
    weights = np.empty(c, q.dtype)
    kept = np.empty((c, c, d), q.dtype)  # of each distance: small enough for the second cache
    for group in range(start, stop):
        for head in range(log_decay.shape[1]):
            dlog, dfirst = dlog_decay[group, head], dbefore[group, head]
            _dweights(
                dread[group, head], dkeep[group, head], dtotal[group, head, 0], read[group, head], keep[group, head],
                total[group, head, 0], query[0], dlog, dfirst,
            )  # fmt: skip
            _exp(log_decay[group, head].ravel(), decay.ravel())
            _exp(before[group, head].ravel(), first.ravel())
            for reader in range(len(q)):
                own, dquery = q[reader, group], dq[reader, group]
                for writer in range(len(k)):
                    key, dkey, given = k[writer, group], dk[writer, group], dseen[reader, writer, group, head]
                    query[:] = 0
                    for back in range(c - 1, 0, -1):
                        for t in range(back, c):
                            weights[t - back] = given[t, t - back]
                        _carry(query[back:], decay[: c - back], weights, key[: c - back], kept[back, : c - back])
                    _dfirst(first.ravel(), query.ravel(), own.ravel(), dquery.ravel(), dfirst.ravel())
                    query[:] = own
                    _multiply(query.ravel(), first.ravel())
                    for back in range(1, c):
                        for t in range(back, c):
                            weights[t - back] = given[t, t - back]
                        rows = c - back
                        _return(query[back:], decay[:rows], weights, kept[back, :rows], dlog[:rows], dkey[:rows])
                    if itself:
                        for t in range(c):
                            weights[t] = given[t, t]
                        _add_rows(weights, key, dquery)
                        _add_rows(weights, own, dkey)
