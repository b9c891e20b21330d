"""linear: y = x Wᵀ + b, with a way of its own for the few rows of decoding on a CPU."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ops.dispatch import Implementation, Op, refuse_native
from ops.precision import autocasting

__all__ = ["linear"]

FEW = 4  # rows: more are a matrix product, at which BLAS is good
LEAST = 1 << 16  # weights: below, calling takes longer than multiplying


def linear(
    x: Float[Tensor, "*rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
    *,
    impl: str = "auto",
) -> Float[Tensor, "*rows outputs"]:
    """y = x Wᵀ + b.

    Decoding multiplies each weight with few rows, so it is as fast as the weights are read. BLAS libraries are far from
    that on some CPUs; "native" (numba) reads them once, in order, for up to 4 rows of float32 or 2 of bfloat16
    (summed in float32). It needs W contiguous, and has no gradient.

    impl: "auto" (native where it can, else torch), "native", "torch" (`torch.nn.functional.linear`) or "reference".
    Cost: 2 · rows · outputs · inputs FLOPs; for few rows the time to read W.
    Raises ValueError for shapes that do not fit together; RuntimeError for an `impl` that cannot take these tensors.
    """
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear takes x [..., inputs] and weight [outputs, inputs], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    return _OP(impl, x=x, weight=weight, bias=bias)


def _native(**arguments: Any) -> Tensor:
    from ops.linear.native import linear as run

    return run(**arguments)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def _reference(**arguments: Any) -> Tensor:
    from ops.linear.reference import linear as run

    return run(**arguments)


def _refuse(arguments: Mapping[str, Any], forced: bool) -> str | None:
    """Checked before anything else of a call, so the commonest reasons stand first."""
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    if torch.compiler.is_compiling():
        return "is not for compiled graphs, which have their own kernels"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "has no gradient; call it under torch.no_grad()"
    few = 2 if x.dtype == torch.bfloat16 else FEW  # which takes longer to widen than to read
    if x.numel() > few * x.shape[-1]:
        return f"is for up to {few} rows of {x.dtype}, got {x.numel() // max(x.shape[-1], 1)}"
    if type(x) is not Tensor or type(weight) not in (Tensor, torch.nn.Parameter):
        return f"takes plain tensors, got {type(x).__name__} and {type(weight).__name__}"
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 or bfloat16, alike, got {x.dtype} and {weight.dtype}"
    if bias is not None and (type(bias) not in (Tensor, torch.nn.Parameter) or bias.dtype != x.dtype):
        return "takes a plain bias of the weight's dtype"
    if weight.numel() < LEAST and not forced:
        return f"gains nothing below {LEAST} weights, got {weight.numel()}"
    if not weight.is_contiguous() or not weight.numel() or not x.numel():
        return "needs a contiguous weight, and something to multiply"
    if autocasting(x.device):
        return "does not follow autocast"
    if _get_current_dispatch_mode() is not None:
        return "would be hidden from the dispatch mode that watches or replaces operations here"
    return refuse_native(arguments, forced)


_OP = Op(
    "linear",
    Implementation("native", _native, _refuse),
    Implementation("torch", _torch),
    Implementation("reference", _reference),
)
