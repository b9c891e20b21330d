"""One token of softmax attention over kept keys and values, its projections and positions included."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit
from numba.np.numpy_support import carray
from torch import Tensor

from ops import native_team
from ops.linear.kernels import OPTIONS, spread
from ops.native_array import array
from ops.native_math import exp
from ops.step import Around, fresh, rows
from ops.step.norm import finish, normed, scaled, unpack
from ops.step.parts import EXACT, NOTHING, add, dot, given, plus, sigmoid

LONGEST = 1 << 21  # numbers of keys: more are worth several threads
NO_RUNS = np.zeros((0, 0), np.int32)


class Turning(NamedTuple):
    """Rotary positions: a pair's angle is position · theta; its cosine and sine are multiplied by `length`."""

    theta: Tensor
    length: float
    interleaved: bool


class HeadNorm(NamedTuple):
    """x / sqrt(mean(x²) + eps) · (centre + weight), over as many numbers as the weight has."""

    q: Tensor
    k: Tensor
    eps: float
    centre: float


Run = Callable[
    [Tensor, Tensor, Tensor, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray] | None],
    Tensor,
]


def attention(
    qkv: tuple[Tensor, Tensor | None],
    out: tuple[Tensor, Tensor | None],
    heads: tuple[int, int, int],
    *,
    scale: float,
    turning: Turning | None,
    norm: HeadNorm | None,
    gate: bool,
    around: Around,
) -> Run:
    """x [batch, 1, width], keys, values, slots, positions, seen -> [batch, 1, width]; writes the token's key and value
    into `keys` and `values`.

    heads: (heads, kv_heads, head_dim). keys, values [batch, tokens, kv_heads, head_dim]: the last two dimensions
    contiguous, the token's own place among them; slots [batch]: that place; positions [batch]. `seen`: (runs [batch,
    tokens] int32, run [batch]): of which only equal ones are looked at; None: all. qkv holds the rows of queries, keys,
    values and, with `gate`, of the gate. The caller has asked `ops.step.fits`, and for each token `ops.step.takes`,
    and keeps keys.numel() below LONGEST.
    """
    theta, length = (NOTHING, 1.0) if turning is None else (array(turning.theta), turning.length)
    weights = (NOTHING, NOTHING) if norm is None else (array(norm.q), array(norm.k))
    eps, centre = (0.0, 0.0) if norm is None else (norm.eps, norm.centre)
    outputs = out[0].shape[0]
    front = (unpack(around), array(qkv[0]), array(out[0]), (given(qkv[1]), given(out[1])), heads)
    back = (
        np.float32(scale),
        theta,
        np.float32(length),
        turning is not None and turning.interleaved,
        weights,
        (np.float32(eps), np.float32(centre)),
        gate,
    )

    def run(
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: np.ndarray,
        positions: np.ndarray,
        seen: tuple[np.ndarray, np.ndarray] | None,
    ) -> Tensor:
        batch, tokens = keys.shape[:2]
        y, y_rows = fresh(batch, 1, outputs)
        mine = (NO_RUNS, slots) if seen is None else seen
        memory, strides = (keys.data_ptr(), values.data_ptr()), (keys.stride(0), values.stride(0), tokens)
        token = rows(x)[:, 0]
        _run(native_team.threads(), token, *front, memory, strides, slots, positions, *mine, *back, y_rows[:, 0])
        return y

    return run


@njit(**OPTIONS)
def _turn(x, cos, sin, interleaved):
    """A head's first components, by pairs."""
    pairs = len(cos)
    for i in range(pairs):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        a, b = x[first], x[second]
        x[first], x[second] = a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]


@njit(**OPTIONS)
def _normed(x, weight, eps, centre):
    if len(weight) > 0:
        for start in range(0, len(x), len(weight)):
            part = x[start : start + len(weight)]
            scaled(part, weight, eps, centre, part)


@njit(**EXACT)
def _softmax(scores):
    """In place; what is -inf becomes 0."""
    highest = scores[0]
    for s in range(len(scores)):
        highest = max(highest, scores[s])
    for s in range(len(scores)):
        scores[s] = exp(scores[s] - highest)


@njit(**OPTIONS)
def _total(x):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i]
    return total


@njit(**OPTIONS)
def _look(q, keys, values, start, step, runs, run, scale, scores, y):
    """A group of heads q [group, d] over the tokens of one key and value head."""
    group, d = q.shape
    tokens = scores.shape[1]
    for s in range(tokens):
        if len(runs) > 0 and runs[s] != run:
            scores[:, s] = np.float32(-np.inf)
            continue
        key = keys[start + s * step : start + s * step + d]
        for h in range(group):
            scores[h, s] = scale * dot(q[h], key)
    for h in range(group):
        _softmax(scores[h])
        part = np.float32(1) / _total(scores[h])
        for s in range(tokens):
            scores[h, s] *= part
        y[h * d : (h + 1) * d] = np.float32(0)
    for s in range(tokens):
        if len(runs) > 0 and runs[s] != run:
            continue
        value = values[start + s * step : start + s * step + d]
        for h in range(group):
            add(y[h * d : (h + 1) * d], value, scores[h, s])


@njit(**EXACT)
def _gated(y, gate):
    for i in range(len(y)):
        y[i] *= sigmoid(gate[i])


@njit(**OPTIONS)
def _run(
    threads, x, around, qkv, out, biases, heads, memory, strides, slots, positions, runs, run, scale, theta,
    length, interleaved, weights, norm, gate, y,
):  # fmt: skip
    count, groups, d = heads
    keys = carray(native_team.floats(memory[0]), ((len(x) - 1) * strides[0] + strides[2] * groups * d,))
    values = carray(native_team.floats(memory[1]), ((len(x) - 1) * strides[1] + strides[2] * groups * d,))
    group, step = count // groups, groups * d
    inner = np.empty((len(x), len(qkv)), np.float32)
    seen = np.empty((len(x), count * d), np.float32)
    scores = np.empty((group, strides[2]), np.float32)
    spread(threads, qkv, normed(x, around), inner)
    plus(inner, biases[0])
    for b in range(len(x)):
        row = inner[b]
        q, k, v = row[: count * d], row[count * d : count * d + step], row[count * d + step : count * d + 2 * step]
        _normed(q, weights[0], norm[0], norm[1])
        _normed(k, weights[1], norm[0], norm[1])
        if len(theta) > 0:
            angle = np.float32(positions[b]) * theta
            cos, sin = np.cos(angle) * length, np.sin(angle) * length
            for h in range(count):
                _turn(q[h * d : (h + 1) * d], cos, sin, interleaved)
            for h in range(groups):
                _turn(k[h * d : (h + 1) * d], cos, sin, interleaved)
        at, other = b * strides[0] + slots[b] * step, b * strides[1] + slots[b] * step
        for i in range(step):
            keys[at + i], values[other + i] = k[i], v[i]
        visible = runs[b] if len(runs) > 0 else np.zeros(0, np.int32)
        for g in range(groups):
            mine = slice(g * group * d, (g + 1) * group * d)
            queries = q[mine].reshape(group, d)
            _look(
                queries, keys[b * strides[0] :], values[b * strides[1] :], g * d, step, visible, run[b], scale, scores,
                seen[b, mine],
            )  # fmt: skip
        if gate:
            _gated(seen[b], row[count * d + 2 * step :])
    spread(threads, out, seen, y)
    finish(x, y, biases[1], around)
