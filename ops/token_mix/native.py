"""The native (numba, CPU) mixes of tokens and their gradient."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ops import native_team
from ops.native_array import array
from ops.token_mix import chain, kernels

SMALL = 1 << 15  # values: below, one thread is done before a second is there
PIECES = 16  # of the rows: each sums the gradient of the weights for itself


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _moves(moved: Tensor | None, weight: Tensor, rows: Tensor) -> Tensor:
    """[mixes, rows, width], or of no rows."""
    if moved is None:
        return rows.new_empty(len(weight), 0, rows.shape[1])
    return moved.reshape(len(weight), *rows.shape).contiguous()


def _job(tensors: tuple[Tensor, ...], rows: Tensor, weight: Tensor, moves: Tensor, pieces: int) -> np.ndarray:
    sizes = *rows.shape, len(weight), moves.shape[1], pieces, 0
    return np.array([*sizes, *(each.data_ptr() for each in tensors)], np.int64)


def _forward(x: Tensor, before: Tensor, weight: Tensor, moved: Tensor | None) -> tuple[Tensor, ...]:
    rows, weight = _rows(x), weight.contiguous()
    moves, made = _moves(moved, weight, rows), x.new_empty(len(weight), *rows.shape)
    tensors = rows, _rows(before), weight, moves, made
    if x.dtype == torch.float32:
        threads = native_team.threads() if made.numel() >= SMALL else 1
        kernels.forward_on(threads, _job(tensors, rows, weight, moves, min(PIECES, len(rows))))
    else:
        arrays = [array(each) for each in tensors]
        kernels.forward(0, len(rows), *arrays)
    return made.view(len(weight), *x.shape).unbind()


def _backward(
    grads: tuple[Tensor, ...], x: Tensor, before: Tensor, weight: Tensor, moved: Tensor | None
) -> tuple[Tensor | None, ...]:
    rows, others, weights = _rows(x), _rows(before), weight.contiguous()
    moves = _moves(moved, weight, rows)
    slopes = [_rows(each) for each in grads]
    pieces = min(PIECES, len(rows))
    dx, dbefore, dmoved = torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(moves)
    sums = rows.new_zeros(pieces, *weight.shape)
    if x.dtype == torch.float32:
        threads = native_team.threads() if dx.numel() * len(weight) >= SMALL else 1
        places = np.array([each.data_ptr() for each in slopes], np.int64)
        tensors = rows, others, weights, moves, dx, dbefore, sums, dmoved
        job = np.append(_job(tensors, rows, weight, moves, pieces), places.ctypes.data)
        kernels.backward_on(threads, job, places)
    else:
        arrays = [array(each) for each in (rows, others, weights, moves, dx, dbefore, sums[0], dmoved)]
        kernels.clear(arrays[4], arrays[5], 0, len(rows))
        for n, each in enumerate(slopes):
            kernels.backward(0, len(rows), array(each), n, *arrays)
        kernels.finish(arrays[4], arrays[5], 0, len(rows))
    moved_back = None if moved is None else dmoved.view(moved.shape)
    return dx.view(x.shape), dbefore.view(x.shape), sums.sum(0), moved_back


class _TokenMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor, weight: Tensor, moved: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, before, weight, moved)
        return _forward(x, before, weight, moved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _backward(grads, *given)
        # Gradients of gradients: by operations that have some.
        wanted = [each for each, ask in zip(given, ctx.needs_input_grad, strict=True) if ask]
        found = iter(torch.autograd.grad(chain(*given), wanted, grads, create_graph=True))
        return tuple(next(found) if ask else None for ask in ctx.needs_input_grad)


def token_mix(x: Tensor, before: Tensor, weight: Tensor, moved: Tensor | None) -> tuple[Tensor, ...]:
    """See `ops.token_mix`."""
    given = x, before, weight, moved
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given):
        return _TokenMix.apply(*given)  # pyright: ignore[reportReturnType]
    return _forward(*given)
