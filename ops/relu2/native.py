"""The native (numba, CPU) relu² and its gradient."""

from typing import Any

import torch
from torch import Tensor

from ops import native_team
from ops.native_array import array
from ops.relu2 import chain, kernels

SMALL = 1 << 15  # values: below, one thread is done before a second is there


def _run(one: Any, on_all: Any, *tensors: Tensor) -> None:
    arrays = [array(each) for each in tensors]
    if tensors[0].dtype == torch.float32:
        on_all(native_team.threads() if len(arrays[0]) >= SMALL else 1, *arrays)
    else:
        one(0, len(arrays[0]), *arrays)


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().view(-1)


def _forward(x: Tensor) -> Tensor:
    values = _flat(x)
    y = torch.empty_like(values)
    _run(kernels.forward, kernels.forward_on, values, y)
    return y.view(x.shape)


class _ReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of gradients: by operations that have some
            return torch.autograd.grad(chain(x), x, grads[0], create_graph=True)[0]
        values = _flat(x)
        made = torch.empty_like(values)
        _run(kernels.backward, kernels.backward_on, values, _flat(grads[0]), made)
        return made.view(x.shape)


def relu2(x: Tensor) -> Tensor:
    """See `ops.relu2`."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _ReLU2.apply(x)  # pyright: ignore[reportReturnType]
    return _forward(x)
