"""Sparse upcycling: a dense model becomes a mixture of experts that starts as the same function (2212.05055)."""

from typing import Any

import torch
from torch import Tensor

from zoo.block import Block
from zoo.config import BlockSpec
from zoo.convert.surgery import dense, exchange, refuse_nothing_done
from zoo.layers.checks import integer
from zoo.model import LanguageModel

ROUTER: dict[str, Any] = {"kind": "top_k", "renormalise": True}


def upcycle(model: LanguageModel, experts: int = 8, top_k: int = 2, every: int = 1, seed: int = 0) -> LanguageModel:
    """A new model whose dense feed-forward layers are mixtures of `experts` copies of them (Komatsuzaki et al.).

    The router is fresh and its top_k weights are renormalised to a sum of 1, so the new model's logits are the old
    one's at the start; experts grow apart as they are trained on different tokens. `every`: only every so many-th
    feed-forward layer (2: the second, the fourth ..., as in the paper). `seed`: of the router's initial values.

    `model` stays as it is. Raises ValueError for top_k=1 (the one renormalised weight is always 1, so no gradient
    would reach the router), and for a model without dense feed-forward layers.
    """
    integer("every", every)
    if integer("top_k", top_k, 2, " (a lone renormalised weight is 1 and trains no router)") > integer(
        "experts", experts, 2
    ):
        raise ValueError(f"top_k={top_k} must be at most experts={experts}")
    generator = torch.Generator().manual_seed(seed)
    met = 0

    def change(spec: BlockSpec, block: Block) -> tuple[str, dict[str, Any], dict[str, Tensor]] | None:
        nonlocal met
        layer = dense(spec, block)
        if layer is None:
            return None
        met += 1
        if met % every:
            return None
        options = {"experts": experts, "top_k": top_k, "hidden": layer.hidden, "expert": layer.expert}
        router = torch.randn(experts, model.config.width, generator=generator) * (3 * model.config.width) ** -0.5
        copies = {name: getattr(layer, name) for name in ("up", "down", "up_bias", "down_bias")}
        tensors = {
            f"experts.{name}": each.expand(experts, *each.shape) for name, each in copies.items() if each is not None
        }
        return "moe", options | {"router": ROUTER}, tensors | {"router.weight": router}

    made = exchange(model, change)
    refuse_nothing_done(met // every, f"dense feed-forward layer (of which every={every} would be taken)", model)
    return made
