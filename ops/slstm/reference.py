"""sLSTM as 2405.04517 writes it, eq. 8 to 17: a loop over time that autograd unrolls."""

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from ops.precision import full_precision
from ops.segments import runs
from ops.slstm import EMPTY

State = tuple[Tensor, Tensor, Tensor, Tensor]


def slstm(
    logits: Float[Tensor, "batch time 4 width"],
    R: Float[Tensor, "heads size 4 size"],
    state: State,
    segments: Int[Tensor, "batch time"] | None,
) -> tuple[Float[Tensor, "batch time width"], State]:
    """See `ops.slstm`. Maxima are constants for autograd: whatever they are, c / n is the same."""
    if segments is None:
        segments = torch.ones(logits.shape[:2], dtype=torch.long, device=logits.device)
    found = runs(segments)
    outputs = []
    with full_precision(logits.device):
        for t in range(logits.shape[1]):
            valid, start = found.valid[:, t, None], found.start[:, t, None]
            h, c, n = (torch.where(start, 0, each) for each in state[:3])
            m = torch.where(start, EMPTY, state[3])

            mixed = einsum(rearrange(h, "b (h i) -> b h i", h=len(R)), R, "b h i, h i g o -> b g h o").flatten(-2)
            i, f, z, o = (logits[:, t] + mixed).unbind(1)
            past = logsigmoid(f) + m
            top = torch.maximum(past, i).detach()
            keep, write = torch.exp(past - top), torch.exp(i - top)
            c, n = keep * c + write * torch.tanh(z), keep * n + write
            h = torch.sigmoid(o) * c / n

            outputs.append(torch.where(valid, h, 0))
            h, c, n, m = (torch.where(valid, new, old) for new, old in zip((h, c, n, top), state, strict=True))
            state = h, c, n, m
    h, c, n, m = state
    return torch.stack(outputs, 1), (h, c, n, m.detach())
