"""Experts choose tokens instead of tokens experts (Zhou et al., 2202.09368). It looks at later tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ops import segments as seg
from zoo.moe import losses
from zoo.moe.routers import Router, Routing


class ExpertChoice(Router):
    """S = softmax(W x) over experts; each expert takes the k tokens of largest S of each document, with weight S
    (2202.09368, eq. 1-2), k = ceil(n · top_k / experts) for a document of n tokens.

    So every expert has the same load, and a token is visited by any number of experts, top_k in the mean, which is
    what the paper calls the capacity factor c. It takes the tokens of the whole batch for n; here documents, and so
    rows of a batch, do not compete, padding takes no place, and an output depends on its document alone. Between
    equal tokens the earlier one is taken. Needs no load-balancing loss (`load_balance=0.0` in the block).

    It is not causal: a later token may take an earlier one's place, in eval mode too. A causal model refuses it.

    aux: "stat/unserved", the share of tokens that no expert took.

    Option:
    - `allow_lookahead`: let a causal model have it all the same. Its losses are then lower than they should be, since
      whether experts take a token tells of what comes after it; and it cannot go on from a state, so each new token
      costs a pass over the whole text, in which earlier outputs may change.

    O(tokens · experts · log tokens). Outside torch.compile one host synchronisation, to drop empty columns.
    """

    causal = False

    def __init__(self, width: int, experts: int, top_k: int, *, allow_lookahead: bool = False):
        super().__init__(width, experts, top_k)
        if not isinstance(allow_lookahead, bool):
            raise ValueError(f"allow_lookahead={allow_lookahead!r} must be true or false")
        self.allow_lookahead = allow_lookahead
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear's by variance: normal with standard deviation 1/sqrt(3 width)."""
        nn.init.normal_(self.weight, std=(3 * self.width) ** -0.5)

    @property
    def refusal(self) -> str | None:
        """See `Block.refusal`."""
        if self.allow_lookahead:
            return None
        return (
            "has the router expert_choice, whose experts choose among all tokens of a document: a token's output would "
            "depend on later tokens, which a causal model predicts and does not have when it generates; use "
            "objective: masked, a router such as top_k, or, if the leak is wanted, "
            "router: {kind: expert_choice, allow_lookahead: true}"
        )

    @property
    def visits(self) -> int:
        """Here in the mean, not at most: a token may be taken by all experts."""
        return self.top_k

    def forward(
        self, x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Routing:
        logits = self.logits(x, self.weight)
        probabilities = logits.softmax(-1)
        taken = self.taken(probabilities.detach(), x.shape[0], x.shape[1], segments)
        experts = torch.arange(self.experts, device=x.device)
        # "No expert" sorts behind all: a token's visits fill its first columns.
        chosen = torch.where(taken, experts, self.experts).sort(1).values
        visits = taken.sum(1)
        if not torch.compiler.is_compiling() and not x.is_meta:
            chosen = chosen[:, : max(1, int(visits.max()))]  # rows of the others would be copied for nothing
        weights = probabilities.gather(1, chosen.clamp_max(self.experts - 1))
        weights = torch.where(chosen < self.experts, weights, 0.0)
        valid = None if segments is None else (segments != 0).reshape(-1)
        unserved = losses.mean((visits == 0).to(probabilities.dtype), valid)
        return Routing(chosen, weights, chosen, logits, probabilities, {"stat/unserved": unserved})

    def taken(
        self,
        probabilities: Float[Tensor, "tokens experts"],
        batch: int,
        time: int,
        segments: Int[Tensor, "batch time"] | None,
    ) -> Bool[Tensor, "tokens experts"]:
        """Which tokens each expert takes."""
        document = torch.arange(batch, device=probabilities.device).repeat_interleave(time)
        valid = torch.ones_like(document, dtype=torch.bool)
        if segments is not None:
            document = document * (time + 1) + seg.runs(segments).run.reshape(-1)
            valid = (segments != 0).reshape(-1)
        ordered = document.sort().values
        first, behind = (torch.searchsorted(ordered, document, right=right) for right in (False, True))
        # ceil(n · top_k / experts) in whole numbers
        places = torch.where(valid, -(-(behind - first) * self.top_k // self.experts), 0)
        # Sort by probability, then by document; both keep the order of time between equals.
        order = probabilities.argsort(dim=0, descending=True, stable=True)
        order = order.gather(0, document[order].argsort(dim=0, stable=True))
        at = torch.arange(len(document), device=order.device)
        rank = torch.empty_like(order).scatter_(0, order, at[:, None].expand_as(order))
        return rank - first[:, None] < places[:, None]
