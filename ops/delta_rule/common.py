"""The one form that every delta rule is brought into, which the implementations share.

A token reads the state before its own decay, so that all that reads does so alike:

    u_t = w_t + a_tᵀ S_{t-1};  S_t = Diag(decay_t) S_{t-1} + b_t u_tᵀ (+ k_t v_tᵀ)
    y_t = q̃_tᵀ S_{t-1} + (q_t·b_t) u_t (+ (q_t·k_t) v_t),  with q̃ = decay ⊙ q

The delta rule is a = -β decay ⊙ k, w = β v, b = k, without the terms in brackets; the generalised one has a and b as
they are given, w = 0, and those terms. Decays are never divided by: only numbers of at most 1 are multiplied in.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ops.segments import marks

WIDEST_KEY = 256  # key channels of a state that a Triton program holds whole


class Rule(NamedTuple):
    """See above; all of one dtype, w and extra values as [batch, time, heads, v_dim]."""

    q: Float[Tensor, "batch time heads k_dim"]  # q̃
    a: Float[Tensor, "batch time heads k_dim"]
    b: Float[Tensor, "batch time heads k_dim"]
    w: Float[Tensor, "batch time heads v_dim"] | None
    k: Float[Tensor, "batch time heads k_dim"] | None
    v: Float[Tensor, "batch time heads v_dim"] | None
    qb: Float[Tensor, "batch time heads 1"]
    qk: Float[Tensor, "batch time heads 1"] | None
    log_decay: Float[Tensor, "#batch time #heads #k_dim"] | None  # 0 at padding, -inf at a document's start


def make_rule(
    q: Float[Tensor, "batch time groups k_dim"],
    k: Float[Tensor, "batch time groups k_dim"],
    v: Float[Tensor, "batch time heads v_dim"],
    beta: Float[Tensor, "batch time heads"] | None,
    log_decay: Float[Tensor, "..."] | None,
    erase: tuple[Tensor, Tensor] | None,
    scale: float,
    segments: Int[Tensor, "batch time"] | None,
    dtype: torch.dtype,
    sums: torch.dtype,
) -> Rule:
    """The arguments of `ops.delta_rule` in this form, in `dtype`, but log decays and products in `sums`: padding reads
    and writes nothing, whatever it holds, and a document's start decays everything before it to 0."""
    mark = None if segments is None else marks(segments)
    valid = None if mark is None else (mark != 0)[..., None, None]
    repeats = v.shape[2] // q.shape[2]
    q, k, v = (_clean(each.to(dtype), valid) for each in (q, k, v))
    if scale != 1.0:
        q = q * scale
    if repeats > 1:
        q, k = (each.repeat_interleave(repeats, 2) for each in (q, k))
    log_decay = _log_decay(log_decay, mark, q.shape[1], sums)
    decay = None if log_decay is None else log_decay.exp()
    read = q if decay is None else (decay * q).to(dtype)
    if erase is None:
        kept, w = k if decay is None else decay * k, v
        if beta is not None:
            rate = _clean(beta.to(sums)[..., None], valid)
            kept, w = rate * kept, rate * v
        return Rule(read, -kept.to(dtype), k, w.to(dtype), None, None, _products(q, k, sums), None, log_decay)
    a, b = (each.to(dtype) for each in erase)
    a, b = a if mark is None else torch.where((mark == 1)[..., None, None], a, 0), _clean(b, valid)
    return Rule(read, a, b, None, k, v, _products(q, b, sums), _products(q, k, sums), log_decay)


def _products(q: Tensor, k: Tensor, sums: torch.dtype) -> Float[Tensor, "batch time heads 1"]:
    return (q * k).sum(-1, keepdim=True, dtype=sums)


def _clean(each: Tensor, valid: Tensor | None) -> Tensor:
    return each if valid is None else torch.where(valid, each, 0)


def _log_decay(
    log_decay: Float[Tensor, "..."] | None,
    mark: UInt8[Tensor, "batch time"] | None,
    time: int,
    dtype: torch.dtype,
) -> Float[Tensor, "#batch time #heads #k_dim"] | None:
    reset = None if mark is None else torch.where(mark == 2, -torch.inf, 0.0).to(dtype)[..., None, None]
    if log_decay is None:
        return reset
    log_decay = log_decay.to(dtype)
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(1, time, -1)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    if mark is not None and reset is not None:
        log_decay = torch.where((mark == 1)[..., None, None], log_decay, reset)
    return log_decay
