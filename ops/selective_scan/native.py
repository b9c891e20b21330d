"""The selective scan on the CPU: the loops of `kernels.py` over rows and channels in threads, as torch custom ops."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops.native_array import array
from ops.native_threads import run_blocks
from ops.precision import state_dtype
from ops.segments import marks
from ops.selective_scan import kernels

SMALL = 1 << 16  # state updates: below, one thread is done before a second has started


def native(
    x: Float[Tensor, "batch time channels"],
    dt: Float[Tensor, "batch time channels"],
    A: Float[Tensor, "channels n"],
    B: Float[Tensor, "batch time n"],
    C: Float[Tensor, "batch time n"],
    D: Float[Tensor, " channels"] | None = None,
    z: Float[Tensor, "batch time channels"] | None = None,
    initial_state: Float[Tensor, "batch channels n"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels n"]]:
    """See `ops.selective_scan`. Keeps the state at every 64th token for the backward pass."""
    inputs = (x, dt, A, B, C, D, z, initial_state)
    mark = None if segments is None else marks(segments)
    keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)
    if not keep and not torch.compiler.is_compiling() and type(x) is Tensor:
        # Decoding spends more time in a custom op's dispatch than in the scan of one token.
        y, final, _ = _forward(*inputs, mark, False)
        return y, final
    y, final, _ = _forward_op(*inputs, mark, keep)
    return y, final


def _array(tensor: Tensor | None, dtype: torch.dtype, ndim: int) -> np.ndarray:
    """Contiguous, in this dtype; an empty array of as many dimensions stands for None."""
    if tensor is None:
        return _NONE[dtype, ndim]
    if tensor.dtype != dtype or not tensor.is_contiguous():
        tensor = tensor.to(dtype).contiguous()
    return array(tensor)


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.uint8: np.uint8}
_NONE = {(dtype, ndim): np.empty((0,) * ndim, each) for dtype, each in _NUMPY.items() for ndim in (1, 2, 3)}
_NDIM = (3, 3, 2, 3, 3, 1, 3, 3)  # of x, dt, A, B, C, D, z, initial


def _share(batch: int, channels: int, updates: int) -> list[tuple[int, int, int, int]]:
    """(row, group, low, high) of each piece of work: a row of the batch and a range of channels.

    Groups of channels are as few as keep the threads busy: each has sums over channels (dB, dC) of its own to add up.
    """
    threads = torch.get_num_threads() if updates > SMALL else 1
    tiles = -(-channels // kernels.TILE)
    groups = 1 if batch % threads == 0 else min(threads, tiles)
    edges = [min(channels, tiles * each // groups * kernels.TILE) for each in range(groups + 1)]
    return [(row, group, edges[group], edges[group + 1]) for row in range(batch) for group in range(groups)]


def _run(
    kernel: Callable[..., None], arrays: list[np.ndarray], pieces: Sequence[tuple[int, ...]], updates: int
) -> None:
    """Call `kernel(*arrays, *piece)` for every piece, in threads where that pays."""

    def share(first: int, end: int) -> None:
        for piece in pieces[first:end]:
            kernel(*arrays, *piece)

    if updates > SMALL:
        run_blocks(share, len(pieces))
    else:
        share(0, len(pieces))


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial: Tensor | None,
    mark: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(x, dt, A, B, C, D, z, initial)
    batch, time, channels = x.shape
    states = A.shape[1]
    y = torch.empty(x.shape, dtype=dtype)
    final = torch.empty(batch, channels, states, dtype=dtype)
    boundary = torch.empty(batch, -(-time // kernels.CHUNK) if keep else 0, states, channels, dtype=dtype)
    inputs = [_array(each, dtype, ndim) for each, ndim in zip((x, dt, A, B, C, D, z, initial), _NDIM, strict=True)]
    inputs.append(_array(mark, torch.uint8, 2))
    inputs += [y.numpy(), final.numpy()]
    updates = batch * time * channels * states
    if time == 1 and not keep:
        _run(kernels.step, inputs, [()], 0)
    else:
        pieces = [(row, low, high) for row, _, low, high in _share(batch, channels, updates)]
        _run(kernels.forward, [*inputs, boundary.numpy()], pieces, updates)
    return y.to(x.dtype), final, boundary


@torch.library.custom_op("zoo::selective_scan_native", mutates_args=(), device_types="cpu")
def _forward_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial: Tensor | None,
    mark: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, dt, A, B, C, D, z, initial, mark, keep)


@_forward_op.register_fake
def _(x, dt, A, B, C, D, z, initial, mark, keep):
    dtype = state_dtype(x, dt, A, B, C, D, z, initial)
    batch, time, channels = x.shape
    final = x.new_empty(batch, channels, A.shape[1], dtype=dtype)
    chunks = -(-time // kernels.CHUNK) if keep else 0
    return x.new_empty(x.shape), final, x.new_empty(batch, chunks, A.shape[1], channels, dtype=dtype)


@torch.library.custom_op("zoo::selective_scan_native_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    mark: Tensor | None,
    boundary: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = boundary.dtype
    batch, time, channels = x.shape
    states = A.shape[1]
    updates = batch * time * channels * states
    pieces = _share(batch, channels, updates)
    groups = 1 + max((piece[1] for piece in pieces), default=0)
    dx, ddt = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape, dtype=dtype)
    dA, dD = torch.empty(batch, channels, states, dtype=dtype), torch.empty(batch, channels, dtype=dtype)
    dB, dC = (torch.zeros(groups, batch, time, states, dtype=dtype) for _ in "BC")
    dz = torch.empty((0, 0, 0) if z is None else x.shape, dtype=dtype)
    dinitial = torch.empty(batch, channels, states, dtype=dtype)
    inputs = [_array(each, dtype, ndim) for each, ndim in zip((x, dt, A, B, C, D, z), _NDIM[:7], strict=True)]
    inputs += [_array(mark, torch.uint8, 2), boundary.numpy(), _array(dy, dtype, 3), _array(dfinal, dtype, 3)]
    inputs += [each.numpy() for each in (dx, ddt, dA, dB, dC, dD, dz, dinitial)]
    _run(kernels.backward, inputs, pieces, updates)
    return (
        dx.to(x.dtype),
        ddt.to(dt.dtype),
        dA.sum(0).to(A.dtype),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        dD.sum(0).to(dtype if D is None else D.dtype),
        dz.to(dtype if z is None else z.dtype),
        dinitial,
    )


@_backward_op.register_fake
def _(x, dt, A, B, C, D, z, mark, boundary, dy, dfinal):
    state = boundary.new_empty(x.shape[0], x.shape[2], A.shape[1])
    dD = boundary.new_empty(x.shape[2], dtype=boundary.dtype if D is None else D.dtype)
    dz = boundary.new_empty(0, 0, 0) if z is None else z.new_empty(z.shape)
    flat = (each.new_empty(each.shape) for each in (x, dt, A, B, C))
    return (*flat, dD, dz, state)


def _setup(ctx, inputs, output):
    x, dt, A, B, C, D, z, initial, mark, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.initial_dtype = None if initial is None else initial.dtype
    ctx.save_for_backward(x, dt, A, B, C, D, z, mark, output[2])


def _backward(ctx, dy, dfinal, dboundary):
    x, dt, A, B, C, D, z, mark, boundary = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, ddt, dA, dB, dC, dD, dz, dinitial = _backward_op(x, dt, A, B, C, D, z, mark, boundary, dy, dfinal)
    return (
        dx,
        ddt,
        dA,
        dB,
        dC,
        None if D is None else dD,
        None if z is None else dz,
        None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype),
        None,
        None,
    )


torch.library.register_autograd(_forward_op, _backward, setup_context=_setup)
