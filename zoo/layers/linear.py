"""The linear map that blocks are made of."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ops.linear import linear


class Linear(nn.Linear):
    """nn.Linear, by `ops.linear` where no gradient is wanted: on a CPU decoding is as fast as weights are read."""

    def forward(self, input: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        if torch.is_grad_enabled() or not input.is_cpu:
            return nn.functional.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)
