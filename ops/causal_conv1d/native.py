"""The native (numba, CPU) causal convolution as torch custom ops, which torch.compile calls without looking inside."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops import segments as seg
from ops.causal_conv1d import kernels
from ops.causal_conv1d.layout import output_dtypes, zero_state
from ops.native_array import array
from ops.native_threads import even_tile, run_blocks

SMALL = 1 << 16  # values: below, one thread is done before a second has started


def causal_conv1d(
    x: Float[Tensor, "batch time channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, " channels"] | None,
    initial_state: Float[Tensor, "batch taps_1 channels"] | None,
    segments: Int[Tensor, "batch time"] | None,
    activation: str | None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch taps_1 channels"]]:
    """See `ops.causal_conv1d`. Reads x once, writes y once; keeps for the backward pass its inputs alone."""
    compute, state_dtype = output_dtypes(x, initial_state)
    marks = torch.ones(x.shape[:2], dtype=torch.uint8) if segments is None else seg.marks(segments)
    state = (zero_state(x, weight) if initial_state is None else initial_state).to(compute)
    bias = x.new_zeros(x.shape[2], dtype=compute) if bias is None else bias.to(compute)
    arguments = (x.to(compute), weight.t().to(compute), bias, state, marks, activation == "silu")
    differentiable = torch.is_grad_enabled() and any(each.requires_grad for each in arguments[:4])
    if not differentiable and not torch.compiler.is_compiling() and type(x) is Tensor:
        # Decoding: the dispatcher of custom ops costs more than a token.
        y, final = _forward(*arguments)
    else:
        y, final = _conv(*arguments)
    return y.to(x.dtype), final.to(state_dtype)


def _run(kernel, silu: bool, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    """`inputs` start with x, weight, bias, state, marks; then comes `silu`."""
    x = inputs[0]
    batch, _, channels = x.shape
    tile = even_tile(channels, batch, kernels.TILE)
    tasks = batch * -(-channels // tile)
    arrays = [_wide(each) if each.shape == x.shape else array(each.contiguous()) for each in inputs]
    arguments = (tile, *arrays[:5], silu, *arrays[5:], *(each.numpy() for each in outputs))
    if x.numel() <= SMALL:
        kernel(0, tasks, *arguments)
    else:
        run_blocks(kernel, tasks, *arguments)


def _wide(x: Tensor) -> np.ndarray:
    """An array of [batch, time, channels or more]: whatever lies between tokens is taken along, so that a part of a
    projection needs no copy."""
    batch, time, channels = x.shape
    apart = x.stride(1)
    packed = x.stride(2) == 1 and apart >= channels and (batch == 1 or x.stride(0) == time * apart)
    if not packed or x.is_contiguous():
        return array(x.contiguous())
    size = x.element_size()
    strides = (time * apart * size, apart * size, size)
    return np.lib.stride_tricks.as_strided(array(x), (batch, time, apart), strides)


def _forward(x, weight, bias, state, marks, silu):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = torch.empty_like(state, memory_format=torch.contiguous_format)
    _run(kernels.forward, silu, (x, weight, bias, state, marks), (y, final))
    return y, final


@torch.library.custom_op("zoo::causal_conv1d_native", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, marks: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """y and the final state; weight is [taps, channels]."""
    return _forward(x, weight, bias, state, marks, silu)


@_conv.register_fake
def _(x, weight, bias, state, marks, silu):
    return x.new_empty(x.shape), state.new_empty(state.shape)


@torch.library.custom_op("zoo::causal_conv1d_native_backward", mutates_args=())
def _conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, marks: Tensor, silu: bool, gy: Tensor, gfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, state."""
    batch, _, channels = x.shape
    dx, dstate = x.new_empty(x.shape), state.new_empty(state.shape)
    dweight, dbias = x.new_empty(batch, weight.shape[0], channels), x.new_empty(batch, channels)
    _run(kernels.backward, silu, (x, weight, bias, state, marks, gy, gfinal), (dx, dweight, dbias, dstate))
    return dx, dweight.sum(0), dbias.sum(0), dstate


@_conv_backward.register_fake
def _(x, weight, bias, state, marks, silu, gy, gfinal):
    return tuple(each.new_empty(each.shape) for each in (x, weight, bias, state))


def _setup(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, gy, gfinal):
    return *_conv_backward(*ctx.saved_tensors, ctx.silu, gy, gfinal), None, None


_conv.register_autograd(_gradients, setup_context=_setup)
