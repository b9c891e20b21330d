"""One token of a whole block in one compiled call, on the CPU: what decoding takes where it can.

A block of a model that decodes on a CPU spends microseconds on arithmetic besides reading its weights, and several
times as many on calling one operation after another. Each file here holds what one kind of block does with one token,
as a numba kernel: the same numbers as the block's own way, which remains the reference. A file's function binds the
block's weights, and what it returns takes a token and the state: looking the weights up again for every token took
longer than all the rest.

`fits` says whether weights may be bound, `takes` whether a call may go this way; all that they ask for can be seen
without reading a number.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ops import dispatch


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


def fits(*weights: Tensor | None) -> bool:
    """Whether weights (None: there is none) are plain contiguous float32 on the CPU, and numba is there."""
    return _numba() and all(
        type(each) in (Tensor, torch.nn.Parameter)
        and each.dtype == torch.float32
        and each.is_cpu
        and each.is_contiguous()
        for each in weights
        if each is not None
    )


def takes(x: Tensor, width: int) -> bool:
    """Whether x is one token [batch, 1, width] of up to 4 rows in plain float32 on the CPU, with nothing that wants a
    gradient, watches operations or compiles them."""
    shape = x.shape
    return (
        len(shape) == 3
        and shape[1] == 1
        and shape[2] == width
        and 0 < shape[0] <= MOST
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dtype == torch.float32
        and x.is_cpu
        and not x.requires_grad
        and dispatch.preferred() in (None, "native")
        and not torch.is_autocast_enabled("cpu")
        and _get_current_dispatch_mode() is None
    )


def holds(leaf: Tensor, *shape: int) -> bool:
    """Whether a state's leaf is float32 on the CPU and of this shape."""
    return leaf.shape == shape and leaf.dtype == torch.float32 and leaf.is_cpu and not leaf.requires_grad


def rows(leaf: Tensor) -> np.ndarray:
    """An activation or a state's leaf, contiguous, as a kernel reads it."""
    return leaf.contiguous().numpy()


def fresh(*shape: int) -> tuple[Tensor, np.ndarray]:
    """A new tensor, and the same for a kernel to write."""
    made = np.empty(shape, np.float32)
    return torch.from_numpy(made), made


def _numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True
