"""A fixed random router, and more and more experts a token (SMoE-Dropout, Chen et al., 2303.01610)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.layers.checks import integer
from zoo.moe.routers import Routing, Scheduled


class SMoEDropout(Scheduled):
    """The k experts of largest logit W x + b, weighed by the softmax over those k; W and b are random and never change.

    While training k grows from top_k to all experts: k = top_k + round((experts − top_k) · done / steps), where `done`
    counts optimizer steps. So each expert learns to be one of few and one of many, and when the model is used k is free
    to choose: fewer for speed, more for quality. (In the authors' code the softmax is over the chosen k, as here.)

    No gradient reaches a router that is fixed, so a load-balancing loss would only push x: set `load_balance=0.0` in
    the block. Without `LanguageModel.after_step` k stays at top_k. A compiled model compiles again for each new k: let
    `torch._dynamo.config.recompile_limit` be above experts − top_k.

    Options:
    - `steps`: optimizer steps until all experts are used.
    - `eval_top_k`: k in eval mode, an attribute that may be set at any time; None: as many as in training by now.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, experts: int, top_k: int, *, steps: int = 10000, eval_top_k: int | None = None):
        super().__init__(width, experts, top_k)
        self.steps = integer("steps", steps)
        self.eval_top_k = eval_top_k
        self.register_buffer("weight", torch.empty(experts, width))
        self.register_buffer("bias", torch.empty(experts))
        self.reset_parameters()
        self.schedule(0)

    @property
    def eval_top_k(self) -> int | None:
        return self._eval_top_k

    @eval_top_k.setter
    def eval_top_k(self, value: int | None) -> None:
        if value is not None and integer("eval_top_k", value) > self.experts:
            raise ValueError(f"eval_top_k={value} must be between 1 and experts={self.experts}, or None")
        self._eval_top_k = value

    def reset_parameters(self) -> None:
        """As nn.Linear's."""
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def schedule(self, done: int) -> None:
        grown = round((self.experts - self.top_k) * done / self.steps)
        self.train_top_k = min(self.top_k + grown, self.experts)

    @property
    def visits(self) -> int:
        if self.training or self.eval_top_k is None:
            return self.train_top_k
        return self.eval_top_k

    def flops_per_token(self) -> int:
        return 2 * self.weight.numel()  # not a parameter

    def forward(
        self, x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Routing:
        logits = self.logits(x, self.weight)
        logits = logits + self.bias.to(logits.dtype)
        best, chosen = logits.topk(self.visits, dim=-1)
        weights = best.softmax(-1)
        chosen, weights = self.skip_padding(chosen, weights, segments)
        return Routing(chosen, weights, chosen, logits, logits.softmax(-1), {})
