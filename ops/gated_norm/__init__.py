"""gated_norm: a norm over each head and a gate, at the end of most recurrent blocks, in one pass each way."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ops.dispatch import Implementation, Op, refuse_few, refuse_native_pass, refuse_triton
from ops.gated_norm.common import ACTIVATIONS, chain

__all__ = ["gated_norm"]

WIDEST = 1 << 14  # values of a row that a Triton program holds


def gated_norm(
    x: Float[Tensor, "*rows width"],
    gate: Float[Tensor, "*rows width"],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    activation: str = "silu",
    gate_first: bool = False,
    center: bool = False,
    impl: str = "auto",
) -> Float[Tensor, "*rows width"]:
    """y = norm(x) ⊙ a(gate), or with `gate_first` norm(x ⊙ a(gate)) (Mamba-2, 2405.21060, section 7.1).

    norm(u) = u / sqrt(mean(u²) + eps) · weight + bias over the last dimension (RMSNorm, 1910.07467, eq. 4); with
    `center` of u − mean(u) (LayerNorm, 1607.06450; over each head by itself, GroupNorm, 1803.08494). a is "silu" or
    "sigmoid". weight and bias, None for 1 and 0: [width], or [groups, width] where the dimension before the last of x
    is groups. Computed in float32 at least; y has gate's type. Differentiable any number of times.

    "native" (numba on a CPU; float32 and float64) and "triton" read x and gate once, and once more in the backward pass
    with dy; they keep those two and two numbers a row. A chain of operations reads and writes some six tensors of that
    size, and in the backward pass a dozen. Gradients of weight and bias are summed in an order that does not depend on
    the number of threads.

    impl: "auto", "triton", "native", "torch", "reference".
    Cost: about 15 FLOPs a value, 40 with backward; the time to read x and gate and write y.
    Raises ValueError for an unknown activation and for shapes that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose from {', '.join(ACTIVATIONS)}")
    if x.ndim == 0 or x.shape != gate.shape:
        raise ValueError(
            f"gated_norm takes x and gate alike, [..., width], got {tuple(x.shape)} and {tuple(gate.shape)}"
        )
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None and (each.ndim not in (1, 2) or each.shape != x.shape[-each.ndim :]):
            raise ValueError(
                f"{name} must have the last one or two dimensions of x {tuple(x.shape)}, got {tuple(each.shape)}"
            )
    return _OP(
        impl,
        x=x,
        gate=gate,
        weight=weight,
        bias=bias,
        eps=eps,
        activation=activation,
        gate_first=gate_first,
        center=center,
    )


def _triton(**arguments: Any) -> Tensor:
    from ops.gated_norm.triton import gated_norm as run

    return run(**arguments)


def _native(**arguments: Any) -> Tensor:
    from ops.gated_norm.native import gated_norm as run

    return run(**arguments)


def _reference(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
    center: bool,
) -> Tensor:
    wide = torch.promote_types(torch.promote_types(x.dtype, gate.dtype), torch.float32)
    opened = 1 / (1 + torch.exp(-gate.to(wide)))
    if activation == "silu":
        opened = opened * gate.to(wide)
    u = x.to(wide) * opened if gate_first else x.to(wide)
    if center:
        u = u - u.mean(-1, keepdim=True)
    y = u / torch.sqrt(u.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return (y if gate_first else y * opened).to(gate.dtype)


def _refuse_native(arguments: Mapping[str, Any], forced: bool) -> str | None:
    return refuse_native_pass(arguments, arguments["x"].numel(), forced)


def _refuse_triton(arguments: Mapping[str, Any], forced: bool) -> str | None:
    x = arguments["x"]
    if torch.float64 in (x.dtype, arguments["gate"].dtype):
        return "computes in float32, got float64"
    if x.shape[-1] > WIDEST:
        return f"takes rows of up to {WIDEST} values, got {x.shape[-1]}"
    return refuse_few(arguments, x.numel(), forced) or refuse_triton(arguments, forced)


_OP = Op(
    "gated_norm",
    Implementation("triton", _triton, _refuse_triton),
    Implementation("native", _native, _refuse_native),
    Implementation("torch", chain),
    Implementation("reference", _reference),
)
