"""The delta rule as the papers write it: one step a token (2406.06484, eq. 5; 2412.06464, eq. 10; 2510.26692, eq. 1;
with `erase` 2503.14456, eq. 15-17, transposed)."""

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
    beta: Float[Tensor, "batch time heads"] | None = None,
    log_decay: Float[Tensor, "..."] | None = None,
    erase: tuple[Float[Tensor, "batch time heads k_dim"], Float[Tensor, "batch time heads k_dim"]] | None = None,
    scale: float = 1.0,
    initial_state: Float[Tensor, "batch heads k_dim v_dim"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch time heads v_dim"], Float[Tensor, "batch heads k_dim v_dim"]]:
    """See `ops.delta_rule`. A loop over time; keeps every state for the backward pass."""
    dtype, given = state_dtype(q, k, v, beta, log_decay, initial_state, *(erase or ())), v.dtype
    batch, time, groups, k_dim = q.shape
    heads, v_dim = v.shape[2:]
    q, k = (repeat(each.to(dtype), "b t g k -> b t (g r) k", r=heads // groups) for each in (q, k))
    v, rate = v.to(dtype), torch.ones_like(v[..., 0]).to(dtype) if beta is None else beta.to(dtype)
    log_decay = _every_channel(log_decay, q)
    reads, writes = (k, k) if erase is None else (each.to(dtype) for each in erase)
    mark = torch.ones(batch, time, dtype=torch.uint8, device=q.device) if segments is None else marks(segments)
    valid = (mark != 0)[:, :, None, None]  # with nothing written or erased and decay 1 a step changes nothing
    q, k, v, log_decay, reads, writes, rate = (
        torch.where(valid, each, 0) for each in (q, k, v, log_decay, reads, writes, rate[..., None])
    )
    S = v.new_zeros(batch, heads, k_dim, v_dim) if initial_state is None else initial_state.to(dtype)
    outputs = []
    with full_precision(v.device):
        for t in range(time):
            S = torch.where((mark[:, t] == 2)[:, None, None, None], 0, S)
            decayed = log_decay[:, t].exp()[..., None] * S
            if erase is None:
                held = einsum("b h k, b h k v -> b h v", k[:, t], decayed)
                change = rate[:, t] * (v[:, t] - held)
                S = decayed + einsum("b h k, b h v -> b h k v", k[:, t], change)
            else:
                held = einsum("b h k, b h k v -> b h v", reads[:, t], S)
                S = decayed + einsum("b h k, b h v -> b h k v", writes[:, t], held)
                S = S + einsum("b h k, b h v -> b h k v", k[:, t], v[:, t])
            outputs.append(einsum("b h k, b h k v -> b h v", q[:, t] * scale, S))
    return torch.stack(outputs, 1).to(given), S


def _every_channel(log_decay: Tensor | None, like: Float[Tensor, "b t h k"]) -> Float[Tensor, "b t h k"]:
    """Any of the four forms as one number a token, head and key channel."""
    if log_decay is None:
        return torch.zeros_like(like)
    log_decay = log_decay.to(like.dtype)
    if log_decay.ndim < 4:
        log_decay = log_decay[..., None]
    return log_decay.expand_as(like)
