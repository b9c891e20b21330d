"""What the implementations in pieces share: the walk over the rows, as a custom op that has the gradients ready."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.linear_cross_entropy.reference import whole

# A piece's logits: many, for each piece reads and writes the gradient of W.
LOGITS_ON_CPU, LOGITS = 1 << 24, 1 << 27

# (products [rows, vocab], targets, ignore_index, scale, softcap, gradient) -> nats [rows], and in place of the products
# the gradient of the summed nats with respect to them, where it is asked for.
Losses = Callable[[Tensor, Tensor, int, float, float, bool], tuple[Tensor, Tensor]]


def _pieces(rows: int, vocab: int, device: torch.device) -> int:
    """Rows of a piece."""
    room = (LOGITS_ON_CPU if device.type == "cpu" else LOGITS) // max(vocab, 1)
    count = -(-rows // max(room, 1))
    return -(-rows // max(count, 1))


def _walk(
    losses: Losses,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    to_x: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed nats and the gradients asked for (others are empty)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, width = x.shape
    vocab = len(weight)
    kept = None
    if x.device.type == "cpu":  # elsewhere the host would have to wait for the count
        _check_targets(targets, ignore_index, vocab)
        counts = targets != ignore_index
        if not bool(counts.all()):
            kept = counts.nonzero()[:, 0]
            x, targets = x[kept], targets[kept]
    nats = x.new_zeros((), dtype=torch.float64 if x.device.type == "cpu" else wide)
    dx = x.new_empty((len(x), width) if to_x else 0)
    several = len(x) > (size := _pieces(len(x), vocab, x.device))
    # Many roundings add up: the sum over pieces is kept in float32.
    dweight = x.new_empty((vocab, width) if to_weight else 0, dtype=wide if several else x.dtype)
    if to_weight and not len(x):
        dweight.zero_()
    products = x.new_empty(min(size, len(x)), vocab)
    for start in range(0, len(x), max(size, 1)):
        part = x[start : start + size]
        made = torch.mm(part, weight.t(), out=products[: len(part)])
        found, slopes = losses(made, targets[start : start + size], ignore_index, scale, softcap, to_x or to_weight)
        nats += found.sum(dtype=nats.dtype)
        if to_x:
            torch.mm(slopes, weight, out=dx[start : start + size])
        if to_weight and start == 0 and dweight.dtype == slopes.dtype:
            torch.mm(slopes.t(), part, out=dweight)
        elif to_weight and dweight.dtype == slopes.dtype:
            dweight.addmm_(slopes.t(), part)
        elif to_weight:
            added = torch.mm(slopes.t(), part)
            dweight.copy_(added) if start == 0 else dweight.add_(added)
    if to_x and kept is not None:
        dx = x.new_zeros(rows, width).index_copy_(0, kept, dx)
    return nats.to(wide), dx, dweight.to(x.dtype)


def _check_targets(targets: Tensor, ignore_index: int, vocab: int) -> None:
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    if bool(outside.any()):
        raise ValueError(
            f"linear_cross_entropy: target {int(targets[outside][0])} is outside of the vocabulary of {vocab}; rows "
            f"that do not count must hold ignore_index={ignore_index}"
        )


def _scaled(made: Tensor, grad: Tensor) -> Tensor:
    """made · grad in made's dtype, with a factor that is not rounded to it first: all would be off by the same."""
    if made.dtype == grad.dtype:
        return made * grad
    return torch.mul(made, grad.reshape(1), out=torch.empty_like(made))


def in_pieces(name: str, losses: Losses) -> Callable[..., Tensor]:
    """`linear_cross_entropy` whose softmax and its gradient are `losses`, registered as `zoo::<name>`: torch.compile
    calls it without looking inside."""

    def typed(
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        scale: float,
        softcap: float,
        to_x: bool,
        to_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _walk(losses, x, weight, targets, ignore_index, scale, softcap, to_x, to_weight)

    op = torch.library.custom_op(f"zoo::{name}", typed, mutates_args=())

    @op.register_fake
    def _(x, weight, targets, ignore_index, scale, softcap, to_x, to_weight):
        wide = torch.promote_types(x.dtype, torch.float32)
        dx, dweight = (each.new_empty(each.shape if ask else 0) for each, ask in ((x, to_x), (weight, to_weight)))
        return x.new_empty((), dtype=wide), dx, dweight

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, targets, *ctx.options, ctx.to_x, ctx.to_weight = inputs
        ctx.save_for_backward(x, weight, targets, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, targets, *made = ctx.saved_tensors
        asked = ctx.to_x, ctx.to_weight
        if torch.is_grad_enabled():  # gradients of gradients
            ignore_index, scale, softcap = ctx.options
            nats = whole(x, weight, targets, ignore_index, scale, softcap or None)
            wanted = [each for each, ask in zip((x, weight), asked, strict=True) if ask]
            found = iter(torch.autograd.grad(nats, wanted, grad, create_graph=True))
            dx, dweight = (next(found) if ask else None for ask in asked)
        else:
            dx, dweight = (_scaled(each, grad) if ask else None for each, ask in zip(made, asked, strict=True))
        return dx, dweight, *[None] * 6

    op.register_autograd(backward, setup_context=save)

    def run(
        x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: float, softcap: float | None
    ) -> Tensor:
        asked = [torch.is_grad_enabled() and each.requires_grad for each in (x, weight)]
        return op(x, weight, targets, ignore_index, scale, softcap or 0.0, *asked)[0]

    return run
