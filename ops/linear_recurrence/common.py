"""What the implementations share."""

import torch
from jaxtyping import Inexact, Int, UInt8
from torch import Tensor

from ops.precision import state_dtype
from ops.segments import marks


def prepare(
    x: Inexact[Tensor, "batch time channels"],
    a: Inexact[Tensor, "..."],
    initial_state: Inexact[Tensor, "batch channels"] | None,
    segments: Int[Tensor, "batch time"] | None,
) -> tuple[Tensor, Tensor, Tensor | None, UInt8[Tensor, "batch time"] | None]:
    """x, a as [batch, time, channels] or [1, 1, channels] and the state, all in the states' dtype; `marks`."""
    dtype = state_dtype(x, a, initial_state)
    return (
        x.to(dtype),
        (a if a.ndim == 3 else a[None, None]).to(dtype),
        None if initial_state is None else initial_state.to(dtype),
        None if segments is None else marks(segments),
    )


def silence(
    h: Inexact[Tensor, "batch time channels"], mark: UInt8[Tensor, "batch time"] | None, dtype: torch.dtype
) -> Inexact[Tensor, "batch time channels"]:
    """The outputs, of states that padding leaves as they are: zeros there, in the inputs' dtype."""
    return (h if mark is None else torch.where((mark != 0)[..., None], h, 0)).to(dtype)
