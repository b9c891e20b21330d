"""Linear attention as the papers write it: one step a token (2006.16236, eq. 16-20; 2312.06635, eq. 3; with `bonus`
2404.05892, eq. 19)."""

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, einsum

from ops.precision import full_precision, state_dtype
from ops.segments import marks


def reference(
    q: Float[Tensor, "batch time groups k_dim"],
    k: Float[Tensor, "batch time groups k_dim"],
    v: Float[Tensor, "batch time heads v_dim"],
    log_decay: Float[Tensor, "..."] | None = None,
    scale: float = 1.0,
    bonus: Float[Tensor, "heads k_dim"] | None = None,
    normalise: bool = False,
    eps: float = 1e-6,
    initial_state: Float[Tensor, "batch heads k_dim v_dim"] | None = None,
    initial_normaliser: Float[Tensor, "batch heads k_dim"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
) -> tuple[
    Float[Tensor, "batch time heads v_dim"],
    Float[Tensor, "batch heads k_dim v_dim"],
    Float[Tensor, "batch heads k_dim"] | None,
]:
    """See `ops.linear_attention`. A loop over time; keeps every state for the backward pass."""
    dtype = state_dtype(q, k, v, log_decay, bonus, initial_state, initial_normaliser)
    batch, time, groups, k_dim = q.shape
    heads, v_dim = v.shape[2:]
    q, k = (repeat(each.to(dtype), "b t g k -> b t (g r) k", r=heads // groups) for each in (q, k))
    q, given, v = q * scale, v.dtype, v.to(dtype)
    log_decay = _every_channel(log_decay, q)
    mark = torch.ones(batch, time, dtype=torch.uint8, device=q.device) if segments is None else marks(segments)
    valid = (mark != 0)[:, :, None, None]  # with k = 0 and decay 1 a step changes nothing
    q, k, v, log_decay = (torch.where(valid, each, 0) for each in (q, k, v, log_decay))
    S = v.new_zeros(batch, heads, k_dim, v_dim) if initial_state is None else initial_state.to(dtype)
    z = v.new_zeros(batch, heads, k_dim) if initial_normaliser is None else initial_normaliser.to(dtype)
    u = None if bonus is None else bonus.to(dtype)
    outputs = []
    with full_precision(v.device):
        for t in range(time):
            start = (mark[:, t] == 2)[:, None, None]
            S, z = torch.where(start[..., None], 0, S), torch.where(start, 0, z)
            add, decay = einsum("b h k, b h v -> b h k v", k[:, t], v[:, t]), log_decay[:, t].exp()
            after, after_z = decay[..., None] * S + add, decay * z + k[:, t]
            read, weight = (after, after_z) if u is None else (S + u[..., None] * add, z + u * k[:, t])
            y = einsum("b h k, b h k v -> b h v", q[:, t], read)
            if normalise:
                y = y / einsum("b h k, b h k -> b h", q[:, t], weight).clamp_min(eps)[..., None]
            outputs.append(y)
            S, z = after, after_z
    return torch.stack(outputs, 1).to(given), S, z if normalise else None


def _every_channel(log_decay: Tensor | None, like: Float[Tensor, "b t h k"]) -> Float[Tensor, "b t h k"]:
    """Any of the four forms as one number a token, head and key channel."""
    if log_decay is None:
        return torch.zeros_like(like)
    log_decay = log_decay.to(like.dtype)
    if log_decay.ndim < 4:
        log_decay = log_decay[..., None]
    return log_decay.expand_as(like)
