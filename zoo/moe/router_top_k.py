"""Each token visits the top_k experts of largest logit (Shazeer et al., 1701.06538; GShard, 2006.16668; Switch,
2101.03961; GLaM, 2112.06905; Mixtral, 2401.04088), with or without a capacity."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ops import segments as seg
from zoo.layers.checks import number
from zoo.moe.routers import Router, Routing, check_groups, within_groups

ORDERS = ("softmax_then_top_k", "top_k_then_softmax")
BEST = 1  # experts of a group by which it is ranked


class TopK(Router):
    """p = softmax(W x), the k largest are the weights; or softmax over the k largest logits alone.

    Options:
    - `order`: "softmax_then_top_k" (Switch, GShard, OLMoE, Qwen3-MoE) or "top_k_then_softmax" (Mixtral). The second
      is the first with `renormalise=True`.
    - `renormalise`: divide the k weights by their sum. None: yes for top_k > 1 (GShard, Mixtral, Qwen3-MoE); no for
      top_k = 1 (Switch), where the one weight would always be 1 and the router would get no gradient.
    - `jitter`: while training, the router (not the experts) sees x · U(1 − jitter, 1 + jitter) (Switch, section 2.4).
    - `random_second`: while training, the second of top_k=2 experts is visited with probability min(1, 2 · its share of
      the two weights) only, drawn for each token (GShard, algorithm 1). A choice not made is in no loss and no load.
    - `capacity_factor`: None drops no token. A number, while training, lets an expert take at most
      ceil(capacity_factor · tokens · top_k / experts) choices of each document (Switch, eq. 3; `tokens` are those of
      the document in this call, padding not counted). Choices are served in order of time, a token's better ones
      first, so a token is dropped because of earlier tokens only and rows of a batch do not compete. (GShard serves
      all first choices before any second one, which looks at later tokens.) Nothing is dropped in eval mode.
    - `groups`, `top_groups`: experts stand in `groups` of equal size, and a token chooses among those of its
      `top_groups` best, ranked by the largest p in each (DeepSeek-V2, 2405.04434, section 2.2.2: 8 and 3).
    - `scale`: factor on the weights (DeepSeek-V2: routed_scaling_factor, 16).
    """

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        *,
        order: str = "softmax_then_top_k",
        renormalise: bool | None = None,
        jitter: float = 0.0,
        random_second: bool = False,
        capacity_factor: float | None = None,
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
    ):
        super().__init__(width, experts, top_k)
        if order not in ORDERS:
            raise ValueError(f"order={order!r} is unknown; choose from {', '.join(ORDERS)}")
        if order == "top_k_then_softmax" and renormalise is False:
            raise ValueError(
                "renormalise=False has no meaning with order='top_k_then_softmax', whose weights sum to 1; "
                "use order='softmax_then_top_k' for weights that do not"
            )
        if not 0 <= number("jitter", jitter) < 1:
            raise ValueError(f"jitter={jitter!r} must be at least 0 and below 1")
        if random_second and top_k != 2:
            raise ValueError(f"random_second=True needs a second expert and no third; use top_k=2, not top_k={top_k}")
        if capacity_factor is not None and number("capacity_factor", capacity_factor) <= 0:
            raise ValueError(f"capacity_factor={capacity_factor!r} must be positive, or None to drop no token")
        if number("scale", scale) <= 0:
            raise ValueError(f"scale={scale!r} must be positive")
        check_groups(experts, top_k, groups, top_groups, BEST)
        self.order = order
        self.renormalise = top_k > 1 if renormalise is None else renormalise
        self.jitter, self.random_second, self.capacity_factor = jitter, random_second, capacity_factor
        self.groups, self.top_groups, self.scale = groups, top_groups, scale
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear's by variance: normal with standard deviation 1/sqrt(3 width)."""
        nn.init.normal_(self.weight, std=(3 * self.width) ** -0.5)

    def forward(
        self, x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Routing:
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = self.logits(x, self.weight)
        probabilities = logits.softmax(-1)
        if self.order == "softmax_then_top_k":
            weights, chosen = self._within_groups(probabilities).topk(self.top_k, dim=-1)
            if self.renormalise:
                weights = weights / weights.sum(-1, keepdim=True)
        else:
            best, chosen = self._within_groups(logits).topk(self.top_k, dim=-1)
            weights = best.softmax(-1)
        if self.scale != 1:
            weights = self.scale * weights
        if self.training and self.random_second:
            second = weights[:, 1].detach() / weights.detach().sum(-1)
            visited = torch.stack([torch.ones_like(second), 2 * second], 1) > torch.rand_like(second)[:, None]
            chosen, weights = torch.where(visited, chosen, self.experts), torch.where(visited, weights, 0.0)
        chosen, weights = self.skip_padding(chosen, weights, segments)
        experts = chosen
        if self.training and self.capacity_factor is not None:
            kept = self.within_capacity(chosen, x.shape[0], x.shape[1], segments)
            experts, weights = torch.where(kept, chosen, self.experts), torch.where(kept, weights, 0.0)
        return Routing(experts, weights, chosen, logits, probabilities, {})

    def _within_groups(self, ranking: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        return within_groups(ranking, self.groups, self.top_groups, BEST)

    def within_capacity(
        self, chosen: Int[Tensor, "tokens k"], batch: int, time: int, segments: Int[Tensor, "batch time"] | None
    ) -> Bool[Tensor, "tokens k"]:
        """Which choices find their expert not yet full. O(n log n) for n choices, no host synchronisation."""
        assert self.capacity_factor is not None
        k, device = chosen.shape[1], chosen.device
        per_token = self.capacity_factor * k / self.experts
        document = torch.arange(batch, device=device).repeat_interleave(time)
        if segments is None:
            capacity: int | Tensor = math.ceil(per_token * time)
        else:
            document = document * (time + 1) + seg.runs(segments).run.reshape(-1)
            tokens = torch.zeros(batch * (time + 1), dtype=torch.long, device=device)
            tokens = tokens.scatter_add(0, document, (segments != 0).reshape(-1).long())
            capacity = (per_token * tokens[document].double()).ceil().long()[:, None]
        # A choice's place in its expert's queue: its rank among the equal keys of a stable sort, which keeps time.
        key = (document[:, None] * (self.experts + 1) + chosen).reshape(-1)
        ordered, order = key.sort(stable=True)
        place = torch.arange(key.numel(), device=device) - torch.searchsorted(ordered, ordered)
        return torch.empty_like(place).scatter_(0, order, place).reshape(-1, k) < capacity
