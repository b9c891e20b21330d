"""The Vandermonde and Cauchy sums in plain torch, for any device, in blocks: no tensor of channels × n × length.

Vandermonde: with l = i · step + j, exp(l · log_a) = start_i · within_j, so the sum over n is a matrix product of
[starts, 2n] and [2n, step] real numbers a channel: tables of 2 √length powers an entry give all of K.
"""

import torch
from einops import einsum, rearrange
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import pad

from ops.precision import full_precision
from ops.ssm_kernel.autograd import cauchy_op, vandermonde_op
from ops.ssm_kernel.common import powers, split

BLOCK = 1 << 20  # complex numbers in a temporary


def vandermonde(
    weights: Complex[Tensor, "channels n"], log_a: Complex[Tensor, "channels n"], length: int, conjugate: bool = True
) -> Float[Tensor, "channels length"]:
    """See `ops.vandermonde`."""
    dtype = torch.promote_types(weights.dtype, log_a.dtype)
    return _vandermonde(weights.to(dtype), log_a.to(dtype), length, conjugate)


def cauchy(
    weights: Complex[Tensor, "channels n"],
    z: Complex[Tensor, " length"],
    poles: Complex[Tensor, "channels n"],
    conjugate: bool = True,
) -> Complex[Tensor, "channels length"]:
    """See `ops.cauchy`."""
    dtype = torch.promote_types(torch.promote_types(weights.dtype, poles.dtype), z.dtype)
    return _cauchy(weights.to(dtype), z.to(dtype), poles.to(dtype), conjugate)


def _channels(n: int, length: int) -> int:
    """Channels in a block of the Vandermonde sum."""
    return max(1, BLOCK // (n * sum(split(length))))


def _pairs(value: Complex[Tensor, "*shape"]) -> Float[Tensor, "*shape 2"]:
    return torch.view_as_real(value.resolve_conj())


def _vandermonde_forward(weights: Tensor, log_a: Tensor, length: int, conjugate: bool) -> Tensor:
    parts = []
    block = _channels(weights.shape[1], length)
    with full_precision(weights.device):
        for w, log in zip(weights.split(block), log_a.split(block), strict=True):
            start, within = powers(log, length)
            # Re(a b) = Re conj(a) · Re b + Im conj(a) · Im b
            left = _pairs((w[..., None] * start).conj_physical())
            K = einsum(left, _pairs(within), "c n i part, c n j part -> c i j")
            parts.append(rearrange(K, "c i j -> c (i j)")[:, :length])
    K = torch.cat(parts)
    return 2 * K if conjugate else K


def _vandermonde_backward(dK: Tensor, weights: Tensor, log_a: Tensor, conjugate: bool) -> tuple[Tensor, Tensor]:
    """dw = Σ_l dK_l conj(exp(l log_a)), dlog_a = conj(w) Σ_l l dK_l conj(exp(l log_a)); l = i · step + j."""
    length = dK.shape[1]
    starts, step = split(length)
    block = _channels(weights.shape[1], length)
    i = step * torch.arange(starts, device=dK.device, dtype=dK.dtype)
    j = torch.arange(step, device=dK.device, dtype=dK.dtype)
    dweights, dlog_a = [], []
    with full_precision(dK.device):
        for g, w, log in zip(dK.split(block), weights.split(block), log_a.split(block), strict=True):
            start, within = powers(log, length)
            g = rearrange(pad(g, (0, starts * step - length)), "c (i j) -> c i j", j=step)
            within = _pairs(within.conj_physical())
            inner = torch.view_as_complex(einsum(g, within, "c i j, c n j part -> c n i part").contiguous())
            ramp = torch.view_as_complex(einsum(g * j, within, "c i j, c n j part -> c n i part").contiguous())
            start = start.conj_physical()
            dweights.append((start * inner).sum(-1))
            dlog_a.append(w.conj_physical() * (start * (i * inner + ramp)).sum(-1))
    scale = 2 if conjugate else 1
    return scale * torch.cat(dweights), scale * torch.cat(dlog_a)


def _places(weights: Tensor) -> int:
    """Entries of z in a block of the Cauchy sum."""
    return max(1, BLOCK // weights.numel())


def _cauchy_forward(weights: Tensor, z: Tensor, poles: Tensor, conjugate: bool) -> Tensor:
    return _cauchy_sum(weights, z, poles, conjugate, 1)


def _cauchy_sum(weights: Tensor, z: Tensor, poles: Tensor, conjugate: bool, order: int) -> Tensor:
    """Σ_n w / (z - p)^order, and that of the conjugates."""
    parts = []
    for part in z.split(_places(weights)):
        K = einsum(weights, _inverse(part, poles, order), "c n, c n l -> c l")
        if conjugate:
            K = K + einsum(weights.conj_physical(), _inverse(part, poles.conj_physical(), order), "c n, c n l -> c l")
        parts.append(K)
    return torch.cat(parts, 1)


def _inverse(z: Tensor, poles: Tensor, order: int) -> Complex[Tensor, "channels n part"]:
    inverse = (z - poles[..., None]).reciprocal()
    return inverse if order == 1 else inverse * inverse


def _cauchy_backward(
    dK: Tensor, weights: Tensor, z: Tensor, poles: Tensor, conjugate: bool, need_z: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """With r = 1/(z - p): dw = Σ_l dK conj(r), dp = conj(w) Σ_l dK conj(r²); the conjugate terms, functions of conj(w)
    and conj(p), add Σ_l conj(dK) r and conj(w) Σ_l conj(dK) r², r = 1/(z - conj(p))."""
    dweights, dinverse = torch.zeros_like(weights), torch.zeros_like(weights)
    for g, part in zip(dK.split(_places(weights), 1), z.split(_places(weights)), strict=True):
        inverse = _inverse(part, poles, 1)
        first = einsum(g.conj_physical(), inverse, "c l, c n l -> c n").conj_physical()
        second = einsum(g.conj_physical(), inverse * inverse, "c l, c n l -> c n").conj_physical()
        if conjugate:
            inverse = _inverse(part, poles.conj_physical(), 1)
            first = first + einsum(g.conj_physical(), inverse, "c l, c n l -> c n")
            second = second + einsum(g.conj_physical(), inverse * inverse, "c l, c n l -> c n")
        dweights, dinverse = dweights + first, dinverse + second
    dz = cauchy_places(dK, weights, z, poles, conjugate) if need_z else None
    return dweights, weights.conj_physical() * dinverse, dz


def cauchy_places(dK: Tensor, weights: Tensor, z: Tensor, poles: Tensor, conjugate: bool) -> Complex[Tensor, " length"]:
    """The gradient of z."""
    return -einsum(dK, _cauchy_sum(weights, z, poles, conjugate, 2).conj_physical(), "c l, c l -> l")


_vandermonde = vandermonde_op("chunked", _vandermonde_forward, _vandermonde_backward)
_cauchy = cauchy_op("chunked", _cauchy_forward, _cauchy_backward)
