"""The native (numba, CPU) product of a matrix with a few rows, for calls without gradients."""

import torch
from torch import Tensor

from ops import native_team
from ops.linear import kernels
from ops.native_array import array
from ops.native_threads import run_blocks

LARGE = 1 << 21  # numbers of the weight: below, one thread is done before a second of a pool is at full speed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `ops.linear`."""
    outputs = weight.shape[0]
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = torch.empty(len(rows), outputs, dtype=torch.float32)
    stored = weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight
    arguments = array(stored), array(rows), y.numpy()
    threads = native_team.threads()
    if threads > 1 or weight.numel() < LARGE:
        kernels.spread(threads, *arguments)
    else:  # no team lends its threads
        run_blocks(kernels.product, outputs, *arguments)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], outputs).to(x.dtype)
