"""The selective scan in plain torch, for any device: two levels, so that chunk + chunks operations do chunk · chunks
tokens.

Within every chunk, all chunks of a block at once: h_i = exp(dt_i A) h_{i-1} + dt_i B_i x_i from a zero state gives what
the chunk adds; with exp(A Σ dt_i), what it keeps, the states between chunks follow from one another; from those the
same steps give every h_i. Every exponent is at most zero (A <= 0 < dt), so nothing overflows, whatever the step.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import pad, silu
from torch.utils.checkpoint import checkpoint

from ops.precision import state_dtype
from ops.segments import marks

CHUNK = 16  # tokens
CHUNKS = 8  # in a block


def chunked(
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
    """See `ops.selective_scan`. Keeps the state before each block of 128 tokens for the backward pass,
    which computes the block again."""
    dtype = state_dtype(x, dt, A, B, C, D, z, initial_state)
    given = x.dtype
    x, dt, A, B, C = (each.to(dtype) for each in (x, dt, A, B, C))
    z = None if z is None else z.to(dtype)
    batch, time, channels = x.shape
    h = x.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state.to(dtype)
    mark = None if segments is None else marks(segments)
    if mark is not None:
        valid = (mark != 0)[..., None]
        x, dt, B, C = (torch.where(valid, each, 0) for each in (x, dt, B, C))
        z = None if z is None else torch.where(valid, z, 0)
    again = torch.is_grad_enabled() and any(each.requires_grad for each in (x, dt, A, B, C, h))
    outputs = []
    for start in range(0, time, CHUNK * CHUNKS):
        part = slice(start, start + CHUNK * CHUNKS)
        arguments = (x[:, part], dt[:, part], A, B[:, part], C[:, part], h, None if mark is None else mark[:, part])
        if again:
            y, h = checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, h = _block(*arguments)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * silu(z)
    return y.to(given), h


def _block(
    x: Float[Tensor, "batch time channels"],
    dt: Float[Tensor, "batch time channels"],
    A: Float[Tensor, "channels n"],
    B: Float[Tensor, "batch time n"],
    C: Float[Tensor, "batch time n"],
    h: Float[Tensor, "batch channels n"],
    mark: UInt8[Tensor, "batch time"] | None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels n"]]:
    """One block of tokens from state h; at padding dt = x = 0 leaves h alone."""
    time = x.shape[1]
    chunk = min(CHUNK, time)
    extra = -time % chunk  # tokens with dt = 0 behind the end

    def split(each: Tensor) -> Tensor:
        return rearrange(pad(each, (0, 0, 0, extra)), "b (k i) c -> b k i c", i=chunk)

    x, dt, B = split(x), split(dt), split(B)
    log_decay = dt[..., None] * A
    if mark is not None:
        start = split((mark == 2)[..., None])
        log_decay = torch.where(start[..., None], -torch.inf, log_decay)  # exp is 0: nothing comes from before
    decays = log_decay.exp().unbind(2)
    drives = ((dt * x)[..., None] * B[..., None, :]).unbind(2)
    added = drives[0]
    for decay, drive in zip(decays[1:], drives[1:], strict=True):
        added = torch.addcmul(drive, decay, added)
    begins = []
    for own, kept in zip(added.unbind(1), log_decay.sum(2).exp().unbind(1), strict=True):
        begins.append(h)
        h = torch.addcmul(own, kept, h)
    states, outputs = torch.stack(begins, 1), []
    for decay, drive, read in zip(decays, drives, split(C).unbind(2), strict=True):
        states = torch.addcmul(drive, decay, states)
        outputs.append(torch.einsum("b k c n, b k n -> b k c", states, read))
    return rearrange(torch.stack(outputs, 2), "b k i c -> b (k i) c")[:, :time], h
