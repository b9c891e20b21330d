"""What the implementations of `vandermonde` and `cauchy` share."""

from typing import NamedTuple

import torch
from jaxtyping import Complex
from torch import Tensor


class Powers(NamedTuple):
    """exp(l · log_a) in two levels: l = i · step + j, exp(l · log_a) = start_i · within_j."""

    start: Complex[Tensor, "channels n starts"]
    within: Complex[Tensor, "channels n step"]


def split(length: int) -> tuple[int, int]:
    """The number of starts and the step between them: a power of two near √length, starts · step >= length."""
    step = 1
    while step * step < length:
        step *= 2
    return -(-length // step), step


def powers(log_a: Complex[Tensor, "channels n"], length: int) -> Powers:
    """Both levels in the dtype of `log_a`; 2 √length exponentials an entry.

    float64 for the exponent: an angle l · Im log_a of 10⁵ rounded to float32 is off by 0.01. The product of two powers
    that are right to float32's rounding is right to that as well.
    """
    starts, step = split(length)
    wide = log_a.to(torch.complex128)[..., None]
    place = torch.arange(max(starts, step), device=log_a.device, dtype=torch.float64)
    start, within = torch.exp(wide * (place[:starts] * step)), torch.exp(wide * place[:step])
    return Powers(start.to(log_a.dtype), within.to(log_a.dtype))
