"""RMSNorm over rows, compiled by numba when first called. `reassoc`: a sum becomes a vector instruction only where its
terms may be added in another order; that order is a row's own and does not depend on threads."""

import math
from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numba.np.numpy_support import carray

from ops import native_team
from ops.native_math import _float_of_bits

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "fastmath": {"contract", "nsz", "arcp", "reassoc"},
    "error_model": "numpy",
}


@njit(**OPTIONS)
def _squares(row):
    total = row.dtype.type(0)
    for i in range(len(row)):
        total += row[i] * row[i]
    return total


@njit(**OPTIONS)
def _weighed(dy, row, weight):
    """Σ dy · weight · x."""
    total = row.dtype.type(0)
    for i in range(len(row)):
        total += dy[i] * weight[i] * row[i]
    return total


@njit(**OPTIONS)
def forward(start, stop, pieces, x, weight, y, rates, eps):
    """Pieces [start, stop) of the rows: y, and what each row is multiplied by."""
    rows, width = x.shape
    for r in range(rows * start // pieces, rows * stop // pieces):
        row, into = x[r], y[r]
        # In float64, which LLVM takes no estimate of: that of float32 is nan for infinity.
        rate = x.dtype.type(1.0 / math.sqrt(np.float64(_squares(row)) / width + np.float64(eps)))
        rates[r] = rate
        for i in range(width):
            into[i] = row[i] * rate * weight[i]


@njit(**OPTIONS)
def backward(start, stop, pieces, dy, x, weight, rates, dx, sums):
    """Pieces [start, stop) of the rows: dx = rate · (dy · w − x · rate² · mean(dy · w · x)), and each piece's sum of
    dy · x · rate in its row of `sums`, which holds zeros."""
    rows, width = x.shape
    for piece in range(start, stop):
        total = sums[piece]
        for r in range(rows * piece // pieces, rows * (piece + 1) // pieces):
            slopes, row, into, rate = dy[r], x[r], dx[r], rates[r]
            pull = _weighed(slopes, row, weight) * rate * rate / x.dtype.type(width)
            for i in range(width):
                into[i] = rate * (slopes[i] * weight[i] - row[i] * pull)
            for i in range(width):
                total[i] += slopes[i] * row[i] * rate


# On torch's threads, each of which takes pieces till none is left: for float32, in which models run.


@cfunc(types.void(types.intp), **OPTIONS)
def _take_forward(job: Any) -> None:
    x, weight, y, rates, rows, width, eps, pieces, _ = carray(native_team.words(job), (9,))
    read, scales = carray(native_team.floats(x), (rows, width)), carray(native_team.floats(weight), (width,))
    into, found = carray(native_team.floats(y), (rows, width)), carray(native_team.floats(rates), (rows,))
    while True:
        piece = native_team.take(job + 8 * 8)
        if piece >= pieces:
            return
        forward(piece, piece + 1, pieces, read, scales, into, found, _float_of_bits(np.int32(eps)))  # pyright: ignore[reportCallIssue]


@cfunc(types.void(types.intp), **OPTIONS)
def _take_backward(job: Any) -> None:
    dy, x, weight, rates, dx, sums, rows, width, pieces, _ = carray(native_team.words(job), (10,))
    slopes, read = carray(native_team.floats(dy), (rows, width)), carray(native_team.floats(x), (rows, width))
    scales, found = carray(native_team.floats(weight), (width,)), carray(native_team.floats(rates), (rows,))
    into, totals = carray(native_team.floats(dx), (rows, width)), carray(native_team.floats(sums), (pieces, width))
    while True:
        piece = native_team.take(job + 8 * 9)
        if piece >= pieces:
            return
        backward(piece, piece + 1, pieces, slopes, read, scales, found, into, totals)


_forward_on_all = native_team.team("zoo_rms_norm", _take_forward)
_backward_on_all = native_team.team("zoo_rms_norm_backward", _take_backward)


@njit(**OPTIONS)
def forward_on(threads, pieces, x, weight, y, rates, eps):
    """`forward` of all rows in float32, contiguous, on so many threads. eps: the bits of a float32."""
    job = np.empty(9, np.int64)
    job[0], job[1], job[2], job[3] = x.ctypes.data, weight.ctypes.data, y.ctypes.data, rates.ctypes.data
    job[4], job[5], job[6], job[7], job[8] = x.shape[0], x.shape[1], eps, pieces, 0
    _forward_on_all(job.ctypes.data, threads)
    assert job[8] >= pieces  # and so the job is kept till here


@njit(**OPTIONS)
def backward_on(threads, dy, x, weight, rates, dx, sums):
    """`backward` of all pieces in float32, contiguous, on so many threads."""
    job = np.empty(10, np.int64)
    job[0], job[1], job[2], job[3] = dy.ctypes.data, x.ctypes.data, weight.ctypes.data, rates.ctypes.data
    job[4], job[5], job[6], job[7], job[8], job[9] = dx.ctypes.data, sums.ctypes.data, *x.shape, len(sums), 0
    _backward_on_all(job.ctypes.data, threads)
    assert job[9] >= len(sums)
