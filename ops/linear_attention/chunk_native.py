"""`chunked.Parts` on the CPU, in the loops of `chunk_kernels.py`. Where something traces, watches or transforms each
operation, torch's stand in."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from ops import native_team
from ops.dispatch import refuse_opaque
from ops.linear_attention import chunk_kernels, chunked
from ops.native_array import array

SMALL = 1 << 14  # numbers read and written: below, one thread is done before a second is there
A_THREAD = 4  # pieces: a thread that other work delays leaves some to the others


def run(name: str, places: int, sizes: Sequence[int], tensors: Sequence[Tensor], options: Sequence[int]) -> None:
    """A kernel on all its places. sizes: those of its job, in its order; options: what it takes behind its arrays."""
    if tensors[0].dtype != torch.float32:
        arguments = [*map(array, tensors), *options]
        getattr(chunk_kernels, name)(0, places, *arguments)
        return
    threads = native_team.threads() if sum(each.numel() for each in tensors) >= SMALL else 1
    numbers = [places, min(places, A_THREAD * threads), 0, *sizes, *(each.data_ptr() for each in tensors)]
    getattr(chunk_kernels, f"{name}_on")(threads, np.array(numbers, np.int64))


def again(ctx: Any, formula: Callable[..., Any], given: Sequence[Any], grads: Sequence[Tensor]) -> tuple[Any, ...]:
    """Gradients by torch's operations, which have gradients in turn."""
    wanted = [each for each, ask in zip(given, ctx.needs_input_grad, strict=True) if ask]
    found = formula(*given)
    found = found if isinstance(found, tuple) else (found,)
    told = [(each, grad) for each, grad in zip(found, grads, strict=True) if each.requires_grad]
    made = iter(torch.autograd.grad([each for each, _ in told], wanted, [grad for _, grad in told], create_graph=True))
    return tuple(next(made) if ask else None for ask in ctx.needs_input_grad)


class _Weigh(Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, log_decay: Tensor, before: Tensor, itself: bool) -> Any:
        several, m, chunk, _ = scores.shape
        heads = log_decay.shape[1]
        given = tuple(each.contiguous() for each in (scores, log_decay, before))
        read, keep = log_decay.new_empty(2, m, heads, chunk)
        found = scores.new_empty(several, m, heads, chunk, chunk), read, keep, log_decay.new_empty(m, heads)
        sizes = several, heads, chunk, int(itself)
        run("weigh", m, sizes, (*given, *found), (int(itself),))
        ctx.save_for_backward(scores, log_decay, before, *found)
        ctx.itself = itself
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scores, log_decay, before, *found = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(ctx, chunked.weigh, (scores, log_decay, before, ctx.itself), grads)
        several, m, heads, chunk, _ = found[0].shape
        made = scores.new_empty(scores.shape), *log_decay.new_empty(2, m, heads, chunk)
        given = [each.contiguous() for each in (*grads, log_decay, before)]
        sizes = several, heads, chunk, int(ctx.itself)
        run("weigh_back", m, sizes, (*given, *found, *made), (int(ctx.itself),))
        return *made, None


class _Carry(Function):
    @staticmethod
    def forward(ctx: Any, add: Tensor, decay: Tensor, state: Tensor) -> Any:
        states, final = add.new_empty(add.shape), state.new_empty(state.shape)
        given = tuple(each.contiguous() for each in (add, decay, state))
        run("carry", _blocks(add), add.shape, (*given, states, final), ())
        ctx.save_for_backward(add, decay, state, states)
        return states, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        add, decay, state, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(ctx, chunked.carry, (add, decay, state), grads)
        made = tuple(each.new_empty(each.shape) for each in (add, decay, state))
        given = [each.contiguous() for each in (*grads, decay)]
        run("carry_back", _blocks(add), add.shape, (*given, states, *made), ())
        return made


def _blocks(add: Tensor) -> int:
    return len(add) * math.ceil(add.shape[2] / chunk_kernels.ROWS)


def _rows(x: Tensor) -> Tensor:
    """[batch, time, more than heads · v] of [batch, time, heads, v]: whatever lies between tokens is taken along, so
    that a part of a projection needs no copy."""
    rows = x.flatten(2)
    batch, time, width = rows.shape
    apart = rows.stride(1)
    packed = rows.stride(2) == 1 and apart >= width and (batch == 1 or rows.stride(0) == time * apart)
    return rows if packed and rows.dtype == torch.float32 else rows.contiguous()


def _sizes(apart: Tensor, batch: int, chunks: int, rows: Tensor) -> tuple[int, ...]:
    """Of the jobs with values: batch, chunks, heads a group, chunk, v, time, and from token to token."""
    return batch, chunks, *apart.shape[1:], rows.shape[1], rows.stride(1)


class _Values(Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, keep: Tensor, chunks: int) -> Any:
        rows, (m, heads, chunk) = _rows(v), keep.shape
        apart, kept = v.new_empty(m, heads, chunk, v.shape[3]), v.new_empty(m, chunk, heads, v.shape[3])
        run("values", m, _sizes(apart, len(v), chunks, rows), (rows, keep.contiguous(), apart, kept), (chunks,))
        ctx.save_for_backward(v, keep)
        ctx.chunks = chunks
        return apart, kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        v, keep = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(ctx, chunked.values, (v, keep, ctx.chunks), grads)
        rows = _rows(v)
        dapart, dkept, keep = (each.contiguous() for each in (*grads, keep))
        dv, dkeep = v.new_empty(v.shape), torch.empty_like(keep)
        sizes = _sizes(dapart, len(v), ctx.chunks, rows)
        run("values_back", len(keep), sizes, (dapart, dkept, rows, keep, dv.flatten(2), dkeep), (ctx.chunks,))
        return dv, dkeep, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, aside: Tensor, read: Tensor, batch: int, time: int) -> Any:
        given = tuple(each.contiguous() for each in (inner, aside, read))
        m, several, chunk, v_dim = inner.shape
        chunks = -(-time // chunk)
        y = inner.new_empty(batch, time, m // (batch * chunks) * several, v_dim)
        rows = y.flatten(2)
        run("combine", m, _sizes(inner, batch, chunks, rows), (*given, rows), (chunks,))
        ctx.save_for_backward(inner, aside, read)
        ctx.batch, ctx.time = batch, time
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inner, aside, read = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(ctx, chunked.combine, (inner, aside, read, ctx.batch, ctx.time), grads)
        rows, chunks = _rows(grads[0]), -(-ctx.time // inner.shape[2])
        made = tuple(each.new_empty(each.shape) for each in (inner, aside, read))
        sizes = _sizes(inner, ctx.batch, chunks, rows)
        run("combine_back", len(inner), sizes, (rows, aside.contiguous(), read.contiguous(), *made), (chunks,))
        return *made, None, None


def either(function: type[Function], formula: Callable[..., Any]) -> Callable[..., Any]:
    def part(*arguments: Any) -> Any:
        given = {str(place): each for place, each in enumerate(arguments)}
        return formula(*arguments) if refuse_opaque(given) else function.apply(*arguments)

    return part


weigh = either(_Weigh, chunked.weigh)
carry = either(_Carry, chunked.carry)
values = either(_Values, chunked.values)
combine = either(_Combine, chunked.combine)
