"""Mamba-3's recurrence (2603.15569, section 3): the exponential-trapezoidal rule, rotation as complex states, rank R.

h_t = α_t h_{t-1} + β_t u_{t-1} + γ_t u_t,  u_t = Σ_r k_t^r (v_t^r)ᵀ,  y_t^r = (q_t^r)ᵀ h_t,  for each head, with
α_t = exp(dt_t A_t), γ_t = λ_t dt_t and β_t = α_t δ_t, δ_t = (1 - λ_t) dt_t: the input's integral over the step is taken
from both of its ends, this token and the one before. A complex state that turns by θ_t is a real one whose q and k are
turned by all angles so far, as rotary embedding does, so rotation costs the recurrence nothing.

For whole sequences, P_t = h_t - γ_t u_t is one linear attention over the inputs of the token before,
P_t = α_t (P_{t-1} + (γ_{t-1} + δ_t) u_{t-1}):
no factor comes from a later token and nothing that was added is taken off again. What is left is each token's own part.
"""

import math
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ops import linear_attention, linear_recurrence
from ops.precision import full_precision
from zoo.block import map_state
from zoo.layers.shift import token_shift


class Trapezoid(NamedTuple):
    """The state: h, and the last token, whose input the next step takes once more."""

    h: Float[Tensor, "batch heads n head_dim"]  # float32 at least
    k: Float[Tensor, "batch rank heads n"]  # turned
    x: Float[Tensor, "batch heads head_dim"]


def trapezoid(
    q: Float[Tensor, "batch time rank heads n"],
    k: Float[Tensor, "batch time rank heads n"],
    x: Float[Tensor, "batch time heads head_dim"],
    log_decay: Float[Tensor, "batch time heads"],
    gamma: Float[Tensor, "batch time heads"],
    delta: Float[Tensor, "batch time heads"],
    up: Float[Tensor, "rank heads head_dim"] | None,
    state: Trapezoid | None,
    segments: Int[Tensor, "batch time"] | None,
) -> tuple[Float[Tensor, "batch time rank heads head_dim"], Trapezoid | None]:
    """y in x's dtype and the state after each row's last valid token (None without one). v_t^r = x_t ⊙ up^r (up None:
    rank 1, v = x). q and k are turned; `log_decay`, `gamma` and `delta` are float32 at least.

    Every document but a row's first starts from nothing. x must be zero at padding, whose outputs are 0.
    Cost: R time steps of `linear_attention` with k_dim = n and v_dim = head_dim a token, and R² products within it.
    """
    with full_precision(x.device):
        if x.shape[1] == 1 and state is not None:
            y, after = _step(q[:, 0], k[:, 0], x[:, 0], log_decay, gamma, delta, up, state)
            if segments is not None:
                valid = segments[:, 0] != 0
                y = torch.where(valid[:, None, None, None, None], y, 0)
                after = map_state(lambda new, old: torch.where(_like(valid, new), new, old), after, state)
            return y, after
        return _sequence(q, k, x, log_decay, gamma, delta, up, state, segments)


def _like(rows: Bool[Tensor, " batch"], each: Float[Tensor, "batch ..."]) -> Bool[Tensor, "batch ..."]:
    return rows.reshape(-1, *[1] * (each.ndim - 1))


def _step(
    q: Float[Tensor, "batch rank heads n"],
    k: Float[Tensor, "batch rank heads n"],
    x: Float[Tensor, "batch heads head_dim"],
    log_decay: Float[Tensor, "batch 1 heads"],
    gamma: Float[Tensor, "batch 1 heads"],
    delta: Float[Tensor, "batch 1 heads"],
    up: Float[Tensor, "rank heads head_dim"] | None,
    state: Trapezoid,
) -> tuple[Float[Tensor, "batch 1 rank heads head_dim"], Trapezoid]:
    """One token: the equation itself, both inputs in one product."""
    dtype = state.h.dtype
    alpha, gamma = log_decay[:, 0, :, None, None].exp(), gamma[:, 0, :, None]
    inputs = torch.stack([alpha[..., 0] * delta[:, 0, :, None] * state.x, gamma * x], 1)
    keys = rearrange(torch.stack([state.k.to(dtype), k.to(dtype)], 1), "b i r h n -> b h n (i r)")
    h = alpha * state.h + keys @ rearrange(_values(inputs, up).to(dtype), "b i r h p -> b h (i r) p")
    y = einsum(q.to(dtype), h, "b r h n, b h n p -> b r h p")
    return y.to(x.dtype)[:, None], Trapezoid(h, k.to(state.k.dtype), x.to(state.x.dtype))


def _sequence(
    q: Float[Tensor, "batch time rank heads n"],
    k: Float[Tensor, "batch time rank heads n"],
    x: Float[Tensor, "batch time heads head_dim"],
    log_decay: Float[Tensor, "batch time heads"],
    gamma: Float[Tensor, "batch time heads"],
    delta: Float[Tensor, "batch time heads"],
    up: Float[Tensor, "rank heads head_dim"] | None,
    state: Trapezoid | None,
    segments: Int[Tensor, "batch time"] | None,
) -> tuple[Float[Tensor, "batch time rank heads head_dim"], Trapezoid | None]:
    """Rank R is R tokens of linear attention for one of ours, the decay before the first: query r sees the inputs up to
    its own, and those beyond it are added here."""
    rank, (heads, head_dim) = q.shape[2], x.shape[2:]
    old_k, last_k = token_shift(k.flatten(2), None if state is None else state.k.flatten(1), segments)
    old_x, last_x = token_shift(x.flatten(2), None if state is None else state.x.flatten(1), segments)
    old_gamma, last_gamma = token_shift(gamma, None, segments)  # a state's h has its γ u already
    old_k, old_x = old_k.unflatten(2, (rank, heads, -1)), old_x.unflatten(2, (heads, head_dim))
    old_v = _values((log_decay.exp() * (old_gamma + delta))[..., None] * old_x, up).to(x.dtype)
    between = pad(log_decay[:, :, None], (0, 0, 0, rank - 1))
    y, h, _ = linear_attention(
        q.flatten(1, 2),
        old_k.flatten(1, 2),
        old_v.flatten(1, 2),
        between.flatten(1, 2),
        initial_state=None if state is None else state.h,
        segments=None if segments is None else segments.repeat_interleave(rank, 1),
    )
    y, v = y.unflatten(1, (-1, rank)), _values(gamma[..., None] * x, up).to(x.dtype)
    if rank == 1:
        y = y + (q * k).sum(-1, keepdim=True) * v
    else:
        later = einsum(q, old_k, "b t i h n, b t j h n -> b t h i j").triu(1)
        own = einsum(q, k, "b t i h n, b t j h n -> b t h i j")
        y = y + einsum(later, old_v, "b t h i j, b t j h p -> b t i h p")
        y = y + einsum(own, v, "b t h i j, b t j h p -> b t i h p")
    if state is None:
        return y, None
    # Copies: a view would keep every token's k for as long as the state lives.
    last_k, last_x = last_k.unflatten(1, (rank, heads, -1)).clone(), last_x.unflatten(1, (heads, head_dim)).clone()
    last_v = _values((last_gamma[..., None] * last_x)[:, None], up)[:, 0].to(h.dtype)
    h = h + einsum(last_k.to(h.dtype), last_v, "b r h n, b r h p -> b h n p")
    return y, Trapezoid(h, last_k, last_x)


def _values(
    x: Float[Tensor, "batch time heads head_dim"], up: Float[Tensor, "rank heads head_dim"] | None
) -> Float[Tensor, "batch time rank heads head_dim"]:
    """v^r = x ⊙ up^r."""
    return x[:, :, None] if up is None else x[:, :, None] * up.to(x.dtype)


def angles(
    steps: Float[Tensor, "batch time heads pairs"],
    before: Float[Tensor, "batch heads pairs"] | None,
    segments: Int[Tensor, "batch time"] | None,
) -> tuple[Float[Tensor, "batch time heads pairs"], Float[Tensor, "batch heads pairs"]]:
    """The sum of all steps of the document up to each token, in radians within ±π, and the last valid token's.

    A row's first document goes on from `before`. The sum is float64: float32 has lost 3 digits of an angle of 1000 π,
    and one sum over time cannot be taken modulo 2π on the way.
    """
    flat = steps.double().flatten(2)
    start = None if before is None else before.double().flatten(1)
    total, last = linear_recurrence(flat, flat.new_ones(flat.shape[-1]), initial_state=start, segments=segments)
    return _wrapped(total).to(steps.dtype).unflatten(-1, steps.shape[2:]), _wrapped(last).to(
        steps.dtype if before is None else before.dtype
    ).unflatten(-1, steps.shape[2:])


def _wrapped(angle: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    return angle - 2 * math.pi * (angle / (2 * math.pi)).round()


def turn(
    x: Float[Tensor, "*rows n"], cos: Float[Tensor, "*angles pairs"], sin: Float[Tensor, "*angles pairs"]
) -> Float[Tensor, "*rows n"]:
    """Components (2i, 2i + 1) of x turned by angle i; those beyond the last pair stay."""
    # Not slices: the gradient of each would fill a tensor of x's size with zeros.
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    # As complex numbers: a third of the passes over memory that sines and cosines of halves take.
    if x.shape[-1] % 2:  # rows of an odd length cannot be viewed as pairs
        turned = turned.contiguous()
    pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    turned = torch.view_as_real(pairs).flatten(-2)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
