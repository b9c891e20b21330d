"""One token of a gated or plain feed-forward block."""

import math
from collections.abc import Callable

import numpy as np
from numba import njit
from torch import Tensor

from ops import native_team
from ops.linear.kernels import OPTIONS, spread
from ops.native_array import array
from ops.step import Around, fresh, rows
from ops.step.norm import finish, normed, unpack
from ops.step.parts import EXACT, gelu_tanh, given, plus, silu

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def feed_forward(
    up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str, gated: bool,
    around: Around,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """down · (f(gate) ⊙ value) with [gate; value] = up · x, or down · f(up · x), of x [batch, 1, width].

    The caller has asked `ops.step.fits`, and for each token `ops.step.takes`.
    """
    outputs, norm, kind = down.shape[0], unpack(around), ACTIVATIONS.index(activation)
    up_rows, down_rows, biases = array(up), array(down), (given(up_bias), given(down_bias))

    def run(x: Tensor) -> Tensor:
        y, y_rows = fresh(x.shape[0], 1, outputs)
        _run(native_team.threads(), rows(x)[:, 0], norm, up_rows, down_rows, biases, kind, gated, y_rows[:, 0])
        return y

    return run


@njit(**EXACT)
def activate(values, kind):
    """values ← f(values); one loop each, so that it becomes vector instructions."""
    zero, half = np.float32(0), np.float32(0.5)
    if kind == 0:
        silu(values)
    elif kind == 1:
        for i in range(len(values)):
            values[i] = half * values[i] * np.float32(1 + math.erf(values[i] * np.float32(0.7071067811865476)))
    elif kind == 2:
        gelu_tanh(values)
    elif kind == 3:
        for i in range(len(values)):
            values[i] = max(values[i], zero)
    else:
        for i in range(len(values)):
            v = max(values[i], zero)
            values[i] = v * v


@njit(**OPTIONS)
def apply(threads, x, up, down, biases, kind, gated, y):
    """The block alone, for kernels; the second bias is left to the caller."""
    hidden = down.shape[1]
    inner = np.empty((len(x), len(up)), np.float32)
    kept = np.empty((len(x), hidden), np.float32)
    spread(threads, up, x, inner)
    plus(inner, biases[0])
    for row in range(len(x)):
        values = inner[row]
        activate(values[:hidden], kind)
        if gated:
            for i in range(hidden):
                kept[row, i] = values[i] * values[hidden + i]
        else:
            for i in range(hidden):
                kept[row, i] = values[i]
    spread(threads, down, kept, y)


@njit(**OPTIONS)
def _run(threads, x, around, up, down, biases, kind, gated, y):
    apply(threads, normed(x, around), up, down, biases, kind, gated, y)
    finish(x, y, biases[1], around)
