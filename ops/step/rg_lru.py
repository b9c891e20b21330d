"""One token of Griffin's recurrent block."""

from collections.abc import Callable

import numpy as np
from numba import njit
from torch import Tensor

from ops import native_team
from ops.linear.kernels import OPTIONS, spread
from ops.native_array import array
from ops.native_math import exp
from ops.step import Around, fresh, rows
from ops.step.norm import finish, normed, unpack
from ops.step.parts import EXACT, add, convolve, gelu_tanh, given, plus, sigmoid, softplus


def rg_lru(
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    gates: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    Lambda: Tensor,
    c: float,
    around: Around,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """x [batch, 1, width], conv [batch, taps - 1, inner], h [batch, inner] -> y and both after the token.

    first [batch]: whether the token is its document's first. weights, biases: of y_proj, x_proj, the convolution and
    out_proj; gates: weight [heads, in, out] and bias [heads, out] of input and decay. The caller has asked
    `ops.step.fits`, and for each token `ops.step.takes`.
    """
    outputs, norm = weights[3].shape[0], unpack(around)
    bound = (
        tuple(array(each) for each in weights),
        tuple(given(each) for each in biases),
        tuple(array(each) for each in gates[0] + gates[1]),
        array(Lambda),
        np.float32(c),
    )

    def run(x: Tensor, conv: Tensor, h: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, y_rows = fresh(x.shape[0], 1, outputs)
        conv_after, conv_rows = fresh(*conv.shape)
        h_after, h_rows = fresh(*h.shape)
        _run(
            native_team.threads(),
            rows(x)[:, 0],
            norm,
            (rows(conv), rows(h)),
            (conv_rows, h_rows),
            rows(first),
            *bound,
            y_rows[:, 0],
        )
        return y, conv_after, h_after

    return run


@njit(**OPTIONS)
def _blocks(x, weight, bias, y):
    """A map in blocks, of one row: weight [heads, in, out]."""
    heads, size, _ = weight.shape
    for head in range(heads):
        part = y[head * size : (head + 1) * size]
        part[:] = bias[head]
        for i in range(size):
            add(part, weight[head, i], x[head * size + i])


@njit(**EXACT)
def _recur(u, first, input_gate, decay_gate, Lambda, c, before, after):
    """One exponential a loop, or none becomes vector instructions. The gates are overwritten."""
    for i in range(len(u)):
        decay_gate[i] = -c * sigmoid(decay_gate[i])
    for i in range(len(u)):
        decay_gate[i] *= softplus(Lambda[i])  # ln of the decay
    for i in range(len(u)):
        input_gate[i] = u[i] * sigmoid(input_gate[i])
    if not first:
        for i in range(len(u)):
            input_gate[i] *= np.sqrt(_left(np.float32(2) * decay_gate[i]))
    for i in range(len(u)):
        after[i] = exp(decay_gate[i]) * before[i] + input_gate[i]


@njit(**EXACT)
def _left(x):
    """1 - e^x of a negative number; by its series near 0, where the difference would lose all digits."""
    p = np.float32(1 / 40320) * x + np.float32(1 / 5040)
    p = (p * x + np.float32(1 / 720)) * x + np.float32(1 / 120)
    p = (p * x + np.float32(1 / 24)) * x + np.float32(1 / 6)
    p = (p * x + np.float32(1 / 2)) * x + np.float32(1)
    return -x * p if x > np.float32(-0.5) else np.float32(1) - exp(x)


@njit(**OPTIONS)
def _run(threads, x, around, before, after, first, weights, biases, gates, Lambda, c, y):
    inner = len(Lambda)
    x_normed = normed(x, around)
    branch, u, mixed = (
        np.empty((len(x), inner), np.float32),
        np.empty((len(x), inner), np.float32),
        np.empty((len(x), inner), np.float32),
    )
    input_gate, decay_gate = np.empty(inner, np.float32), np.empty(inner, np.float32)
    spread(threads, weights[0], x_normed, branch)
    plus(branch, biases[0])
    spread(threads, weights[1], x_normed, u)
    plus(u, biases[1])
    for row in range(len(x)):
        convolve(u[row], weights[2], biases[2], before[0][row], after[0][row], mixed[row])
        _blocks(mixed[row], gates[0], gates[1], input_gate)
        _blocks(mixed[row], gates[2], gates[3], decay_gate)
        _recur(mixed[row], first[row], input_gate, decay_gate, Lambda, c, before[1][row], after[1][row])
        gelu_tanh(branch[row])
        for i in range(inner):
            branch[row, i] *= after[1][row, i]
    spread(threads, weights[3], branch, y)
    finish(x, y, biases[3], around)
