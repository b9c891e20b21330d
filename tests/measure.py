"""What the laws measure with: inputs, chunked runs, gradients, padded layouts, and how near is near enough."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ops.dispatch import Op
from zoo.block import Block

BATCH, TIME, WIDTH = 3, 37, 24
LENGTHS = (37, 30, 23)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2}


def inputs(dtype: torch.dtype, time: int = TIME, batch: int = BATCH, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, what: str, scale: float = 1.0) -> None:
    tolerance = scale * TOLERANCE[dtype]
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    assert torch.isfinite(found).all(), f"{what}: not finite"
    size = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    error = (found.double() - wanted.double()).abs().max().item() / size if wanted.numel() else 0.0
    assert error <= tolerance, f"{what}: differs by {error:.3g} of the largest value, allowed {tolerance:.3g}"


def run_chunks(block: Block, x: Tensor, sizes: list[int], segments: Tensor | None = None):
    """The outputs of a sequence fed in chunks, and the last state."""
    state, outputs, start = block.init_state(len(x), dtype=x.dtype), [], 0
    for size in sizes:
        part = slice(start, start + size)
        y, state, _ = block(x[:, part], state, None if segments is None else segments[:, part])
        outputs.append(y)
        start += size
    assert start == x.shape[1]
    return torch.cat(outputs, 1), state


def gradients(block: Block, x: Tensor, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of run(x), with respect to x and every parameter."""
    x = x.detach().clone().requires_grad_()
    y = run(x)
    direction = torch.linspace(-1, 1, y[0].numel(), dtype=torch.float64).reshape(y[0].shape).cos().to(y.dtype)
    names = ["x", *(name for name, _ in block.named_parameters())]
    tensors = [x, *block.parameters()]
    found = torch.autograd.grad((y * direction).sum(), tensors, allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for n, t, g in zip(names, tensors, found, strict=True)}


def same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype, what: str) -> None:
    for name in wanted:
        close(found[name], wanted[name], dtype, f"{what}: gradient of {name}", scale=10)


def place(x: Tensor, where: str, garbage: float = float("nan")) -> tuple[Tensor, Tensor]:
    """Rows cut to LENGTHS, with padding (full of garbage) on the left, on the right or between tokens."""
    total = TIME + 8
    padded = torch.full((len(x), total, x.shape[-1]), garbage, dtype=x.dtype)
    segments = torch.zeros(len(x), total, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        if where == "left":
            index = torch.arange(total - length, total)
        elif where == "right":
            index = torch.arange(length)
        else:
            index = torch.randperm(total, generator=torch.Generator().manual_seed(row))[:length].sort().values
        padded[row, index] = x[row, :length]
        segments[row, index] = 1
    return padded, segments


@contextlib.contextmanager
def implementations_met() -> Iterator[set[str]]:
    """The names of all implementations of the ops that are called inside; but of those of which every block is made and
    which have tests of their own."""
    met: set[str] = set()
    plan = Op.plan

    def noted(self: Op, *arguments: Any) -> Any:
        if self.name not in ("linear", "rms_norm", "gated", "gated_norm", "token_mix", "relu2"):
            met.update(self.names)
        return plan(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "plan", noted)
        yield met


class Operations(TorchDispatchMode):
    """Counts arithmetic and numbers written: 5/2 n log n for a real transform of n, 2 for a multiply-add of a matrix
    product, else one for each number of an output that is not a view."""

    count = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        mine = {
            each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        for each in tree_leaves(out):
            if not isinstance(each, torch.Tensor) or not each.numel():
                continue
            if name.startswith("_fft"):
                real = each if name == "_fft_c2r" else args[0]
                n = real.shape[args[1][0]]
                self.count += 2.5 * real.numel() * math.log2(n)
            elif name in ("mm", "addmm", "bmm"):
                self.count += 2 * each.numel() * args[-2 if name != "addmm" else 1].shape[-1]
            elif func._schema.is_mutable or each.untyped_storage().data_ptr() not in mine:
                self.count += each.numel()
        return out
