"""The product as it is written."""

import torch
from jaxtyping import Float
from torch import Tensor


def linear(
    x: Float[Tensor, "*rows inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> Float[Tensor, "*rows outputs"]:
    """y_o = Σ_i W_oi x_i + b_o."""
    y = torch.einsum("...i, oi -> ...o", x, weight)
    return y if bias is None else y + bias
