"""Mixes of rows, compiled by numba when first called."""

from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numba.np.numpy_support import carray

from ops import native_team

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "fastmath": {"contract", "nsz"},
    "error_model": "numpy",
}


# A loop writes few arrays and reads few: before LLVM takes vector instructions it compares all their places.


@njit(**OPTIONS)
def _difference(one, other, into):
    for i in range(len(into)):
        into[i] = one[i] - other[i]


@njit(**OPTIONS)
def _mix(x, difference, weight, into):
    for i in range(len(into)):
        into[i] = x[i] + difference[i] * weight[i]


@njit(**OPTIONS)
def _mix_moved(x, difference, weight, moved, into):
    for i in range(len(into)):
        into[i] = x[i] + difference[i] * (weight[i] + moved[i])


@njit(**OPTIONS)
def _add(row, into):
    for i in range(len(into)):
        into[i] += row[i]


@njit(**OPTIONS)
def _add_product(one, other, into):
    for i in range(len(into)):
        into[i] += one[i] * other[i]


@njit(**OPTIONS)
def _add_product_moved(one, weight, moved, into):
    for i in range(len(into)):
        into[i] += one[i] * (weight[i] + moved[i])


@njit(**OPTIONS)
def _product(one, other, into):
    for i in range(len(into)):
        into[i] = one[i] * other[i]


@njit(**OPTIONS)
def forward(start, stop, x, before, weight, moved, made):
    """Rows [start, stop). x, before: [rows, d]; weight: [n, d]; moved: [n, rows, d], or of no rows; made: [n, rows,
    d]."""
    difference = np.empty(x.shape[1], x.dtype)
    for r in range(start, stop):
        _difference(before[r], x[r], difference)
        for n in range(len(weight)):
            if moved.shape[1]:
                _mix_moved(x[r], difference, weight[n], moved[n, r], made[n, r])
            else:
                _mix(x[r], difference, weight[n], made[n, r])


@njit(**OPTIONS)
def clear(dx, dbefore, start, stop):
    dx[start:stop] = 0
    dbefore[start:stop] = 0


@njit(**OPTIONS)
def backward(start, stop, dy, n, x, before, weight, moved, dx, dbefore, dweight, dmoved):
    """What mix n adds to the gradients of rows [start, stop), from its own `dy`. dx: the sum of all mixes' gradients at
    first, see `finish`. dweight: [n, d]."""
    difference = np.empty(x.shape[1], x.dtype)
    for r in range(start, stop):
        _difference(before[r], x[r], difference)
        _add(dy[r], dx[r])
        if moved.shape[1]:
            _add_product_moved(dy[r], weight[n], moved[n, r], dbefore[r])
            _product(dy[r], difference, dmoved[n, r])
        else:
            _add_product(dy[r], weight[n], dbefore[r])
        _add_product(dy[r], difference, dweight[n])


@njit(**OPTIONS)
def finish(dx, dbefore, start, stop):
    for r in range(start, stop):
        for i in range(dx.shape[1]):
            dx[r, i] -= dbefore[r, i]


# On torch's threads, each of which takes pieces of the rows till none is left: for float32, in which models run.


@cfunc(types.void(types.intp), **OPTIONS)
def _take_forward(job: Any) -> None:
    rows, width, mixes, moves, pieces, _, x, before, weight, moved, made = carray(native_team.words(job), (11,))
    x_, before_ = carray(native_team.floats(x), (rows, width)), carray(native_team.floats(before), (rows, width))
    weight_, moved_ = (
        carray(native_team.floats(weight), (mixes, width)),
        carray(native_team.floats(moved), (mixes, moves, width)),
    )
    made_ = carray(native_team.floats(made), (mixes, rows, width))
    while True:
        piece = native_team.take(job + 8 * 5)
        if piece >= pieces:
            return
        forward(rows * piece // pieces, rows * (piece + 1) // pieces, x_, before_, weight_, moved_, made_)


STRIP = 8  # rows at a time: all mixes of them while they are in the first cache


@cfunc(types.void(types.intp), **OPTIONS)
def _take_backward(job: Any) -> None:
    rows, width, mixes, moves, pieces, _, x, before, weight, moved, dx, dbefore, dweight, dmoved, dy = carray(
        native_team.words(job), (15,)
    )
    x_, before_ = carray(native_team.floats(x), (rows, width)), carray(native_team.floats(before), (rows, width))
    weight_, moved_ = (
        carray(native_team.floats(weight), (mixes, width)),
        carray(native_team.floats(moved), (mixes, moves, width)),
    )
    dx_, dbefore_ = carray(native_team.floats(dx), (rows, width)), carray(native_team.floats(dbefore), (rows, width))
    dweight_ = carray(native_team.floats(dweight), (pieces, mixes, width))
    dmoved_ = carray(native_team.floats(dmoved), (mixes, moves, width))
    places = carray(native_team.words(dy), (mixes,))
    while True:
        piece = native_team.take(job + 8 * 5)
        if piece >= pieces:
            return
        for start in range(rows * piece // pieces, rows * (piece + 1) // pieces, STRIP):
            stop = min(start + STRIP, rows * (piece + 1) // pieces)
            clear(dx_, dbefore_, start, stop)
            for n in range(mixes):
                dy_ = carray(native_team.floats(places[n]), (rows, width))
                backward(
                    start, stop, dy_, n, x_, before_, weight_, moved_, dx_, dbefore_, dweight_[piece], dmoved_
                )  # fmt: skip
            finish(dx_, dbefore_, start, stop)


_forward_on_all = native_team.team("zoo_token_mix", _take_forward)
_backward_on_all = native_team.team("zoo_token_mix_backward", _take_backward)


@njit(**OPTIONS)
def forward_on(threads, job):
    """`forward` of a job, whose numbers stand as `_take_forward` reads them, on so many threads."""
    _forward_on_all(job.ctypes.data, threads)
    assert job[5] >= job[4]  # and so the job is kept till here


@njit(**OPTIONS)
def backward_on(threads, job, places):
    """places: the addresses of the mixes' gradients, which the job knows the place of."""
    _backward_on_all(job.ctypes.data, threads)
    assert job[5] >= job[4] and len(places) == job[2]
