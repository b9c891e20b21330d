"""The native (numba, CPU) norm and gate, and their gradient."""

import numpy as np
import torch
from torch import Tensor

from ops import native_team
from ops.gated_norm import kernels
from ops.gated_norm.common import groups_of, rows_of, with_gradient
from ops.native_array import array

SMALL = 1 << 15  # values: below, one thread is done before a second is there
PIECES = 16  # of the rows: each sums the gradients of weight and bias for itself


def _threads(values: int) -> int:
    """How many of torch's threads to work on."""
    return native_team.threads() if values >= SMALL else 1


class _Work:
    """What forward and backward take alike."""

    def __init__(self, x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None):
        self.width = x.shape[-1]
        kept, self.groups = groups_of(x, weight, bias)
        self.x, self.gate = self.rows(x), self.rows(gate)
        ones = x.new_ones(kept, self.width) if weight is None else weight
        zeros = x.new_zeros(kept, self.width) if bias is None else bias
        self.weight, self.bias = ((each.expand(kept, self.width)).contiguous() for each in (ones, zeros))
        self.pieces = min(PIECES, len(self.x))

    def rows(self, x: Tensor) -> Tensor:
        rows = rows_of(x, self.groups * self.width)
        return rows if rows.dtype == torch.float32 else rows.contiguous()  # one kind of array to compile for

    def sizes(self) -> tuple[int, int, int]:
        return len(self.x), self.groups, self.width


def _forward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and 1 / sqrt(mean square + eps) of each row and group."""
    work = _Work(x, gate, weight, bias)
    y = x.new_empty(len(work.x), work.groups * work.width)
    means, rates = x.new_empty(2, len(work.x), work.groups)
    options = activation == "silu", gate_first, center
    tensors = work.x, work.gate, work.weight, work.bias, y, means, rates
    if x.dtype == torch.float32:
        job = np.empty(19, np.int64)
        job[:7] = [each.data_ptr() for each in tensors]
        job[7:10] = work.sizes()
        job[10:14] = work.x.stride(0), work.gate.stride(0), len(work.weight), np.float32(eps).view(np.int32)
        job[14:] = *options, work.pieces, 0
        kernels.forward_on(_threads(x.numel()), job)
    else:
        arguments = [*map(array, tensors), float(eps), *options]
        kernels.forward(0, work.pieces, work.pieces, *arguments)
    return y.view(x.shape), means, rates


def _backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    means: Tensor,
    rates: Tensor,
    activation: str,
    gate_first: bool,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    work = _Work(x, gate, weight, bias)
    slopes = work.rows(dy)
    dx, dgate = x.new_empty(2, len(work.x), work.groups * work.width)
    sums = x.new_zeros(work.pieces, 2, *work.weight.shape)
    options = activation == "silu", gate_first, center
    tensors = slopes, work.x, work.gate, work.weight, work.bias, means, rates, dx, dgate, sums
    if x.dtype == torch.float32:
        job = np.empty(22, np.int64)
        job[:10] = [each.data_ptr() for each in tensors]
        job[10:13] = work.sizes()
        job[13:17] = slopes.stride(0), work.x.stride(0), work.gate.stride(0), len(work.weight)
        job[17:] = *options, work.pieces, 0
        kernels.backward_on(_threads(x.numel()), job)
    else:
        arguments = [*map(array, tensors), *options]
        kernels.backward(0, work.pieces, work.pieces, *arguments)
    found = tuple(
        None if each is None else total.sum_to_size(each.shape)
        for each, total in zip((weight, bias), sums.sum(0), strict=True)
    )
    return dx.view(x.shape), dgate.view(x.shape), found[0], found[1]


gated_norm = with_gradient(_forward, _backward)
