"""The filters of diagonal state space models, without the channels × n × length matrix in memory: the Vandermonde sum
of S4D and DSS (2206.11893, eq. 7; 2203.14343) and the Cauchy sum of S4 (2111.00396, algorithm 1)."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ops.dispatch import Implementation, Op, refuse_native, refuse_triton, tensors


def _vandermonde_reference(**arguments: Any) -> Tensor:
    from ops.ssm_kernel.reference import vandermonde as run

    return run(**arguments)


def _cauchy_reference(**arguments: Any) -> Tensor:
    from ops.ssm_kernel.reference import cauchy as run

    return run(**arguments)


def _vandermonde_chunked(**arguments: Any) -> Tensor:
    from ops.ssm_kernel.chunked import vandermonde as run

    return run(**arguments)


def _cauchy_chunked(**arguments: Any) -> Tensor:
    from ops.ssm_kernel.chunked import cauchy as run

    return run(**arguments)


def _cauchy_native(**arguments: Any) -> Tensor:
    from ops.ssm_kernel.native import cauchy as run

    return run(**arguments)


def _refuse_cauchy_native(arguments: Mapping[str, Any], forced: bool) -> str | None:
    if any(each.dtype != torch.complex64 for each in tensors(arguments)):
        return "takes complex64 alone; use chunked"
    return refuse_native(arguments, forced)


def _vandermonde_triton(**arguments: Any) -> Tensor:
    from ops.ssm_kernel.triton import vandermonde as run

    return run(**arguments)


def _cauchy_triton(**arguments: Any) -> Tensor:
    from ops.ssm_kernel.triton import cauchy as run

    return run(**arguments)


_VANDERMONDE = Op(
    "vandermonde",
    Implementation("triton", _vandermonde_triton, refuse_triton),
    Implementation("chunked", _vandermonde_chunked),
    Implementation("reference", _vandermonde_reference),
)
_CAUCHY = Op(
    "cauchy",
    Implementation("triton", _cauchy_triton, refuse_triton),
    Implementation("native", _cauchy_native, _refuse_cauchy_native),
    Implementation("chunked", _cauchy_chunked),
    Implementation("reference", _cauchy_reference),
)


def vandermonde(
    weights: Complex[Tensor, "channels n"],
    log_a: Complex[Tensor, "channels n"],
    length: int,
    *,
    conjugate: bool = True,
    impl: str = "auto",
) -> Float[Tensor, "channels length"]:
    """K[c, l] = 2 Re Σ_n weights[c, n] · exp(l · log_a[c, n]), l = 0 ... length-1   (S4D, 2206.11893, eq. 7).

    The filter of h_l = exp(log_a) h_{l-1} + B x_l, y_l = 2 Re <C, h_l> for weights = C B. With `conjugate` each entry
    stands for itself and its conjugate (hence the 2); without it, K is Re Σ_n alone.

    Returns the real dtype of the inputs: float32 for complex64, float64 for complex128. Both inputs have a gradient.
    `log_a` must be finite; powers may vanish (Re log_a << 0) and grow without bound where Re log_a > 0. The angle
    l · Im log_a is computed in float64, so a complex64 result is right to float32's rounding however long it is.

    `impl`: "auto", "triton" (CUDA), "chunked" (any device) or "reference" (a loop over n, in complex128).
    Cost: about 4·channels·n·length FLOPs, twice that backward, and 2·channels·n·√length exponentials, a few of whose
    tables are all the memory besides K. "triton" and "chunked" keep their inputs alone for the backward pass.

    Raises ValueError for shapes that do not fit, a length below 1 or an unknown `impl`; TypeError for tensors that are
    not complex64 or complex128; RuntimeError for an `impl` that cannot take these tensors.
    """
    _check_complex("vandermonde", weights=weights, log_a=log_a)
    _check_pair("vandermonde", "log_a", weights, log_a)
    if isinstance(length, bool) or not isinstance(length, int | torch.SymInt):
        raise TypeError(f"vandermonde takes an integer length, got {length!r}")
    if length < 1:
        raise ValueError(f"vandermonde got length={length}; pass at least 1")
    return _VANDERMONDE(impl, weights=weights, log_a=log_a, length=length, conjugate=conjugate)


def cauchy(
    weights: Complex[Tensor, "channels n"],
    z: Complex[Tensor, " length"],
    poles: Complex[Tensor, "channels n"],
    *,
    conjugate: bool = True,
    impl: str = "auto",
) -> Complex[Tensor, "channels length"]:
    """K[c, l] = Σ_n w/(z_l - p) + conj(w)/(z_l - conj(p)), w = weights[c, n], p = poles[c, n]   (2111.00396, eq. 11).

    With `conjugate` each entry stands for itself and its conjugate; without it the second term is left out.

    Returns the widest of the inputs' dtypes; each input has a gradient. z must be finite and meet no pole (the sum is
    infinite there).

    `impl`: "auto", "triton" (CUDA), "native" (numba, CPU, complex64, summed in complex128), "chunked" (any device, in
    blocks of 2²⁰ numbers) or "reference" (a loop over n).
    Cost: about 20·channels·n·length FLOPs, twice that for conjugate pairs and about three times that backward. All but
    "reference" keep their inputs alone for the backward pass.

    Raises ValueError for shapes that do not fit or an unknown `impl`; TypeError for tensors that are not complex64 or
    complex128; RuntimeError for an `impl` that cannot take these tensors.
    """
    _check_complex("cauchy", weights=weights, z=z, poles=poles)
    _check_pair("cauchy", "poles", weights, poles)
    if z.ndim != 1 or z.shape[0] < 1:
        raise ValueError(f"cauchy takes z of shape [length], length >= 1, got {tuple(z.shape)}")
    return _CAUCHY(impl, weights=weights, z=z, poles=poles, conjugate=conjugate)


def _check_complex(op: str, **given: Tensor) -> None:
    for name, value in given.items():
        if value.dtype not in (torch.complex64, torch.complex128):
            raise TypeError(
                f"{op} takes complex64 or complex128 tensors, but {name} is {value.dtype}; "
                "make one of real pairs with torch.view_as_complex, of real numbers with torch.complex(a, 0 * a)"
            )


def _check_pair(op: str, name: str, weights: Tensor, other: Tensor) -> None:
    if weights.ndim != 2 or weights.shape[1] < 1:
        raise ValueError(f"{op} takes weights of shape [channels, n], n >= 1, got {tuple(weights.shape)}")
    if other.shape != weights.shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(other.shape)}, but weights {tuple(weights.shape)}; "
            f"pass [channels, n] for both (weights shared by several need .expand)"
        )
