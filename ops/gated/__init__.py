"""gated: what a gated linear unit does between its matrices, activation(gate) ⊙ value."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ops.dispatch import Implementation, Op, refuse_native_pass
from ops.relu2 import relu2

__all__ = ["ACTIVATIONS", "gated"]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 and Gemma use it (Hendrycks & Gimpel, 1606.08415)."""
    return F.gelu(x, approximate="tanh")


# Every one maps 0 to 0, so a zero row of a block without biases stays zero.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
}
COMPILED = ("silu", "gelu_tanh")


def gated(inner: Float[Tensor, "*rows inner"], activation: str, *, impl: str = "auto") -> Float[Tensor, "*rows hidden"]:
    """activation(gate) ⊙ value (Shazeer, 2002.05202, eqs. 5 and 6): the gate is the first half of the last dimension of
    `inner`, the value the second. Differentiable any number of times.

    "native" (numba on a CPU; float32 and float64; silu and gelu_tanh) reads `inner` once and keeps nothing else for the
    backward pass, which computes the activation again and writes both halves of the gradient where they belong; torch's
    operations keep three tensors and copy the halves together.

    activation: one of ACTIVATIONS. impl: "auto", "native", "torch", "reference".
    Cost: about 10 FLOPs a value; the time to read `inner`.
    Raises ValueError for an unknown activation or an odd last dimension.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose from {', '.join(ACTIVATIONS)}")
    if inner.ndim == 0 or inner.shape[-1] % 2:
        raise ValueError(f"gated takes a gate and a value side by side, [..., 2·hidden], got {tuple(inner.shape)}")
    return _OP(impl, inner=inner, activation=activation)


def _native(**arguments: Any) -> Tensor:
    from ops.gated.native import gated as run

    return run(**arguments)


def _torch(inner: Tensor, activation: str) -> Tensor:
    gate, value = inner.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * value


def _reference(inner: Tensor, activation: str) -> Tensor:
    wide = inner.to(torch.promote_types(inner.dtype, torch.float32))
    return _torch(wide, activation).to(inner.dtype)


def _refuse(arguments: Mapping[str, Any], forced: bool) -> str | None:
    if arguments["activation"] not in COMPILED:
        return f"knows {' and '.join(COMPILED)}, not {arguments['activation']}"
    return refuse_native_pass(arguments, arguments["inner"].numel(), forced)


_OP = Op(
    "gated",
    Implementation("native", _native, _refuse),
    Implementation("torch", _torch),
    Implementation("reference", _reference),
)
