"""Convolution of a sequence that becomes known token by token, exact, in O(log² T) a token (amortised).

The half-relaxed multiplication of Fischer & Stockmeyer (1974) and van der Hoeven (2003), as in Flash Inference
(Oncescu et al., 2410.12982, algorithm 2). Let 2^k be the largest power of two that divides the number of tokens seen,
i. As soon as token i - 1 is known, one transform adds what the last 2^k inputs give to the next 2^k outputs:

    y_t += Σ_{i - 2^k <= s < i} h_{t-s} x_s      for i <= t < i + 2^k.

Every pair s < t is counted once: at the one i in (s, t] with the most factors of two. So output t lacks nothing but its
own input when it is its turn. A transform over 2^k tokens comes once in 2^{k+1} tokens, and needs 2^{k+1} lags of h.

Inputs and pending outputs share one buffer: slot t holds the sum so far until token t comes, its input afterwards. Its
size is the power of two above the number of tokens.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

DIRECT = 8  # tokens: up to here a small Toeplitz matrix is faster than a transform


def room(tokens: int) -> int:
    """Slots for `tokens` inputs and what they give to later outputs."""
    return 1 << tokens.bit_length() if tokens else 0


def blocks(clock: int, time: int) -> Iterator[tuple[int, int]]:
    """[clock, clock + time) cut into (begin, size), sizes powers of two that divide `begin`: O(log) blocks. Transforms
    that the tokens inside such a block would have caused stay inside it."""
    end = clock + time
    while clock < end:
        size = 1 << (end - clock).bit_length() - 1
        if clock:
            size = min(size, clock & -clock)
        yield clock, size
        clock += size


def lags(clock: int, time: int) -> int:
    """How many lags of the filters `spread` needs while `time` tokens come after `clock`."""
    return max(2 * ((begin + size) & -(begin + size)) for begin, size in blocks(clock, time))


def spread(
    x: Float[Tensor, "batch size channels"], kernel: Float[Tensor, "channels twice"]
) -> Float[Tensor, "batch size channels"]:
    """What `size` inputs give to the `size` outputs after them, from lags 0 ... 2 size - 1 (0 is not used)."""
    size = x.shape[1]
    if size <= DIRECT:
        place = torch.arange(size, device=x.device)
        toeplitz = kernel[:, size + place[:, None] - place]
        # Not a matrix product: autocast would make that in bfloat16.
        return (rearrange(toeplitz, "c after size -> after size c") * x[:, None]).sum(2)
    # A transform of 2 size is enough: what wraps around falls on the first half, which nobody reads.
    spectrum = torch.fft.rfft(x, 2 * size, dim=1) * torch.fft.rfft(kernel.t(), 2 * size, dim=0)
    return torch.fft.irfft(spectrum, 2 * size, dim=1)[:, size:]


def grown(slots: Float[Tensor, "batch room channels"], tokens: int) -> Float[Tensor, "batch more channels"]:
    """Slots for `tokens` inputs; a copy once in a doubling."""
    more = room(tokens) - slots.shape[1]
    return pad(slots, (0, 0, 0, more)) if more > 0 else slots


def put(
    slots: Float[Tensor, "batch room channels"],
    begin: int,
    inputs: Float[Tensor, "batch size channels"],
    kernel: Float[Tensor, "channels lags"],
    in_place: bool,
) -> Float[Tensor, "batch room channels"]:
    """The slots after a block of inputs: theirs filled, and what is due at its end added to later ones."""
    end = begin + inputs.shape[1]
    size = end & -end
    inputs = inputs.to(slots.dtype)
    if in_place:
        slots[:, begin:end] = inputs
        slots[:, end : end + size] += spread(slots[:, end - size : end], kernel[:, : 2 * size])
        return slots
    seen = torch.cat([slots[:, :begin], inputs], 1)
    later = slots[:, end : end + size] + spread(seen[:, end - size :], kernel[:, : 2 * size])
    return torch.cat([seen, later, slots[:, end + size :]], 1)


def rebuilt(
    inputs: Float[Tensor, "batch tokens channels"], kernel: Float[Tensor, "channels lags"]
) -> Float[Tensor, "batch room channels"]:
    """The slots after any inputs, made anew: one `spread` for each one in the binary form of their number."""
    tokens = inputs.shape[1]
    later = inputs.new_zeros(inputs.shape[0], room(tokens) - tokens, inputs.shape[2])
    bit, end = 1, tokens
    while end:
        if end & bit:
            given = spread(inputs[:, end - bit : end], kernel[:, : 2 * bit])[:, tokens - end :]
            later = later + pad(given, (0, 0, 0, later.shape[1] - given.shape[1]))
            end -= bit
        bit *= 2
    return torch.cat([inputs, later], 1)


def aligned(
    inputs: Float[Tensor, "batch tokens channels"], kept: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens channels"]:
    """The kept inputs moved to the end of their row, in their order; zeros before them."""
    order = kept.long().argsort(dim=1, stable=True)
    return torch.where(kept[..., None], inputs, 0).gather(1, order[..., None].expand_as(inputs))
