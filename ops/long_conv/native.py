"""The native implementation (numba, on CPUs): an engine of transforms for `ops/long_conv/autograd.py`."""

import sys
from functools import lru_cache
from math import pi

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ops.long_conv.autograd import conv_op
from ops.long_conv.butterflies import LANES
from ops.native_array import array
from ops.native_threads import run_blocks


def forward(
    rows: Float[Tensor, "rows extended channels"], kernel: Float[Tensor, "channels taps"], time: int
) -> Float[Tensor, "rows time channels"]:
    """Σ_s kernel_s row_{t-s} for the last `time` places of each row."""
    from ops.long_conv.native_kernels import convolve

    out = rows.new_empty(len(rows), time, rows.shape[2])
    plan = _plan(rows.shape[1], str(rows.dtype))
    arrays = array(rows.contiguous()), array(kernel.contiguous())
    run_blocks(convolve, _blocks(rows), *arrays, time, *plan, array(out))
    return out


def backward(
    rows: Float[Tensor, "rows extended channels"],
    kernel: Float[Tensor, "channels taps"],
    dy: Float[Tensor, "rows time channels"],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What is asked for of: the output again, the gradient of rows, that of kernel."""
    from ops.long_conv.native_kernels import adjoints

    shapes = (dy.shape, rows.shape, kernel.shape)
    # The compiled function takes arrays of one kind, asked for or not.
    made = [rows.new_empty(shape if need else (0,) * len(shape)) for shape, need in zip(shapes, needs, strict=True)]
    plan = _plan(rows.shape[1], str(rows.dtype))
    arrays = (array(each.contiguous()) for each in (rows, kernel, dy))
    run_blocks(adjoints, _blocks(rows), *arrays, *plan, tuple(needs), *(array(each) for each in made))
    output, drows, dkernel = (each if need else None for each, need in zip(made, needs, strict=True))
    return output, drows, dkernel


def _blocks(rows: Tensor) -> int:
    return -(-rows.shape[2] // LANES)


@lru_cache(maxsize=32)
def _plan(least: int, dtype: str) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Points, radices, and tables of a transform of at least so many points: 2^m or 3 · 2^m."""
    n = 1 << max(least - 1, 1).bit_length()
    if n >= 8 and 3 * (n // 4) >= least:
        n = 3 * (n // 4)
    radices, left = [], n
    for radix in (3, 4, 2):
        while left % radix == 0:
            radices.append(radix)
            left //= radix
    kind = np.float64 if dtype == "torch.float64" else np.float32
    t = np.arange(n)
    circle = np.stack([np.cos(2 * pi * t / n), np.sin(2 * pi * t / n)]).astype(kind)
    angle = np.stack([np.cos(pi * t / (2 * n)), np.sin(pi * t / (2 * n))])
    # Plain; over √n, of what is read and written once each; over n.
    return n, np.array(radices), circle, np.concatenate([angle, angle / np.sqrt(n), angle / n]).astype(kind)


native = conv_op("native", sys.modules[__name__])
