"""The loops of the native wkv, compiled by numba when first called.

A task is one row and one tile of channels. Channels are the vector lanes; time runs outside. `marks` is [batch, time]:
0 padding, 1 go on, 2 start a document. Of two numbers e^(a - max(a, b)), e^(b - max(a, b)) one is 1, so a step takes
one exponential, of -|a - b|.

Everything of a tile lives in one array `s`, as rows of `TILE` numbers at constant places, and tokens are copied in and
out: LLVM vectorises a loop only when it can tell its addresses apart. `lanes` is the number of channels rounded up to
whole vectors; the lanes past the last channel compute on zeros.
"""

import numpy as np
from numba import njit

from ops.native_math import exp

# Channels: long runs of a token use the memory better; what is kept of a chunk, 5 rows a token, is 320 KiB: it fits L2.
TILE = 512
CHUNK = 32  # tokens between two stored states
EMPTY = -1e38

# A NaN in the input must come out as NaN: no "nnan", no "ninf".
OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract", "nsz", "arcp"}, "error_model": "numpy"}

# Places in `s`.
NUM, DEN, TOP, PAST, NOW, K, V, W, U, Y = (TILE * row for row in range(10))
GN, GD, GY, DK, DV, DW, DU = (TILE * row for row in range(10, 17))
ROWS = 17
KEPT = TILE * ROWS  # after them, for each token of a chunk, NUM ... NOW as it saw them


@njit(**OPTIONS)
def _load(s, place, row):
    to = s[place : place + len(row)]
    for i in range(len(row)):
        to[i] = row[i]


@njit(**OPTIONS)
def _save(row, s, place):
    of = s[place : place + len(row)]
    for i in range(len(row)):
        row[i] = of[i]


@njit(**OPTIONS)
def _empty(s):
    s[NUM : DEN + TILE] = 0
    s[TOP : TOP + TILE] = EMPTY


@njit(**OPTIONS)
def _average(s, lanes, one, zero):
    """Y from the state and the token."""
    for i in range(lanes):
        d = s[U + i] + s[K + i] - s[TOP + i]
        e = exp(-abs(d))
        past = e if d > zero else one
        now = one if d > zero else e
        s[Y + i] = (past * s[NUM + i] + now * s[V + i]) / (past * s[DEN + i] + now)


@njit(**OPTIONS)
def _step(s, lanes, one, zero):
    """The state after the token, and the factors PAST and NOW that led there."""
    for i in range(lanes):
        decayed = s[TOP + i] + s[W + i]
        d = s[K + i] - decayed
        e = exp(-abs(d))
        past = e if d > zero else one
        now = one if d > zero else e
        s[PAST + i] = past
        s[NOW + i] = now
        s[NUM + i] = past * s[NUM + i] + now * s[V + i]
        s[DEN + i] = past * s[DEN + i] + now
        s[TOP + i] = s[K + i] if d > zero else decayed


@njit(**OPTIONS)
def _adjoint(s, lanes, one, zero):
    """Gradients of the token, and those of the sums before it from those after it."""
    for i in range(lanes):
        gn, gd, v, past, now = s[GN + i], s[GD + i], s[V + i], s[PAST + i], s[NOW + i]
        num, den = s[NUM + i], s[DEN + i]
        d = s[U + i] + s[K + i] - s[TOP + i]
        e = exp(-abs(d))
        before = e if d > zero else one
        current = one if d > zero else e
        inverse = one / (before * den + current)
        y = (before * num + current * v) * inverse
        g = s[GY + i] * inverse
        gu = g * current * (v - y)
        s[DU + i] += gu
        s[DW + i] += past * (num * gn + den * gd)
        s[DK + i] = now * (v * gn + gd) + gu
        s[DV + i] = now * gn + g * current
        s[GN + i] = past * gn + g * before
        s[GD + i] = past * gd - g * before * y


@njit(**OPTIONS)
def forward(begin, end, tile, k, v, w, u, marks, first, y, final, stored):
    """Tasks [begin, end), of `tile` channels of a row each, TILE at most. first, final: [3, batch, channels]: the sums
    and their maximum. stored: [batch, chunks, 3, channels], the state before each chunk, or no chunks to store none."""
    _, time, channels = k.shape
    tiles = (channels + tile - 1) // tile
    one, zero = k.dtype.type(1), k.dtype.type(0)
    store = stored.shape[1] > 0
    s = np.zeros(KEPT, k.dtype)
    for task in range(begin, end):
        b, lo = task // tiles, (task % tiles) * tile
        hi = min(lo + tile, channels)
        lanes = (hi - lo + 15) & ~15
        _load(s, NUM, first[0, b, lo:hi])
        _load(s, DEN, first[1, b, lo:hi])
        _load(s, TOP, first[2, b, lo:hi])
        _load(s, W, w[lo:hi])
        _load(s, U, u[lo:hi])
        for t in range(time):
            if store and t % CHUNK == 0:
                _save(stored[b, t // CHUNK, 0, lo:hi], s, NUM)
                _save(stored[b, t // CHUNK, 1, lo:hi], s, DEN)
                _save(stored[b, t // CHUNK, 2, lo:hi], s, TOP)
            if marks[b, t] == 0:
                y[b, t, lo:hi] = 0
                continue
            if marks[b, t] == 2:
                _empty(s)
            _load(s, K, k[b, t, lo:hi])
            _load(s, V, v[b, t, lo:hi])
            _average(s, lanes, one, zero)
            _save(y[b, t, lo:hi], s, Y)
            _step(s, lanes, one, zero)
        _save(final[0, b, lo:hi], s, NUM)
        _save(final[1, b, lo:hi], s, DEN)
        _save(final[2, b, lo:hi], s, TOP)


@njit(**OPTIONS)
def _again(s, b, from_t, to_t, lo, hi, lanes, k, v, marks, stored, one, zero):
    """Compute the states of one chunk again, from the stored one before it, and keep them."""
    row = stored[b, from_t // CHUNK]
    _load(s, NUM, row[0, lo:hi])
    _load(s, DEN, row[1, lo:hi])
    _load(s, TOP, row[2, lo:hi])
    for t in range(from_t, to_t):
        if marks[b, t] == 0:
            continue
        if marks[b, t] == 2:
            _empty(s)
        _load(s, K, k[b, t, lo:hi])
        _load(s, V, v[b, t, lo:hi])
        kept = KEPT + (t - from_t) * 5 * TILE
        _load(s, kept, s[NUM : TOP + TILE])
        _step(s, lanes, one, zero)
        _load(s, kept + 3 * TILE, s[PAST : NOW + TILE])


@njit(**OPTIONS)
def backward(begin, end, tile, k, v, w, u, marks, stored, gy, gfinal, dk, dv, dw, du, dfirst):
    """Tasks [begin, end). gfinal, dfirst: [.., batch, channels], of numerator and denominator (maxima are constants).
    dw, du: [batch, channels], to be summed over the batch.

    GN, GD are the gradients of the sums at their own maximum. They obey GN[t] = past GN[t+1] + gy/z e^(m - top) with
    the forward pass's own factors, all at most 1: nothing can overflow.
    """
    _, time, channels = k.shape
    tiles = (channels + tile - 1) // tile
    one, zero = k.dtype.type(1), k.dtype.type(0)
    s = np.zeros(KEPT + CHUNK * 5 * TILE, k.dtype)
    for task in range(begin, end):
        b, lo = task // tiles, (task % tiles) * tile
        hi = min(lo + tile, channels)
        lanes = (hi - lo + 15) & ~15
        _load(s, W, w[lo:hi])
        _load(s, U, u[lo:hi])
        _load(s, GN, gfinal[0, b, lo:hi])
        _load(s, GD, gfinal[1, b, lo:hi])
        s[DW : DU + TILE] = 0
        for chunk in range((time + CHUNK - 1) // CHUNK - 1, -1, -1):
            from_t, to_t = chunk * CHUNK, min((chunk + 1) * CHUNK, time)
            _again(s, b, from_t, to_t, lo, hi, lanes, k, v, marks, stored, one, zero)
            for t in range(to_t - 1, from_t - 1, -1):
                if marks[b, t] == 0:
                    dk[b, t, lo:hi] = 0
                    dv[b, t, lo:hi] = 0
                    continue
                kept = KEPT + (t - from_t) * 5 * TILE
                _load(s, NUM, s[kept : kept + 5 * TILE])
                _load(s, K, k[b, t, lo:hi])
                _load(s, V, v[b, t, lo:hi])
                _load(s, GY, gy[b, t, lo:hi])
                _adjoint(s, lanes, one, zero)
                _save(dk[b, t, lo:hi], s, DK)
                _save(dv[b, t, lo:hi], s, DV)
                if marks[b, t] == 2:
                    s[GN : GD + TILE] = 0
        _save(dw[b, lo:hi], s, DW)
        _save(du[b, lo:hi], s, DU)
        _save(dfirst[0, b, lo:hi], s, GN)
        _save(dfirst[1, b, lo:hi], s, GD)
