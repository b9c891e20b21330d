"""One token of Mamba-2."""

from collections.abc import Callable

import numpy as np
from numba import njit
from torch import Tensor

from ops import native_team
from ops.linear.kernels import OPTIONS, spread
from ops.native_array import array
from ops.step import Around, fresh, rows
from ops.step.norm import finish, normed, scaled, unpack
from ops.step.parts import EXACT, add, convolve, given, plus, sigmoid, silu, softplus


def mamba2(
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    heads: tuple[Tensor, Tensor, Tensor],
    groups: int,
    limit: tuple[float, float],
    norm: tuple[Tensor, int, bool, float],
    around: Around,
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """x [batch, 1, width], conv [batch, taps - 1, channels], ssd [batch, heads, n, p] -> y and both after the token.

    weights, biases: of in_proj, the convolution, out_proj; heads: A_log, D and dt_bias; limit: least and greatest dt;
    norm: weight, groups, before_gate, eps. The caller has asked `ops.step.fits`, and for each token
    `ops.step.takes`.
    """
    outputs, outer = weights[2].shape[0], unpack(around)
    weight, runs, before_gate, eps = norm
    bound = (
        tuple(array(each) for each in weights),
        tuple(given(each) for each in biases),
        tuple(array(each) for each in heads),
        groups,
        (np.float32(limit[0]), np.float32(limit[1])),
        (array(weight), runs, before_gate, np.float32(eps)),
    )

    def run(x: Tensor, conv: Tensor, ssd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, y_rows = fresh(x.shape[0], 1, outputs)
        conv_after, conv_rows = fresh(*conv.shape)
        ssd_after, ssd_rows = fresh(*ssd.shape)
        _run(
            native_team.threads(),
            rows(x)[:, 0],
            outer,
            (rows(conv), rows(ssd)),
            (conv_rows, ssd_rows),
            *bound,
            y_rows[:, 0],
        )
        return y, conv_after, ssd_after

    return run


@njit(**OPTIONS)
def _update(h, after, decay, dt, x, B, C, y):
    """h ← decay h + dt B xᵀ and y = Cᵀ h, of one head: h [n, p]."""
    y[:] = np.float32(0)
    for i in range(len(h)):
        factor = dt * B[i]
        old, new = h[i], after[i]
        for j in range(len(x)):
            new[j] = decay * old[j] + factor * x[j]
            y[j] += C[i] * new[j]


@njit(**EXACT)
def gated_norm(y, z, norm, ones):
    """norm(y · silu(z)), or norm(y) · silu(z), over equal runs; in place."""
    weight, runs, before_gate, eps = norm
    if not before_gate:
        for i in range(len(y)):
            y[i] *= z[i] * sigmoid(z[i])
    size = len(y) // runs
    for start in range(0, len(y), size):
        part = y[start : start + size]
        scaled(part, ones[:size], eps, np.float32(0), part)
    for i in range(len(y)):
        y[i] *= weight[i]
    if before_gate:
        for i in range(len(y)):
            y[i] *= z[i] * sigmoid(z[i])


@njit(**OPTIONS)
def _run(threads, x, around, before, after, weights, biases, heads, groups, limit, norm, y):
    A_log, D, dt_bias = heads
    _, count, n, p = before[1].shape
    inner, channels = count * p, len(weights[1])
    all_parts = np.empty((len(x), len(weights[0])), np.float32)
    mixed = np.empty((len(x), channels), np.float32)
    out = np.empty((len(x), inner), np.float32)
    ones = np.ones(inner, np.float32)
    spread(threads, weights[0], normed(x, around), all_parts)
    plus(all_parts, biases[0])
    for row in range(len(x)):
        z, dts = all_parts[row, :inner], all_parts[row, inner + channels :]
        newest = all_parts[row, inner : inner + channels]
        convolve(newest, weights[1], biases[1], before[0][row], after[0][row], mixed[row])
        silu(mixed[row])
        B, C = mixed[row, inner : inner + groups * n], mixed[row, inner + groups * n :]
        for h in range(count):
            dt = min(max(softplus(dts[h] + dt_bias[h]), limit[0]), limit[1])
            decay = np.float32(np.exp(-dt * np.exp(A_log[h])))
            group = slice(h * groups // count * n, h * groups // count * n + n)
            u, o = mixed[row, h * p : (h + 1) * p], out[row, h * p : (h + 1) * p]
            _update(before[1][row, h], after[1][row, h], decay, dt, u, B[group], C[group], o)
            add(o, u, D[h])
        gated_norm(out[row], z, norm, ones)
    spread(threads, weights[2], out, y)
    finish(x, y, biases[2], around)
