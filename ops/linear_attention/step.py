"""One token of linear attention: the decoding step, in few operations."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops.precision import full_precision, state_dtype


def step(
    q: Float[Tensor, "batch 1 groups k_dim"],
    k: Float[Tensor, "batch 1 groups k_dim"],
    v: Float[Tensor, "batch 1 heads v_dim"],
    log_decay: Float[Tensor, "..."] | None = None,
    scale: float = 1.0,
    bonus: Float[Tensor, "heads k_dim"] | None = None,
    normalise: bool = False,
    eps: float = 1e-6,
    initial_state: Float[Tensor, "batch heads k_dim v_dim"] | None = None,
    initial_normaliser: Float[Tensor, "batch heads k_dim"] | None = None,
    segments: Int[Tensor, "batch 1"] | None = None,
) -> tuple[
    Float[Tensor, "batch 1 heads v_dim"],
    Float[Tensor, "batch heads k_dim v_dim"],
    Float[Tensor, "batch heads k_dim"] | None,
]:
    """See `ops.linear_attention`. The one token is its row's first: it goes on from the initial state."""
    with full_precision(v.device):
        dtype = state_dtype(q, k, v, log_decay, bonus, initial_state, initial_normaliser)
        given, repeats = v.dtype, v.shape[2] // q.shape[2]
        q, k, v = q[:, 0].to(dtype), k[:, 0].to(dtype), v[:, 0].to(dtype)
        decay = None if log_decay is None else log_decay.to(dtype)
        if initial_state is None and decay is not None:
            if decay.requires_grad:  # it has a gradient, of 0
                initial_state = v.new_zeros(v.shape[0], v.shape[1], k.shape[2], v.shape[2])
            else:
                decay = None
        if decay is not None and decay.ndim > 1:
            decay = decay[:, 0]
        if segments is not None:
            valid = (segments != 0)[..., None]
            q, k, v = (torch.where(valid, each, 0) for each in (q, k, v))
            if decay is not None:
                decay = torch.where(valid if decay.ndim == 3 else valid[..., 0], decay, 0)
        if repeats > 1:
            q, k = (each.repeat_interleave(repeats, 1) for each in (q, k))
        if scale != 1.0:
            q = q * scale
        if decay is not None:
            decay = decay.exp()
            decay = decay if decay.ndim == 3 else decay[..., None]
        y, state = _one(q, k, v, decay, bonus, initial_state)
        normaliser = None
        if normalise:
            before = None if initial_normaliser is None else initial_normaliser[..., None]
            weight, normaliser = _one(q, k, torch.ones_like(v[..., :1]), decay, bonus, before)
            y, normaliser = y / weight.clamp_min(eps), normaliser[..., 0]
    return y[:, None].to(given), state, normaliser


def _one(
    q: Float[Tensor, "batch heads k_dim"],
    k: Float[Tensor, "batch heads k_dim"],
    v: Float[Tensor, "batch heads v_dim"],
    decay: Float[Tensor, "*batch heads #k_dim"] | None,
    bonus: Float[Tensor, "heads k_dim"] | None,
    before: Float[Tensor, "batch heads k_dim v_dim"] | None,
) -> tuple[Float[Tensor, "batch heads v_dim"], Float[Tensor, "batch heads k_dim v_dim"]]:
    """Output and state of one token."""
    after, row = k[..., None], v[..., None, :]
    if before is None:
        state = after * row
    else:
        before = before.to(v.dtype)
        state = torch.addcmul(before if decay is None else decay[..., None] * before, after, row)
    if bonus is None:
        return (q[..., None, :] @ state).squeeze(-2), state
    y = (q * k * bonus.to(v.dtype)).sum(-1, keepdim=True) * v
    return y if before is None else y + (q[..., None, :] @ before).squeeze(-2), state
