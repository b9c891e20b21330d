"""Gated activations over rows, compiled by numba when first called. Without `reassoc`, which `exp` does not survive."""

from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numba.np.numpy_support import carray

from ops import native_team
from ops.native_math import exp

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "fastmath": {"contract", "nsz", "arcp"},
    "error_model": "numpy",
}
SLOPE, CUBIC = 0.7978845608028654, 0.044715  # sqrt(2/π) and the cubic term of GELU's approximation


@njit(**OPTIONS)
def silu(start, stop, inner, y):
    """Rows [start, stop): y = g / (1 + e^−g) · v."""
    hidden = y.shape[1]
    one = y.dtype.type(1)
    for r in range(start, stop):
        gate, value, into = inner[r, :hidden], inner[r, hidden:], y[r]
        for i in range(hidden):
            into[i] = gate[i] / (one + exp(-gate[i])) * value[i]


@njit(**OPTIONS)
def silu_backward(start, stop, dy, inner, made):
    """Rows [start, stop) of the gradient: dg = dy · v · s · (1 + g · (1 − s)), dv = dy · g · s, s = 1 / (1 + e^−g)."""
    hidden = dy.shape[1]
    one = dy.dtype.type(1)
    for r in range(start, stop):
        gate, value, slopes = inner[r, :hidden], inner[r, hidden:], dy[r]
        dgate, dvalue = made[r, :hidden], made[r, hidden:]
        for i in range(hidden):
            g = gate[i]
            s = one / (one + exp(-g))
            dgate[i] = slopes[i] * value[i] * s * (one + g * (one - s))
            dvalue[i] = slopes[i] * g * s


@njit(**OPTIONS)
def gelu_tanh(start, stop, inner, y):
    """Rows [start, stop): y = g / 2 · (1 + tanh u) · v = g · (1 − 1 / (e^2u + 1)) · v, u = SLOPE · (g + CUBIC · g³)."""
    hidden = y.shape[1]
    one, twice, cubic = y.dtype.type(1), y.dtype.type(2 * SLOPE), y.dtype.type(CUBIC)
    for r in range(start, stop):
        gate, value, into = inner[r, :hidden], inner[r, hidden:], y[r]
        for i in range(hidden):
            g = gate[i]
            into[i] = g * (one - one / (exp(twice * (g + cubic * g * g * g)) + one)) * value[i]


@njit(**OPTIONS)
def gelu_tanh_backward(start, stop, dy, inner, made):
    """Rows [start, stop) of the gradient: with p = 1 − 1 / (e^2u + 1), dg = dy · v · (p + g · p · (1 − p) · 2u'), dv =
    dy · g · p."""
    hidden = dy.shape[1]
    one, twice, cubic = dy.dtype.type(1), dy.dtype.type(2 * SLOPE), dy.dtype.type(CUBIC)
    three = dy.dtype.type(3 * CUBIC)
    for r in range(start, stop):
        gate, value, slopes = inner[r, :hidden], inner[r, hidden:], dy[r]
        dgate, dvalue = made[r, :hidden], made[r, hidden:]
        for i in range(hidden):
            g = gate[i]
            p = one - one / (exp(twice * (g + cubic * g * g * g)) + one)
            dgate[i] = slopes[i] * value[i] * (p + g * p * (one - p) * twice * (one + three * g * g))
            dvalue[i] = slopes[i] * g * p


# On torch's threads, each of which takes pieces of the rows till none is left: for float32, in which models run.


@cfunc(types.void(types.intp), **OPTIONS)
def _take_forward(job: Any) -> None:
    inner, y, rows, hidden, tanh, pieces, _ = carray(native_team.words(job), (7,))
    read, into = carray(native_team.floats(inner), (rows, 2 * hidden)), carray(native_team.floats(y), (rows, hidden))
    while True:
        piece = native_team.take(job + 8 * 6)
        if piece >= pieces:
            return
        start, stop = rows * piece // pieces, rows * (piece + 1) // pieces
        if tanh:
            gelu_tanh(start, stop, read, into)
        else:
            silu(start, stop, read, into)


@cfunc(types.void(types.intp), **OPTIONS)
def _take_backward(job: Any) -> None:
    dy, inner, made, rows, hidden, tanh, pieces, _ = carray(native_team.words(job), (8,))
    slopes, read = carray(native_team.floats(dy), (rows, hidden)), carray(native_team.floats(inner), (rows, 2 * hidden))
    into = carray(native_team.floats(made), (rows, 2 * hidden))
    while True:
        piece = native_team.take(job + 8 * 7)
        if piece >= pieces:
            return
        start, stop = rows * piece // pieces, rows * (piece + 1) // pieces
        if tanh:
            gelu_tanh_backward(start, stop, slopes, read, into)
        else:
            silu_backward(start, stop, slopes, read, into)


_forward_on_all = native_team.team("zoo_gated", _take_forward)
_backward_on_all = native_team.team("zoo_gated_backward", _take_backward)


@njit(**OPTIONS)
def forward_on(threads, tanh, inner, y):
    """y of all rows in float32, contiguous, on so many threads; `tanh`: GELU's, not SiLU."""
    rows, hidden = y.shape
    job = np.empty(7, np.int64)
    job[0], job[1], job[2], job[3] = inner.ctypes.data, y.ctypes.data, rows, hidden
    job[4], job[5], job[6] = tanh, min(rows, 4 * threads), 0
    _forward_on_all(job.ctypes.data, threads)
    assert job[6] >= job[5]  # and so the job is kept till here


@njit(**OPTIONS)
def backward_on(threads, tanh, dy, inner, made):
    """The gradient of all rows; otherwise as `forward_on`."""
    rows, hidden = dy.shape
    job = np.empty(8, np.int64)
    job[0], job[1], job[2], job[3] = dy.ctypes.data, inner.ctypes.data, made.ctypes.data, rows
    job[4], job[5], job[6], job[7] = hidden, tanh, min(rows, 4 * threads), 0
    _backward_on_all(job.ctypes.data, threads)
    assert job[7] >= job[6]
