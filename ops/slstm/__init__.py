"""slstm: the recurrence of xLSTM's sLSTM (2405.04517), whose gates see the output of the token before."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops import segments as seg
from ops.dispatch import Implementation, Op
from ops.precision import state_dtype

__all__ = ["EMPTY", "SLSTMMemory", "slstm"]

EMPTY = -1e30  # m where n = 0: below every gate, and finite, so that no difference of two is NaN


class SLSTMMemory(NamedTuple):
    """h, and the sums c and n as c e^-m and n e^-m, where n e^-m is 1 or more from the first token on; float32 at
    least. All zeros: nothing seen yet (n = 0 makes m irrelevant)."""

    h: Float[Tensor, "batch width"]
    c: Float[Tensor, "batch width"]
    n: Float[Tensor, "batch width"]
    m: Float[Tensor, "batch width"]


def slstm(
    logits: Float[Tensor, "batch time 4 width"],
    R: Float[Tensor, "heads size 4 size"],
    *,
    initial_state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "batch time width"], SLSTMMemory]:
    """c_t = f c_{t-1} + i z;  n_t = f n_{t-1} + i;  h_t = o c_t / n_t   (2405.04517, eq. 8 to 14)

    with i = exp(ĩ), f = σ(f̃), z = tanh(z̃), o = σ(õ) and (ĩ, f̃, z̃, õ) = logits_t + R h_{t-1}, in this order; R[k] takes
    the h of head k's channels to the four logits of the same channels. `logits` are the inputs' share, bias included.
    The sums are kept as c e^-m and n e^-m, m_t = max(log f + m_{t-1}, ĩ) (eq. 15 to 17): no gate overflows them.
    `segments` (0 padding, equal ids one document): every document of a row but the first starts from nothing, the first
    from `initial_state` (h, c, n, m; None: nothing); padding is never read, changes no memory, and h is 0 there.

    Returns h in logits' dtype, and the memory after each row's last valid token, in float32 at least. Gradients flow to
    logits, R and initial_state, through h and the last h, c and n. m is redundant, so the last m is a constant (it
    carries no gradient), and the gradient of the last c and n is taken at that constant: right for every function of
    c e^m and n e^m, as another call is. The gradient of the initial m is the true one, c ∂c + n ∂n.

    Cost: T steps one after another, forward and backward (h feeds back through tanh and the gates: no parallel form
    exists), each 8·batch·width²/heads FLOPs forward and about 20 a channel; memory O(time): "scan" keeps h, c, n and m
    of each token.
    impl: "auto", "scan" (any device; one custom op, so that torch.compile does not unroll time, and a gradient written
    out) or "reference" (the loop, for autograd).
    Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    _check(logits, R, initial_state, segments)
    wide = state_dtype(logits, R, *(initial_state or ()))
    batch, width = logits.shape[0], logits.shape[-1]
    if initial_state is None:
        h = c = n = logits.new_zeros(batch, width, dtype=wide)
        m = torch.full_like(h, EMPTY)
    else:
        h, c, n, m = (each.to(wide) for each in initial_state)
        if m.requires_grad:  # the same sums with a constant m, whose gradient is in theirs now
            constant = m.detach()
            factor = torch.exp(m - constant)
            c, n, m = c * factor, n * factor, constant
        m = torch.where(n == 0, EMPTY, m)
    given, logits = logits.dtype, logits.to(wide)
    if segments is not None:
        logits = torch.where((segments != 0)[..., None, None], logits, 0)
    y, last = _OP(impl, logits=logits, R=R.to(wide), state=(h, c, n, m), segments=segments)
    return y.to(given), SLSTMMemory(*last)


def _check(logits: Tensor, R: Tensor, initial_state: tuple[Tensor, ...] | None, segments: Tensor | None) -> None:
    if logits.ndim != 4 or logits.shape[2] != 4:
        raise ValueError(f"slstm takes logits [batch, time, 4, width] of i, f, z and o, got {tuple(logits.shape)}")
    batch, time, _, width = logits.shape
    if time == 0:
        raise ValueError("slstm got an empty sequence (time=0); pass at least one token")
    if R.ndim != 4 or R.shape[1:] != (R.shape[1], 4, R.shape[1]) or R.shape[0] * R.shape[1] != width:
        raise ValueError(
            f"slstm: R has shape {tuple(R.shape)}, but logits have width={width}; "
            "pass [heads, size, 4, size] with heads · size = width"
        )
    if initial_state is not None:
        shapes = [tuple(each.shape) for each in initial_state]
        if shapes != [(batch, width)] * 4:
            raise ValueError(
                f"slstm: initial_state has shapes {shapes}; pass (h, c, n, m), each [batch, width] = {(batch, width)}"
            )
    for each in (logits, R, *(initial_state or ())):
        if not each.is_floating_point():
            raise TypeError(f"slstm takes floating point (real) tensors, got {each.dtype}; convert with .float()")
    if segments is not None:
        seg.check(segments, batch, time)


def _scan(**arguments: Any):
    from ops.slstm.scan import slstm as run

    return run(**arguments)


def _reference(**arguments: Any):
    from ops.slstm.reference import slstm as run

    return run(**arguments)


_OP = Op("slstm", Implementation("scan", _scan), Implementation("reference", _reference))
