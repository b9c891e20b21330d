"""relu2: relu(x)², the activation of RWKV's channel mixes and of Primer's feed-forward blocks."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ops.dispatch import Implementation, Op, refuse_native_pass

__all__ = ["relu2"]


def relu2(x: Float[Tensor, "*shape"], *, impl: str = "auto") -> Float[Tensor, "*shape"]:
    """relu(x)² (So et al., Primer, 2109.08668, section 4.1). Differentiable any number of times.

    "native" (numba on a CPU; float32 and float64) reads x once, keeps it alone, and once more with the gradient in the
    backward pass; torch's operations make and keep a tensor more.

    impl: "auto", "native", "torch", "reference".
    Cost: 2 FLOPs a value, 4 with backward; the time to read and write it.
    """
    return _OP(impl, x=x)


def chain(x: Tensor) -> Tensor:
    """The formula by torch's operations."""
    return F.relu(x).square()


def _native(**arguments: Any) -> Tensor:
    from ops.relu2.native import relu2 as run

    return run(**arguments)


def _reference(x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0, x).square()


def _refuse(arguments: Mapping[str, Any], forced: bool) -> str | None:
    return refuse_native_pass(arguments, arguments["x"].numel(), forced)


_OP = Op(
    "relu2",
    Implementation("native", _native, _refuse),
    Implementation("torch", chain),
    Implementation("reference", _reference),
)
