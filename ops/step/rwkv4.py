"""One token of RWKV-4's time mix and channel mix."""

from collections.abc import Callable, Sequence

import numpy as np
from numba import njit
from torch import Tensor

from ops import native_team
from ops.linear.kernels import OPTIONS, spread
from ops.native_array import array
from ops.native_math import exp
from ops.step import Around, fresh, rows
from ops.step.norm import finish, normed, unpack
from ops.step.parts import EXACT, NOTHING, sigmoid


def time_mix(
    weights: tuple[Tensor, ...],
    mixes: tuple[Tensor, ...],
    decay: Tensor,
    bonus: Tensor,
    around: Around,
) -> Callable[[Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
    """x [batch, 1, width], shift [batch, width], sums (numerator, denominator, maximum) [batch, width] -> y, and shift
    and sums after the token.

    weights: of key, value, receptance, output; mixes: shares of x in what the first three read; decay: log(-log) of it.
    The caller has asked `ops.step.fits`, and for each token `ops.step.takes`.
    """
    norm = unpack(around)
    bound = (
        tuple(array(each) for each in weights),
        tuple(array(each) for each in mixes),
        array(decay),
        array(bonus),
    )

    def run(x: Tensor, shift: Tensor, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        batch, _, width = x.shape
        y, y_rows = fresh(batch, 1, width)
        after, after_rows = fresh(4, batch, width)
        before = rows(sums[0]), rows(sums[1]), rows(sums[2])
        _time_mix(native_team.threads(), rows(x)[:, 0], norm, rows(shift), before, after_rows, *bound, y_rows[:, 0])
        new, *later = after.unbind()
        return y, new, tuple(later)

    return run


def channel_mix(
    weights: tuple[Tensor, ...], mixes: tuple[Tensor, ...], around: Around
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """x [batch, 1, width], shift [batch, width] -> y and the shift after the token; weights: of key, receptance, value;
    mixes: shares of x in what the first two read. The caller has asked `ops.step.fits`, and for each token
    `ops.step.takes`."""
    norm, bound = unpack(around), (tuple(array(each) for each in weights), tuple(array(each) for each in mixes))

    def run(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, width = x.shape
        y, y_rows = fresh(batch, 1, width)
        after, after_rows = fresh(batch, width)
        _channel_mix(native_team.threads(), rows(x)[:, 0], norm, rows(shift), after_rows, *bound, y_rows[:, 0])
        return y, after

    return run


@njit(**OPTIONS)
def _mix(before, x, share, y):
    for row in range(len(x)):
        for i in range(len(share)):
            y[row, i] = before[row, i] + share[i] * (x[row, i] - before[row, i])


@njit(**EXACT)
def _average(k, v, decay, bonus, before, after, y):
    """2305.13048, eq. 16: all numbers are held relative to e^maximum."""
    numerator, denominator, maximum = before
    for i in range(len(k)):
        now = k[i] + bonus[i]
        highest = max(maximum[i], now)
        after[0, i], after[1, i], after[2, i] = maximum[i] - highest, now - highest, highest
    _exponentials(after[:2])
    for i in range(len(k)):
        old, new = after[0, i], after[1, i]
        y[i] = (old * numerator[i] + new * v[i]) / (old * denominator[i] + new)
        later = maximum[i] - decay[i]
        highest = max(later, k[i])
        after[0, i], after[1, i], after[2, i] = later - highest, k[i] - highest, highest
    _exponentials(after[:2])
    for i in range(len(k)):
        old, new = after[0, i], after[1, i]
        after[0, i], after[1, i] = old * numerator[i] + new * v[i], old * denominator[i] + new


@njit(**EXACT)
def _exponentials(values):
    for row in range(len(values)):
        for i in range(values.shape[1]):
            values[row, i] = exp(values[row, i])


@njit(**EXACT)
def _gate(y, gate):
    for row in range(len(y)):
        for i in range(y.shape[1]):
            y[row, i] *= sigmoid(gate[row, i])


@njit(**OPTIONS)
def _time_mix(threads, x, around, shift, sums, after, weights, mixes, decay, bonus, y):
    x_normed = normed(x, around)
    k, v, gate, mixed = np.empty_like(shift), np.empty_like(shift), np.empty_like(shift), np.empty_like(shift)
    _mix(shift, x_normed, mixes[0], mixed)
    spread(threads, weights[0], mixed, k)
    _mix(shift, x_normed, mixes[1], mixed)
    spread(threads, weights[1], mixed, v)
    _mix(shift, x_normed, mixes[2], mixed)
    spread(threads, weights[2], mixed, gate)
    rates = decay.copy().reshape(1, -1)
    _exponentials(rates)
    made = np.empty((3, len(decay)), np.float32)
    for row in range(len(x)):
        _average(k[row], v[row], rates[0], bonus, (sums[0][row], sums[1][row], sums[2][row]), made, mixed[row])
        for each in range(3):
            after[1 + each, row] = made[each]
    after[0] = x_normed
    _gate(mixed, gate)
    spread(threads, weights[3], mixed, y)
    finish(x, y, NOTHING, around)


@njit(**OPTIONS)
def _channel_mix(threads, x, around, shift, after, weights, mixes, y):
    x_normed = normed(x, around)
    mixed, gate = np.empty_like(shift), np.empty_like(shift)
    key = np.empty((len(x), len(weights[0])), np.float32)
    _mix(shift, x_normed, mixes[0], mixed)
    spread(threads, weights[0], mixed, key)
    _mix(shift, x_normed, mixes[1], mixed)
    spread(threads, weights[1], mixed, gate)
    for row in range(len(x)):
        for i in range(key.shape[1]):
            positive = max(key[row, i], np.float32(0))
            key[row, i] = positive * positive
    spread(threads, weights[2], key, y)
    _gate(y, gate)
    after[:] = x_normed
    finish(x, y, NOTHING, around)
