"""token_mix: RWKV's mixes of a token with the one before it, all at once."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ops.dispatch import Implementation, Op, refuse_native_pass

__all__ = ["token_mix"]


def token_mix(
    x: Float[Tensor, "batch time width"],
    before: Float[Tensor, "batch time width"],
    weight: Float[Tensor, "mixes width"],
    moved: Float[Tensor, "mixes batch time width"] | None = None,
    *,
    impl: str = "auto",
) -> tuple[Float[Tensor, "batch time width"], ...]:
    """x + (before − x) ⊙ (weight_i + moved_i) for each mix i: every channel between x and `before`, the tokens one
    place earlier. `moved` is how far the data moves a mix (RWKV-6, 2404.05892, section 4.2), None in RWKV-4
    (2305.13048, section 3.1) and RWKV-7 (2503.14456, section 4.1). In x's type; differentiable any number of times.

    "native" (numba on a CPU; float32 and float64) reads x and `before` once for all mixes, and once more in the
    backward pass with the gradients; it keeps its inputs alone. The gradient of `weight` is summed in an order that
    does not depend on the number of threads.

    impl: "auto", "native", "torch", "reference".
    Cost: 3 FLOPs a channel and mix, 9 with backward; the time to write the mixes.
    Raises ValueError for shapes that do not fit.
    """
    shape = (len(weight), *x.shape)
    if x.ndim == 0 or x.shape != before.shape or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        shapes = ", ".join(str(tuple(each.shape)) for each in (x, before, weight))
        raise ValueError(f"token_mix takes x and before [..., width] and weight [mixes, width], got {shapes}")
    if moved is not None and moved.shape != shape:
        raise ValueError(f"token_mix: moved must be {shape}, as weight and x are, got {tuple(moved.shape)}")
    return _OP(impl, x=x, before=before, weight=weight, moved=moved)


def chain(x: Tensor, before: Tensor, weight: Tensor, moved: Tensor | None) -> tuple[Tensor, ...]:
    """The formula by torch's operations."""
    difference, weight = before - x, weight.to(x.dtype)
    shares = weight if moved is None else weight.view(len(weight), *(1,) * (x.ndim - 1), -1) + moved.to(x.dtype)
    return tuple(torch.addcmul(x, difference, share) for share in shares.unbind())


def _native(**arguments: Any) -> tuple[Tensor, ...]:
    from ops.token_mix.native import token_mix as run

    return run(**arguments)


def _reference(x: Tensor, before: Tensor, weight: Tensor, moved: Tensor | None) -> tuple[Tensor, ...]:
    mixed = []
    for i, share in enumerate(weight):
        share = share.to(x.dtype) if moved is None else share.to(x.dtype) + moved[i].to(x.dtype)
        mixed.append((1 - share) * x + share * before)
    return tuple(mixed)


def _refuse(arguments: Mapping[str, Any], forced: bool) -> str | None:
    return refuse_native_pass(arguments, arguments["x"].numel() * len(arguments["weight"]), forced)


_OP = Op(
    "token_mix",
    Implementation("native", _native, _refuse),
    Implementation("torch", chain),
    Implementation("reference", _reference),
)
