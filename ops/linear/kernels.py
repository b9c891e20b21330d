"""The product of a matrix with a few vectors, compiled by numba when first called.

`reassoc`: a sum becomes a vector instruction only where its terms may be added in another order. bfloat16 comes as the
int16 of the same bits, and is widened by shifting.
"""

from typing import Any

import numpy as np
from llvmlite import binding
from numba import cfunc, njit, types
from numba.extending import overload
from numba.np.numpy_support import carray

from ops import native_team
from ops.linear.ahead import dots
from ops.native_math import _float_of_bits

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "fastmath": {"contract", "nsz", "arcp", "reassoc"},
    "error_model": "numpy",
}


def _wide(x):
    """A stored number as float32."""
    raise NotImplementedError("_wide works inside numba-compiled functions only")


@overload(_wide, inline="always")
def _wide_of(x):
    if x == types.int16:
        return lambda x: _float_of_bits(np.int32(np.int32(x) << np.int32(16)))  # pyright: ignore[reportCallIssue]
    return lambda x: x


@njit(**OPTIONS)
def _one(row, x):
    total = np.float32(0)
    for i in range(len(row)):
        total += _wide(row[i]) * x[i]
    return total


@njit(**OPTIONS)
def _two(row, first, second):
    a = b = np.float32(0)
    for i in range(len(row)):
        wide = _wide(row[i])
        a += wide * first[i]
        b += wide * second[i]
    return a, b


# Rows of a weight read side by side: Intel's processors read two by a fifth faster, AMD's at half the rate.
STREAMS = 1 if binding.get_host_cpu_name().startswith("znver") else 2
_dots, _dot, _pair = dots(STREAMS, 1), dots(1, 1), dots(1, 2)


@njit(**OPTIONS)
def _single(start, stop, weight, x, y):
    """`product` for one row of x, all of it float32 and contiguous."""
    inputs = weight.shape[1]
    size, read, first = 4 * inputs, x.ctypes.data, weight.ctypes.data
    part = (stop - start) // STREAMS
    for output in range(start, start + part):
        found = _dots(first + output * size, part * size, read, 0, inputs)
        for each in range(STREAMS):
            y[0, output + each * part] = found[each]
    for output in range(start + STREAMS * part, stop):
        y[0, output] = _dot(first + output * size, 0, read, 0, inputs)[0]


@njit(**OPTIONS)
def _several(start, stop, weight, x, y):
    """`product`, all of it float32 and contiguous."""
    rows, inputs = x.shape
    size, read, first = 4 * inputs, x.ctypes.data, weight.ctypes.data
    for output in range(start, stop):
        for each in range(0, rows - 1, 2):
            y[each, output], y[each + 1, output] = _pair(first + output * size, 0, read + each * size, size, inputs)
        if rows % 2 == 1:
            y[rows - 1, output] = _dot(first + output * size, 0, read + (rows - 1) * size, 0, inputs)[0]


@njit(**OPTIONS)
def _wide_product(start, stop, weight, x, y):
    """`product` of a weight in bfloat16."""
    rows = len(x)
    for output in range(start, stop):
        row = weight[output]
        for each in range(0, rows - 1, 2):
            y[each, output], y[each + 1, output] = _two(row, x[each], x[each + 1])
        if rows % 2 == 1:
            y[rows - 1, output] = _one(row, x[rows - 1])


@njit(**OPTIONS)
def product(start, stop, weight, x, y):
    """y[:, start:stop] = x · weight[start:stop]ᵀ, with x [rows, inputs] and y [rows, outputs] in float32; weight and x
    contiguous. Reads each row of the weight once, for up to two rows of x."""
    if weight.itemsize == 2:
        _wide_product(start, stop, weight, x, y)
    elif len(x) == 1:
        _single(start, stop, weight, x, y)
    else:
        _several(start, stop, weight, x, y)


LEAST = 1 << 16  # numbers of a weight: below, one thread has read them before another is there
PIECE = 1 << 14  # numbers that are worth going for


@cfunc(types.void(types.intp), **OPTIONS)
def _take_pieces(job: Any) -> None:
    """What each thread of a team does with the job of `spread`."""
    weight, x, y, outputs, inputs, rows, size, pieces, _ = carray(native_team.words(job), (9,))
    read, written = carray(native_team.floats(x), (rows, inputs)), carray(native_team.floats(y), (rows, outputs))
    while True:
        piece = native_team.take(job + 8 * 8)
        if piece >= pieces:
            return
        start, stop = outputs * piece // pieces, outputs * (piece + 1) // pieces
        if size == 2:
            product(start, stop, carray(native_team.halves(weight), (outputs, inputs)), read, written)
        else:
            product(start, stop, carray(native_team.floats(weight), (outputs, inputs)), read, written)


_on_all = native_team.team("zoo_product", _take_pieces)


@njit(**OPTIONS)
def spread(threads, weight, x, y):
    """y = x · weightᵀ, on so many threads of torch's (`ops.native_team`) where that is worth their meeting; weight, x
    contiguous. A number of y is summed by one thread, in the same order for any number of them."""
    outputs, inputs = weight.shape
    if threads == 1 or weight.size < LEAST or y.strides[0] != outputs * y.itemsize:
        product(0, outputs, weight, x, y)
        return
    job = np.empty(9, np.int64)
    job[0], job[1], job[2] = weight.ctypes.data, x.ctypes.data, y.ctypes.data
    job[3], job[4], job[5], job[6] = outputs, inputs, len(x), weight.itemsize
    # Several pieces for each: another process may hold a thread up.
    job[7], job[8] = min(outputs, 4 * threads, max(weight.size // PIECE, 1)), 0
    _on_all(job.ctypes.data, threads)
    assert job[8] >= job[7]  # and so the job is kept till here
