"""How much a key weighs for a later query of its chunk, for decays of any strength.

Between a key s and a query t >= s lie the log decays of s+1 ... t. Their sum as a difference of two sums from the
chunk's start would cancel, and split into factors exp(sum to t) · exp(-sum to s) would overflow. So pairs are taken by
halves (divide and conquer): in blocks of 2, 4, 8, ... tokens, each query of the upper half and each key of the lower
one meet at the middle, with exp(middle to t) <= 1 and exp(s to middle) <= 1. Every pair meets once; every sum is of
numbers of one sign; log2(chunk) exponentials a token do it, and the rest is matrix products.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

# Shapes: ... are batch dimensions that broadcast, c the tokens of a chunk (a power of 2), d channels: 1 or k_dim.


# Of `pairs`, or another way to compute it.
Pairs = Callable[[Tensor | None, Tensor | None, Tensor, Tensor, bool], tuple[Tensor, ...]]


class Sums(NamedTuple):
    """Log decays added up, within blocks of `size` tokens."""

    size: int
    read: Float[Tensor, "*rest c d"]  # from the block's start to the token
    keep: Float[Tensor, "*rest c d"]  # from behind the token to the block's end
    total: Float[Tensor, "*rest blocks 1 d"]


def _halves(each: Float[Tensor, "*rest c d"], size: int) -> tuple[Tensor, Tensor]:
    """Lower and upper halves of blocks of 2·size rows: two views [..., blocks, size, d]."""
    halves = each.unflatten(-2, (-1, 2, size))
    return halves.select(-3, 0), halves.select(-3, 1)


def _corners(pairs: Float[Tensor, "*rest c c"], size: int) -> Tensor:
    """A view [..., size, size, blocks] of what upper queries see of lower keys, in blocks of 2·size."""
    blocks = pairs.unflatten(-2, (-1, 2 * size)).unflatten(-1, (-1, 2 * size))
    return blocks.diagonal(dim1=-4, dim2=-2)[..., size:, :size, :]


def _climb(log_decay: Float[Tensor, "*rest c d"], read: Float[Tensor, "*rest c d"]) -> Iterator[Sums]:
    """Sums within blocks of 1, 2, 4, ... c tokens. Changes in place what it has yielded."""
    sums = Sums(1, read.clone(), torch.zeros_like(log_decay), log_decay.unsqueeze(-2))
    yield sums
    while sums.size < log_decay.shape[-2]:
        size, total = sums.size, sums.total
        lower, upper = total.unflatten(-3, (-1, 2)).unbind(-3)
        _halves(sums.read, size)[1].add_(lower)
        _halves(sums.keep, size)[0].add_(upper)
        sums = Sums(2 * size, sums.read, sums.keep, lower + upper)
        yield sums


class _Pairs(Function):
    """`pairs` with its backward pass, which climbs again instead of keeping what it met."""

    @staticmethod
    def forward(ctx: Any, q: Tensor | None, k: Tensor | None, log_decay: Tensor, read: Tensor, itself: bool) -> Any:
        shape = torch.broadcast_shapes(*(each.shape for each in (q, k, log_decay) if each is not None))
        seen = log_decay.new_zeros(*shape[:-1], shape[-2])
        if itself:
            diagonal = torch.diagonal(seen, dim1=-2, dim2=-1)
            diagonal.fill_(1) if q is None or k is None else diagonal.copy_((q * k).sum(-1))
        sums = Sums(1, read, log_decay, log_decay)
        for sums in _climb(log_decay, read):
            if sums.size == shape[-2]:
                break
            after, before = _meet(sums)
            if q is not None and k is not None:
                after, before = after * _halves(q, sums.size)[1], before * _halves(k, sums.size)[0]
            # A batch of products of single tokens is slow as such.
            met = after @ before.mT if sums.size > 1 else (after * before).sum(-1, keepdim=True)
            _corners(seen, sums.size).copy_(met.movedim(-3, -1))
        # Not in place: torch.compile of torch 2.11 keeps the sums from before for the backward pass.
        weights = sums.read.exp(), sums.keep.exp(), sums.total.squeeze(-3).exp()
        ctx.save_for_backward(q, k, log_decay, read, *weights)
        ctx.itself = itself
        return seen, *weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dseen, dread, dkeep, dtotal = gradients
        q, k, log_decay, read, *weights = ctx.saved_tensors
        dread, dkeep = dread * weights[0], dkeep * weights[1]
        dtotal = (dtotal * weights[2]).unsqueeze(-3)
        dq = dk = None
        if q is not None and k is not None:
            ditself = torch.diagonal(dseen, dim1=-2, dim2=-1)[..., None] * float(ctx.itself)
            dq, dk = (ditself * k).sum_to_size(q.shape), (ditself * q).sum_to_size(k.shape)
        met = [(sums.size, *_meet(sums)) for sums in _climb(log_decay, read) if sums.size < log_decay.shape[-2]]
        for size, after, before in reversed(met):
            upper, lower = _halves(dread, size)[1], _halves(dkeep, size)[0]
            dtotal = torch.stack([dtotal + upper.sum(-2, True), dtotal + lower.sum(-2, True)], -3).flatten(-4, -3)
            corner = _corners(dseen, size).movedim(-1, -3)
            query = after if q is None else after * _halves(q, size)[1]
            key = before if k is None else before * _halves(k, size)[0]
            dquery, dkey = (corner @ key, corner.mT @ query) if size > 1 else (corner * key, corner * query)
            upper.add_((dquery * query).sum_to_size(upper.shape))
            lower.add_((dkey * key).sum_to_size(lower.shape))
            if dq is not None and dk is not None:
                upper, lower = _halves(dq, size)[1], _halves(dk, size)[0]
                upper.add_((dquery * after).sum_to_size(upper.shape))
                lower.add_((dkey * before).sum_to_size(lower.shape))
        return dq, dk, dtotal.squeeze(-2), dread, None


def _meet(sums: Sums) -> tuple[Tensor, Tensor]:
    """Decays from the middle of each block of 2·size to the queries after it, and from the keys before to it."""
    return _halves(sums.read, sums.size)[1].exp(), _halves(sums.keep, sums.size)[0].exp()


def pairs(
    q: Float[Tensor, "*#rest #heads c d"] | None,
    k: Float[Tensor, "*#rest #heads c d"] | None,
    log_decay: Float[Tensor, "*#rest #heads c d"],
    read: Float[Tensor, "*#rest #heads c d"],
    itself: bool,
) -> tuple[
    Float[Tensor, "*#rest #heads c c"],
    Float[Tensor, "*#rest #heads c d"],
    Float[Tensor, "*#rest #heads c d"],
    Float[Tensor, "*#rest #heads 1 d"],
]:
    """For log decays g <= 0 of the tokens of chunks, and r, what a token adds at its read-out to those before it (g
    itself when it reads after its decay, 0 when before):

    seen[t, s] = Σ_d q_t k_s exp(r_t + Σ_{s<j<t} g_j) for s < t and, with `itself`, q_t·k_t for s = t, else 0
    (without q and k: of ones, d being 1); then exp(r_t + Σ_{j<t} g_j), exp(Σ_{j>s} g_j), exp(Σ_j g_j).

    q, k and log_decay broadcast, but for c: q and k may have size 1 where log_decay has heads, log_decay where several
    queries meet the same decays. O(c (c + d log c)) a chunk, forward and backward.
    """
    return _Pairs.apply(q, k, log_decay, read, itself)
