"""The native (numba, CPU) RMSNorm and its gradient."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import rms_norm as by_torch

from ops import native_team
from ops.native_array import array
from ops.rms_norm import kernels

SMALL = 1 << 15  # values: below, one thread is done before a second is there
PIECES = 16  # of the rows: each sums the gradient of the weight for itself


def _threads(rows: Tensor) -> int:
    """How many of torch's threads to work on."""
    return native_team.threads() if rows.numel() >= SMALL else 1


def _forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y and 1 / sqrt(mean(x²) + eps) of each row."""
    width = x.shape[-1]
    rows = x.reshape(-1, width).contiguous()
    scales = torch.ones(width, dtype=x.dtype) if weight is None else weight.contiguous()
    y, rates = torch.empty_like(rows), rows.new_empty(len(rows))
    pieces = min(PIECES, len(rows))
    read, scaled, into, found = (array(each) for each in (rows, scales, y, rates))
    if rows.dtype == torch.float32:
        kernels.forward_on(_threads(rows), pieces, read, scaled, into, found, np.float32(eps).view(np.int32))
    else:
        kernels.forward(0, pieces, pieces, read, scaled, into, found, float(eps))
    return y.view(x.shape), rates


def _backward(dy: Tensor, x: Tensor, weight: Tensor | None, rates: Tensor) -> tuple[Tensor, Tensor | None]:
    width = x.shape[-1]
    rows, slopes = x.reshape(-1, width).contiguous(), dy.reshape(-1, width).contiguous()
    scales = torch.ones(width, dtype=x.dtype) if weight is None else weight.contiguous()
    pieces = min(PIECES, len(rows))
    dx, sums = torch.empty_like(rows), rows.new_zeros(pieces, width)
    arrays = [array(each) for each in (slopes, rows, scales, rates, dx, sums)]
    if rows.dtype == torch.float32:
        kernels.backward_on(_threads(rows), *arrays)
    else:
        kernels.backward(0, pieces, pieces, *arrays)
    return dx.view(x.shape), None if weight is None else sums.sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y, rates = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rates)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rates = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *_backward(grads[0], x, weight, rates), None
        # Gradients of gradients: by operations that have some.
        wanted = [each for each, ask in zip((x, weight), ctx.needs_input_grad, strict=False) if ask]
        y = by_torch(x, x.shape[-1:], weight, ctx.eps)
        found = iter(torch.autograd.grad(y, wanted, grads[0], create_graph=True))
        return *(next(found) if ask else None for ask in ctx.needs_input_grad[:2]), None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]
    return _forward(x, weight, eps)[0]
