"""The selective scan as the paper writes it: one step a token (Gu & Dao, 2312.00752, eq. 2 and algorithm 2)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import silu

from ops.precision import state_dtype
from ops.segments import marks


def reference(
    x: Float[Tensor, "batch time channels"],
    dt: Float[Tensor, "batch time channels"],
    A: Float[Tensor, "channels n"],
    B: Float[Tensor, "batch time n"],
    C: Float[Tensor, "batch time n"],
    D: Float[Tensor, " channels"] | None = None,
    z: Float[Tensor, "batch time channels"] | None = None,
    initial_state: Float[Tensor, "batch channels n"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels n"]]:
    """See `ops.selective_scan`. A loop over time; keeps every state for the backward pass."""
    dtype = state_dtype(x, dt, A, B, C, D, z, initial_state)
    given = x.dtype
    x, dt, A, B, C = (each.to(dtype) for each in (x, dt, A, B, C))
    mark = None if segments is None else marks(segments)
    if mark is not None:  # with dt = 0 and x = 0 a step changes nothing, and where() keeps a NaN out of the gradients
        valid = (mark != 0)[..., None]
        x, dt, B, C = (torch.where(valid, each, 0) for each in (x, dt, B, C))
        z = None if z is None else torch.where(valid, z, 0)
    batch, time, channels = x.shape
    h = x.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(time):
        if mark is not None:
            h = torch.where((mark[:, t] == 2)[:, None, None], 0, h)
        decay = torch.exp(dt[:, t, :, None] * A)
        h = decay * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        y = torch.einsum("b c n, b n -> b c", h, C[:, t])
        if D is not None:
            y = y + D.to(dtype) * x[:, t]
        if z is not None:
            y = y * silu(z[:, t].to(dtype))
        outputs.append(y)
    return torch.stack(outputs, 1).to(given), h
