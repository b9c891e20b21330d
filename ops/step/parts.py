"""What the kernels of several blocks are made of."""

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from ops.linear.kernels import OPTIONS
from ops.native_array import array
from ops.native_math import exp

# Not `reassoc`: exp rounds by adding a large number and taking it away again.
EXACT: dict[str, Any] = OPTIONS | {"fastmath": {"contract", "nsz", "arcp"}}


NOTHING = np.zeros(0, np.float32)


def given(tensor: Tensor | None) -> np.ndarray:
    """A weight as kernels take it: no numbers where there is none."""
    return NOTHING if tensor is None else array(tensor)


@njit(**EXACT)
def sigmoid(x):
    return np.float32(1) / (np.float32(1) + exp(-x))


@njit(**EXACT)
def silu(values):
    """In place."""
    for i in range(len(values)):
        values[i] = values[i] * sigmoid(values[i])


@njit(**EXACT)
def gelu_tanh(values):
    """In place: GELU by its tanh approximation."""
    for i in range(len(values)):
        v = values[i]
        inner = np.float32(0.7978845608028654) * (v + np.float32(0.044715) * v * v * v)
        values[i] = v * sigmoid(inner + inner)  # (1 + tanh u) / 2 = sigmoid(2u)


@njit(**EXACT)
def softplus(x):
    """log(1 + e^x) of one number, to 2 units in the last place: log(1 + u) = 2 artanh(u / (2 + u)), of which the last
    term left out is below 1e-9 of the sum. The C library's would keep a loop from becoming vector instructions."""
    u = exp(-abs(x))
    s = u / (np.float32(2) + u)
    q = s * s
    p = np.float32(1 / 15) * q + np.float32(1 / 13)
    p = (p * q + np.float32(1 / 11)) * q + np.float32(1 / 9)
    p = (p * q + np.float32(1 / 7)) * q + np.float32(1 / 5)
    p = (p * q + np.float32(1 / 3)) * q + np.float32(1)
    return max(x, np.float32(0)) + np.float32(2) * s * p


@njit(**OPTIONS)
def dot(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit(**OPTIONS)
def add(y, x, factor):
    """y += factor · x."""
    for i in range(len(y)):
        y[i] += factor * x[i]


@njit(**OPTIONS)
def plus(rows, bias):
    """bias to each row, none where it has no numbers."""
    if len(bias) > 0:
        for row in range(len(rows)):
            add(rows[row], bias, np.float32(1))


@njit(**OPTIONS)
def convolve(x, weight, bias, before, after, y):
    """y = bias + Σ_j weight[:, j] · (the token j places behind the oldest), x the newest; `before` and `after` hold the
    taps - 1 tokens before and up to it [taps - 1, channels]."""
    taps = weight.shape[1]
    for c in range(len(x)):
        y[c] = weight[c, taps - 1] * x[c] + (bias[c] if len(bias) > 0 else np.float32(0))
    for j in range(taps - 1):
        for c in range(len(x)):
            y[c] += weight[c, j] * before[j, c]
    for j in range(taps - 1):
        after[j] = before[j + 1] if j + 1 < taps - 1 else x
