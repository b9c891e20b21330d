"""Linear attention in plain torch, for any device, in matrix products (2006.16236, section 3.3; 2405.21060, section 6;
2312.06635, section 4): tokens of a chunk see each other as in attention, and earlier chunks through the state.

Every exponent is a sum of numbers below 0 (see `pairs`), so decays of any strength are safe, a log decay of -inf too:
that is how a document's start forgets everything before it. Padding has k = 0 and decay 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, einsum
from torch.nn.functional import pad

from ops.linear_attention.pairs import Pairs, pairs
from ops.linear_attention.step import step
from ops.precision import full_precision, state_dtype
from ops.segments import marks

# Tokens, by the dimensions of the decay (0: none).
CHUNK = {0: 64, 1: 64, 3: 64, 4: 32}


class Parts(NamedTuple):
    """What stands between the matrix products, which a native implementation has loops for. Letters: m is a chunk of a
    group of heads, in the order of batch, chunks and groups; r heads of the group, c tokens of the chunk."""

    pairs: Pairs
    weigh: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor, Tensor]]
    carry: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    values: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    combine: Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


def weigh(
    scores: Float[Tensor, "x m c c"], log_decay: Float[Tensor, "m r c"], before: Float[Tensor, "m r c"], itself: bool
) -> tuple[Float[Tensor, "x m r c c"], Float[Tensor, "m r c"], Float[Tensor, "m r c"], Float[Tensor, "m r"]]:
    """`pairs` of a decay a head, its weights times some scores."""
    weights, read, keep, total = pairs(None, None, log_decay[..., None], before[..., None], itself)
    return weights * scores[:, :, None], read[..., 0], keep[..., 0], total[..., 0, 0]


def carry(
    add: Float[Tensor, "b n rows v"], decay: Float[Tensor, "b n rows"], state: Float[Tensor, "b rows v"]
) -> tuple[Float[Tensor, "b n rows v"], Float[Tensor, "b rows v"]]:
    """The state before each chunk and behind the last: one decays and adds to the other."""
    befores = []
    for own, kept in zip(add.unbind(1), decay[..., None].unbind(1), strict=True):
        befores.append(state)
        state = torch.addcmul(own, kept, state)
    return torch.stack(befores, 1), state


def values(
    v: Float[Tensor, "b time heads v"], keep: Float[Tensor, "m r c"], chunks: int
) -> tuple[Float[Tensor, "m r c v"], Float[Tensor, "m c r v"]]:
    """v with its heads apart, and times `keep` with the heads of a group side by side; zeros behind the end."""
    apart = rearrange(_pad(v, keep.shape[2]), "b (n c) (g r) v -> (b n g) r c v", n=chunks, r=keep.shape[1])
    return apart, (apart * keep[..., None]).transpose(1, 2)


def combine(
    inner: Float[Tensor, "m r c v"],
    aside: Float[Tensor, "m c r v"],
    read: Float[Tensor, "m r c"],
    batch: int,
    time: int,
) -> Float[Tensor, "b time heads v"]:
    """What tokens saw of their chunk, heads apart, and of the state before it times `read`, side by side: their sum."""
    y = torch.addcmul(inner, aside.transpose(1, 2), read[..., None])
    chunks = -(-time // read.shape[2])
    return rearrange(y, "(b n g) r c v -> b (n c) (g r) v", b=batch, n=chunks)[:, :time]


PARTS = Parts(pairs, weigh, carry, values, combine)


def chunked(
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
    parts: Parts = PARTS,
) -> tuple[
    Float[Tensor, "batch time heads v_dim"],
    Float[Tensor, "batch heads k_dim v_dim"],
    Float[Tensor, "batch heads k_dim"] | None,
]:
    """See `ops.linear_attention`. Keeps the state before each chunk and the pairs within for the backward pass."""
    if q.shape[1] == 1:
        return step(
            q, k, v, log_decay, scale, bonus, normalise, eps, initial_state, initial_normaliser, segments
        )  # fmt: skip
    with full_precision(v.device):
        dtype = state_dtype(q, k, v, log_decay, bonus, initial_state, initial_normaliser)
        given, v = v.dtype, v.to(dtype)
        q, k = q.to(dtype), k.to(dtype)
        mark = None if segments is None else marks(segments)
        if mark is not None:
            valid = (mark != 0)[..., None, None]
            q, k, v = (torch.where(valid, each, 0) for each in (q, k, v))
        q = q if scale == 1.0 else q * scale
        state = None if initial_state is None else initial_state.to(dtype)
        if normalise:  # the normaliser is the state of one more value, always 1
            v = pad(v, (0, 1), value=1.0)
            if state is not None and initial_normaliser is not None:
                state = torch.cat([state, initial_normaliser.to(dtype)[..., None]], -1)
        decay, reset = _decay(log_decay, mark, q.shape[1], dtype)
        y, state = _chunks(q, k, v, decay, reset, None if bonus is None else bonus.to(dtype), state, parts)
        if normalise:
            y = y[..., :-1] / y[..., -1:].clamp_min(eps)
            return y.to(given), state[..., :-1].contiguous(), state[..., -1].contiguous()
    return y.to(given), state, None


def _decay(
    log_decay: Float[Tensor, "..."] | None, mark: UInt8[Tensor, "batch time"] | None, time: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The log decay of each token as [#batch time #heads #k_dim], or None where nothing decays: 0 at padding and
    -inf at a document's start. Then what the start alone adds, [batch time 1 1]."""
    reset = None if mark is None else torch.where(mark == 2, -torch.inf, 0.0).to(dtype)[..., None, None]
    if log_decay is None:
        return reset, reset
    log_decay = log_decay.to(dtype)
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(1, time, -1)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    if mark is not None and reset is not None:
        log_decay = torch.where((mark == 1)[..., None, None], log_decay, reset)
    return log_decay, reset


def _pad(each: Float[Tensor, "b time heads d"], chunk: int) -> Tensor:
    """With zeros behind the end, to whole chunks."""
    short = -each.shape[1] % chunk
    return pad(each, (0, 0, 0, 0, 0, short)) if short else each  # by nothing, pad would copy


def _split(each: Float[Tensor, "b time heads d"], chunk: int) -> Float[Tensor, "b n heads c d"]:
    """In chunks, contiguous: else every product would copy them anew, transposed too."""
    return rearrange(_pad(each, chunk), "b (n c) h d -> b n h c d", c=chunk).contiguous()


def _chunks(
    q: Float[Tensor, "b time groups k"],
    k: Float[Tensor, "b time groups k"],
    v: Float[Tensor, "b time heads v"],
    decay: Float[Tensor, "#b time #heads #k"] | None,
    reset: Float[Tensor, "b time 1 1"] | None,
    bonus: Float[Tensor, "heads k"] | None,
    state: Float[Tensor, "b heads k v"] | None,
    parts: Parts,
) -> tuple[Float[Tensor, "b time heads v"], Float[Tensor, "b heads k v"]]:
    """y and the final state."""
    time, groups = q.shape[1:3]
    wide = decay is not None and decay.shape[-1] > 1
    chunk = min(CHUNK[4 if wide else 0 if decay is None else 3], 1 << (time - 1).bit_length())
    own = None
    if bonus is not None:
        weight = rearrange(bonus, "(g r) k -> g r k", g=groups)
        own = einsum("b t g k, g r k -> b t g r", q * k, weight).flatten(2)[..., None] * v
    q, k = _split(q, chunk), _split(k, chunk)
    before = decay
    if decay is not None and bonus is not None:
        before = torch.zeros_like(decay) if reset is None else reset.expand_as(decay)
    if decay is None or before is None:
        y, final = _without_decay(q, k, v, bonus is None, state)
    elif wide:
        y, final = _decay_a_channel(q, k, v, decay, before, bonus is None, state, parts)
    else:
        y, final = _decay_a_head(q, k, v, decay, before, bonus is None, state, parts)
    return y if own is None else y + own, final


def _without_decay(
    q: Float[Tensor, "b n g c k"],
    k: Float[Tensor, "b n g c k"],
    v: Float[Tensor, "b time heads v"],
    itself: bool,
    state: Float[Tensor, "b heads k v"] | None,
) -> tuple[Float[Tensor, "b time heads v"], Float[Tensor, "b heads k v"]]:
    """The heads of a group stand side by side, and are multiplied at once with what they share."""
    (groups, chunk), (time, heads) = q.shape[2:4], v.shape[1:3]
    together = rearrange(_pad(v, chunk), "b (n c) (g r) v -> b n g c (r v)", c=chunk, g=groups).contiguous()
    y = (q @ k.mT).tril(0 if itself else -1) @ together
    add = k.mT @ together
    final = add[:, 0]
    if add.shape[1] > 1 or state is not None:
        first = torch.zeros_like(add[:, :1])
        if state is not None:
            first = rearrange(state, "b (g r) k v -> b 1 g k (r v)", g=groups)
        states = torch.cat([first, add[:, :-1]], 1).cumsum(1)
        final = states[:, -1] + add[:, -1]
        y = y + q @ states
    y = rearrange(y, "b n g c (r v) -> b (n c) (g r) v", v=v.shape[-1])[:, :time]
    return y, rearrange(final, "b g k (r v) -> b (g r) k v", r=heads // groups)


def _decay_a_head(
    q: Float[Tensor, "b n g c k"],
    k: Float[Tensor, "b n g c k"],
    v: Float[Tensor, "b time heads v"],
    decay: Float[Tensor, "#b time #heads 1"],
    before: Float[Tensor, "#b time #heads 1"],
    itself: bool,
    state: Float[Tensor, "b heads k v"] | None,
    parts: Parts,
) -> tuple[Float[Tensor, "b time heads v"], Float[Tensor, "b heads k v"]]:
    batch, chunks, groups, chunk, k_dim = q.shape
    time, heads, v_dim = v.shape[1:]
    if decay.shape[2] == 1:  # for all heads: those of a group are as one of more values
        v = v.unflatten(2, (groups, -1)).flatten(3)
    several = v.shape[2] // groups

    def shaped(each: Tensor) -> Float[Tensor, "m r c"]:
        split = rearrange(_pad(each, chunk), "b (n c) h 1 -> b n h c", c=chunk)
        return split.expand(batch, chunks, v.shape[2], chunk).reshape(-1, several, chunk)

    q, k = q.flatten(0, 2), k.flatten(0, 2)
    own = shaped(decay)
    seen, read, keep, total = parts.weigh((q @ k.mT)[None], own, own if before is decay else shaped(before), itself)
    apart, kept = parts.values(v, keep, chunks)
    add = (k.mT @ kept.flatten(2)).view(batch, chunks, -1, v.shape[3])  # rows: g, k, r
    y = seen[0] @ apart
    if chunks == 1 and state is None:
        final = add[:, 0]
        y = rearrange(y, "(b g) r c v -> b c (g r) v", b=batch)[:, :time]
    else:
        if state is None:
            state = torch.zeros_like(add[:, 0])
        else:
            state = rearrange(state, "b (g s r) k v -> b (g k r) (s v)", g=groups, r=several)
        rates = total.view(batch, chunks, groups, 1, several).expand(-1, -1, -1, k_dim, -1).flatten(2)
        states, final = parts.carry(add, rates, state)
        aside = (q @ states.view(len(q), k_dim, -1)).unflatten(-1, (several, -1))
        y = parts.combine(y, aside, read, batch, time)
    y = y.reshape(batch, time, heads, v_dim)
    return y, rearrange(final, "b (g k r) (s v) -> b (g s r) k v", g=groups, r=several, v=v_dim)


def _decay_a_channel(
    q: Float[Tensor, "b n g c k"],
    k: Float[Tensor, "b n g c k"],
    v: Float[Tensor, "b time heads v"],
    decay: Float[Tensor, "#b time heads k"],
    before: Float[Tensor, "#b time heads k"],
    itself: bool,
    state: Float[Tensor, "b heads k v"] | None,
    parts: Parts,
) -> tuple[Float[Tensor, "b time heads v"], Float[Tensor, "b heads k v"]]:
    """Nothing of q and k is left that heads would share."""
    (groups, chunk, k_dim), (time, heads) = q.shape[2:], v.shape[1:3]

    def shaped(each: Tensor) -> Float[Tensor, "#b n g r c k"]:
        return rearrange(_pad(each, chunk), "b (n c) (g r) k -> b n g r c k", c=chunk, g=groups).contiguous()

    own = shaped(decay)
    arguments = own, own if before is decay else shaped(before), itself
    q, k = q.unsqueeze(3), k.unsqueeze(3)
    seen, read, keep, total = parts.pairs(q, k, *arguments)
    q, k, seen = (q * read).flatten(2, 3), (k * keep).flatten(2, 3), seen.flatten(2, 3)
    v = _split(v, chunk)
    y = seen @ v
    add = (k.mT @ v).flatten(2, 3)
    if add.shape[1] == 1 and state is None:
        final = add[:, 0]
    else:
        state = torch.zeros_like(add[:, 0]) if state is None else state.flatten(1, 2)
        states, final = parts.carry(add, total.expand(len(q), -1, -1, -1, -1, -1).flatten(2), state)
        y = y + q @ states.unflatten(2, (heads, k_dim))
    return rearrange(y, "b n h c v -> b (n c) h v")[:, :time], final.unflatten(1, (heads, k_dim))
