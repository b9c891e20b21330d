"""Causal convolution by one complex transform a sequence, compiled by numba when first called.

With z_t = x_t ω^t, ω = e^(iπ/2n), and the kernel likewise, the circular convolution of n points is
ω^t (y_t + i y_{t+n}), y the linear one (the right-angle convolution: Nussbaumer, Fast Fourier Transform and Convolution
Algorithms, 1982). So n real tokens take a complex transform of n points, where zeros would have doubled it. Both
transforms leave frequencies in an order of their own: only products of them follow, and the inverse takes them so.
"""

import numpy as np
from numba import njit

from ops.long_conv.butterflies import LANES, four, four_back, three, three_back, two, two_back

OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract", "nsz", "arcp"}, "error_model": "numpy"}


@njit(**OPTIONS)
def _forward(real, imaginary, n, radices, cos, sin):
    """Decimation in frequency, in place: cos, sin of 2π t / n."""
    length = n
    for radix in radices:
        part, step = length // radix, n // length
        for base in range(0, n, length):
            for j in range(part):
                i, t = base + j, j * step
                if radix == 4:
                    rows = (i, i + part, i + 2 * part, i + 3 * part)
                    four(real, imaginary, rows, (cos[t], sin[t], cos[2 * t], sin[2 * t], cos[3 * t], sin[3 * t]))
                elif radix == 2:
                    two(real, imaginary, (i, i + part), (cos[t], sin[t]))
                else:
                    three(real, imaginary, (i, i + part, i + 2 * part), (cos[t], sin[t], cos[2 * t], sin[2 * t]))
        length = part


@njit(**OPTIONS)
def _backward(real, imaginary, n, radices, cos, sin):
    """The inverse of `_forward`, times n."""
    length = 1
    for place in range(len(radices) - 1, -1, -1):
        radix, part = radices[place], length
        length = part * radix
        step = n // length
        for base in range(0, n, length):
            for j in range(part):
                i, t = base + j, j * step
                if radix == 4:
                    rows = (i, i + part, i + 2 * part, i + 3 * part)
                    four_back(real, imaginary, rows, (cos[t], sin[t], cos[2 * t], sin[2 * t], cos[3 * t], sin[3 * t]))
                elif radix == 2:
                    two_back(real, imaginary, (i, i + part), (cos[t], sin[t]))
                else:
                    rows = (i, i + part, i + 2 * part)
                    three_back(real, imaginary, rows, (cos[t], sin[t], cos[2 * t], sin[2 * t]))


@njit(**OPTIONS)
def _load(x, first, width, back, n, cos, sin, real, imaginary):
    """x [time, channels] from channel `first` on, backwards in time if `back`, times ω^t; zeros behind it and in lanes
    without a channel."""
    time = len(x)
    for t in range(time):
        row = x[time - 1 - t if back else t]
        start = LANES * t
        for c in range(width):
            value = row[first + c]
            real[start + c], imaginary[start + c] = value * cos[t], value * sin[t]
        for c in range(width, LANES):
            real[start + c] = imaginary[start + c] = 0
    real[LANES * time : LANES * n] = 0
    imaginary[LANES * time : LANES * n] = 0


@njit(**OPTIONS)
def _load_kernel(kernel, first, width, n, cos, sin, real, imaginary):
    """The same of kernel [channels, taps]."""
    taps = kernel.shape[1]
    real[: LANES * n] = 0
    imaginary[: LANES * n] = 0
    for c in range(width):
        row = kernel[first + c]
        for t in range(taps):
            real[LANES * t + c], imaginary[LANES * t + c] = row[t] * cos[t], row[t] * sin[t]


@njit(**OPTIONS)
def _product(a_real, a_imaginary, b_real, b_imaginary, real, imaginary):
    for i in range(len(real)):
        x, y, u, v = a_real[i], a_imaginary[i], b_real[i], b_imaginary[i]
        real[i] = x * u - y * v
        imaginary[i] = x * v + y * u


@njit(**OPTIONS)
def _value(real, imaginary, t, c, cos, sin):
    return real[LANES * t + c] * cos[t] + imaginary[LANES * t + c] * sin[t]


@njit(**OPTIONS)
def _store(real, imaginary, begin, end, first, width, back, cos, sin, out):
    """out[t] ← the convolution at begin + t, backwards in time if `back`."""
    count = end - begin
    for t in range(count):
        row = out[count - 1 - t if back else t]
        at = begin + t
        for c in range(width):
            row[first + c] = _value(real, imaginary, at, c, cos, sin)


@njit(**OPTIONS)
def convolve(start, stop, rows, kernel, time, n, radices, circle, angle, out):
    """out [rows, time, channels]: the last `time` places of each row; blocks of LANES channels from start to stop.

    circle: cos and sin of 2π t / n; angle: those of π t / 2n, over √n, so that a product of two such is over n."""
    channels = len(kernel)
    k_real, k_imaginary = np.empty(LANES * n, rows.dtype), np.empty(LANES * n, rows.dtype)
    real, imaginary = np.empty(LANES * n, rows.dtype), np.empty(LANES * n, rows.dtype)
    for block in range(start, stop):
        first = block * LANES
        width = min(LANES, channels - first)
        _load_kernel(kernel, first, width, n, angle[0], angle[1], k_real, k_imaginary)
        _forward(k_real, k_imaginary, n, radices, circle[0], circle[1])
        for row in range(len(rows)):
            _load(rows[row], first, width, False, n, angle[2], angle[3], real, imaginary)
            _forward(real, imaginary, n, radices, circle[0], circle[1])
            _product(real, imaginary, k_real, k_imaginary, real, imaginary)
            _backward(real, imaginary, n, radices, circle[0], circle[1])
            extended = rows.shape[1]
            _store(real, imaginary, extended - time, extended, first, width, False, angle[2], angle[3], out[row])


@njit(**OPTIONS)
def adjoints(start, stop, rows, kernel, dy, n, radices, circle, angle, asked, out, drows, dkernel):
    """What is asked for of: the convolution again, the gradient of rows, that of kernel. With dy turned round in time
    both gradients are causal convolutions too, of it with the kernel and with the rows."""
    channels, taps = kernel.shape
    time, extended = dy.shape[1], rows.shape[1]
    k_real, k_imaginary = np.empty(LANES * n, rows.dtype), np.empty(LANES * n, rows.dtype)
    x_real, x_imaginary = np.empty(LANES * n, rows.dtype), np.empty(LANES * n, rows.dtype)
    g_real, g_imaginary = np.empty(LANES * n, rows.dtype), np.empty(LANES * n, rows.dtype)
    real, imaginary = np.empty(LANES * n, rows.dtype), np.empty(LANES * n, rows.dtype)
    for block in range(start, stop):
        first = block * LANES
        width = min(LANES, channels - first)
        sum_real, sum_imaginary = np.zeros(LANES * n, rows.dtype), np.zeros(LANES * n, rows.dtype)
        if asked[0] or asked[1]:
            _load_kernel(kernel, first, width, n, angle[0], angle[1], k_real, k_imaginary)
            _forward(k_real, k_imaginary, n, radices, circle[0], circle[1])
        for row in range(len(rows)):
            if asked[0] or asked[2]:
                _load(rows[row], first, width, False, n, angle[2], angle[3], x_real, x_imaginary)
                _forward(x_real, x_imaginary, n, radices, circle[0], circle[1])
            if asked[0]:
                _product(x_real, x_imaginary, k_real, k_imaginary, real, imaginary)
                _backward(real, imaginary, n, radices, circle[0], circle[1])
                _store(real, imaginary, extended - time, extended, first, width, False, angle[2], angle[3], out[row])
            if asked[1] or asked[2]:
                _load(dy[row], first, width, True, n, angle[0], angle[1], g_real, g_imaginary)
                _forward(g_real, g_imaginary, n, radices, circle[0], circle[1])
            if asked[1]:
                # Their weights once over √n: the kernel's and dy's have none, so the product wants it twice.
                _product(g_real, g_imaginary, k_real, k_imaginary, real, imaginary)
                _backward(real, imaginary, n, radices, circle[0], circle[1])
                _store(real, imaginary, 0, extended, first, width, True, angle[4], angle[5], drows[row])
            if asked[2]:
                _product(x_real, x_imaginary, g_real, g_imaginary, real, imaginary)
                for i in range(LANES * n):
                    sum_real[i] += real[i]
                    sum_imaginary[i] += imaginary[i]
        if asked[2]:
            _backward(sum_real, sum_imaginary, n, radices, circle[0], circle[1])
            for c in range(width):
                for s in range(taps):
                    dkernel[first + c, s] = _value(sum_real, sum_imaginary, extended - 1 - s, c, angle[2], angle[3])
