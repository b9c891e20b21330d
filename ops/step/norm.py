"""One token of a norm, and of what stands around a block."""

import numpy as np
from numba import njit

from ops.linear.kernels import OPTIONS
from ops.step import Around
from ops.step.parts import given

_float = np.float32


Unpacked = tuple[np.ndarray, np.ndarray, np.float32, np.float32, np.float32, np.float32]


def unpack(around: Around) -> Unpacked:
    """As compiled kernels take it."""
    weight, bias = around.weight, around.bias
    return (
        given(weight),
        given(bias),
        _float(around.eps),
        _float(around.centre),
        _float(around.skip),
        _float(around.scale),
    )


@njit(**OPTIONS)
def scaled(x, weight, eps, centre, y):
    """y = x / sqrt(mean(x²) + eps) · (centre + weight), of one row."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    factor = np.float32(1) / np.sqrt(total / np.float32(len(x)) + eps)
    for i in range(len(x)):
        y[i] = x[i] * factor * (centre + weight[i])


@njit(**OPTIONS)
def normed(x, around):
    """The norm of all rows; x itself where there is none."""
    weight, bias, eps, centre, _, _ = around
    if len(weight) == 0:
        return x
    y = np.empty_like(x)
    for row in range(len(x)):
        if len(bias) == 0:
            scaled(x[row], weight, eps, centre, y[row])
            continue
        mean = np.float32(0)
        for i in range(x.shape[1]):
            mean += x[row, i]
        mean /= np.float32(x.shape[1])
        for i in range(x.shape[1]):
            y[row, i] = x[row, i] - mean
        scaled(y[row], weight, eps, centre, y[row])
        for i in range(x.shape[1]):
            y[row, i] += bias[i]
    return y


@njit(**OPTIONS)
def finish(x, y, bias, around):
    """y ← skip · x + scale · (y + bias)."""
    skip, scale = around[4], around[5]
    for row in range(len(y)):
        for i in range(len(bias)):
            y[row, i] += bias[i]
        if skip != np.float32(0) or scale != np.float32(1):
            for i in range(y.shape[1]):
                y[row, i] = skip * x[row, i] + scale * y[row, i]
