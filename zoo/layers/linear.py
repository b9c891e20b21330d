"""The linear map that blocks are made of."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ops.linear import linear
from zoo.layers.wide import WideLinear


class Linear(nn.Linear):
    """nn.Linear, by `ops.linear` where no gradient is wanted: on a CPU decoding is as fast as weights are read."""

    def forward(self, input: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        if torch.is_grad_enabled() or not input.is_cpu:
            return nn.functional.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def plain(*linears: nn.Module, wide: Sequence[nn.Module] = ()) -> bool:
    """Whether these are maps of this class (of WideLinear) and nothing more: no adapters, no hooks. Then a step in one
    compiled call (`ops.step`) may read their weights by itself."""
    for kind, each in [*((Linear, one) for one in linears), *((WideLinear, one) for one in wide)]:
        if type(each) is not kind or each._forward_hooks or each._forward_pre_hooks:
            return False
    return True
