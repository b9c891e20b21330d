"""One token of Mamba."""

from collections.abc import Callable

import numpy as np
from numba import njit
from torch import Tensor

from ops import native_team
from ops.linear.kernels import OPTIONS, spread
from ops.native_array import array
from ops.native_math import exp
from ops.step import Around, fresh, rows
from ops.step.norm import finish, normed, scaled, unpack
from ops.step.parts import EXACT, NOTHING, convolve, dot, given, plus, sigmoid, silu, softplus


def mamba(
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    A_log: Tensor,
    D: Tensor,
    norms: tuple[Tensor, ...] | None,
    eps: float,
    around: Around,
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """x [batch, 1, width], conv [batch, taps - 1, inner], scan [batch, inner, n] -> y and both after the token.

    weights, biases: of in_proj, the convolution, x_proj (no bias), dt_proj, out_proj; norms: weights of dt's, B's and
    C's, or None. The caller has asked `ops.step.fits`, and for each token `ops.step.takes`.
    """
    outputs, norm = weights[4].shape[0], unpack(around)
    bound = (
        tuple(array(each) for each in weights),
        tuple(given(each) for each in biases),
        array(A_log),
        array(D),
        (NOTHING, NOTHING, NOTHING) if norms is None else tuple(array(each) for each in norms),
        np.float32(eps),
    )

    def run(x: Tensor, conv: Tensor, scan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, y_rows = fresh(x.shape[0], 1, outputs)
        conv_after, conv_rows = fresh(*conv.shape)
        scan_after, scan_rows = fresh(*scan.shape)
        _run(
            native_team.threads(),
            rows(x)[:, 0],
            norm,
            (rows(conv), rows(scan)),
            (conv_rows, scan_rows),
            *bound,
            y_rows[:, 0],
        )
        return y, conv_after, scan_after

    return run


@njit(**EXACT)
def _exponentials(logs, values):
    for c in range(len(logs)):
        for i in range(logs.shape[1]):
            values[c, i] = exp(logs[c, i])


@njit(**EXACT)
def _update(h, after, dt, x, rates, B):
    """h ← exp(-dt rates) h + dt x B, of one channel."""
    add = dt * x
    for i in range(len(h)):
        after[i] = exp(-dt * rates[i]) * h[i] + add * B[i]


@njit(**EXACT)
def _steps(values):
    for i in range(len(values)):
        values[i] = softplus(values[i])


@njit(**EXACT)
def _gate(y, z):
    for i in range(len(y)):
        y[i] *= z[i] * sigmoid(z[i])


@njit(**OPTIONS)
def _run(threads, x, around, before, after, weights, biases, A_log, D, norms, eps, y):
    inner, n = A_log.shape
    rank = weights[3].shape[1]
    both = np.empty((len(x), 2 * inner), np.float32)
    channels, dt = np.empty((len(x), inner), np.float32), np.empty((len(x), inner), np.float32)
    small = np.empty((len(x), rank + 2 * n), np.float32)
    spread(threads, weights[0], normed(x, around), both)
    plus(both, biases[0])
    for row in range(len(x)):
        convolve(both[row, :inner], weights[1], biases[1], before[0][row], after[0][row], channels[row])
        silu(channels[row])
    spread(threads, weights[2], channels, small)
    for row in range(len(x)):
        parts = small[row, :rank], small[row, rank : rank + n], small[row, rank + n :]
        if len(norms[0]) > 0:
            for part, weight in zip(parts, norms):  # noqa: B905  # numba knows no strict
                scaled(part, weight, eps, np.float32(0), part)
    spread(threads, weights[3], small[:, :rank].copy(), dt)
    plus(dt, biases[3])
    rates = np.empty_like(A_log)
    _exponentials(A_log, rates)
    for row in range(len(x)):
        _steps(dt[row])
        B, C = small[row, rank : rank + n], small[row, rank + n :]
        u, h = channels[row], after[1][row]
        for c in range(inner):
            _update(before[1][row, c], h[c], dt[row, c], u[c], rates[c], B)
            u[c] = dot(h[c], C) + D[c] * u[c]
        _gate(u, both[row, inner:])
    spread(threads, weights[4], channels, y)
    finish(x, y, biases[4], around)
