"""Initial values of matrices that torch.nn.init has not."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def orthogonal_(weight: Tensor, gain: float = 1.0) -> None:
    """Fill `weight` with a random (semi-)orthogonal matrix times `gain`, whatever its dtype.

    Made in float32 at least: torch's own has no decomposition for bfloat16.
    """
    made = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    weight.copy_(nn.init.orthogonal_(made, gain))
