"""Norm and gate over rows, compiled by numba when first called.

Sums over a row may be added in another order (`reassoc`), which makes vector instructions of them; `exp` does not
survive that, so the loops that call it are functions of their own.
"""

import math
from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numba.np.numpy_support import carray

from ops import native_team
from ops.native_math import _float_of_bits, exp

PLAIN: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "fastmath": {"contract", "nsz", "arcp"},
    "error_model": "numpy",
}
SUMS = {**PLAIN, "fastmath": {"contract", "nsz", "arcp", "reassoc"}}


@njit(**SUMS)
def _sum(row):
    total = row.dtype.type(0)
    for i in range(len(row)):
        total += row[i]
    return total


@njit(**SUMS)
def _squares(row, mean):
    total = row.dtype.type(0)
    for i in range(len(row)):
        total += (row[i] - mean) * (row[i] - mean)
    return total


@njit(**SUMS)
def _product(one, other):
    total = one.dtype.type(0)
    for i in range(len(one)):
        total += one[i] * other[i]
    return total


@njit(**PLAIN)
def _open(gate, value, y, silu):
    """y = value · a(gate)."""
    one = y.dtype.type(1)
    for i in range(len(y)):
        s = one / (one + exp(-gate[i]))
        y[i] = value[i] * (gate[i] * s if silu else s)


@njit(**PLAIN)
def _bend(gate, opened, bent, silu):
    """a(gate) and its slope."""
    one = gate.dtype.type(1)
    for i in range(len(gate)):
        s = one / (one + exp(-gate[i]))
        opened[i] = gate[i] * s if silu else s
        bent[i] = s * (one + gate[i] * (one - s)) if silu else s * (one - s)


@njit(**PLAIN)
def _statistics(row, eps, center):
    """Mean (0 without `center`) and what u − mean is multiplied by."""
    kind = row.dtype.type
    mean = _sum(row) / kind(len(row)) if center else kind(0)
    # In float64, which LLVM takes no estimate of: that of float32 is nan for infinity.
    return mean, kind(1.0 / math.sqrt(np.float64(_squares(row, mean)) / len(row) + np.float64(eps)))


@njit(**PLAIN)
def _normed(row, mean, rate, weight, bias, into):
    for i in range(len(into)):
        into[i] = (row[i] - mean) * rate * weight[i] + bias[i]


@njit(**PLAIN)
def forward(start, stop, pieces, x, gate, weight, bias, y, means, rates, eps, silu, first, center):
    """Pieces [start, stop) of the rows of [rows, groups · width]: y, and the mean and the rate of each row and group.
    weight, bias: [groups or 1, width]."""
    rows, groups = means.shape
    width = weight.shape[1]
    held = np.empty(width, y.dtype)
    for r in range(rows * start // pieces, rows * stop // pieces):
        for g in range(groups):
            low, high = g * width, (g + 1) * width
            value, door, into = x[r, low:high], gate[r, low:high], y[r, low:high]
            w, b = weight[g % len(weight)], bias[g % len(bias)]
            if first:
                _open(door, value, held, silu)
                means[r, g], rates[r, g] = _statistics(held, eps, center)
                _normed(held, means[r, g], rates[r, g], w, b, into)
            else:
                means[r, g], rates[r, g] = _statistics(value, eps, center)
                _normed(value, means[r, g], rates[r, g], w, b, held)
                _open(door, held, into, silu)


# Loops write one array each, of few others: before LLVM takes vector instructions it compares the places of all that a
# loop writes and reads, and of more than eight pairs it takes none.


@njit(**PLAIN)
def _times(one, other, into):
    for i in range(len(into)):
        into[i] = one[i] * other[i]


@njit(**PLAIN)
def _add_product(one, other, into):
    for i in range(len(into)):
        into[i] += one[i] * other[i]


@njit(**PLAIN)
def _add(one, into):
    for i in range(len(into)):
        into[i] += one[i]


@njit(**PLAIN)
def _standard(row, mean, rate, into):
    for i in range(len(into)):
        into[i] = (row[i] - mean) * rate


@njit(**PLAIN)
def _through_norm(pulled, normed, rate, center, into):
    """The slope at the norm's input, from that at what the weight multiplies."""
    kind = into.dtype.type
    level = _sum(pulled) / kind(len(into)) if center else kind(0)
    pull = _product(pulled, normed) / kind(len(into))
    for i in range(len(into)):
        into[i] = rate * (pulled[i] - level - normed[i] * pull)


@njit(**PLAIN)
def _at_gate(slopes, normed, weight, bias, bent, into):
    for i in range(len(into)):
        into[i] = slopes[i] * (normed[i] * weight[i] + bias[i]) * bent[i]


@njit(**PLAIN)
def _twice(one, other, third, into):
    for i in range(len(into)):
        into[i] = one[i] * other[i] * third[i]


@njit(**PLAIN)
def backward(start, stop, pieces, dy, x, gate, weight, bias, means, rates, dx, dgate, sums, silu, first, center):
    """Pieces [start, stop) of the gradient; each piece's sums for weight and bias in its [2, groups or 1, width] of
    `sums`, which holds zeros."""
    rows, groups = means.shape
    width = weight.shape[1]
    opened, bent = np.empty(width, dx.dtype), np.empty(width, dx.dtype)
    after, pulled = np.empty(width, dx.dtype), np.empty(width, dx.dtype)
    held, normed = np.empty(width, dx.dtype), np.empty(width, dx.dtype)
    for piece in range(start, stop):
        for r in range(rows * piece // pieces, rows * (piece + 1) // pieces):
            for g in range(groups):
                low, high = g * width, (g + 1) * width
                slopes, value, door = dy[r, low:high], x[r, low:high], gate[r, low:high]
                into, onto = dx[r, low:high], dgate[r, low:high]
                place = g % len(weight)
                w, b, mean, rate = weight[place], bias[place], means[r, g], rates[r, g]
                dweight, dbias = sums[piece, 0, place], sums[piece, 1, place]
                _bend(door, opened, bent, silu)
                if first:
                    _times(slopes, w, pulled)
                    _times(value, opened, held)
                    _standard(held, mean, rate, normed)
                    _through_norm(pulled, normed, rate, center, after)
                    _times(after, opened, into)
                    _twice(after, value, bent, onto)
                    _add_product(slopes, normed, dweight)
                    _add(slopes, dbias)
                else:
                    _times(slopes, opened, after)
                    _times(after, w, pulled)
                    _standard(value, mean, rate, normed)
                    _through_norm(pulled, normed, rate, center, into)
                    _at_gate(slopes, normed, w, b, bent, onto)
                    _add_product(after, normed, dweight)
                    _add(after, dbias)


# On torch's threads, each of which takes pieces till none is left: for float32, in which models run.


@cfunc(types.void(types.intp), **PLAIN)
def _take_forward(job: Any) -> None:
    words = carray(native_team.words(job), (18,))
    x, gate, weight, bias, y, means, rates, rows, groups, width = words[:10]
    along, across, kept, eps, silu, first, center, pieces = words[10:]
    read = carray(native_team.floats(x), (rows, along))
    doors = carray(native_team.floats(gate), (rows, across))
    w, b = carray(native_team.floats(weight), (kept, width)), carray(native_team.floats(bias), (kept, width))
    into = carray(native_team.floats(y), (rows, groups * width))
    found = carray(native_team.floats(means), (rows, groups))
    scales = carray(native_team.floats(rates), (rows, groups))
    while True:
        piece = native_team.take(job + 8 * 18)
        if piece >= pieces:
            return
        forward(
            piece, piece + 1, pieces, read, doors, w, b, into, found, scales,
            _float_of_bits(np.int32(eps)), silu, first, center,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip


@cfunc(types.void(types.intp), **PLAIN)
def _take_backward(job: Any) -> None:
    words = carray(native_team.words(job), (21,))
    dy, x, gate, weight, bias, means, rates, dx, dgate, sums, rows, groups, width = words[:13]
    down, along, across, kept, silu, first, center, pieces = words[13:]
    slopes = carray(native_team.floats(dy), (rows, down))
    read = carray(native_team.floats(x), (rows, along))
    doors = carray(native_team.floats(gate), (rows, across))
    w, b = carray(native_team.floats(weight), (kept, width)), carray(native_team.floats(bias), (kept, width))
    found = carray(native_team.floats(means), (rows, groups))
    scales = carray(native_team.floats(rates), (rows, groups))
    into = carray(native_team.floats(dx), (rows, groups * width))
    onto = carray(native_team.floats(dgate), (rows, groups * width))
    totals = carray(native_team.floats(sums), (pieces, 2, kept, width))
    while True:
        piece = native_team.take(job + 8 * 21)
        if piece >= pieces:
            return
        backward(
            piece, piece + 1, pieces, slopes, read, doors, w, b, found, scales, into, onto, totals,
            silu, first, center,
        )  # fmt: skip


_forward_on_all = native_team.team("zoo_gated_norm", _take_forward)
_backward_on_all = native_team.team("zoo_gated_norm_backward", _take_backward)


@njit(**PLAIN)
def forward_on(threads, job):
    """`forward` of a job, whose numbers stand as `_take_forward` reads them, on so many threads."""
    _forward_on_all(job.ctypes.data, threads)
    assert job[18] >= job[17]  # and so the job is kept till here


@njit(**PLAIN)
def backward_on(threads, job):
    _backward_on_all(job.ctypes.data, threads)
    assert job[21] >= job[20]
