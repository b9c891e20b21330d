"""The native (numba, CPU) product of a matrix with a few rows, for calls without gradients."""

import torch
from torch import Tensor

from ops.linear import kernels
from ops.native_array import array
from ops.native_threads import run_blocks

LARGE = 1 << 21  # numbers of the weight: below, one thread is done before a second is at full speed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `ops.linear`."""
    outputs = weight.shape[0]
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = torch.empty(len(rows), outputs, dtype=torch.float32)
    stored = weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight
    arguments = array(stored), array(rows), y.numpy()
    if weight.numel() < LARGE:
        kernels.product(0, outputs, *arguments)
    else:
        run_blocks(kernels.product, outputs, *arguments)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], outputs).to(x.dtype)
