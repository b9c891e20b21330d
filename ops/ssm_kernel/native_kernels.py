"""The Cauchy sum in compiled loops. Numbers are float64 inside: |z - p|² of complex64 overflows in float32.

z and gradients come as separate real and imaginary parts, which vector instructions read.
"""

import numpy as np
from numba import njit

from ops.linear.kernels import OPTIONS

PART = 512  # places of z at once: what is added up stays in the first cache


@njit(**OPTIONS)
def _pair(w, p, z_real, z_imag, real, imag):
    """Adds w/(z - p) + conj(w)/(z - conj(p)) = 2 (Re w · z - Re(w conj(p))) / ((z - p) (z - conj(p)))."""
    wr, both = 2 * w[0], 2 * (w[0] * p[0] + w[1] * p[1])
    for place in range(len(real)):
        above_real, above_imag = wr * z_real[place] - both, wr * z_imag[place]
        a, b = z_real[place] - p[0], z_imag[place]
        below_real, below_imag = a * a + (p[1] - b) * (p[1] + b), 2 * a * b
        factor = 1.0 / (below_real * below_real + below_imag * below_imag)
        real[place] += factor * (above_real * below_real + above_imag * below_imag)
        imag[place] += factor * (above_imag * below_real - above_real * below_imag)


@njit(**OPTIONS)
def _single(w, p, z_real, z_imag, real, imag):
    """Adds w/(z - p)."""
    for place in range(len(real)):
        a, b = z_real[place] - p[0], z_imag[place] - p[1]
        factor = 1.0 / (a * a + b * b)
        real[place] += factor * (w[0] * a + w[1] * b)
        imag[place] += factor * (w[1] * a - w[0] * b)


@njit(**OPTIONS)
def cauchy(start, stop, weights, z_real, z_imag, poles, conjugate, out):
    """out [channels, length, 2] of weights and poles [channels, n, 2]."""
    length = len(z_real)
    real, imag = np.empty(PART), np.empty(PART)
    for channel in range(start, stop):
        for first in range(0, length, PART):
            last = min(length, first + PART)
            x, y = real[: last - first], imag[: last - first]
            x[:] = 0.0
            y[:] = 0.0
            for n in range(weights.shape[1]):
                if conjugate:
                    _pair(weights[channel, n], poles[channel, n], z_real[first:last], z_imag[first:last], x, y)
                else:
                    _single(weights[channel, n], poles[channel, n], z_real[first:last], z_imag[first:last], x, y)
            for place in range(last - first):
                out[channel, first + place, 0] = x[place]
                out[channel, first + place, 1] = y[place]


@njit(**OPTIONS)
def _sums(g_real, g_imag, z_real, z_imag, pole_real, pole_imag):
    """Σ_l conj(g) r and Σ_l conj(g) r² with r = 1/(z - p): four real numbers."""
    one_real = one_imag = two_real = two_imag = 0.0
    for place in range(len(z_real)):
        a, b = z_real[place] - pole_real, z_imag[place] - pole_imag
        factor = 1.0 / (a * a + b * b)
        r, s = factor * a, -factor * b
        t = g_real[place] * r + g_imag[place] * s
        u = g_real[place] * s - g_imag[place] * r
        one_real += t
        one_imag += u
        two_real += t * r - u * s
        two_imag += t * s + u * r
    return one_real, one_imag, two_real, two_imag


@njit(**OPTIONS)
def cauchy_backward(start, stop, g_real, g_imag, z_real, z_imag, poles, conjugate, ones, twos):
    """ones, twos [channels, n, 2]: gradients of the weights, and those of the poles over conj(weight). g [channels,
    length] is the gradient of the sum."""
    for channel in range(start, stop):
        g, h = g_real[channel], g_imag[channel]
        for n in range(poles.shape[1]):
            pole_real, pole_imag = poles[channel, n, 0], poles[channel, n, 1]
            a, b, c, d = _sums(g, h, z_real, z_imag, pole_real, pole_imag)
            b, d = -b, -d  # of the term itself the conjugate
            if conjugate:
                e, f, i, j = _sums(g, h, z_real, z_imag, pole_real, -pole_imag)
                a, b, c, d = a + e, b + f, c + i, d + j
            ones[channel, n, 0], ones[channel, n, 1] = a, b
            twos[channel, n, 0], twos[channel, n, 1] = c, d
