"""Routing that is learned first and then held fast: StableMoE (Dai et al., 2204.08396)."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ops.precision import full_precision
from zoo.layers.checks import integer, number
from zoo.layers.low_rank import LowRankLinear
from zoo.moe import losses
from zoo.moe.routers import Routing, Scheduled


class Stable(Scheduled):
    """weight_e = sigmoid(s_e) of the experts chosen, s = W x. Who chooses depends on the stage:

    1. The largest s, under a loss for balance. A light router ŝ = D(x) learns the same choices by cross entropy.
    2. After `stage_steps` optimizer steps the largest ŝ, with D as it was then. Both losses are gone; W learns on, by
       the weights alone.

    In eval mode the light router chooses in both stages, as in the authors' code.

    What differs from the paper: its light router reads word embeddings of its own, so that in stage 2 a word always
    goes to the same experts. A block sees no words, so D reads x, through a matrix of low `rank`, and no gradient goes
    back to x. In stage 2 that map is fixed, but x may still drift with the layers below, and some choices with it. Few
    directions of x matter to a matrix of low rank, and its length does not. The balance loss is over all the call's
    tokens, each expert's part being Σ σ(s_te) over its tokens times its load's relative excess; with top_k > 1 (the
    paper has 1) both losses are means over the choices.

    aux: "loss/balance", "loss/distill", "stat/agreement" (share of the choices by s that are choices by ŝ too).
    The block's own loss is not needed (`load_balance=0.0`). Without `LanguageModel.after_step` it stays in stage 1.

    Options:
    - `stage_steps`: optimizer steps of stage 1 (6000 of 60000 in the paper).
    - `rank`: of the light router; None: half of the full matrix's.
    - `balance`, `distill`: weights of the losses.
    """

    frozen_encode: Tensor
    frozen_decode: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        *,
        stage_steps: int = 6000,
        rank: int | None = None,
        balance: float = 0.3,
        distill: float = 0.3,
    ):
        super().__init__(width, experts, top_k)
        for name, value in (("balance", balance), ("distill", distill)):
            if number(name, value) < 0:
                raise ValueError(f"{name}={value!r} must not be negative")
        self.stage_steps = integer("stage_steps", stage_steps, 0)
        self.balance, self.distill = balance, distill
        self.rank = max(1, min(width, experts) // 2) if rank is None else rank
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.light = LowRankLinear(width, experts, self.rank)
        # Stage 2 routes by copies: an optimizer goes on moving what it holds, by momentum and weight decay.
        self.register_buffer("frozen_encode", torch.empty(self.rank, width))
        self.register_buffer("frozen_decode", torch.empty(experts, self.rank))
        self.reset_parameters()
        self.schedule(0)

    def reset_parameters(self) -> None:
        """As nn.Linear's by variance, the light router's product too."""
        nn.init.normal_(self.weight, std=(3 * self.width) ** -0.5)
        self.light.reset_parameters()
        self.freeze()

    @torch.no_grad()
    def freeze(self) -> None:
        """Copy the light router as it is now. Under sharding every rank must call this."""
        for frozen, layer in ((self.frozen_encode, self.light.encode), (self.frozen_decode, self.light.decode)):
            weight: Any = layer.weight
            frozen.copy_(weight.full_tensor() if hasattr(weight, "full_tensor") else weight)

    def schedule(self, done: int) -> None:
        self.stage = 1 if done < self.stage_steps else 2

    def after_step(self, step: int, sums: Mapping[str, Tensor]) -> None:
        before = self.stage
        super().after_step(step, sums)
        if self.stage != before:
            self.freeze()

    def forward(
        self, x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Routing:
        valid = None if segments is None else (segments != 0).reshape(-1)
        logits = self.logits(x, self.weight)
        light = self.light_logits(x)
        by_logits, by_light = (each.detach().topk(self.top_k, dim=-1).indices for each in (logits, light))
        learning = self.training and self.stage == 1
        chosen = by_logits if learning else by_light
        weights = logits.sigmoid().gather(1, chosen)
        same = (by_logits[:, :, None] == by_light[:, None, :]).any(-1).to(logits.dtype)
        aux = {"stat/agreement": losses.mean(same.mean(-1), valid)}
        if self.training:
            aux["loss/distill"] = self.distill * self.distillation(light, chosen, valid)
        chosen, weights = self.skip_padding(chosen, weights, segments)
        if learning and self.balance:
            aux["loss/balance"] = self.balance * self.imbalance(weights, chosen, valid)
        return Routing(chosen, weights, chosen, logits, logits.softmax(-1), aux)

    def light_logits(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "tokens experts"]:
        """ŝ = D(x), in float32 at least; without a gradient to x."""
        encode, decode = self.light.encode.weight, self.light.decode.weight
        if self.stage == 2:
            encode, decode = self.frozen_encode, self.frozen_decode
        latent = self.logits(x.detach(), encode)
        with full_precision(x.device):
            return F.linear(latent, decode.to(latent.dtype))

    def distillation(self, light: Tensor, chosen: Tensor, valid: Tensor | None) -> Float[Tensor, ""]:
        """Mean over tokens and choices of -log softmax(ŝ)_chosen."""
        if self.stage == 2:  # a gradient of zero: replicated training waits for one of every parameter
            return 0.0 * (self.light.encode.weight.sum() + self.light.decode.weight.sum())
        return -losses.mean(light.log_softmax(-1).gather(1, chosen).mean(-1), valid)

    def imbalance(self, weights: Tensor, chosen: Tensor, valid: Tensor | None) -> Float[Tensor, ""]:
        """Σ_e (n_e − n)/n · Σ_{t chose e} σ(s_te) over the number of choices, n_e the load of e and n the mean load:
        scores of experts with more than their share are pressed down, others' lifted."""
        counts = losses.count_sorted(chosen.reshape(-1).sort().values, self.experts)
        excess = self.experts * losses.shares(counts, weights.dtype) - 1
        excess = F.pad(excess, (0, 1))  # for "no expert", of weight 0
        return losses.mean((excess[chosen] * weights).mean(-1), valid)
