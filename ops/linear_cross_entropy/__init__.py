"""linear_cross_entropy: the loss of a language model's head, without ever holding all logits."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops.dispatch import Implementation, Op, refuse_native, refuse_transforms, refuse_triton
from ops.precision import autocasting

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " rows"],
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "sum",
    impl: str = "auto",
) -> Float[Tensor, ""]:
    """Cross entropy in nats of softmax(logits) at the targets, with logits = scale · x Wᵀ.

    `softcap` c: c · tanh(logits / c) in their place (Gemma 2, 2408.00118, section 2). Rows whose target is
    `ignore_index` count for nothing. `reduction`: "sum", or "mean" over the rows that count (nan if there are none).

    The logits of a language model are its largest tensor: rows · vocab numbers, and as many again for their logarithms
    and their gradient. Here a piece of the rows at a time goes all the way: logits, loss, gradient of the logits, and
    what that adds to the gradients of x and W (the idea of Liger Kernel, 2410.10989, section 3.2), so that the backward
    pass only has to scale them. Under autocast x and W are cast as torch.mm casts them; nats are float32 at least.

    impl: "auto", "triton" (softmax and gradient of a row in one kernel), "native" (the same by numba on a CPU, float32
    and float64), "chunked" (torch, any device), "torch" (all logits at once), "reference". On a CPU rows that do not
    count are left out of all products.
    Cost: 6 · rows · vocab · width FLOPs with gradients, 2 without; memory beside inputs and gradients: 2^24 logits on a
    CPU, 2^27 elsewhere, instead of rows · vocab.
    Raises ValueError or TypeError for shapes and types that do not fit and, on a CPU, for targets outside of the
    vocabulary.
    """
    _check(x, weight, targets, reduction)
    if autocasting(x.device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(f"linear_cross_entropy takes x and weight of one dtype, got {x.dtype} and {weight.dtype}")
    nats = _OP(
        impl, x=x, weight=weight, targets=targets, ignore_index=ignore_index, scale=float(scale), softcap=softcap
    )
    return nats / (targets != ignore_index).sum() if reduction == "mean" else nats


def _check(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> None:
    shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy takes x [rows, width], weight [vocab, width] and targets [rows], got {shapes}; "
            "flatten batch and time first"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"linear_cross_entropy: targets must be int64 or int32, got {targets.dtype}; use .long()")
    if not x.device == weight.device == targets.device:
        raise ValueError(
            f"linear_cross_entropy: x is on {x.device}, weight on {weight.device}, targets on {targets.device}"
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose 'sum' or 'mean'")


def _triton(**arguments: Any) -> Tensor:
    from ops.linear_cross_entropy.triton import linear_cross_entropy as run

    return run(**arguments)


def _native(**arguments: Any) -> Tensor:
    from ops.linear_cross_entropy.native import linear_cross_entropy as run

    return run(**arguments)


def _chunked(**arguments: Any) -> Tensor:
    from ops.linear_cross_entropy.chunked import linear_cross_entropy as run

    return run(**arguments)


def _torch(**arguments: Any) -> Tensor:
    from ops.linear_cross_entropy.reference import whole

    return whole(**arguments)


def _reference(**arguments: Any) -> Tensor:
    from ops.linear_cross_entropy.reference import linear_cross_entropy as run

    return run(**arguments)


def _refuse_chunked(arguments: Mapping[str, Any], forced: bool) -> str | None:
    if torch.compiler.is_compiling():
        return None
    for name in ("x", "weight"):
        if type(arguments[name]) not in (Tensor, torch.nn.Parameter):
            return f"takes plain tensors, got {type(arguments[name]).__name__}"
    return refuse_transforms()


def _refuse_triton(arguments: Mapping[str, Any], forced: bool) -> str | None:
    if arguments["x"].dtype == torch.float64:
        return "computes in float32, got float64"
    return _refuse_chunked(arguments, forced) or refuse_triton(arguments, forced)


def _refuse_native(arguments: Mapping[str, Any], forced: bool) -> str | None:
    if arguments["x"].dtype not in (torch.float32, torch.float64):
        return f"takes float32 and float64, got {arguments['x'].dtype}"
    return _refuse_chunked(arguments, forced) or refuse_native(arguments, forced)


_OP = Op(
    "linear_cross_entropy",
    Implementation("triton", _triton, _refuse_triton),
    Implementation("native", _native, _refuse_native),
    Implementation("chunked", _chunked, _refuse_chunked),
    Implementation("torch", _torch),
    Implementation("reference", _reference),
)
