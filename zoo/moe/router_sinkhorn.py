"""While training, tokens are dealt to experts evenly by Sinkhorn's iteration (Clark et al., 2202.01169;
BlackMamba, 2402.01771)."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.block import tag
from zoo.layers.checks import integer, number
from zoo.moe.routers import Router, Routing


def sinkhorn(
    scores: Float[Tensor, "tokens experts"], valid: Bool[Tensor, " tokens"] | None = None, iterations: int = 8
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " experts"]]:
    """Logarithms f, g of the factors that make exp(f_t + g_e + scores_te) a fair plan: each of the N valid tokens
    holds 1/N of it in sum and each of the E experts 1/E.

    Starts at g_e = -log(E · Σ_t exp(scores_te)), which is near the answer (2402.01771), then takes turns: f makes the
    tokens' sums equal, g the experts'. The last turn is g's, so experts' sums are exact after any number of iterations
    and tokens' sums approach 1/N. Tokens not valid have f = -inf, and no part in any sum.

    In logarithms no score overflows. The number of iterations is fixed: asking whether they have converged would make
    the host wait for the device at each. O(iterations · N · E).
    """
    tokens, experts = scores.shape
    floor = torch.finfo(scores.dtype).min  # where no token is valid, a sum of nothing stays finite
    f = scores.new_zeros(tokens)
    g = scores.new_zeros(experts)
    for turn in range(iterations + 1):
        if turn:
            f = -(scores + g).logsumexp(1)  # less log N, which g would add again
        if valid is not None:
            f = torch.where(valid, f, -math.inf)
        g = -math.log(experts) - (scores + f[:, None]).logsumexp(0).clamp_min(floor)
    return f, g


class Sinkhorn(Router):
    """weight_e = sigmoid(logit_e) of the one expert chosen: the largest logit, or while training the largest share of
    a plan that gives every expert as many tokens.

    That plan is made of exp(sharpness · logits) of all valid tokens of the call by `sinkhorn`. So while training the
    choice of a token (not its weight) depends on all tokens of the batch, later ones and other documents too, as in
    the published models; no gradient flows that way. In eval mode a token looks at itself alone: the plan is left out.
    Needs no load-balancing loss (`load_balance=0.0` in the block). With top_k > 1 (Megatron's form) the k largest are
    chosen, and the weights are softmax(logits), not renormalised.

    Options:
    - `sharpness`: factor on the logits in the plan; 2 in BlackMamba, 1 in Megatron.
    - `iterations`: of Sinkhorn's; tokens' sums are then right to 1e-4 for logits that spread by 1, later beyond.
    - `bias`: of the router's matrix, as in BlackMamba.
    """

    def __init__(
        self, width: int, experts: int, top_k: int, *, sharpness: float = 2.0, iterations: int = 8, bias: bool = True
    ):
        super().__init__(width, experts, top_k)
        if number("sharpness", sharpness) <= 0:
            raise ValueError(f"sharpness={sharpness!r} must be positive")
        self.sharpness, self.iterations = sharpness, integer("iterations", iterations)
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.bias = nn.Parameter(torch.empty(experts)) if bias else None
        if bias:
            tag(self, "bias", weight_decay=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear's by variance: normal with standard deviation 1/sqrt(3 width); the bias starts at zero."""
        nn.init.normal_(self.weight, std=(3 * self.width) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Routing:
        logits = self.logits(x, self.weight)
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        valid = None if segments is None else (segments != 0).reshape(-1)
        ranking = logits.detach()
        if self.training:  # a token's own factor f changes nothing about which of its experts is best
            ranking = ranking + sinkhorn(self.sharpness * ranking, valid, self.iterations)[1] / self.sharpness
        chosen = ranking.topk(self.top_k, dim=-1).indices
        probabilities = logits.softmax(-1)
        weights = (logits.sigmoid() if self.top_k == 1 else probabilities).gather(1, chosen)
        chosen, weights = self.skip_padding(chosen, weights, segments)
        return Routing(chosen, weights, chosen, logits, probabilities, {})
