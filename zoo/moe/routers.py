"""What a router is, and how one is found by its name.

A router looks at tokens and says which experts each one visits and with what weight. It is the one thing that
differs between most mixtures of experts, so it is an object injected into the block: a file router_NAME.py beside this
one, with one class of `Router`. Nothing else knows of it.
"""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops.precision import full_precision
from zoo.layers.checks import integer
from zoo.layers.spelling import nearest


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

    @classmethod
    def options(cls) -> list[str]:
        """The names of this router's own options: those by keyword."""
        return [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def forward(
        self, x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Routing:
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    @property
    def refusal(self) -> str | None:
        """Why no causal model takes a block with this router, as `Block.refusal`."""
        if self.causal:
            return None
        return (
            f"has the router {type(self).__name__}, which looks at later tokens, those that a causal model predicts; "
            "use objective: masked, or a router such as top_k"
        )

    @property
    def visits(self) -> int:
        """How many experts a token visits at most, as things stand."""
        return self.top_k

    def flops_per_token(self) -> int:
        """Forward FLOPs to route a token (a multiply-add is 2). The default counts every matrix once."""
        return sum(2 * p.numel() for p in self.parameters() if p.ndim >= 2)

    def after_step(self, step: int, sums: Mapping[str, Tensor]) -> None:
        """See `Block.after_step`. `sums` holds "sum/choices" [experts], how many choices fell on each expert, and what
        "sum/..." the router's own aux had. By default nothing happens."""

    def logits(self, x: Float[Tensor, "batch time width"], weight: Tensor) -> Float[Tensor, "tokens experts"]:
        """x weightᵀ in float32 at least, under autocast too: bfloat16 logits of near-equal experts are ties."""
        exact = torch.promote_types(x.dtype, torch.float32)
        with full_precision(x.device):
            return nn.functional.linear(x.reshape(-1, x.shape[-1]).to(exact), weight.to(exact))

    def skip_padding(
        self,
        chosen: Int[Tensor, "tokens choices"],
        weights: Float[Tensor, "tokens choices"],
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[Int[Tensor, "tokens choices"], Float[Tensor, "tokens choices"]]:
        """The choices with "no expert" and weight 0 at padding."""
        if segments is None:
            return chosen, weights
        valid = (segments != 0).reshape(-1, 1)
        return torch.where(valid, chosen, self.experts), torch.where(valid, weights, 0.0)


def check_groups(experts: int, top_k: int, groups: int, top_groups: int, best: int) -> None:
    """Raise ValueError unless `groups` of equal size can be ranked by their `best` experts, and `top_groups` of them
    hold top_k experts."""
    if experts % integer("groups", groups):
        raise ValueError(f"groups={groups} must divide experts={experts}; try groups={math.gcd(experts, groups)}")
    if integer("top_groups", top_groups) > groups:
        raise ValueError(f"top_groups={top_groups} must not be above groups={groups}")
    size = experts // groups
    if top_groups < groups and size < best:
        raise ValueError(
            f"groups={groups} of size {size} cannot be ranked by their {best} best experts; "
            f"use at most groups={experts // best}"
        )
    if top_k > top_groups * size:
        raise ValueError(
            f"top_k={top_k} is above the {top_groups * size} experts in top_groups={top_groups} of {size} each; "
            f"use top_groups={math.ceil(top_k / size)} or more"
        )


def within_groups(
    ranking: Float[Tensor, "tokens experts"], groups: int, top_groups: int, best: int
) -> Float[Tensor, "tokens experts"]:
    """The ranking with -inf for experts outside a token's `top_groups` groups of largest sum over their `best`."""
    if groups == top_groups:
        return ranking
    grouped = ranking.unflatten(-1, (groups, -1))
    chosen = grouped.topk(best, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
    kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, chosen, True)
    return torch.where(kept[..., None], grouped, -math.inf).flatten(-2)


class Scheduled(Router):
    """A router that changes with the number of optimizer steps it was trained for.

    `step` is that number: a buffer, so that it goes with the weights through resuming and further training. `schedule`
    sets what follows from it, as plain attributes: then a forward neither waits for a device nor breaks a graph, and
    torch.compile compiles again when they change, not at each step.
    """

    step: Tensor

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__(width, experts, top_k)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._done = 0  # `step`, as a number of the host's
        self.register_load_state_dict_post_hook(_read_step)

    def schedule(self, done: int) -> None:
        """Set what follows from the number of steps done."""
        raise NotImplementedError(f"{type(self).__name__} defines no schedule")

    def train(self, mode: bool = True) -> "Scheduled":
        """As of any module. Reads `step` too, which some loaders set without load_state_dict."""
        _read_step(self)
        return super().train(mode)

    def after_step(self, step: int, sums: Mapping[str, Tensor]) -> None:
        self.step += 1
        self._done += 1  # not read back, which would wait for the device at every step
        self.schedule(self._done)


def _read_step(router: Any, keys: Any = None) -> None:
    """Set a scheduled router up for the step in its buffer. `keys` are those that load_state_dict did not find."""
    if not router.step.is_meta:
        router._done = int(router.step)
    router.schedule(router._done)


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
    return build(routers(), "router", spec, width=width, experts=experts, top_k=top_k)


def routers() -> dict[str, str]:
    """Every router's name and the module that holds it, by the files there are. Imports none."""
    package = __name__.rpartition(".")[0]
    folder = importlib.import_module(package).__path__
    names = sorted(each.name for each in pkgutil.iter_modules(folder) if each.name.startswith("router_"))
    return {name.removeprefix("router_"): f"{package}.{name}" for name in names}


def _class(place: str) -> Any:
    """The class at "module:Class", or the router that a module defines."""
    name, _, wanted = place.partition(":")
    module = importlib.import_module(name)
    if wanted:
        return getattr(module, wanted)
    (found,) = (
        each
        for each in vars(module).values()
        if inspect.isclass(each) and issubclass(each, Router) and each.__module__ == name
    )
    return found


def build(table: Mapping[str, str], what: str, spec: Any, **sizes: Any) -> Any:
    """Build the `what` that `spec` names ("name" or {"kind": "name", **options}) from a table of "module:Class", or of
    modules that define one router each."""
    options = dict(spec) if isinstance(spec, Mapping) else {"kind": spec}
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in table:
        raise ValueError(
            f"unknown {what} {kind!r}{nearest(kind, table)}. Known: {', '.join(table)}; "
            f"pass a name, {{'kind': name, **options}} or an object"
        )
    cls = _class(table[kind])
    known = cls.options()
    for option in options:
        if option not in known:
            raise ValueError(
                f"{what} {kind!r} has no option {option!r}{nearest(option, known)}. "
                f"Its options: {', '.join(known) or 'none'}"
            )
    return cls(**sizes, **options)
