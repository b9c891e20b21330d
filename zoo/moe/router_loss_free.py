"""Balance without a loss: a bias for each expert, moved after every step, helps to choose (Wang et al., 2408.15664;
DeepSeek-V3, 2412.19437)."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.layers.checks import number
from zoo.moe.routers import Router, Routing, check_groups, within_groups

SCORES = ("sigmoid", "softmax")
BEST = 2  # experts of a group by which it is ranked


class LossFree(Router):
    """The top_k experts of largest s_e + b_e are chosen, and s_e weighs: s = sigmoid(W x).

    After each optimizer step b_e ← b_e + update_rate · sign(mean count − count of e) (2408.15664, algorithm 1), with
    the counts over all micro-batches and ranks of the step. b has no gradient and never weighs. Needs no load-balancing
    loss (`load_balance=0.0` in the block). Without `LanguageModel.after_step` b stays as it is.

    Options:
    - `scores`: "sigmoid" or "softmax", of the logits.
    - `update_rate`: u of the paper; 0.0 holds the bias.
    - `renormalise`: divide the top_k weights by their sum (DeepSeek-V3).
    - `groups`, `top_groups`: experts stand in `groups` of equal size, and a token chooses among those of its
      `top_groups` best, ranked by the sum of the two largest s + b in each (DeepSeek-V3: 8 and 4).
    - `scale`: factor on the weights (DeepSeek-V3: routed_scaling_factor, 2.5).
    """

    bias: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        *,
        scores: str = "sigmoid",
        update_rate: float = 0.001,
        renormalise: bool = False,
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
    ):
        super().__init__(width, experts, top_k)
        if scores not in SCORES:
            raise ValueError(f"scores={scores!r} is unknown; choose from {', '.join(SCORES)}")
        if number("update_rate", update_rate) < 0:
            raise ValueError(f"update_rate={update_rate!r} must not be negative; 0.0 holds the bias")
        if number("scale", scale) <= 0:
            raise ValueError(f"scale={scale!r} must be positive")
        check_groups(experts, top_k, groups, top_groups, BEST)
        self.scores, self.update_rate, self.renormalise = scores, update_rate, renormalise
        self.groups, self.top_groups, self.scale = groups, top_groups, scale
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("bias", torch.zeros(experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear's by variance: normal with standard deviation 1/sqrt(3 width); the bias starts at zero."""
        nn.init.normal_(self.weight, std=(3 * self.width) ** -0.5)
        nn.init.zeros_(self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to` and its like. The bias stays in float32 at least: bfloat16 would round its small moves away."""
        before = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype.itemsize < 4:
            self.bias = before.to(self.bias.device)
        return self

    def forward(
        self, x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Routing:
        logits = self.logits(x, self.weight)
        probabilities = logits.softmax(-1)
        scores = probabilities
        if self.scores == "sigmoid":
            scores = logits.sigmoid()
            probabilities = scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        ranking = within_groups(scores.detach() + self.bias, self.groups, self.top_groups, BEST)
        chosen = ranking.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        weights = self.scale * weights
        chosen, weights = self.skip_padding(chosen, weights, segments)
        return Routing(chosen, weights, chosen, logits, probabilities, {})

    def after_step(self, step: int, sums: Mapping[str, Tensor]) -> None:
        counts = sums.get("sum/choices")
        if counts is None:
            if self.training:
                raise ValueError(
                    "the router loss_free got no counts of the step's choices; add up each forward's aux with "
                    "zoo.block.add_sums and pass the result to after_step"
                )
            return  # held in eval mode while others train
        # In integers: below, at or above the mean is then exact, and the same on every rank and device.
        self.bias += self.update_rate * (counts.sum() - self.experts * counts).sign()
