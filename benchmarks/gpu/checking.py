"""Before a row is timed: the values and gradients of the very call that will be timed, against the reference.

The call runs at its full shape, so with the grid, the blocks and the configuration that autotuning chose for it. The
reference, too slow for that size, computes a part: the first tokens (or the last, behind a window) of the last row and
the last heads or channels. The loss of the full call reads that part of the output alone, so its gradients are those
of the part. Memory that nothing wrote holds NaN.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # name -> found, wanted
# Relative to the norm of what is wanted. Sums of bfloat16 products lie between 1e-3 and 1e-2, their gradients above.
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 2e-3, torch.float64: 1e-9}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is filled with NaN (deterministic algorithms ask for that)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore[reportAttributeAccessIssue]


def same(dims: str, *names: str) -> dict[str, str]:
    """The same dimensions for several tensors."""
    return dict.fromkeys(names, dims)


class Part(NamedTuple):
    """The part that is compared. `dims` names the dimensions of each input, and of each output under "out" ("out0",
    "out1" for several). `window`: tokens before the compared ones that are needed, which are then the last."""

    dims: Mapping[str, str]
    reference: Callable[..., Any]  # takes the inputs of the part by name, in float64
    window: int | None = None
    tokens: int = 192
    rows: int = 1
    others: int = 2  # of heads
    channels: int = 32

    def cut(self, name: str, tensor: Tensor, *, output: bool = False) -> Tensor:
        for place, dim in enumerate(self.dims[name].split()):
            most = {"batch": self.rows, "heads": self.others, "channels": self.channels}.get(dim)
            size = tensor.shape[place]
            if most is not None:
                tensor = tensor.narrow(place, size - min(most, size), min(most, size))
            elif dim == "time" and self.window is None:
                tensor = tensor.narrow(place, 0, min(self.tokens, size))
            elif dim == "time":
                count = min(size, self.tokens + (0 if output else self.window or 0))
                tensor = tensor.narrow(place, size - count, count)
        return tensor


def pairs(run: Callable[..., Any], inputs: Mapping[str, Tensor], constants: tuple[str, ...], part: Part) -> Pairs:
    """Outputs and gradients of `run` at the full shape beside the reference's of the part."""
    leaves = {name: _leaf(each, name in constants) for name, each in inputs.items()}
    outputs = _several(run(**leaves))
    wide = {name: _leaf(_wide(part.cut(name, each)).contiguous(), name in constants) for name, each in inputs.items()}
    wanted = _several(part.reference(**wide))
    names = ["out"] if len(outputs) == 1 else [f"out{place}" for place in range(len(outputs))]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, mine, theirs in zip(names, outputs, wanted, strict=True):
        theirs = part.cut(name, theirs, output=True)
        found[name] = part.cut(name, mine, output=True), theirs
    if outputs[0].requires_grad:
        mine, theirs = found[names[0]]
        direction = torch.randn_like(theirs)
        full = torch.zeros_like(outputs[0])
        part.cut(names[0], full, output=True).copy_(direction)
        wrt = [name for name, each in leaves.items() if each.requires_grad]
        got = torch.autograd.grad(outputs[0], [leaves[name] for name in wrt], full)
        exact = torch.autograd.grad(theirs, [wide[name] for name in wrt], direction)
        found |= {f"d{name}": (part.cut(name, a), b) for name, a, b in zip(wrt, got, exact, strict=True)}
    return found


def values(output: Any, inputs: Mapping[str, Tensor], part: Part) -> Pairs:
    """What a peer made of the inputs beside the reference's: whether it computes the same."""
    outputs = _several(output)
    wanted = _several(part.reference(**{name: _wide(part.cut(name, each)) for name, each in inputs.items()}))
    names = ["out"] if len(outputs) == 1 else [f"out{place}" for place in range(len(outputs))]
    cut = (
        (part.cut(n, a, output=True), part.cut(n, b, output=True))
        for n, a, b in zip(names, outputs, wanted, strict=True)
    )
    return dict(zip(names, cut, strict=True))


def errors(found: Pairs) -> dict[str, float]:
    """|found - wanted| / |wanted| of each; infinite where something is not finite."""
    result = {}
    for name, (mine, theirs) in found.items():
        off = (mine.detach().double() - theirs.detach().double()).norm() / theirs.detach().double().norm().clamp_min(
            1e-30
        )
        result[name] = off.item() if torch.isfinite(off) else float("inf")
    return result


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def _leaf(tensor: Tensor, constant: bool) -> Tensor:
    leaf = tensor.detach()
    return leaf if constant or not leaf.is_floating_point() else leaf.requires_grad_()
