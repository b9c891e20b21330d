"""Matrix products of groups of rows, each group with a matrix of its own: the work of a mixture of experts."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops.dispatch import Implementation, Op, refuse_triton
from ops.precision import autocasting


def _triton(**arguments: Any) -> Tensor:
    from ops.grouped_mm.triton import grouped_mm

    return grouped_mm(**arguments)


def _torch(**arguments: Any) -> Tensor:
    from ops.grouped_mm.aten import grouped_mm

    return grouped_mm(**arguments)


def _chunked(**arguments: Any) -> Tensor:
    from ops.grouped_mm.chunked import grouped_mm

    return grouped_mm(**arguments)


def _reference(**arguments: Any) -> Tensor:
    from ops.grouped_mm.reference import grouped_mm

    return grouped_mm(**arguments)


def _refuse_triton(arguments: Any, forced: bool) -> str | None:
    dtype = arguments["x"].dtype
    if dtype == torch.float64 and not forced:
        return "float64 is for checking numbers, which the loop over cuBLAS does; impl='triton' forces the kernel"
    return refuse_triton(arguments, forced)


def _refuse_torch(arguments: Any, forced: bool) -> str | None:
    x, weight = arguments["x"], arguments["weight"]
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"torch's grouped_mm takes bfloat16, float16 and float32, got {x.dtype}"
    unit = 16 // x.element_size()
    if weight.shape[1] % unit or weight.shape[2] % unit:
        return f"torch's grouped_mm needs K and N divisible by {unit} (16 bytes), got {tuple(weight.shape[1:])}"
    if min(x.shape[0], *weight.shape) == 0:
        return "an empty product"
    if x.device.type == "cpu" and not forced:
        return "on the CPU it is the same loop over groups with more around it"
    return None


_op = Op(
    "grouped_mm",
    Implementation("triton", _triton, _refuse_triton),
    Implementation("torch", _torch, _refuse_torch),
    Implementation("chunked", _chunked),
    Implementation("reference", _reference),
)


def grouped_mm(
    x: Float[Tensor, "rows k"],
    weight: Float[Tensor, "groups k n"],
    sizes: Int[Tensor, " groups"],
    *,
    impl: str = "auto",
) -> Float[Tensor, "rows n"]:
    """y[r] = x[r] @ weight[g] for the group g that row r belongs to (MegaBlocks, 2211.15841, section 4).

    Rows are sorted by group: the first `sizes[0]` belong to group 0, the next `sizes[1]` to group 1. Groups may be
    empty. Rows behind the last group (sum(sizes) < rows) are never read: they are zero in the output and in the
    gradient of x, whatever stands in them. Differentiable in x and weight, any number of times.

    Shapes: x [rows, k], weight [groups, k, n], sizes [groups] of integers on the same device -> [rows, n].
    Under autocast x and weight are cast as torch.mm casts them. Sums are float32 at least (Triton) or torch.mm's.

    Cost: 2 · sum(sizes) · k · n FLOPs forward and twice that backward. "triton" and "torch" read `sizes` on the
    device; "chunked" and "reference" read them on the host (one synchronisation on a GPU, none on the CPU).

    Raises ValueError or TypeError for shapes, types or devices that do not fit; where the host reads `sizes`, also
    for a negative size and for a sum above the number of rows (Triton cuts such groups at the last row).
    """
    _check(x, weight, sizes)
    if autocasting(x.device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(f"grouped_mm takes x and weight of one dtype, got {x.dtype} and {weight.dtype}; cast one")
    return _op(impl, x=x, weight=weight, sizes=sizes)


def _check(x: Tensor, weight: Tensor, sizes: Tensor) -> None:
    shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, sizes {tuple(sizes.shape)}"
    if x.ndim != 2 or weight.ndim != 3 or sizes.ndim != 1:
        raise ValueError(f"grouped_mm takes x [rows, k], weight [groups, k, n] and sizes [groups], got {shapes}")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"grouped_mm: x has k={x.shape[1]} columns, weight is for k={weight.shape[1]} ({shapes}); "
            "weight is [groups, k, n], pass weight.transpose(1, 2) if it is [groups, n, k]"
        )
    if sizes.shape[0] != weight.shape[0]:
        raise ValueError(f"grouped_mm: {sizes.shape[0]} sizes for {weight.shape[0]} groups of weight ({shapes})")
    if sizes.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"grouped_mm: sizes must hold integers, got {sizes.dtype}; use .long()")
    if not x.is_floating_point() or not weight.is_floating_point():
        raise TypeError(f"grouped_mm takes floating point x and weight, got {x.dtype} and {weight.dtype}")
    if not x.device == weight.device == sizes.device:
        raise ValueError(f"grouped_mm: x is on {x.device}, weight on {weight.device}, sizes on {sizes.device}")
