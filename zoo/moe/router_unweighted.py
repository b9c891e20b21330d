"""The top_k experts of largest score, each with weight 1: what MoEfication needs (Zhang et al., 2110.01786)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.moe.routers import Router, Routing


class Unweighted(Router):
    """y is the plain sum of the top_k experts of largest W x + b, so all experts together are one dense layer.

    For experts that are parts of a layer, not alternatives to one another. Weights of 1 carry no gradient to W and b:
    they are buffers, set by `zoo.convert.moefy`, and never trained; set `load_balance=0.0` in the block. top_k is free
    to choose at any time, by the attribute `top_k` or in the configuration. No options.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__(width, experts, top_k)
        self.register_buffer("weight", torch.empty(experts, width))
        self.register_buffer("bias", torch.zeros(experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W as nn.Linear's by variance, b = 0."""
        torch.nn.init.normal_(self.weight, std=(3 * self.width) ** -0.5)
        torch.nn.init.zeros_(self.bias)

    def flops_per_token(self) -> int:
        return 2 * self.weight.numel()

    def forward(
        self, x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Routing:
        logits = self.logits(x, self.weight)
        logits = logits + self.bias.to(logits.dtype)
        chosen = logits.topk(self.top_k, dim=-1).indices
        weights = torch.ones_like(chosen, dtype=logits.dtype)
        chosen, weights = self.skip_padding(chosen, weights, segments)
        return Routing(chosen, weights, chosen, logits, logits.softmax(-1), {})
