"""Linear attention on the CPU: as `chunked`, with the loops of `chunk_native.py` between the matrix products, and pairs
under a decay a key channel in those of `pairs_kernels.py`, as torch custom ops. The delta rule shares them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ops.linear_attention import chunk_native, pairs_kernels
from ops.linear_attention.chunked import Parts, chunked
from ops.linear_attention.pairs import pairs
from ops.native_array import array
from ops.native_threads import run_blocks


def native(**arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `ops.linear_attention`. Keeps what `chunked` keeps."""
    return chunked(**arguments, parts=_PARTS)


def _pairs(q: Tensor | None, k: Tensor | None, log_decay: Tensor, read: Tensor, itself: bool) -> tuple[Tensor, ...]:
    if q is None or k is None:
        return pairs(q, k, log_decay, read, itself)
    seen, *weights = native_pairs(q[None], k[None], log_decay, read, itself)
    return seen[0, 0], *weights


_PARTS = Parts(_pairs, chunk_native.weigh, chunk_native.carry, chunk_native.values, chunk_native.combine)


def native_pairs(
    q: Float[Tensor, "readers *rest 1 c d"],
    k: Float[Tensor, "writers *rest 1 c d"],
    log_decay: Float[Tensor, "*rest heads c d"],
    read: Float[Tensor, "*rest heads c d"],
    itself: bool,
) -> tuple[
    Float[Tensor, "readers writers *rest heads c c"],
    Float[Tensor, "*rest heads c d"],
    Float[Tensor, "*rest heads c d"],
    Float[Tensor, "*rest heads 1 d"],
]:
    """`pairs` of every reader with every writer. O(readers writers c² d) a chunk, forward and backward."""
    rest = log_decay.shape[:-3]
    given = q.flatten(1, -3), k.flatten(1, -3), log_decay.flatten(0, -4), read.flatten(0, -4)
    seen, *weights = _forward_op(*(each.contiguous() for each in given), itself)
    return seen.unflatten(2, rest), *(each.unflatten(0, rest) for each in weights)


@torch.library.custom_op("zoo::linear_attention_pairs_native", mutates_args=(), device_types="cpu")
def _forward_op(
    q: Tensor, k: Tensor, log_decay: Tensor, read: Tensor, itself: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = _outputs(q, k, log_decay, read, itself)
    given = (array(each) for each in (q, k, log_decay, read))
    run_blocks(pairs_kernels.pairs, q.shape[1], *given, itself, *(array(each) for each in found))
    return found


@_forward_op.register_fake
def _outputs(q, k, log_decay, read, itself):
    groups, heads, c, d = log_decay.shape
    seen = q.new_empty(len(q), len(k), groups, heads, c, c)
    return seen, torch.empty_like(log_decay), torch.empty_like(log_decay), q.new_empty(groups, heads, 1, d)


@torch.library.custom_op("zoo::linear_attention_pairs_native_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    dseen: Tensor, dread: Tensor, dkeep: Tensor, dtotal: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, read: Tensor,
    weights_read: Tensor, weights_keep: Tensor, weights_total: Tensor, itself: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    found = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(log_decay), torch.zeros_like(read)
    given = [array(each.contiguous()) for each in (dseen, dread, dkeep, dtotal)]
    given += [array(each) for each in (q, k, log_decay, read, weights_read, weights_keep, weights_total)]
    run_blocks(pairs_kernels.pairs_backward, q.shape[1], *given, itself, *(array(each) for each in found))
    return found


@_backward_op.register_fake
def _gradients(
    dseen, dread, dkeep, dtotal, q, k, log_decay, read, weights_read, weights_keep, weights_total, itself
):  # fmt: skip
    return tuple(torch.empty_like(each) for each in (q, k, log_decay, read))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *given, ctx.itself = inputs
    ctx.save_for_backward(*given, *output[1:])


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward_op(*gradients, *ctx.saved_tensors, ctx.itself), None)


_forward_op.register_autograd(_backward, setup_context=_setup)
