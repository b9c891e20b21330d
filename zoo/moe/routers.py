"""What a router is, and the table of routers.

A router looks at tokens and says which experts each one visits and with what weight. It is the one thing that
differs between most mixtures of experts, so it is an object injected into the block: a file with a class, and one
line in `ROUTERS`.
"""

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops.precision import full_precision
from zoo.layers.spelling import nearest

ROUTERS: dict[str, str] = {
    "top_k": "zoo.moe.router_top_k:TopK",
    "sinkhorn": "zoo.moe.router_sinkhorn:Sinkhorn",
}


class Routing(NamedTuple):
    """Where tokens go. `tokens` counts batch · time, row by row; E is the number of experts.

    An entry of `experts` that is E means "no expert" (padding, dropped, or a choice not used) and has weight 0.
    `choices` may differ from call to call, or be E for routers by which a token visits any number of experts.
    """

    experts: Int[Tensor, "tokens choices"]
    weights: Float[Tensor, "tokens choices"]
    chosen: Int[Tensor, "tokens choices"]  # as `experts`, before any was dropped for want of capacity
    logits: Float[Tensor, "tokens experts"]  # float32 at least
    probabilities: Float[Tensor, "tokens experts"]  # what the load-balancing loss takes the mean of
    aux: Mapping[str, Tensor]  # "loss/..." and "stat/..." of the router's own; the block adds the common ones


class Router(nn.Module):
    """Base of routers: sizes, and the router's matrix [experts, width] where it has one.

    `forward(x [batch, time, width], segments [batch, time] or None) -> Routing`. Rows of padding are zero in x.
    Options of every router: `width`, `experts`, `top_k`, then its own by keyword.
    """

    causal: ClassVar[bool] = True  # False: the choice for a token looks at later tokens

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__()
        if not isinstance(experts, int) or experts < 1:
            raise ValueError(f"experts={experts!r} must be a positive integer")
        if not isinstance(top_k, int) or not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k!r} must be between 1 and experts={experts}")
        self.width, self.experts, self.top_k = width, experts, top_k

    def forward(
        self, x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Routing:
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def logits(self, x: Float[Tensor, "batch time width"], weight: Tensor) -> Float[Tensor, "tokens experts"]:
        """x weightᵀ in float32 at least, under autocast too: bfloat16 logits of near-equal experts are ties."""
        exact = torch.promote_types(x.dtype, torch.float32)
        with full_precision(x.device):
            return nn.functional.linear(x.reshape(-1, x.shape[-1]).to(exact), weight.to(exact))


def build_router(spec: Any, width: int, experts: int, top_k: int) -> Router:
    """A router from its name, from {"kind": name, **options}, or the object itself (its sizes are checked)."""
    if isinstance(spec, Router):
        for name, wanted in (("width", width), ("experts", experts), ("top_k", top_k)):
            if getattr(spec, name) != wanted:
                raise ValueError(
                    f"the router was built for {name}={getattr(spec, name)}, the block has {name}={wanted}; "
                    f"pass the same {name} to both"
                )
        return spec
    return build(ROUTERS, "router", spec, width=width, experts=experts, top_k=top_k)


def build(table: Mapping[str, str], what: str, spec: Any, **sizes: Any) -> Any:
    """Build the `what` that `spec` names ("name" or {"kind": "name", **options}) from a table "module:Class"."""
    options = dict(spec) if isinstance(spec, Mapping) else {"kind": spec}
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in table:
        raise ValueError(
            f"unknown {what} {kind!r}{nearest(kind, table)}. Known: {', '.join(table)}; "
            f"pass a name, {{'kind': name, **options}} or an object"
        )
    module, name = table[kind].split(":")
    cls = getattr(importlib.import_module(module), name)
    known = cls.options()
    for option in options:
        if option not in known:
            raise ValueError(
                f"{what} {kind!r} has no option {option!r}{nearest(option, known)}. "
                f"Its options: {', '.join(known) or 'none'}"
            )
    return cls(**sizes, **options)
