"""The product of a matrix with a few vectors, compiled by numba when first called.

`reassoc`: a sum becomes a vector instruction only where its terms may be added in another order. bfloat16 comes as the
int16 of the same bits, and is widened by shifting.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload

from ops.native_math import _float_of_bits

OPTIONS = {
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


@njit(**OPTIONS)
def product(start, stop, weight, x, y):
    """y[:, start:stop] = x · weight[start:stop]ᵀ, with x [rows, inputs] and y [rows, outputs] in float32.

    One row of the weight at a time: reading several side by side took three times as long, as no page follows another.
    """
    rows = len(x)
    for output in range(start, stop):
        row = weight[output]
        for each in range(0, rows - 1, 2):
            y[each, output], y[each + 1, output] = _two(row, x[each], x[each + 1])
        if rows % 2 == 1:
            y[rows - 1, output] = _one(row, x[rows - 1])
