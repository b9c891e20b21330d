"""The sums of an Attention Free Transformer (2105.14103), max-subtracted: Σ_s e^(k_s + w_ts) v_s, Σ_s e^(k_s + w_ts).

Sums over disjoint sets of tokens are made apart and merged: each carries the maximum that was subtracted, so keys of
any size fit. A maximum is redundant (scaling it away leaves the sums alone), hence a constant for autograd, and
gradients of numerators and denominators are taken at that constant.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ops import segments as seg

EMPTY = -1e38  # the maximum of a sum of nothing; finite, so that differences are never NaN
CHUNK = 32  # queries that meet their keys at a time; the largest tensor is [batch, CHUNK, keys near by, width]


class Sums(NamedTuple):
    """numerator · e^maximum and denominator · e^maximum, per channel; shapes broadcast to one another."""

    numerator: Float[Tensor, "*shape"]
    denominator: Float[Tensor, "*shape"]
    maximum: Float[Tensor, "*shape"]


def empty(batch: int, width: int, *, device: Any = None, dtype: torch.dtype | None = None) -> Sums:
    """The sums of no token, [batch width]."""
    zeros = torch.zeros(batch, width, device=device, dtype=dtype)
    return Sums(zeros, zeros.clone(), torch.full_like(zeros, EMPTY))


def constant(sums: Sums) -> Sums:
    """The same sums with a constant maximum: the gradient of a given maximum is in that of the other two."""
    if not sums.maximum.requires_grad:
        return sums
    fixed = sums.maximum.detach()
    factor = torch.exp(sums.maximum - fixed)  # 1, with the gradient of e^maximum
    return Sums(sums.numerator * factor, sums.denominator * factor, fixed)


def where(condition: Bool[Tensor, "..."], sums: Sums) -> Sums:
    """The sums where the condition holds, elsewhere those of nothing."""
    return Sums(
        torch.where(condition, sums.numerator, 0),
        torch.where(condition, sums.denominator, 0),
        torch.where(condition, sums.maximum, EMPTY),
    )


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over the tokens of both."""
    top = torch.maximum(a.maximum, b.maximum)
    left, right = torch.exp(a.maximum - top), torch.exp(b.maximum - top)
    return Sums(left * a.numerator + right * b.numerator, left * a.denominator + right * b.denominator, top)


def average(sums: Sums) -> Tensor:
    """The weighted average of the values; 0 of nothing."""
    some = sums.denominator > 0
    return torch.where(some, sums.numerator / torch.where(some, sums.denominator, 1), 0)


def total(
    k: Float[Tensor, "batch keys width"], v: Float[Tensor, "batch keys width"], mask: Bool[Tensor, "rows keys"] | None
) -> Sums:
    """The sums, without positions, over the keys where `mask` (rows: batch or 1), [batch width]."""
    if k.shape[1] == 0:
        return empty(k.shape[0], k.shape[2], device=k.device, dtype=k.dtype)
    if mask is not None:
        k = torch.where(mask[..., None], k, -torch.inf)
    top = k.detach().amax(1).clamp_min(EMPTY)
    weight = torch.exp(k - top[:, None])
    return Sums((weight * v).sum(1), weight.sum(1), top)


# Every query with every key: exact for all keys and positions, for the keys near by ------------------------------


class _Near(torch.autograd.Function):
    """Keeps k, v and w alone; the weights, [batch queries keys width], are made again for the gradients."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = _logits(k, w)
        top = logits.amax(2).clamp_min(EMPTY)
        weight = torch.exp(logits - top[:, :, None])
        ctx.save_for_backward(k, v, w, top)
        ctx.mark_non_differentiable(top)
        return (weight * v[:, None]).sum(2), weight.sum(2), top

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v, w, top = ctx.saved_tensors
        numerator, denominator = grads[0][:, :, None], grads[1][:, :, None]
        weight = torch.exp(_logits(k, w) - top[:, :, None])
        of_v = weight * numerator
        of_logits = of_v * v[:, None] + weight * denominator
        of_w = of_logits.unflatten(-1, (w.shape[-1], -1)).sum(-1).sum_to_size(w.shape)
        return of_logits.sum(1), of_v.sum(1), of_w


def _logits(k: Tensor, w: Tensor) -> Tensor:
    """k_s + w_ts, [batch queries keys width]; a head of w is shared by width / heads neighbouring channels."""
    return (k[:, None].unflatten(-1, (w.shape[-1], -1)) + w[..., None]).flatten(-2)


def near(
    k: Float[Tensor, "batch keys width"],
    v: Float[Tensor, "batch keys width"],
    w: Float[Tensor, "rows_w queries keys heads"],
    seen: Bool[Tensor, "rows queries keys"],
) -> Sums:
    """Sums over the keys that are `seen`, each query with its own maximum, [batch queries width].

    `rows` and `rows_w` are the batch or 1. Nothing is lost, whatever the keys and biases. Work and, for a moment,
    memory are O(batch queries keys width).
    """
    return Sums(*_Near.apply(k, v, torch.where(seen[..., None], w, -torch.inf)))  # pyright: ignore[reportGeneralTypeIssues]


# Every query with every key as two matrix products: for the many keys far away -------------------------------------


class _Pairs(torch.autograd.Function):
    """e^(k_s + w_ts) = e^(w_ts - max_s w_ts) e^(k_s - max_s k_s) up to a factor. Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, left: Tensor, right: Tensor, queries: Tensor, keys: Tensor):
        ctx.save_for_backward(k, v, left, right, queries, keys)
        position, row, content, top = _factors(k, left, right, queries, keys)
        denominator, numerator = position @ content, position @ (content * v)
        some = denominator > 0
        whole = torch.where(some, denominator, 1)
        maximum = torch.where(some, row + top + whole.log(), EMPTY)
        ctx.mark_non_differentiable(maximum)
        return torch.where(some, numerator / whole, 0), some.to(k.dtype), maximum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        k, v, left, right, queries, keys = ctx.saved_tensors
        position, _, content, _ = _factors(k, left, right, queries, keys)
        denominator = position @ content
        some = denominator > 0
        whole = torch.where(some, denominator, 1)
        numerator, denominator = (torch.where(some, grad / whole, 0) for grad in grads[:2])
        back = position.mT
        of_v = content * (back @ numerator)
        of_k = of_v * v + content * (back @ denominator)
        of_w = position * (numerator @ (content * v).mT + denominator @ content.mT)
        of_w = of_w.sum_to_size(position.shape)
        return of_k, of_v, of_w @ right, of_w.mT @ left, None, None


def _factors(k: Tensor, left: Tensor, right: Tensor, queries: Tensor, keys: Tensor):
    """e^(w - its row's maximum), that maximum, e^(k - its channel's maximum), that maximum; 0 where not visible."""
    w = torch.where(queries[:, :, None] & keys[:, None], left @ right.mT, -torch.inf)
    row = w.amax(-1, keepdim=True).clamp_min(EMPTY)
    k = torch.where(keys[..., None], k, -torch.inf)
    top = k.amax(1, keepdim=True).clamp_min(EMPTY)
    return torch.exp(w - row), row, torch.exp(k - top), top


def pairs(
    k: Float[Tensor, "batch keys width"],
    v: Float[Tensor, "batch keys width"],
    left: Float[Tensor, "rows queries rank"],
    right: Float[Tensor, "rows keys rank"],
    query_mask: Bool[Tensor, "rows queries"],
    key_mask: Bool[Tensor, "rows keys"],
) -> Sums:
    """Sums with w_ts = left_t · right_s over all keys of the mask, for all queries of theirs, [batch queries width].

    Two matrix products: O(batch queries keys width) multiply-adds, O(batch (queries + keys) width) memory besides w.
    Keys may differ by any amount; a term is lost where a query's w_ts differ by more than a number's exponent
    holds (87 in float32, 708 in float64) in favour of keys that are smaller by as much.
    """
    return Sums(*_Pairs.apply(k, v, left, right, query_mask, key_mask))  # pyright: ignore[reportGeneralTypeIssues]


# Where tokens stand -----------------------------------------------------------------------------------------------


def locate(
    time: int, before: Int[Tensor, " rows"], segments: Int[Tensor, "rows time"] | None
) -> tuple[Int[Tensor, "rows time"], Int[Tensor, "rows time"]]:
    """Each token's place in its document, and its document's number in the row: 1, 2, ..., 0 at padding.

    `before`: tokens of the row's first document before this call.
    """
    if segments is None:
        place = before[:, None] + torch.arange(time, device=before.device)
        return place, torch.ones_like(place)
    found = seg.runs(segments)
    rank = found.valid.long().cumsum(1) - 1
    first = torch.where(found.start, rank, 0).cummax(1).values
    place = rank - first + torch.where(found.run == 1, before[:, None], 0)
    return torch.where(found.valid, place, 0), found.run
