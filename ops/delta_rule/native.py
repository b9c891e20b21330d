"""The delta rule on the CPU: as `chunked`, with pairs and decays in compiled loops, and a carry that writes what it
finds where it belongs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ops.delta_rule import chunked as by_torch
from ops.delta_rule.chunked import Parts, chunked
from ops.linear_attention import chunk_native
from ops.linear_attention.native import native_pairs
from ops.linear_attention.pairs import pairs


def native(**arguments: Any) -> tuple[Tensor, Tensor]:
    """See `ops.delta_rule`. Keeps what `chunked` keeps."""
    return chunked(**arguments, parts=_PARTS)


def _pairs(q: Tensor | None, k: Tensor | None, log_decay: Tensor, read: Tensor, itself: bool) -> tuple[Tensor, ...]:
    if q is None or k is None:
        return pairs(q, k, log_decay, read, itself)
    # Here a head is a group of one.
    q, k, log_decay, read = (each.unsqueeze(-3) for each in (q[:, 0], k[0], log_decay[0, 0], read[0, 0]))
    seen, *weights = native_pairs(q, k, log_decay, read, itself)
    return seen.squeeze(-3), *(each.squeeze(-3)[None, None] for each in weights)


class _Carry(Function):
    """`chunked.carry`: S before each chunk lies in one tensor, to which products add, so that nothing is gathered
    afterwards; so do its gradients. Only what waits for the chunk before (or behind) is computed a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, a: Tensor, b: Tensor, new: Tensor, add: Tensor | None, total: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks, (k_dim, v_dim) = len(q), state.shape[-2:]
        readers, writers, given = (each.flatten(1, 2) for each in (a, b, new))
        rates = None if total is None else total.expand(-1, *state.shape[:3], -1).flatten(1, 2)
        states = state.new_empty(chunks + 1, readers.shape[1], k_dim, v_dim)
        states[0] = state.flatten(0, 1)
        us = torch.empty_like(given, memory_format=torch.contiguous_format)
        for n in range(chunks):
            torch.baddbmm(given[n], readers[n], states[n], out=us[n])
            base = states[n]
            if rates is not None:
                base = torch.mul(base, rates[n], out=states[n + 1])
            if add is not None:
                base = torch.add(base, add[n].flatten(0, 1), out=states[n + 1])
            torch.baddbmm(base, writers[n].mT, us[n], out=states[n + 1])
        befores, us = states[:-1].view(chunks, *state.shape), us.view(new.shape)
        ctx.save_for_backward(q, a, b, new, add, total, state, befores, us)
        return q @ befores, us, states[-1].view(state.shape).clone()  # not a view, which would keep all states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, a, b, new, add, total, state, befores, us = ctx.saved_tensors
        if torch.is_grad_enabled():
            return chunk_native.again(ctx, by_torch.carry, (q, a, b, new, add, total, state), gradients)
        dreads, given, dfinal = gradients
        chunks = len(q)
        readers, writers, given = (each.flatten(1, 2) for each in (a, b, given))
        rates = None if total is None else total.expand(-1, *state.shape[:3], -1).flatten(1, 2)
        # Behind chunk n is before chunk n + 1; what reads S there adds to it before anything else does.
        slopes = state.new_empty(chunks + 1, *state.shape)
        torch.matmul(q.mT, dreads, out=slopes[:-1])
        slopes[-1] = dfinal
        flat = slopes.flatten(1, 2)
        du = torch.empty_like(given, memory_format=torch.contiguous_format)
        for n in reversed(range(chunks)):
            torch.baddbmm(given[n], writers[n], flat[n + 1], out=du[n])
            flat[n].baddbmm_(readers[n].mT, du[n])
            if rates is None:
                flat[n].add_(flat[n + 1])
            else:
                flat[n].addcmul_(flat[n + 1], rates[n])
        behind, du = slopes[1:], du.view(new.shape)
        dtotal = None
        if total is not None:
            products = state.new_empty(*behind.shape[:-1], 1)
            rows = products.numel()
            parts = behind.reshape(rows, -1), befores.reshape(rows, -1), products.view(rows)
            chunk_native.run("dots", rows, (behind.shape[-1],), parts, ())
            dtotal = products.sum_to_size(total.shape)
        dq, da, db = dreads @ befores.mT, du @ befores.mT, us @ behind.mT
        return dq, da, db, du, None if add is None else behind, dtotal, slopes[0].clone()


_PARTS = Parts(_pairs, chunk_native.weigh, chunk_native.either(_Carry, by_torch.carry))
