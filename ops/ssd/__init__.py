"""State space duality, the sequence mixing of Mamba-2 (Dao & Gu, 2405.21060): a state space model whose A is one number
a head is linear attention with a decay a head and step. It runs on `ops.linear_attention`, which has the kernels."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops import segments as seg
from ops.linear_attention import linear_attention
from ops.precision import state_dtype


def ssd(
    x: Float[Tensor, "batch time heads p"],
    dt: Float[Tensor, "batch time heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "batch time groups n"],
    C: Float[Tensor, "batch time groups n"],
    D: Float[Tensor, " heads"] | None = None,
    *,
    initial_state: Float[Tensor, "batch heads n p"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "batch time heads p"], Float[Tensor, "batch heads n p"]]:
    """h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)ᵀ;  y_t = C_tᵀ h_t + D x_t, for each head
    (2405.21060, eq. 2 with A_t = exp(dt_t A) I; computed in chunks by matrix products, section 6).

    `dt` is the step itself, positive: softplus and bias are the caller's. `A` is not positive (a positive one grows
    without bound). `groups` divides heads: head i reads B and C of group i // (heads / groups). Without D: no skip.

    `segments` (0 padding, equal ids one document): h starts from zero at each document of a row but the first, which
    goes on from `initial_state` (default zero); padding leaves h alone and gets y = 0, whatever its x, dt, ... hold.

    Returns y, in x's dtype, and the state after each row's last valid token, in the dtype h is summed in: the widest of
    the inputs' dtypes and float32. Every input has a gradient, `initial_state` too, also through the final state.

    `impl` and cost are those of `ops.linear_attention` with k_dim = n and v_dim = p; what it chooses is what
    `ops.explain` tells. The decay is computed in float32 at least, dt x in x's dtype.

    Raises ValueError for shapes that do not fit together, an unknown `impl` or an empty sequence; TypeError for tensors
    that are not real floating point; RuntimeError for an `impl` that cannot take these tensors.
    """
    _check(x, dt, A, B, C, D, initial_state, segments)
    dtype = state_dtype(x, dt, A, B, C, D, initial_state)
    given, wide = x.dtype, dt.to(dtype)
    if segments is not None:
        # linear_attention minds dt x and dt A at padding, but their factors' gradients are theirs times the other.
        valid = (segments != 0)[..., None]
        x, wide = torch.where(valid[..., None], x, 0), torch.where(valid, wide, 0)
    y, state, _ = linear_attention(
        C,
        B,
        (wide[..., None] * x.to(dtype)).to(given),
        wide * A.to(dtype),
        initial_state=initial_state,
        segments=segments,
        impl=impl,
    )
    if D is not None:
        y = torch.addcmul(y.to(dtype), D.to(dtype)[:, None], x.to(dtype)).to(given)
    return y, state


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
) -> None:
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(
            "ssd takes x [batch, time, heads, p] and B [batch, time, groups, n], "
            f"got {tuple(x.shape)} and {tuple(B.shape)}"
        )
    batch, time, heads, p = x.shape
    groups, n = B.shape[2:]
    if time == 0:
        raise ValueError("ssd got an empty sequence (time=0); pass at least one token")
    if groups == 0 or heads % groups:
        raise ValueError(
            f"ssd: groups={groups} of B and C must divide heads={heads} of x; try groups={math.gcd(groups, heads)}"
        )
    for name, value, shape in (
        ("x", x, (batch, time, heads, p)),
        ("dt", dt, (batch, time, heads)),
        ("A", A, (heads,)),
        ("B", B, (batch, time, groups, n)),
        ("C", C, (batch, time, groups, n)),
        ("D", D, (heads,)),
        ("initial_state", initial_state, (batch, heads, n, p)),
    ):
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"ssd takes floating point (real) tensors, but {name} is {value.dtype}")
        if value.shape != shape:
            raise ValueError(
                f"ssd: {name} has shape {tuple(value.shape)}, but x with batch={batch}, time={time}, heads={heads}, "
                f"p={p} and B with groups={groups}, n={n} need {shape}"
            )
    if segments is not None:
        seg.check(segments, batch, time)
