"""Mixture of experts: a router, experts, and the way of tokens to experts and back."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ops.precision import autocasting
from ops.step import Around
from zoo.block import Block, Out, State, Step, tag
from zoo.layers.checks import integer, number
from zoo.layers.linear import Linear
from zoo.moe import losses
from zoo.moe.experts import Experts, build_experts
from zoo.moe.moe_step import bind_step
from zoo.moe.parallel import Exchange
from zoo.moe.routers import Router, Routing, build_router

FEW = 8  # up to so many choices in a call without gradients, sorting costs more than a product for each


class _Dispatch(torch.autograd.Function):
    """rows[r] = tokens[order[r] // k]. The gradient is a gather too: adding rows up by index would be slow on the
    CPU, and on a GPU it would sum in an order that differs from run to run."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return tokens.index_select(0, order // inverse.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return F.embedding_bag(inverse, grads[0], mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """y[n] = Σ_j weights[n, j] · rows[inverse[n, j]], always in the order of j: a token's sum does not depend on
    what else is in the batch. embedding_bag does it in one pass, without a copy of the rows in token order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, inverse)
        return F.embedding_bag(inverse, rows, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order, inverse = ctx.saved_tensors
        grad = grads[0].index_select(0, order // inverse.shape[1])
        to_weights = torch.linalg.vecdot(grad, rows)[inverse]
        scale = weights.reshape(-1)[order][:, None]
        return grad * scale if torch.is_grad_enabled() else grad.mul_(scale), to_weights, None, None


class MoE(Block):
    """Mixture of experts (2101.03961, 2401.04088): each token visits the few experts its router chooses.

    y = Σ_{e in the experts chosen for x} weight_e(x) · expert_e(x) + shared experts (GShard, 2006.16668; Switch,
    2101.03961; Mixtral, 2401.04088; shared experts: DeepSeekMoE, 2401.06066, eq. 9).

    A token's output depends on that token alone (with a capacity, while training, also on which earlier tokens of
    its document filled its experts; some routers look at more, as each tells). No state: a given one is passed through.
    Cost: top_k experts a token.

    Options:
    - `experts`, `top_k`, `hidden` (of one expert; by default that of the dense block of its kind).
    - `router`: "top_k", {"kind": "top_k", "jitter": 0.01, ...} or a Router. See zoo.moe.routers.
    - `expert`: "swiglu", "geglu", "mlp", {"kind": "mlp", "activation": "relu2"}, {"kind": "mpo", "bond": 32} (matrices
      that share their largest tensor) or an Experts object.
    - `shared_experts`: how many more experts every token visits, with weight 1; `shared_hidden`: of each of them, by
      default as `hidden`; `shared_gate`: their sum is weighed by sigmoid(w·x) (Qwen1.5-MoE and what followed it).
    - `out_bias`: a vector added to every token's output that no router weighs (of a dense layer, see
      `zoo.convert.moefy`).
    - `load_balance`, `router_z`: weights of the two losses; a loss of weight 0 is left out.

    aux: "loss/load_balance", "loss/router_z" (weighted), "stat/load" (each expert's share of choices, before any is
    dropped), "stat/dropped" (share of choices dropped), "stat/router_entropy" (nats), "sum/choices" (while training:
    how many choices fell on each expert), and the router's own. Where a model decodes on a CPU, one token at once
    (`one_token`), there are none.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D (experts + top_k hidden + shared_experts shared_hidden))
        train memory: O(T (top_k (D + hidden) + D + shared_experts shared_hidden))
        prefill: as train time, forward
        decode: O(D (experts + top_k hidden + shared_experts shared_hidden)) a token; reads the chosen experts
        state bytes: 0
    """

    def __init__(
        self,
        width: int,
        experts: int = 8,
        top_k: int = 2,
        hidden: int | None = None,
        router: str | Mapping[str, Any] | Router = "top_k",
        expert: str | Mapping[str, Any] | Experts = "swiglu",
        shared_experts: int = 0,
        load_balance: float = 0.01,
        router_z: float = 0.0,
        out_bias: bool = False,
        shared_hidden: int | None = None,
        shared_gate: bool = False,
    ):
        super().__init__(width)
        integer("shared_experts", shared_experts, 0)
        for name, value in (("load_balance", load_balance), ("router_z", router_z)):
            if number(name, value) < 0:
                raise ValueError(f"{name}={value!r} must not be negative")
        self.load_balance, self.router_z = load_balance, router_z
        self.router = build_router(router, width, experts, top_k)
        self.experts = build_experts(expert, width, experts, hidden)
        if not shared_experts and (shared_hidden is not None or shared_gate):
            raise ValueError(
                f"shared_hidden={shared_hidden} and shared_gate={shared_gate} need shared_experts of at least 1"
            )
        self.shared_hidden = self.experts.hidden if shared_hidden is None else integer("shared_hidden", shared_hidden)
        self.shared = self.experts.shared(shared_experts * self.shared_hidden) if shared_experts else None
        self.shared_gate = Linear(width, 1, bias=False) if shared_gate else None
        self.out_bias = nn.Parameter(torch.zeros(width)) if out_bias else None
        if out_bias:
            tag(self, "out_bias", weight_decay=False)
        self.exchange: Exchange | None = None  # with the processes that hold the other experts; see `divide_experts`
        if not self.router.causal:
            self.causal = False  # pyright: ignore[reportAttributeAccessIssue]  # depends on the router given

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0.0)
        routing = self.router(x, segments)
        run = self.by_token if self.is_few(routing, x) else self.by_expert
        y, counts = run(x.flatten(0, 1), routing)
        y = y.reshape(x.shape)
        if self.shared is not None:
            always = self.shared(x, segments=segments).y
            y = y + (always if self.shared_gate is None else self.shared_gate(x).sigmoid() * always)
        if self.out_bias is not None:
            bias = self.out_bias.to(y.dtype)
            y = y + (bias if segments is None else torch.where((segments != 0)[..., None], bias, 0.0))
        return Out(y, state, self.aux(routing, counts, segments))

    def bind_step(self, around: Around) -> Step | None:
        """A call by its model alone; `forward` gives the losses and statistics of a single token too."""
        return bind_step(self, around)

    def is_few(self, routing: Routing, x: Tensor) -> bool:
        """Whether to take each token in turn: decoding, where a call has no gradients and few choices."""
        if (
            self.exchange is not None
            or routing.experts.numel() > FEW
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return False
        return not autocasting(x.device) and hasattr(self.experts, "few")

    def by_expert(self, tokens: Tensor, routing: Routing) -> tuple[Float[Tensor, "tokens width"], Tensor]:
        """Sort the choices by expert, run each expert on its rows at once, and add up in token order.
        Also returns how many rows each expert got."""
        ordered, order = routing.experts.reshape(-1).sort(stable=True)
        place = torch.arange(order.numel(), device=order.device)
        inverse = torch.empty_like(order).scatter_(0, order, place).view_as(routing.experts)
        sizes = losses.count_sorted(ordered, self.router.experts)
        rows = cast(Tensor, _Dispatch.apply(tokens, order, inverse))
        rows = self.experts(rows, sizes) if self.exchange is None else self.exchange(self.experts, rows, sizes)
        return cast(Tensor, _Combine.apply(rows, routing.weights.to(rows.dtype), order, inverse)), sizes

    def by_token(self, tokens: Tensor, routing: Routing) -> tuple[Float[Tensor, "tokens width"], Tensor]:
        """The same for a few tokens: each one's experts in turn."""
        y = self.experts.few(tokens, routing.experts, routing.weights)
        return y, losses.count_sorted(routing.experts.reshape(-1).sort().values, self.router.experts)

    def aux(
        self, routing: Routing, counts: Int[Tensor, " experts"], segments: Int[Tensor, "batch time"] | None
    ) -> dict[str, Tensor]:
        """Losses and statistics. `counts`: rows that experts took, after dropping."""
        valid = None if segments is None else (segments != 0).reshape(-1)
        found = dict(routing.aux)
        taken = counts
        if routing.chosen is not routing.experts:
            counts = losses.count_sorted(routing.chosen.reshape(-1).sort().values, self.router.experts)
        if self.load_balance:
            found["loss/load_balance"] = self.load_balance * losses.load_balance(routing.probabilities, counts, valid)
        if self.router_z:
            found["loss/router_z"] = self.router_z * losses.router_z(routing.logits, valid)
        dtype = routing.probabilities.dtype
        if self.training:
            found["sum/choices"] = counts
        found["stat/load"] = losses.shares(counts, dtype)
        found["stat/dropped"] = (counts.sum() - taken.sum()).to(dtype) / counts.sum().clamp_min(1)
        found["stat/router_entropy"] = losses.entropy(routing.probabilities.detach(), valid)
        return found

    def after_step(self, step: int, sums: Mapping[str, Tensor]) -> None:
        self.router.after_step(step, sums)
        super().after_step(step, sums)  # shared experts are a block, and experts of somebody's own may hold some

    @property
    def refusal(self) -> str | None:
        return self.router.refusal

    def active_parameters(self) -> int:
        """Parameters that one token uses: the router, the experts it visits, the shared ones."""
        parts = [each for each in (self.router, self.shared, self.shared_gate) if each is not None]
        always = sum(p.numel() for module in parts for p in module.parameters())
        always += 0 if self.out_bias is None else self.width
        return always + self.experts.parameters_used(self.router.visits)

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of a token: the experts it visits, the shared ones and the router."""
        shared = 0 if self.shared is None else self.shared.flops_per_token(context)
        shared += 0 if self.shared_gate is None else 2 * self.width
        return self.router.flops_per_token() + self.experts.flops(self.router.visits) + shared
