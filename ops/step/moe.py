"""One token of a mixture of experts whose router takes the largest logits."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit
from torch import Tensor

from ops.linear.kernels import OPTIONS, product
from ops.native_array import array
from ops.step import Around, fresh, rows
from ops.step.feed_forward import ACTIVATIONS, activate, apply
from ops.step.norm import finish, normed, unpack
from ops.step.parts import NOTHING, add, dot, given, sigmoid

NO_MATRIX = np.zeros((0, 0), np.float32)


class Choice(NamedTuple):
    """How the router weighs: of the softmax over all or over the chosen, divided by their sum or not, times `scale`."""

    top_k: int
    after: bool  # softmax over the chosen alone
    renormalise: bool
    scale: float


class Shared(NamedTuple):
    """Experts that every token visits: a dense block, and the gate of its output [1, width] or None."""

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    gate: Tensor | None


def moe(
    router: Tensor,
    choice: Choice,
    up: Tensor,
    down: Tensor,
    biases: tuple[Tensor, Tensor] | None,
    activation: str,
    gated: bool,
    shared: Shared | None,
    out_bias: Tensor | None,
    around: Around,
) -> Callable[[Tensor], Tensor]:
    """x [batch, 1, width] -> y; router [experts, width], up [experts, width, inner], down [experts, hidden, width],
    biases [experts, inner] and [experts, width]. Reads the chosen experts' matrices once. The caller has asked
    `ops.step.fits`, and for each token `ops.step.takes`."""
    dense, gate = (NO_MATRIX, NO_MATRIX, NOTHING, NOTHING), NO_MATRIX
    if shared is not None:
        dense = (array(shared.up), array(shared.down), given(shared.up_bias), given(shared.down_bias))
        gate = NO_MATRIX if shared.gate is None else array(shared.gate)
    bound = (
        unpack(around),
        array(router),
        (choice.top_k, choice.after, choice.renormalise, np.float32(choice.scale)),
        (array(up), array(down)),
        (NO_MATRIX, NO_MATRIX) if biases is None else (array(biases[0]), array(biases[1])),
        ACTIVATIONS.index(activation),
        gated,
        dense,
        gate,
        given(out_bias),
    )

    def run(x: Tensor) -> Tensor:
        y, y_rows = fresh(*x.shape)
        _run(rows(x)[:, 0], *bound, y_rows[:, 0])
        return y

    return run


@njit(**OPTIONS)
def _choose(logits, choice, chosen, weights):
    """The experts of the largest logits, the best first and the first of equal ones, and their weights."""
    top_k, after, renormalise, scale = choice
    highest = logits[0]
    for e in range(len(logits)):
        highest = max(highest, logits[e])
    total = np.float32(0)
    for e in range(len(logits)):
        total += np.float32(np.exp(logits[e] - highest))
    for place in range(top_k):
        best = -1
        for e in range(len(logits)):
            taken = False
            for earlier in range(place):
                taken = taken or chosen[earlier] == e
            if not taken and (best < 0 or logits[e] > logits[best]):
                best = e
        chosen[place] = best
        weights[place] = np.float32(np.exp(logits[best] - highest))
    if after or renormalise:
        total = np.float32(0)
        for place in range(top_k):
            total += weights[place]
    for place in range(top_k):
        weights[place] *= scale / total


@njit(**OPTIONS)
def _times(x, matrix, y):
    """y = x · matrix [inputs, outputs]. One row of the matrix at a time: two of them side by side are read at half the
    rate, as no page follows another."""
    y[:] = np.float32(0)
    for i in range(len(x)):
        add(y, matrix[i], x[i])


@njit(**OPTIONS)
def _run(x, around, router, choice, matrices, biases, kind, gated, dense, gate, out_bias, y):
    up, down = matrices
    hidden = down.shape[1]
    normal = normed(x, around)
    logits = np.empty((len(x), len(router)), np.float32)
    chosen, weights = np.empty(choice[0], np.int64), np.empty(choice[0], np.float32)
    inner, part = np.empty(up.shape[2], np.float32), np.empty(x.shape[1], np.float32)
    product(0, len(router), router, normal, logits)
    if len(dense[0]) > 0:
        apply(normal, dense[0], dense[1], (dense[2], dense[3]), kind, gated, y)
    for row in range(len(x)):
        if len(dense[0]) == 0:
            y[row] = np.float32(0)
        else:
            if len(dense[3]) > 0:
                add(y[row], dense[3], np.float32(1))
            if len(gate) > 0:
                share = sigmoid(dot(gate[0], normal[row]))
                for i in range(x.shape[1]):
                    y[row, i] *= share
        _choose(logits[row], choice, chosen, weights)
        for place in range(len(chosen)):
            e = chosen[place]
            _times(normal[row], up[e], inner)
            if len(biases[0]) > 0:
                add(inner, biases[0][e], np.float32(1))
            activate(inner[:hidden], kind)
            if gated:
                for i in range(hidden):
                    inner[i] *= inner[hidden + i]
            _times(inner[:hidden], down[e], part)
            if len(biases[1]) > 0:
                add(part, biases[1][e], np.float32(1))
            add(y[row], part, weights[place])
    finish(x, y, out_bias, around)
