"""A linear map whose bias keeps its digits."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class WideLinear(nn.Linear):
    """y = x Wᵀ in the precision of x, plus b in float32 at least, where y then stays; without b as nn.Linear.

    For what stands in an exponent or before a sigmoid: bfloat16's 8 bits of the sum would be 8 bits of a decay over
    many tokens, and a bias of 10 would be off by 3 %. A call of the module, so that what wraps one (LoRA) takes part.
    """

    def forward(self, input: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        y = nn.functional.linear(input, self.weight.to(input.dtype))
        if self.bias is None:
            return y
        wide = torch.promote_types(y.dtype, torch.float32)
        return y.to(wide) + self.bias.to(wide)
