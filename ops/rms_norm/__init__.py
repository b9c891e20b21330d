"""rms_norm: y = x / sqrt(mean(x²) + eps) · weight, in one pass over x each way on a CPU."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ops.dispatch import Implementation, Op, refuse_native_pass

__all__ = ["rms_norm"]


def rms_norm(
    x: Float[Tensor, "*rows width"], weight: Float[Tensor, " width"] | None, eps: float, *, impl: str = "auto"
) -> Float[Tensor, "*rows width"]:
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich, 1910.07467, eq. 4); weight None
    is 1. Differentiable any number of times.

    PyTorch has it as one kernel on a GPU; on a CPU it is a chain of operations, each of which reads and writes all of
    x. "native" (numba, float32 and float64) reads x once, and once more in the backward pass with dy; it keeps x and a
    number a row. The gradient of the weight is summed in an order that does not depend on the number of threads.

    impl: "auto", "native", "torch" (`torch.nn.functional.rms_norm`), "reference".
    Cost: about 5 FLOPs a value, 12 with backward; the time to read x and write y.
    Raises ValueError for a weight that does not fit.
    """
    if weight is not None and (weight.ndim != 1 or x.ndim == 0 or weight.shape[0] != x.shape[-1]):
        raise ValueError(
            f"rms_norm takes x [..., width] and weight [width], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    return _OP(impl, x=x, weight=weight, eps=eps)


def _native(**arguments: Any) -> Tensor:
    from ops.rms_norm.native import rms_norm as run

    return run(**arguments)


def _torch(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def _reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def _refuse(arguments: Mapping[str, Any], forced: bool) -> str | None:
    return refuse_native_pass(arguments, arguments["x"].numel(), forced)


_OP = Op(
    "rms_norm",
    Implementation("native", _native, _refuse),
    Implementation("torch", _torch),
    Implementation("reference", _reference),
)
