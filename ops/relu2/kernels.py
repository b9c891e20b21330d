"""relu² and its gradient, compiled by numba when first called."""

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
PIECE = 1 << 14  # values a thread takes at once


@njit(**OPTIONS)
def forward(start, stop, x, y):
    """y[start:stop]. A NaN stays one."""
    zero = x.dtype.type(0)
    for i in range(start, stop):
        kept = zero if x[i] <= zero else x[i]
        y[i] = kept * kept


@njit(**OPTIONS)
def backward(start, stop, x, dy, dx):
    """dx[start:stop] = 2 relu(x) dy."""
    zero, two = x.dtype.type(0), x.dtype.type(2)
    for i in range(start, stop):
        kept = zero if x[i] <= zero else x[i]
        dx[i] = two * kept * dy[i]


# On torch's threads, each of which takes pieces till none is left: for float32, in which models run.


@cfunc(types.void(types.intp), **OPTIONS)
def _take_forward(job: Any) -> None:
    count, _, x, y = carray(native_team.words(job), (4,))
    x_, y_ = carray(native_team.floats(x), (count,)), carray(native_team.floats(y), (count,))
    while True:
        start = native_team.take(job + 8) * PIECE
        if start >= count:
            return
        forward(start, min(start + PIECE, count), x_, y_)


@cfunc(types.void(types.intp), **OPTIONS)
def _take_backward(job: Any) -> None:
    count, _, x, dy, dx = carray(native_team.words(job), (5,))
    x_, dy_ = carray(native_team.floats(x), (count,)), carray(native_team.floats(dy), (count,))
    dx_ = carray(native_team.floats(dx), (count,))
    while True:
        start = native_team.take(job + 8) * PIECE
        if start >= count:
            return
        backward(start, min(start + PIECE, count), x_, dy_, dx_)


_forward_on_all = native_team.team("zoo_relu2", _take_forward)
_backward_on_all = native_team.team("zoo_relu2_backward", _take_backward)


@njit(**OPTIONS)
def forward_on(threads, x, y):
    """`forward` of all values on so many threads."""
    job = np.array([len(x), 0, x.ctypes.data, y.ctypes.data], np.int64)
    _forward_on_all(job.ctypes.data, threads)
    assert job[1] * PIECE >= len(x)  # and so the job is kept till here


@njit(**OPTIONS)
def backward_on(threads, x, dy, dx):
    job = np.array([len(x), 0, x.ctypes.data, dy.ctypes.data, dx.ctypes.data], np.int64)
    _backward_on_all(job.ctypes.data, threads)
    assert job[1] * PIECE >= len(x)
