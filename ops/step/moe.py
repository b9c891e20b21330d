"""One token of a mixture of experts whose router takes the largest logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cfunc, njit, types
from numba.np.numpy_support import carray
from torch import Tensor

from ops import native_team
from ops.linear.ahead import add_rows
from ops.linear.kernels import LEAST, OPTIONS, STREAMS, spread
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
        _run(native_team.threads(), rows(x)[:, 0], *bound, y_rows[:, 0])
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


_add_row, _add_rows = add_rows(1), add_rows(2)


@njit(**OPTIONS)
def _times(x, matrix, start, stop, y):
    """y[start:stop] = (x · matrix)[start:stop], matrix [inputs, outputs] and y contiguous."""
    inputs, outputs = matrix.shape
    y[start:stop] = np.float32(0)
    written, read = y.ctypes.data + 4 * start, matrix.ctypes.data + 4 * start
    half = 0 if STREAMS == 1 else inputs // 2
    for i in range(half):
        _add_rows(written, read + 4 * i * outputs, 4 * half * outputs, (x[i], x[i + half]), stop - start)
    for i in range(2 * half, inputs):
        _add_row(written, read + 4 * i * outputs, 0, (x[i],), stop - start)


@cfunc(types.void(types.intp), **OPTIONS)
def _take_pieces(job: Any) -> None:
    """What each thread of a team does with the job of `_visit`."""
    chosen, count, x, apart, matrices, experts, inputs, outputs, y, parts, _ = carray(native_team.words(job), (11,))
    which = carray(native_team.words(chosen), (count,))
    read = carray(native_team.floats(matrices), (experts, inputs, outputs))
    written = carray(native_team.floats(y), (count, outputs))
    while True:
        piece = native_team.take(job + 10 * 8)
        if piece >= count * parts:
            return
        place, part = piece // parts, piece % parts
        row = carray(native_team.floats(x + 4 * place * apart), (inputs,))
        start, stop = outputs * part // parts, outputs * (part + 1) // parts
        _times(row, read[which[place]], start, stop, written[place])


_on_all = native_team.team("zoo_experts", _take_pieces)


@njit(**OPTIONS)
def _visit(threads, chosen, x, matrices, y):
    """y[place] = x[place] · matrices[chosen[place]], or of the one row that x has, on so many threads of torch's
    (`ops.native_team`): an expert for each thread where there are as many. A number of y is summed by one thread."""
    experts, inputs, outputs = matrices.shape
    apart = 0 if len(x) == 1 else inputs
    if threads == 1 or inputs * outputs < LEAST:
        for place in range(len(chosen)):
            _times(x[place if apart else 0], matrices[chosen[place]], 0, outputs, y[place])
        return
    job = np.empty(11, np.int64)
    job[0], job[1], job[2], job[3] = chosen.ctypes.data, len(chosen), x.ctypes.data, apart
    job[4], job[5], job[6], job[7] = matrices.ctypes.data, experts, inputs, outputs
    # Narrow parts of a row are read slowly: none below a page.
    parts = max(min((threads + len(chosen) - 1) // len(chosen), outputs // 1024), 1)
    job[8], job[9], job[10] = y.ctypes.data, parts, 0
    _on_all(job.ctypes.data, threads)
    assert job[10] >= len(chosen) * parts  # and so the job is kept till here


@njit(**OPTIONS)
def _run(threads, x, around, router, choice, matrices, biases, kind, gated, dense, gate, out_bias, y):
    up, down = matrices
    hidden = down.shape[1]
    normal = normed(x, around)
    logits = np.empty((len(x), len(router)), np.float32)
    chosen, weights = np.empty(choice[0], np.int64), np.empty(choice[0], np.float32)
    inner, part = np.empty((choice[0], up.shape[2]), np.float32), np.empty((choice[0], x.shape[1]), np.float32)
    kept = np.empty((choice[0], hidden), np.float32)
    spread(threads, router, normal, logits)
    if len(dense[0]) > 0:
        apply(threads, normal, dense[0], dense[1], (dense[2], dense[3]), kind, gated, y)
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
        _visit(threads, chosen, normal[row : row + 1], up, inner)
        for place in range(len(chosen)):
            values = inner[place]
            if len(biases[0]) > 0:
                add(values, biases[0][chosen[place]], np.float32(1))
            activate(values[:hidden], kind)
            for i in range(hidden):
                kept[place, i] = values[i] * values[hidden + i] if gated else values[i]
        _visit(threads, chosen, kept, down, part)
        for place in range(len(chosen)):
            if len(biases[1]) > 0:
                add(part[place], biases[1][chosen[place]], np.float32(1))
            add(y[row], part[place], weights[place])
    finish(x, y, out_bias, around)
