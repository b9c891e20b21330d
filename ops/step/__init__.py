"""One token of a whole block in one compiled call, on the CPU: what decoding takes where it can.

A block of a model that decodes on a CPU spends microseconds on arithmetic besides reading its weights, and several
times as many on calling one operation after another. Each file here holds what one kind of block does with one token,
as a numba kernel: the same numbers as the block's own way, which remains the reference.

`takes` says whether a call may go this way; all it asks for can be seen without reading a number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ops import dispatch
from ops.precision import autocasting


class Around(NamedTuple):
    """What stands around a block: y = skip · x + scale · f(norm(x)).

    The norm is x / sqrt(mean(x²) + eps) · (centre + weight), after the mean has been taken away if `bias` is given,
    which is added. No weight: no norm.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    centre: float = 0.0
    skip: float = 0.0
    scale: float = 1.0


BARE = Around()
MOST = 4  # rows: with more, a product of matrices reads the weights once for all


def takes(x: Tensor, weights: Sequence[Tensor | None]) -> bool:
    """Whether x [batch, 1, width] is one token of up to 4 rows in plain float32 on the CPU, and the weights are too,
    contiguous, with nothing that wants a gradient, watches operations or compiles them; and numba is there."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _numba():
        return False
    if x.ndim != 3 or x.shape[1] != 1 or not 0 < x.shape[0] <= MOST or dispatch.preferred() not in (None, "native"):
        return False
    for each in (x, *weights):
        if each is None:
            continue
        if type(each) not in (Tensor, torch.nn.Parameter) or each.dtype != torch.float32 or not each.is_cpu:
            return False
        if each is not x and not each.is_contiguous():
            return False
    return _get_current_dispatch_mode() is None and not autocasting(x.device)


def holds(leaf: Tensor, *shape: int) -> bool:
    """Whether a state's leaf is float32 on the CPU and of this shape."""
    return leaf.shape == shape and leaf.dtype == torch.float32 and leaf.is_cpu


_found: bool | None = None


def _numba() -> bool:
    global _found
    if _found is None:
        try:
            import numba  # noqa: F401

            _found = True
        except ImportError:
            _found = False
    return _found
