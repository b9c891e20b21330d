"""The delta rule in plain torch, for any device, in matrix products (2406.06484, section 3.2; 2412.06464, section 3.3;
2510.26692, section 3): what the tokens of a chunk write depends on each other through a triangular system (the WY form
of a product of rank-one changes), solved at once for all chunks and values; then one state a chunk is carried along.

Every exponent is a sum of numbers below 0 (`ops.linear_attention.pairs`, by halves), so decays of any strength are
safe, a log decay of -inf too: that is how a document's start forgets everything before it. Padding neither reads nor
writes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from ops.delta_rule.common import Rule, make_rule
from ops.delta_rule.step import step
from ops.linear_attention.chunked import weigh
from ops.linear_attention.pairs import Pairs, pairs
from ops.precision import full_precision, state_dtype

# Tokens, by the dimensions of the decay (0: none).
CHUNK = {0: 64, 1: 64, 3: 64, 4: 32}


class Parts(NamedTuple):
    """What a native implementation has loops of its own for."""

    pairs: Pairs
    weigh: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor, Tensor]]
    carry: Callable[..., tuple[Tensor, Tensor, Tensor]]


def chunked(
    q: Float[Tensor, "batch time groups k_dim"],
    k: Float[Tensor, "batch time groups k_dim"],
    v: Float[Tensor, "batch time heads v_dim"],
    beta: Float[Tensor, "batch time heads"] | None = None,
    log_decay: Float[Tensor, "..."] | None = None,
    erase: tuple[Float[Tensor, "batch time heads k_dim"], Float[Tensor, "batch time heads k_dim"]] | None = None,
    scale: float = 1.0,
    initial_state: Float[Tensor, "batch heads k_dim v_dim"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    parts: Parts | None = None,
) -> tuple[Float[Tensor, "batch time heads v_dim"], Float[Tensor, "batch heads k_dim v_dim"]]:
    """See `ops.delta_rule`. Keeps the state before each chunk and the pairs within for the backward pass."""
    if q.shape[1] == 1:
        return step(q, k, v, beta, log_decay, erase, scale, initial_state, segments)
    with full_precision(v.device):
        dtype = state_dtype(q, k, v, beta, log_decay, initial_state, *(erase or ()))
        rule = make_rule(q, k, v, beta, log_decay, erase, scale, segments, dtype, dtype)
        batch, time, heads, v_dim = v.shape
        wide = rule.log_decay is not None and rule.log_decay.shape[-1] > 1
        chunk = min(CHUNK[4 if wide else 0 if rule.log_decay is None else 3], 1 << (time - 1).bit_length())
        parts = Parts(pairs, weigh, carry) if parts is None else parts
        met = meet(split(rule, chunk), parts)
        state = met.b.new_zeros(batch, heads, q.shape[-1], v_dim) if initial_state is None else initial_state.to(dtype)
        reads, us, state = parts.carry(met.q, met.a, met.b, met.new, met.add, met.total, state)
        y = reads + met.seen @ us
        y = y if met.own is None else y + met.own
        y = rearrange(y, "n b h c v -> b (n c) h v")[:, :time]
    return y.to(v.dtype), state


def split(rule: Rule, chunk: int) -> Rule:
    """Every part as [chunks, batch, heads, chunk, d], with zeros behind the end: nothing is read or written there."""

    def one(each: Tensor | None) -> Tensor | None:
        if each is None:
            return None
        if each.shape[1] % chunk:  # by nothing, pad would copy
            each = pad(each, (0, 0, 0, 0, 0, -each.shape[1] % chunk))
        return rearrange(each, "b (n c) h d -> n b h c d", c=chunk)

    return Rule(*(one(each) for each in rule))  # pyright: ignore[reportArgumentType] (Nones stay where they are)


class Met(NamedTuple):
    """What is left of the chunks when their tokens have met: S is the state before the chunk.

    u = new + a S;  y = seen u + own + q S;  the state behind it = total ⊙ S + bᵀ u + add.
    """

    q: Float[Tensor, "n b h c k"]
    a: Float[Tensor, "n b h c k"]
    b: Float[Tensor, "n b h c k"]
    new: Float[Tensor, "n b h c v"]
    seen: Float[Tensor, "n b h c c"]
    own: Float[Tensor, "n b h c v"] | None
    add: Float[Tensor, "n b h k v"] | None
    total: Float[Tensor, " n #b #h #k 1"] | None


def meet(rule: Rule, parts: Parts) -> Met:
    """The pairs within each chunk, and its triangular system solved: with A the strictly lower triangle of what a
    token's `a` sees of earlier b, (I - A) u = w + a S."""
    q, a, b, k = rule.q, rule.a, rule.b, rule.k
    readers = torch.stack([q, a])[:, None]
    writers = torch.stack([b] if k is None else [b, k])
    if rule.log_decay is None:
        seen, total = (readers @ writers.mT).tril(-1), None
    else:
        # Readers come before their own decay (see `common`), which is what the third argument says.
        log_decay, before = rule.log_decay[None, None], torch.zeros_like(rule.log_decay)[None, None]
        if log_decay.shape[-1] > 1:
            seen, read, keep, total = parts.pairs(readers, writers[None], log_decay, before, False)
        else:
            scores = readers @ writers.mT
            decays = rule.log_decay.expand(*scores.shape[2:5], -1, -1).reshape(-1, 1, scores.shape[-1])
            seen, read, keep, total = parts.weigh(
                scores.flatten(0, 1).flatten(1, 3), decays, torch.zeros_like(decays), False
            )
            seen = seen.view(scores.shape)
            read, keep, total = (each.view(1, 1, *scores.shape[2:5], -1, 1) for each in (read, keep, total))
        (q, a), writers = (readers * read).squeeze(1), (writers * keep[0])
        total = total[0, 0].mT
        b, k = (writers.squeeze(0), None) if k is None else writers.unbind()
    # Parts by unbind: the gradient of an index fills a tensor as large as the whole.
    met = seen.flatten(0, 1).unbind()  # q and a, of b and k each
    seen_q, system = met[0], met[len(met) // 2]
    w, own, add = rule.w, None, None
    if k is not None and rule.v is not None and rule.qk is not None:
        _, seen_qk, _, seen_ak = met
        w, own, add = seen_ak @ rule.v, seen_qk @ rule.v + rule.qk * rule.v, k.mT @ rule.v
    assert w is not None
    # Substitution, not a product of powers: those of equal keys grow like binomials and cancel. It has few columns: a
    # product with the inverse is several times faster than substitution for every value and key channel.
    one = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(-system, one, upper=False, unitriangular=True)
    seen = seen_q + torch.diag_embed(rule.qb.squeeze(-1))
    return Met(q, inverse @ a, b, inverse @ w, seen, own, add, total)


def carry(
    q: Float[Tensor, "n b h c k"],
    a: Float[Tensor, "n b h c k"],
    b: Float[Tensor, "n b h c k"],
    new: Float[Tensor, "n b h c v"],
    add: Float[Tensor, "n b h k v"] | None,
    total: Float[Tensor, " n #b #h #k 1"] | None,
    state: Float[Tensor, "b h k v"],
) -> tuple[Float[Tensor, "n b h c v"], Float[Tensor, "n b h c v"], Float[Tensor, "b h k v"]]:
    """q S and u of every chunk, and S behind the last: the only part that goes chunk by chunk."""
    reads, us, _, final = _Carry.apply(q, a, b, new, add, total, state)
    return reads, us, final


class _Carry(Function):
    """`carry`, and S before each chunk.

    Its own backward pass: that of a chunk's part of a tensor fills one as large as the whole, so that time would grow
    with the square of the chunks. What does not wait for the chunk behind is computed for all chunks at once.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, a: Tensor, b: Tensor, new: Tensor, add: Tensor | None, total: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chunk, states, reads, us = q.shape[-2], [], [], []
        for n, reader in enumerate(torch.cat([a, q], -2).unbind()):
            states.append(state)
            held, read = (reader @ state).split(chunk, -2)
            u = new[n] + held
            written = b[n].mT @ u if add is None else b[n].mT @ u + add[n]
            state = state + written if total is None else torch.addcmul(written, total[n], state)
            reads.append(read)
            us.append(u)
        us, states = torch.stack(us), torch.stack(states)
        ctx.save_for_backward(q, a, b, total, us, states)
        ctx.has_add = add is not None
        return torch.stack(reads), us, states, state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dreads, given, dstates, dstate = gradients
        q, a, b, total, us, states = ctx.saved_tensors
        dus, behind = [], []
        writer, ahead = torch.cat([a, q], -2).mT, dstates.unbind()
        for n in reversed(range(len(q))):
            behind.append(dstate)
            du = given[n] + b[n] @ dstate
            dus.append(du)
            back = writer[n] @ torch.cat([du, dreads[n]], -2)
            dstate = back + (dstate if total is None else total[n] * dstate) + ahead[n]
        du, behind = torch.stack(dus[::-1]), torch.stack(behind[::-1])
        dtotal = None if total is None else (behind * states).sum_to_size(total.shape)
        dq, da, db = dreads @ states.mT, du @ states.mT, us @ behind.mT
        return dq, da, db, du, behind if ctx.has_add else None, dtotal, dstate
