"""Cross entropy of rows of logits and its gradient in their place, compiled by numba when first called.

Each loop by itself and in place: one with `exp` must not have `reassoc`, which its rounding does not survive, and one
from an array to another asks at run time whether they overlap.
"""

import math
from typing import Any

import numpy as np
from numba import njit

from ops.native_math import exp

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "fastmath": {"contract", "nsz", "arcp"},
    "error_model": "numpy",
}
SUMMING: dict[str, Any] = {**OPTIONS, "fastmath": {"reassoc", "nsz"}}


@njit(**OPTIONS)
def _top(row, bits, found):
    """The greatest number of a row. `bits`: the same memory as integers, of which LLVM finds the greatest in vectors;
    `found`: room for one."""
    flip = np.iinfo(bits.dtype).max  # the order of negative numbers is the other way round
    best = bits[0] if bits[0] >= 0 else bits[0] ^ flip
    for i in range(len(bits)):
        value = bits[i] if bits[i] >= 0 else bits[i] ^ flip
        best = max(best, value)
    found[0] = best if best >= 0 else best ^ flip
    return found.view(row.dtype)[0]


@njit(**OPTIONS)
def _powers(row, top):
    """e^(l − top) in the place of l."""
    for i in range(len(row)):
        row[i] = exp(row[i] - top)


@njit(**SUMMING)
def _sum(row):
    total = row[0] - row[0]
    for i in range(len(row)):
        total += row[i]
    return total


@njit(**OPTIONS)
def _bend(row, scale, softcap):
    """row = softcap · tanh(scale · row / softcap), or without the bend where softcap is 0."""
    one = row.dtype.type(1)
    two = row.dtype.type(2)
    if softcap == 0:
        for i in range(len(row)):
            row[i] *= scale
        return
    factor = two * scale / softcap
    for i in range(len(row)):
        row[i] = softcap * (one - two / (exp(factor * row[i]) + one))


@njit(**OPTIONS)
def losses(start, stop, products, bits, targets, nats, scale, softcap, gradient):
    """nats of rows [start, stop), and in place of their products the gradient of their sum. All rows count.
    `bits`: the products' memory as integers."""
    one = products.dtype.type(1)
    powers = np.empty(products.shape[1] if softcap != 0 else 0, products.dtype)
    found = np.empty(1, bits.dtype)
    for r in range(start, stop):
        row, target = products[r], targets[r]
        if softcap != 0 or scale != 1:
            _bend(row, scale, softcap)
        top, chosen = _top(row, bits[r], found), row[target]
        if softcap != 0:
            powers[:] = row
            _powers(powers, top)
            total = _sum(powers)
        else:
            _powers(row, top)
            total = _sum(row)
        nats[r] = math.log(total) + np.float64(top) - np.float64(chosen)
        if not gradient:
            continue
        share = scale / total
        if softcap != 0:
            for i in range(len(row)):
                bent = row[i] / softcap
                row[i] = share * powers[i] * (one - bent * bent)
            bent = chosen / softcap
            row[target] -= scale * (one - bent * bent)
        else:
            for i in range(len(row)):
                row[i] *= share
            row[target] -= scale
