"""The native (numba, CPU) wkv as torch custom ops, which torch.compile calls without looking inside."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops import segments as seg
from ops.native_array import array
from ops.native_threads import even_tile, run_blocks
from ops.wkv import kernels

SMALL = 1 << 15  # values: below, one thread is done before a second has started


def wkv(
    k: Float[Tensor, "batch time channels"],
    v: Float[Tensor, "batch time channels"],
    log_decay: Float[Tensor, " channels"],
    bonus: Float[Tensor, " channels"],
    state: tuple[Tensor, Tensor, Tensor],
    segments: Int[Tensor, "batch time"] | None,
) -> tuple[Float[Tensor, "batch time channels"], tuple[Tensor, Tensor, Tensor]]:
    """See `ops.wkv`. Keeps for the backward pass its inputs and a state every `CHUNK` tokens."""
    marks = torch.ones(k.shape[:2], dtype=torch.uint8) if segments is None else seg.marks(segments)
    arguments = (k, v, log_decay, bonus, marks, torch.stack(state))
    differentiable = torch.is_grad_enabled() and any(each.requires_grad for each in (*arguments[:4], arguments[5]))
    if not differentiable and not torch.compiler.is_compiling() and type(k) is Tensor:
        # Decoding: the dispatcher of custom ops costs more than a token.
        y, final, _ = _forward(*arguments, False)
    else:
        y, final, _ = _wkv(*arguments, differentiable)
    return y, (final[0], final[1], final[2].detach())


def _run(kernel, k: Tensor, *tensors: Tensor) -> None:
    batch, _, channels = k.shape
    tile = even_tile(channels, batch, kernels.TILE)
    tasks = batch * -(-channels // tile)
    arrays = [array(each) for each in (k, *tensors)]
    if k.numel() <= SMALL:
        kernel(0, tasks, tile, *arrays)
    else:
        run_blocks(kernel, tasks, tile, *arrays)


def _forward(k, v, w, u, marks, first, save):
    batch, time, channels = k.shape
    k, v, w, u, first = (each.contiguous() for each in (k, v, w, u, first))
    chunks = -(-time // kernels.CHUNK) if save else 0
    y, final = torch.empty_like(k), torch.empty_like(first)
    stored = k.new_empty(batch, chunks, 3, channels)
    _run(kernels.forward, k, v, w, u, marks.contiguous(), first, y, final, stored)
    return y, final, stored


@torch.library.custom_op("zoo::wkv_native", mutates_args=())
def _wkv(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, marks: Tensor, first: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, final state [3, batch, channels], and (where `save`) the states before each chunk."""
    return _forward(k, v, w, u, marks, first, save)


@_wkv.register_fake
def _(k, v, w, u, marks, first, save):
    batch, time, channels = k.shape
    chunks = -(-time // kernels.CHUNK) if save else 0
    contiguous = torch.contiguous_format
    y, final = torch.empty_like(k, memory_format=contiguous), torch.empty_like(first, memory_format=contiguous)
    return y, final, k.new_empty(batch, chunks, 3, channels)


@torch.library.custom_op("zoo::wkv_native_backward", mutates_args=())
def _wkv_backward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, marks: Tensor, stored: Tensor, gy: Tensor, gfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and of the first numerator and denominator [2, batch, channels]."""
    k, v, w, u, gy, gfinal = (each.contiguous() for each in (k, v, w, u, gy, gfinal))
    dk, dv, dfirst = torch.empty_like(k), torch.empty_like(v), torch.empty_like(gfinal[:2])
    dw, du = torch.empty_like(k[:, 0]), torch.empty_like(k[:, 0])
    _run(kernels.backward, k, v, w, u, marks.contiguous(), stored, gy, gfinal, dk, dv, dw, du, dfirst)
    return dk, dv, dw.sum(0), du.sum(0), dfirst


@_wkv_backward.register_fake
def _(k, v, w, u, marks, stored, gy, gfinal):
    contiguous = torch.contiguous_format
    dk, dv = torch.empty_like(k, memory_format=contiguous), torch.empty_like(v, memory_format=contiguous)
    return dk, dv, torch.empty_like(w), torch.empty_like(u), gfinal.new_empty(2, *gfinal.shape[1:])


def _setup(ctx, inputs, output):
    k, v, w, u, marks, _, save = inputs
    assert save, "a differentiable call stores the states"
    ctx.save_for_backward(k, v, w, u, marks, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx, gy, gfinal, _):
    dk, dv, dw, du, dfirst = _wkv_backward(*ctx.saved_tensors, gy, gfinal)
    return dk, dv, dw, du, None, torch.cat([dfirst, torch.zeros_like(dfirst[:1])]), None


_wkv.register_autograd(_gradients, setup_context=_setup)
