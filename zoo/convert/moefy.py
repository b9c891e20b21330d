"""MoEfication: a dense feed-forward layer split into experts of neurons that fire together (2110.01786)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from zoo.block import Block
from zoo.config import BlockSpec
from zoo.convert.surgery import Dense, dense, exchange, refuse_nothing_done
from zoo.layers.checks import integer
from zoo.layers.ffn import FeedForward
from zoo.layers.parallel import single
from zoo.model import LanguageModel
from zoo.moe.experts import build_experts

ROUNDS = 50  # of k-means; it settles in fewer


def moefy(
    model: LanguageModel,
    experts: int = 8,
    top_k: int | None = None,
    tokens: Int[Tensor, "batch time"] | None = None,
    seed: int = 0,
) -> LanguageModel:
    """A new model whose dense feed-forward layers are mixtures of `experts` parts of them (Zhang et al.).

    A layer's neurons are clustered by their input weights (a gated unit's by the gate's), as many to each expert. A
    token then visits the top_k experts whose neurons it is likely to excite most, each with weight 1; with top_k =
    experts (None) the new model's logits are the old one's. top_k can be changed later, in the configuration.

    The router scores an expert by the cosine between the token and the mean of the expert's neurons; given `tokens`, by
    a least-squares fit (with intercept) to the sizes of what the expert's neurons give out on them,
    Σ_n |activation_n| · ‖output weights_n‖. (The paper fits a two-layer network to a like sum.)

    `model` stays as it is. `seed`: of the clustering's start. Raises ValueError for layers whose neurons cannot be
    shared out evenly (by their place), and for a model without dense feed-forward layers. A layer's output bias is
    added to every token, whatever experts it visits.
    Cost: O(rounds · neurons · experts · width) a layer, and with `tokens` a forward pass and one solution of width
    equations a layer.
    """
    top_k = integer("experts", experts) if top_k is None else integer("top_k", top_k)
    if top_k > experts:
        raise ValueError(f"top_k={top_k} must be at most experts={experts}")
    inputs = {} if tokens is None else _inputs(model, tokens)
    found = 0

    def change(spec: BlockSpec, block: Block) -> tuple[str, dict[str, Any], dict[str, Tensor]] | None:
        nonlocal found
        layer = dense(spec, block)
        if layer is None:
            return None
        if layer.hidden % experts:
            raise ValueError(
                f"{spec.where} (kind {spec.kind}) has {layer.hidden} neurons, which experts={experts} cannot share out "
                "evenly; choose a divisor"
            )
        found += 1
        points = F.normalize(layer.up[:, : layer.hidden].mT.to(torch.promote_types(layer.up.dtype, torch.float32)))
        if not points.isfinite().all():
            raise ValueError(f"{spec.where} (kind {spec.kind}) holds weights that are not finite")
        cluster = balanced_clusters(points, experts, seed)
        tensors = _split(layer, cluster, experts)
        weight, bias = _similarity(points, cluster, experts), points.new_zeros(experts)
        if tokens is not None:
            weight, bias = _fit(layer, cluster, inputs[block], experts)
        options = {"experts": experts, "top_k": top_k, "hidden": layer.hidden // experts, "router": "unweighted"}
        tensors |= {"router.weight": weight, "router.bias": bias}
        options |= {"expert": layer.expert, "load_balance": 0.0, "out_bias": layer.down_bias is not None}
        return "moe", options, tensors

    made = exchange(model, change)
    refuse_nothing_done(found, "dense feed-forward layer", model)
    return made


# Clusters -------------------------------------------------------------------------------------------------------


def balanced_clusters(points: Float[Tensor, "points features"], clusters: int, seed: int) -> Int[Tensor, " points"]:
    """The cluster of each point: k-means whose clusters all have points / clusters members, the best round's."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(points), generator=generator)[:clusters]
    centres, best, least = points[start.to(points.device)], None, float("inf")
    for _ in range(ROUNDS):
        distances = torch.cdist(points, centres).square()
        cluster = balanced_assignment(distances)
        total = distances.gather(1, cluster[:, None]).sum().item()
        if total >= least:
            break
        best, least = cluster, total
        centres = torch.stack([points[cluster == each].mean(0) for each in range(clusters)])
    assert best is not None
    return best


def balanced_assignment(costs: Float[Tensor, "points clusters"]) -> Int[Tensor, " points"]:
    """Each point's cluster, equally many to each, such that no point and cluster would both rather have one another:
    points apply to their nearest cluster, which keeps its nearest and sends the others on (Gale & Shapley, 1962)."""
    points, clusters = costs.shape
    size, left = points // clusters, costs.clone()
    place = torch.arange(points, device=costs.device)
    while True:
        cost, cluster = left.min(1)
        order = cost.argsort(stable=True)
        order = order[cluster[order].argsort(stable=True)]  # by cluster, then by cost
        counts = torch.bincount(cluster, minlength=clusters)
        rank = place - (counts.cumsum(0) - counts)[cluster[order]]
        sent_on = order[rank >= size]
        if not len(sent_on):
            return cluster
        left[sent_on, cluster[sent_on]] = float("inf")


def _split(layer: Dense, cluster: Int[Tensor, " neurons"], experts: int) -> dict[str, Tensor]:
    """The layer's neurons by expert."""
    members = cluster.argsort(stable=True).reshape(experts, -1)
    halves = layer.up.unflatten(1, (-1, layer.hidden))  # [width, gate and value or one, neurons]
    up = halves[:, :, members].permute(2, 0, 1, 3).flatten(2)
    found = {"experts.up": up, "experts.down": layer.down[members]}
    if layer.up_bias is not None and layer.down_bias is not None:
        bias = layer.up_bias.unflatten(0, (-1, layer.hidden))[:, members].movedim(0, 1).flatten(1)
        found |= {"experts.up_bias": bias, "out_bias": layer.down_bias}
        found["experts.down_bias"] = torch.zeros_like(layer.down_bias).expand(experts, -1)
    return found


# Routers --------------------------------------------------------------------------------------------------------


def _similarity(points: Tensor, cluster: Tensor, experts: int) -> Float[Tensor, "experts width"]:
    """Directions of the clusters' means: a token's length does not change the order of its scores."""
    return F.normalize(torch.stack([points[cluster == each].mean(0) for each in range(experts)]))


@torch.no_grad()
def _inputs(model: LanguageModel, tokens: Int[Tensor, "batch time"]) -> dict[Block, Float[Tensor, "tokens width"]]:
    """What each block of the model reads on these tokens."""
    found: dict[Block, Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(lambda block, given: found.update({block: given[0].flatten(0, 1)}))
        for spec, each in zip(model.config.blocks(), model.residuals, strict=True)
        for _, block in single(spec.kind, each.block)
        if isinstance(block, FeedForward)
    ]
    training = model.training
    try:
        model.eval()(tokens, logits_to_keep=1)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def _fit(
    layer: Dense, cluster: Tensor, x: Float[Tensor, "tokens width"], experts: int
) -> tuple[Float[Tensor, "experts width"], Float[Tensor, " experts"]]:
    """Weights and intercepts that predict the size of each expert's output, by ridge regression in float64."""
    one = build_experts(layer.expert, layer.up.shape[0], 1, layer.hidden)
    inner = x @ layer.up if layer.up_bias is None else x @ layer.up + layer.up_bias
    fired = one.activate(inner).abs() * layer.down.norm(dim=1)
    sizes = torch.stack([fired[:, cluster == each].sum(1) for each in range(experts)], 1).double()
    x = x.double()
    centred = x - x.mean(0)
    gram = centred.mT @ centred
    ridge = 1e-4 * gram.diagonal().mean().clamp_min(1e-12)
    gram.diagonal().add_(ridge)
    weight = torch.linalg.solve(gram, centred.mT @ (sizes - sizes.mean(0))).mT
    return weight, sizes.mean(0) - weight @ x.mean(0)
