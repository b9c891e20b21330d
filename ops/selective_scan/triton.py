"""The selective scan on a GPU: the kernels of `triton_kernels.py` as torch custom ops."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ops.dispatch import interpreting
from ops.precision import state_dtype
from ops.segments import marks
from ops.selective_scan import triton_kernels as kernels

CHUNK = 64  # tokens between two stored states
BLOCKS = (64, 32, 16, 8)  # channels a program takes
forced_block: int | None = None  # tests set it, to try each of BLOCKS
_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


def triton_scan(
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
    keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)
    y, final, _ = _forward_op(*inputs, None if segments is None else marks(segments), keep)
    return y, final


def _options(batch: int, channels: int, n: int, dtype: torch.dtype, **given: Tensor | None) -> dict[str, Any]:
    """The constants of a kernel: its block, and which of the optional tensors there are.

    As many channels to a program as leave several programs for each of a large GPU's processors, and the states in
    registers: eight to a thread.
    """
    states = triton.next_power_of_2(n)
    if interpreting():
        block = BLOCKS[0]  # the interpreter's time is the number of programs
    else:
        block = next((each for each in BLOCKS if batch * -(-channels // each) >= 512), BLOCKS[-1])
        block = max(1, min(block, 2048 // states))
    block = forced_block or block
    flags = {f"HAS_{name}": each is not None for name, each in given.items()}
    constants = {"ACC": _ACC[dtype], "CHUNK": CHUNK, "BLOCK": block, "STATES": states}
    return flags | constants | {"num_warps": min(8, max(1, block * states // 256))}


def _device(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _rows(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if each is None else each.contiguous() for each in tensors]


@torch.library.custom_op("zoo::selective_scan_triton", mutates_args=())
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
    y, final, boundary = _outputs(x, dt, A, B, C, D, z, initial, mark, keep)
    batch, time, channels = x.shape
    options = _options(batch, channels, A.shape[1], final.dtype, D=D, Z=z, INITIAL=initial, MARK=mark)
    options["KEEP"] = keep
    arguments: list[Any] = [*_rows(x, dt, A, B, C, D, z, initial, mark), y, final, boundary, time, channels, A.shape[1]]
    with _device(x):
        kernels.forward[(batch, triton.cdiv(channels, options["BLOCK"]))](*arguments, **options)
    return y, final, boundary


@_forward_op.register_fake
def _outputs(x, dt, A, B, C, D, z, initial, mark, keep):
    dtype = state_dtype(x, dt, A, B, C, D, z, initial)
    batch, time, channels = x.shape
    chunks = -(-time // CHUNK) if keep else 0
    final = x.new_empty(batch, channels, A.shape[1], dtype=dtype)
    return x.new_empty(x.shape), final, x.new_empty(batch, chunks, channels, A.shape[1], dtype=dtype)


@torch.library.custom_op("zoo::selective_scan_triton_backward", mutates_args=())
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
    batch, time, channels = x.shape
    n = A.shape[1]
    options = _options(batch, channels, n, boundary.dtype, D=D, Z=z, FINAL=dfinal, MARK=mark)
    blocks = triton.cdiv(channels, options["BLOCK"])
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dA, dD = boundary.new_empty(batch, channels, n), boundary.new_empty(batch, channels)
    dB, dC = boundary.new_empty(blocks, batch, time, n), boundary.new_empty(blocks, batch, time, n)
    dz = boundary.new_empty(0, 0, 0) if z is None else z.new_empty(z.shape)
    dinitial = boundary.new_empty(batch, channels, n)
    scratch = boundary.new_empty(batch, CHUNK, channels, n)
    arguments: list[Any] = _rows(x, dt, A, B, C, D, z, mark, boundary, dy, dfinal)
    arguments += [scratch, dx, ddt, dA, dB, dC, dD, dz, dinitial, batch, time, channels, n]
    with _device(x):
        kernels.backward[(batch, blocks)](*arguments, **options)
    dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
    dD = dD.sum(0) if D is None else dD.sum(0).to(D.dtype)
    return dx, ddt, dA.sum(0).to(A.dtype), dB, dC, dD, dz, dinitial


@_backward_op.register_fake
def _(x, dt, A, B, C, D, z, mark, boundary, dy, dfinal):
    state = boundary.new_empty(x.shape[0], x.shape[2], A.shape[1])
    dD = boundary.new_empty(x.shape[2], dtype=boundary.dtype if D is None else D.dtype)
    dz = boundary.new_empty(0, 0, 0) if z is None else z.new_empty(z.shape)
    return (*(each.new_empty(each.shape) for each in (x, dt, A, B, C)), dD, dz, state)


def _setup(ctx, inputs, output):
    x, dt, A, B, C, D, z, initial, mark, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.initial_dtype = None if initial is None else initial.dtype
    ctx.save_for_backward(x, dt, A, B, C, D, z, mark, output[2])


def _backward(ctx, dy, dfinal, dboundary):
    x, dt, A, B, C, D, z, mark, boundary = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddt, dA, dB, dC, dD, dz, dinitial = _backward_op(x, dt, A, B, C, D, z, mark, boundary, dy, dfinal)
    dD, dz = None if D is None else dD, None if z is None else dz
    dinitial = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
    return dx, ddt, dA, dB, dC, dD, dz, dinitial, None, None


torch.library.register_autograd(_forward_op, _backward, setup_context=_setup)
