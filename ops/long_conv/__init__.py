"""Causal convolution over time with a filter as long as the sequence: the convolution view of time-invariant state
space models (S4, 2111.00396, eq. 5) and of Hyena (2302.10866)."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops import segments as seg
from ops.dispatch import Implementation, Op, refuse_native, refuse_triton, tensors

LIMIT = 8192  # tokens and taps that the Triton kernel takes: its work grows with their product
SHORT = 512  # tokens and taps up to which `auto` prefers it to transforms
DIRECT = 4  # tokens up to which "chunked" sums directly


def _reference(**arguments: Any) -> Tensor:
    from ops.long_conv.reference import reference

    return reference(**arguments)


def _chunked(**arguments: Any) -> Tensor:
    from ops.long_conv.chunked import chunked

    return chunked(**arguments)


def _native(**arguments: Any) -> Tensor:
    from ops.long_conv.native import native

    return native(**arguments)


def _triton(**arguments: Any) -> Tensor:
    from ops.long_conv.triton import triton_conv

    return triton_conv(**arguments)


def _refuse_triton(arguments: Mapping[str, Any], forced: bool) -> str | None:
    """Direct sums take time · reach multiply-adds a channel, a transform about 60 · reach moved through memory several
    times: where the first wins is an estimate, so `auto` takes it for short sequences only."""
    x, history = arguments["x"], arguments["history"]
    time = x.shape[1]
    reach = min(arguments["kernel"].shape[1], time + (0 if history is None else history.shape[1]))
    if x.is_cuda and any(each.dtype == torch.float64 for each in tensors(arguments)):
        return "takes float64 under the interpreter alone; use chunked, or float32"
    if max(time, reach) > LIMIT:
        return f"sums directly, for time and taps up to {LIMIT}, got {max(time, reach)}; use chunked"
    if not forced and max(time, reach) > SHORT:
        return f"direct sums over more than {SHORT} tokens lose to a transform (impl='triton' forces them)"
    if not forced and time <= DIRECT:
        return "a few tokens are as fast in PyTorch"
    return refuse_triton(arguments, forced)


def _refuse_native(arguments: Mapping[str, Any], forced: bool) -> str | None:
    if not forced and arguments["x"].shape[1] <= DIRECT:
        return "a few tokens are as fast in PyTorch"
    return refuse_native(arguments, forced)


_OP = Op(
    "long_conv",
    Implementation("native", _native, _refuse_native),
    Implementation("triton", _triton, _refuse_triton),
    Implementation("chunked", _chunked),
    Implementation("reference", _reference),
)


def long_conv(
    x: Float[Tensor, "batch time channels"],
    kernel: Float[Tensor, "channels taps"],
    D: Float[Tensor, " channels"] | None = None,
    gate: Float[Tensor, "batch time channels"] | None = None,
    *,
    response: Float[Tensor, "batch time channels"] | None = None,
    history: Float[Tensor, "batch past channels"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "batch time channels"]:
    """y_t = (Σ_{s=0}^{min(t, taps-1)} kernel_s x_{t-s} + response_t + D x_t) · gate_t   (2302.10866, section 2).

    `kernel[:, 0]` multiplies the current token; `taps` may be less or more than time. Without D the skip is left out,
    without gate the product. `response` is what a state from before the call adds (C Āᵗ⁺¹ h for a state space model).
    `history` holds the inputs before the call, right-aligned: its last entry is the input before the first token, and
    zeros stand where there was none.

    `segments` (0 padding, equal ids one document): t counts the valid tokens of the document alone. `history` belongs
    to each row's first document, the others start from nothing; `response` is added wherever it is given. Padding is
    never read and y is 0 there, whatever x, gate and response hold.

    Returns y in x's dtype; sums are made in the widest of the inputs' dtypes and float32. Every input has a gradient.

    `impl`: "auto", "native" (numba on a CPU; transforms of its own), "triton" (CUDA; direct sums), "chunked" (any
    device; transforms, direct sums for up to 4 tokens) or "reference" (a loop over time).
    Cost, with n = past + time: O(batch·channels·n log n) for "native" and "chunked", and as much memory as a few copies
    of x; 2·batch·channels·time·min(taps, n) FLOPs for "triton" and "reference". All but "reference" keep their inputs
    alone for the backward pass; with segments they wait for the device to know the documents' lengths. A transform's
    rounding error is relative to the largest values of its document, not to those of the token.

    Raises ValueError for shapes that do not fit together, an unknown `impl` or an empty sequence; TypeError for tensors
    that are not real floating point; RuntimeError for an `impl` that cannot take these tensors.
    """
    _check(x, kernel, D, gate, response, history, segments)
    return _OP(
        impl, x=x, kernel=kernel, D=D, gate=gate, response=response, history=history, segments=segments
    )  # fmt: skip


def _check(
    x: Tensor,
    kernel: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    response: Tensor | None,
    history: Tensor | None,
    segments: Tensor | None,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"long_conv takes x of shape [batch, time, channels], got {tuple(x.shape)}")
    batch, time, channels = x.shape
    if time == 0:
        raise ValueError("long_conv got an empty sequence (time=0); pass at least one token")
    if kernel.ndim != 2 or kernel.shape[0] != channels or kernel.shape[1] < 1:
        raise ValueError(
            f"kernel has shape {tuple(kernel.shape)}, but x has channels={channels}; pass [channels, taps], taps >= 1"
        )
    if history is not None and (history.ndim != 3 or (history.shape[0], history.shape[2]) != (batch, channels)):
        raise ValueError(
            f"history has shape {tuple(history.shape)}, but x {tuple(x.shape)} needs [batch, past, channels] with "
            f"batch={batch} and channels={channels}"
        )
    for name, value, shape in (
        ("D", D, (channels,)),
        ("gate", gate, (batch, time, channels)),
        ("response", response, (batch, time, channels)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but x {tuple(x.shape)} needs {shape}")
    for name, value in (
        ("x", x), ("kernel", kernel), ("D", D), ("gate", gate), ("response", response), ("history", history)
    ):  # fmt: skip
        if value is not None and not value.is_floating_point():
            raise TypeError(
                f"long_conv takes floating point (real) tensors, but {name} is {value.dtype}; "
                "convert integers with .float(), complex numbers into their real and imaginary parts"
            )
    if segments is not None:
        seg.check(segments, batch, time)
