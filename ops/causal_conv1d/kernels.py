"""The loops of the native causal convolution, compiled by numba when first called.

A task is one row and one tile of channels; time runs outside, channels are the vector lanes. `marks` is [batch, time]:
0 padding, 1 go on, 2 start a document. `recent` holds the places of the last `taps - 1` inputs of the document, oldest
first: below `taps - 1` a row of the state, else token place - (taps - 1), -1 where there is none.

Inner loops take slices and index them from 0: LLVM vectorises a loop only where no index could be negative.
"""

import numpy as np
from numba import njit

from ops.native_math import exp

TILE = 1024  # channels at most of a task: long runs of a token use the memory better

# A NaN in the input must come out as NaN: no "nnan", no "ninf".
OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract", "nsz", "arcp"}, "error_model": "numpy"}


@njit(**OPTIONS)
def _push(recent, place):
    for j in range(len(recent) - 1):
        recent[j] = recent[j + 1]
    if len(recent) > 0:
        recent[-1] = place


@njit(**OPTIONS)
def _add(to, a, b):
    """to += a · b."""
    for i in range(len(to)):
        to[i] += a[i] * b[i]


@njit(**OPTIONS)
def _sum(acc, b, t, lo, hi, x, weight, bias, state, recent):
    """The convolution at token t into acc."""
    held = len(recent)
    acc[:] = bias[lo:hi]
    for tap in range(held):
        place = recent[tap]
        if place >= held:
            _add(acc, weight[tap, lo:hi], x[b, place - held, lo:hi])
        elif place >= 0:
            _add(acc, weight[tap, lo:hi], state[b, place, lo:hi])
    _add(acc, weight[held, lo:hi], x[b, t, lo:hi])


@njit(**OPTIONS)
def _silu(to, acc, one):
    for i in range(len(to)):
        to[i] = acc[i] / (one + exp(-acc[i]))


@njit(**OPTIONS)
def _silu_back(acc, g, one):
    """acc becomes g · silu'(acc)."""
    for i in range(len(acc)):
        gate = one / (one + exp(-acc[i]))
        acc[i] = g[i] * gate * (one + acc[i] * (one - gate))


@njit(**OPTIONS)
def forward(begin, end, tile, x, weight, bias, state, marks, silu, y, final):
    """Tasks [begin, end), of `tile` channels of a row each. weight: [taps, channels]; state, final: [batch, taps - 1,
    channels]. x may have more channels, which are not read."""
    time, channels = x.shape[1], weight.shape[1]
    held = weight.shape[0] - 1
    tiles = (channels + tile - 1) // tile
    one = x.dtype.type(1)
    recent = np.empty(held, np.int64)
    space = np.empty(tile, x.dtype)
    for task in range(begin, end):
        b, lo = task // tiles, (task % tiles) * tile
        hi = min(lo + tile, channels)
        acc = space[: hi - lo]
        for j in range(held):
            recent[j] = j
        for t in range(time):
            out = y[b, t, lo:hi]
            if marks[b, t] == 0:
                out[:] = 0
                continue
            if marks[b, t] == 2:
                recent[:] = -1
            if silu:
                _sum(acc, b, t, lo, hi, x, weight, bias, state, recent)
                _silu(out, acc, one)
            else:
                _sum(out, b, t, lo, hi, x, weight, bias, state, recent)
            _push(recent, t + held)
        for j in range(held):
            if recent[j] < 0:
                final[b, j, lo:hi] = 0
            elif recent[j] < held:
                final[b, j, lo:hi] = state[b, recent[j], lo:hi]
            else:
                final[b, j, lo:hi] = x[b, recent[j] - held, lo:hi]


@njit(**OPTIONS)
def backward(begin, end, tile, x, weight, bias, state, marks, silu, gy, gfinal, dx, dweight, dbias, dstate):
    """Tasks [begin, end), as of `forward`; gy may have more channels too. dweight: [batch, taps, channels] and dbias:
    [batch, channels], to be summed over the batch.

    A token's own tap comes first in time, so dx is cleared there and later tokens add to it.
    """
    time, channels = x.shape[1], weight.shape[1]
    held = weight.shape[0] - 1
    tiles = (channels + tile - 1) // tile
    one = x.dtype.type(1)
    recent = np.empty(held, np.int64)
    space = np.empty(tile, x.dtype)
    ones = np.ones(tile, x.dtype)
    for task in range(begin, end):
        b, lo = task // tiles, (task % tiles) * tile
        hi = min(lo + tile, channels)
        g = space[: hi - lo]
        dweight[b, :, lo:hi] = 0
        dbias[b, lo:hi] = 0
        dstate[b, :, lo:hi] = 0
        for j in range(held):
            recent[j] = j
        for t in range(time):
            dx[b, t, lo:hi] = 0
            if marks[b, t] == 0:
                continue
            if marks[b, t] == 2:
                recent[:] = -1
            if silu:
                _sum(g, b, t, lo, hi, x, weight, bias, state, recent)
                _silu_back(g, gy[b, t, lo:hi], one)
            else:
                g[:] = gy[b, t, lo:hi]
            _add(dbias[b, lo:hi], g, ones)
            for tap in range(held):
                place = recent[tap]
                if place >= held:
                    _add(dweight[b, tap, lo:hi], g, x[b, place - held, lo:hi])
                    _add(dx[b, place - held, lo:hi], g, weight[tap, lo:hi])
                elif place >= 0:
                    _add(dweight[b, tap, lo:hi], g, state[b, place, lo:hi])
                    _add(dstate[b, place, lo:hi], g, weight[tap, lo:hi])
            _add(dweight[b, held, lo:hi], g, x[b, t, lo:hi])
            _add(dx[b, t, lo:hi], g, weight[held, lo:hi])
            _push(recent, t + held)
        for j in range(held):
            if recent[j] >= held:
                _add(dx[b, recent[j] - held, lo:hi], gfinal[b, j, lo:hi], ones)
            elif recent[j] >= 0:
                _add(dstate[b, recent[j], lo:hi], gfinal[b, j, lo:hi], ones)
