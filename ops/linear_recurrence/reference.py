"""The linear recurrence as it is written: one multiply and one add a token."""

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from ops.precision import state_dtype
from ops.segments import runs


def reference(
    x: Inexact[Tensor, "batch time channels"],
    a: Inexact[Tensor, "..."],
    initial_state: Inexact[Tensor, "batch channels"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
) -> tuple[Inexact[Tensor, "batch time channels"], Inexact[Tensor, "batch channels"]]:
    """See `ops.linear_recurrence`. A loop over time; keeps every state for the backward pass."""
    dtype, given = state_dtype(x, a, initial_state), x.dtype
    batch, time, channels = x.shape
    x, a = x.to(dtype), a.to(dtype).expand(batch, time, channels)
    h = x.new_zeros(batch, channels) if initial_state is None else initial_state.to(dtype)
    found = None if segments is None else runs(segments)
    outputs = []
    for t in range(time):
        if found is None:
            h = a[:, t] * h + x[:, t]
            outputs.append(h)
            continue
        valid, start = found.valid[:, t, None], found.start[:, t, None]
        before = torch.where(start, 0, h)
        after = torch.where(valid, a[:, t], 1) * before + torch.where(valid, x[:, t], 0)
        h = torch.where(valid, after, h)
        outputs.append(torch.where(valid, h, 0))
    return torch.stack(outputs, 1).to(given), h
