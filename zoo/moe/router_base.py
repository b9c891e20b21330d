"""While training, tokens are dealt to experts by the best balanced assignment (BASE layers, 2103.16716)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.moe.routers import Router, Routing

PRECISION = 1e-6  # of the assignment's mean score, relative to the largest difference between a token's scores
COARSEST, FINER = 0.25, 5.0  # the first phase's step, relative to the same, and how much finer each next one is
LARGEST = 1e300  # scores are held within this, so that their differences are finite


def balanced_sizes(first: Int[Tensor, " tokens"], experts: int) -> Int[Tensor, " experts"]:
    """How many of N tokens each expert gets: N / E, and where E does not divide N, one more for the N mod E experts
    that most tokens want `first`. (Between equals, the one of lower number.)"""
    each, rest = divmod(first.numel(), experts)
    wanted = torch.bincount(first, minlength=experts).argsort(descending=True, stable=True)
    sizes = torch.full((experts,), each, device=first.device)
    sizes[wanted[:rest]] += 1
    return sizes


def assign(
    scores: Float[Tensor, "tokens experts"], sizes: Int[Tensor, " experts"], precision: float = PRECISION
) -> Int[Tensor, " tokens"]:
    """An expert for each token, `sizes[e]` tokens (all in sum) to expert e, that maximises Σ_t scores[t, expert_t].

    Bertsekas's auction, all tokens at once: each token without an expert bids for the one of largest score less price.
    It bids so much that the second best would be as good for it, and ε more. An expert keeps its `sizes[e]` highest
    bidders; once it has so many its price is the lowest bid it keeps. Prices only rise, by ε at least where a bidder
    is turned away, so it ends; and then no token is more than ε short of its best at these prices, so the sum is within
    tokens · ε of the largest. It is run with smaller and smaller ε, each time from the last prices, down to
    `precision` times the largest difference between a token's scores; most often the sum is then the largest itself.

    In float64; NaN counts as 0. O(tokens · (experts + log tokens)) a round, tens of rounds for 8 experts, up to about a
    thousand for 64. The host waits for the device in each round.
    """
    (open_to,) = sizes.nonzero(as_tuple=True)
    if open_to.numel() < 2:  # nothing to choose, and no second best
        return open_to.expand(len(scores)).clone()
    values = scores[:, open_to].double().nan_to_num(0.0).clamp(-LARGEST, LARGEST)
    values = values - values.amax(1, keepdim=True)
    values = values / (-values.min()).clamp_min(1 / LARGEST)
    prices, step = values.new_zeros(open_to.numel()), COARSEST
    while True:
        expert, prices = auction(values, sizes[open_to], prices, max(step, precision))
        if step <= precision:
            return open_to[expert]
        step /= FINER


def auction(
    values: Float[Tensor, "tokens experts"],
    sizes: Int[Tensor, " experts"],
    start: Float[Tensor, " experts"],
    step: float,
) -> tuple[Int[Tensor, " tokens"], Float[Tensor, " experts"]]:
    """One auction from the prices `start`, with bids raised by `step`: each token's expert, and the last prices."""
    tokens, experts = values.shape
    place = torch.arange(tokens, device=values.device)
    expert = torch.full((tokens,), experts, device=values.device)  # that number: none yet
    bid = values.new_full((tokens,), -torch.inf)
    prices = start
    while True:
        (free,) = (expert == experts).nonzero(as_tuple=True)
        if not free.numel():
            return expert, prices
        (best, second), (wanted, _) = (each.unbind(1) for each in (values[free] - prices).topk(2, dim=1))
        expert[free] = wanted
        bid[free] = prices[wanted] + (best - second) + step
        # A bid's rank at its expert: its place in a sort by expert of what is sorted by bid.
        order = bid.argsort(descending=True, stable=True)
        order = order[expert[order].argsort(stable=True)]
        at = expert[order]
        bids = torch.bincount(expert, minlength=experts)
        turned_away = order[place - (bids.cumsum(0) - bids)[at] >= sizes[at]]
        lowest = bid.index_fill(0, turned_away, torch.inf)
        lowest = torch.full_like(start, torch.inf).scatter_reduce(0, expert, lowest, "amin")
        prices = torch.where(bids >= sizes, lowest, start)
        expert[turned_away], bid[turned_away] = experts, -torch.inf


@torch.library.custom_op("zoo::balanced_assignment", mutates_args=())
def balanced_assignment(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Int[tokens]: `assign` of the valid tokens to experts of `balanced_sizes`; the number of experts at the others.

    An operator of its own, because torch.compile cannot follow a loop that runs until all have an expert.
    """
    experts = scores.shape[1]
    kept = scores if valid is None else scores[valid]
    chosen = assign(kept, balanced_sizes(kept.argmax(1), experts))
    if valid is None:
        return chosen
    found = torch.full((len(scores),), experts, device=scores.device)
    found[valid] = chosen
    return found


@balanced_assignment.register_fake
def _(scores: Tensor, valid: Tensor | None) -> Tensor:
    return scores.new_empty(len(scores), dtype=torch.int64)


class Base(Router):
    """weight_e = sigmoid(logit_e) of the one expert chosen: the largest logit, or while training the one that the
    assignment of largest Σ_t logit_t gives the token, with as many tokens for each expert (2103.16716, eq. 1-3).

    Each of E experts gets exactly 1/E of the call's valid tokens; where E does not divide them, sizes differ by one
    (see `balanced_sizes`). So while training the choice of a token (not its weight) depends on all tokens of the
    batch, later ones and other documents too, as published; no gradient flows that way. In eval mode a token looks at
    itself alone. Each process assigns its own tokens: the shuffle between processes that the paper puts before the
    assignment is left to the data loader. Needs no load-balancing loss (`load_balance=0.0` in the block).

    Takes top_k=1. The residual of eq. 2 is the model's. Cost while training: see `assign`.
    """

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__(width, experts, top_k)
        if top_k != 1:
            raise ValueError(f"top_k={top_k}, but base gives each token one expert; use top_k=1")
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear's by variance: normal with standard deviation 1/sqrt(3 width)."""
        nn.init.normal_(self.weight, std=(3 * self.width) ** -0.5)

    def forward(
        self, x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Routing:
        logits = self.logits(x, self.weight)
        valid: Bool[Tensor, " tokens"] | None = None if segments is None else (segments != 0).reshape(-1)
        if self.training:
            chosen = balanced_assignment(logits.detach(), valid)
        else:
            chosen = logits.argmax(1)
            chosen = chosen if valid is None else torch.where(valid, chosen, self.experts)
        weights = logits.sigmoid().gather(1, chosen.clamp_max(self.experts - 1)[:, None])
        weights = torch.where(chosen[:, None] < self.experts, weights, 0.0)
        return Routing(chosen[:, None], weights, chosen[:, None], logits, logits.softmax(-1), {})
