"""Linear attention in plain torch, for any device, in matrix products (2006.16236, section 3.3; 2405.21060, section 6;
2312.06635, section 4): tokens of a chunk see each other as in attention, and earlier chunks through the state.

Every exponent is a sum of numbers below 0 (see `pairs`), so decays of any strength are safe, a log decay of -inf too:
that is how a document's start forgets everything before it. Padding has k = 0 and decay 1.
"""

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
    pairs: Pairs = pairs,
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
        y, state = _chunks(q, k, v, decay, reset, None if bonus is None else bonus.to(dtype), state, pairs)
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


def _split(each: Tensor, chunk: int, groups: int) -> Tensor:
    """[b, time, heads, d] -> [b, chunks, groups, heads a group, chunk, d], with zeros behind the end. One group and
    one head stay one each: they broadcast. Contiguous: else every product would copy it anew, transposed too."""
    if each.shape[1] % chunk:  # by nothing, pad would copy
        each = pad(each, (0, 0, 0, 0, 0, -each.shape[1] % chunk))
    return rearrange(each, "b (n c) (g r) d -> b n g r c d", c=chunk, g=min(groups, each.shape[2])).contiguous()


def _chunks(
    q: Float[Tensor, "b time groups k"],
    k: Float[Tensor, "b time groups k"],
    v: Float[Tensor, "b time heads v"],
    decay: Float[Tensor, "#b time #heads #k"] | None,
    reset: Float[Tensor, "b time 1 1"] | None,
    bonus: Float[Tensor, "heads k"] | None,
    state: Float[Tensor, "b heads k v"] | None,
    pairs: Pairs,
) -> tuple[Float[Tensor, "b time heads v"], Float[Tensor, "b heads k v"]]:
    """y and the final state. Letters of the products: n chunks, g groups, r heads a group, i and j tokens of a chunk;
    q and k stay one a group wherever the decay allows."""
    time, groups = q.shape[1:3]
    wide = decay is not None and decay.shape[-1] > 1
    chunk = min(CHUNK[4 if wide else 0 if decay is None else 3], 1 << (time - 1).bit_length())
    q, k, v = (_split(each, chunk, groups) for each in (q, k, v))
    own = None
    if bonus is not None:
        weight = rearrange(bonus, "(g r) k -> g r k", g=groups)
        own = einsum("b n g i k, g r k -> b n g r i", (q * k).squeeze(3), weight)[..., None] * v
    read = keep = total = None
    if decay is None:
        seen = (q @ k.mT).tril(0 if bonus is None else -1)
    else:
        decay = _split(decay, chunk, groups)
        before = decay if bonus is None else torch.zeros_like(decay) if reset is None else _split(reset, chunk, groups)
        arguments = decay, before.expand_as(decay), bonus is None
        if wide:
            seen, read, keep, total = pairs(q, k, *arguments)
            q, k, read, keep = q * read, k * keep, None, None
        else:
            seen, read, keep, total = pairs(None, None, *arguments)
            seen = seen * (q @ k.mT)
    y = _product(seen, v)
    add = _product(k.mT, v if keep is None else v * keep)
    states, final = _pass(add, None if total is None else total.mT, state)
    if states is not None:
        y = y + _product(q, states) if read is None else torch.addcmul(y, _product(q, states), read)
    y = y if own is None else y + own
    y = rearrange(y, "b n g r c v -> b (n c) (g r) v")[:, :time]
    return y, final


def _product(left: Float[Tensor, "*b g one i j"], right: Float[Tensor, "*b g r j v"]) -> Float[Tensor, "*b g r i v"]:
    """left @ right; what a group's heads share is multiplied with all their columns at once."""
    if left.shape[-3] == right.shape[-3]:
        return left @ right
    return einsum("... g i j, ... g r j v -> ... g r i v", left.squeeze(-3), right)


def _pass(
    add: Float[Tensor, "b n g r k v"],
    decay: Float[Tensor, "#b n #g #r #k 1"] | None,
    state: Float[Tensor, "b heads k v"] | None,
) -> tuple[Float[Tensor, "b n g r k v"] | None, Float[Tensor, "b heads k v"]]:
    """The state before each chunk (None: nothing precedes any of them) and behind the last, from what each adds."""
    groups = add.shape[2]
    state = None if state is None else rearrange(state, "b (g r) k v -> b g r k v", g=groups)
    if add.shape[1] == 1 and state is None:
        states, final = None, add[:, 0]
    elif decay is None:
        first = torch.zeros_like(add[:, :1]) if state is None else state[:, None]
        states = torch.cat([first, add[:, :-1]], 1).cumsum(1)
        final = states[:, -1] + add[:, -1]
    else:
        final = torch.zeros_like(add[:, 0]) if state is None else state
        befores = []
        for own, kept in zip(add.unbind(1), decay.unbind(1), strict=True):
            befores.append(final)
            final = torch.addcmul(own, kept, final)
        states = torch.stack(befores, 1)
    return states, rearrange(final, "b g r k v -> b (g r) k v")
