"""One token of the delta rule: the decoding step, in few operations."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops.delta_rule.common import make_rule
from ops.precision import full_precision, state_dtype


def step(
    q: Float[Tensor, "batch 1 groups k_dim"],
    k: Float[Tensor, "batch 1 groups k_dim"],
    v: Float[Tensor, "batch 1 heads v_dim"],
    beta: Float[Tensor, "batch 1 heads"] | None = None,
    log_decay: Float[Tensor, "..."] | None = None,
    erase: tuple[Float[Tensor, "batch 1 heads k_dim"], Float[Tensor, "batch 1 heads k_dim"]] | None = None,
    scale: float = 1.0,
    initial_state: Float[Tensor, "batch heads k_dim v_dim"] | None = None,
    segments: Int[Tensor, "batch 1"] | None = None,
) -> tuple[Float[Tensor, "batch 1 heads v_dim"], Float[Tensor, "batch heads k_dim v_dim"]]:
    """See `ops.delta_rule`. The one token is its row's first: it goes on from the initial state."""
    with full_precision(v.device):
        dtype = state_dtype(q, k, v, beta, log_decay, initial_state, *(erase or ()))
        rule = make_rule(q, k, v, beta, log_decay, erase, scale, segments, dtype, dtype)
        state = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state
        state = state.to(dtype)
        read, u = (torch.cat([rule.q, rule.a], 1).movedim(1, 2) @ state).unbind(2)
        u = u if rule.w is None else u + rule.w[:, 0]
        y = torch.addcmul(read, rule.qb[:, 0], u)
        if rule.log_decay is not None:
            state = state * rule.log_decay[:, 0].exp()[..., None]
        state = torch.addcmul(state, rule.b[:, 0, :, :, None], u[..., None, :])
        if rule.k is not None and rule.v is not None and rule.qk is not None:
            y = torch.addcmul(y, rule.qk[:, 0], rule.v[:, 0])
            state = torch.addcmul(state, rule.k[:, 0, :, :, None], rule.v[:, 0, :, None, :])
    return y[:, None].to(v.dtype), state
