"""The native (numba, CPU) gated activation and its gradient."""

from typing import Any

import torch
from torch import Tensor

from ops import native_team
from ops.gated import ACTIVATIONS, kernels
from ops.native_array import array

SMALL = 1 << 15  # values: below, one thread is done before a second is there


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _threads(rows: Tensor) -> int:
    """How many of torch's threads to work on."""
    return native_team.threads() if rows.numel() >= SMALL else 1


def _forward(inner: Tensor, activation: str) -> Tensor:
    rows = _rows(inner)
    y = rows.new_empty(len(rows), rows.shape[1] // 2)
    if rows.dtype == torch.float32:
        kernels.forward_on(_threads(rows), activation == "gelu_tanh", array(rows), array(y))
    else:
        getattr(kernels, activation)(0, len(rows), array(rows), array(y))
    return y.view(*inner.shape[:-1], y.shape[1])


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(inner)
        ctx.activation = activation
        return _forward(inner, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inner,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of gradients: by operations that have some
            gate, value = inner.chunk(2, dim=-1)
            y = ACTIVATIONS[ctx.activation](gate) * value
            return *torch.autograd.grad(y, inner, grads[0], create_graph=True), None
        rows, dy = _rows(inner), _rows(grads[0])
        made = torch.empty_like(rows)
        arrays = array(dy), array(rows), array(made)
        if rows.dtype == torch.float32:
            kernels.backward_on(_threads(rows), ctx.activation == "gelu_tanh", *arrays)
        else:
            getattr(kernels, f"{ctx.activation}_backward")(0, len(rows), *arrays)
        return made.view(inner.shape), None


def gated(inner: Tensor, activation: str) -> Tensor:
    """See `ops.gated`."""
    if torch.is_grad_enabled() and inner.requires_grad:
        return _Gated.apply(inner, activation)  # pyright: ignore[reportReturnType]
    return _forward(inner, activation)
