"""The top-k router, its losses and statistics, dropping and jitter."""

import math

import pytest
import torch
from torch.nn import functional as F

from zoo.moe import losses
from zoo.moe.moe import MoE
from zoo.moe.router_top_k import TopK

WIDTH, EXPERTS = 16, 5


def test_orders_differ_where_they_should():
    """Not renormalised weights sum to less than one; renormalised ones are top-k-then-softmax's."""
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    plain = TopK(WIDTH, EXPERTS, 2, renormalise=False).double()
    other = TopK(WIDTH, EXPERTS, 2, order="top_k_then_softmax").double()
    scaled = TopK(WIDTH, EXPERTS, 2, renormalise=True).double()
    for each in (other, scaled):
        each.load_state_dict(plain.state_dict())
    torch.testing.assert_close(scaled(x).weights, other(x).weights, rtol=0, atol=1e-14)
    assert (plain(x).weights.sum(-1) < 0.99).all()
    assert torch.equal(plain(x).experts, other(x).experts)


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_equals_switch_router(capacity):
    """Top-1 with a capacity: the same tokens kept and the same weights as transformers' Switch router."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    config = SwitchTransformersConfig(hidden_size=WIDTH, num_experts=EXPERTS, expert_capacity=capacity)
    peer = SwitchTransformersTop1Router(config)
    time = 10
    router = TopK(WIDTH, EXPERTS, 1, capacity_factor=capacity * EXPERTS / time).train()
    with torch.no_grad():
        peer.classifier.weight.normal_()
        router.weight.copy_(peer.classifier.weight)
    x = torch.randn(3, time, WIDTH)
    kept, probability, _ = peer.eval()(x)
    if kept.shape[-1] != EXPERTS:  # transformers 5.17: in the other order, the logits overwritten, and its capacity
        kept, probability = probability.squeeze(-2), kept  # counts along an axis of one, so it never drops a token
        router.eval()
    logits = peer.classifier(x)
    routing = router(x)
    wanted = torch.where(kept.any(-1), kept.argmax(-1), EXPERTS).reshape(-1, 1)
    assert torch.equal(routing.experts, wanted)
    assert (wanted == EXPERTS).any() == router.training
    torch.testing.assert_close(
        routing.weights[:, 0], torch.where(kept.any(-1), probability[..., 0], 0.0).flatten(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(routing.logits, logits.reshape(-1, EXPERTS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_load_balance_is_transformers(top_k, padded):
    """transformers divides by tokens, we by choices, so that the minimum is the weight for every top_k."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    block = MoE(WIDTH, experts=EXPERTS, top_k=top_k, load_balance=0.5)
    x = torch.randn(2, 9, WIDTH)
    segments = (torch.rand(2, 9) < 0.6).long() if padded else None
    routing = block.router(x, segments)
    wanted = load_balancing_loss_func((routing.logits,), EXPERTS, top_k, segments)
    found = block(x, None, segments).aux["loss/load_balance"]
    torch.testing.assert_close(found, 0.5 * wanted / top_k)


# Losses and statistics ------------------------------------------------------------------------------------------


def test_load_balance_minimum_and_gradient():
    probabilities = torch.full((20, 4), 0.25, dtype=torch.float64)
    uniform = losses.load_balance(probabilities, torch.tensor([5, 5, 5, 5]), None)
    assert uniform == 1
    one = F.one_hot(torch.zeros(20, dtype=torch.long), 4).double()
    assert losses.load_balance(one, torch.tensor([20, 0, 0, 0]), None) == 4
    # The gradient is that of E · Σ f P with f constant.
    probabilities = torch.rand(20, 4, dtype=torch.float64).requires_grad_()
    counts = torch.tensor([8, 6, 4, 2])
    (grad,) = torch.autograd.grad(losses.load_balance(probabilities, counts, None), probabilities)
    torch.testing.assert_close(grad, (4 * counts.double() / 20 / 20).expand(20, 4), rtol=0, atol=1e-14)


def test_aux_values_and_names():
    block = MoE(WIDTH, experts=EXPERTS, load_balance=0.3, router_z=0.7).double()
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    aux = block(x).aux
    logits = x.reshape(-1, WIDTH) @ block.router.weight.T
    p = logits.softmax(-1)
    torch.testing.assert_close(aux["loss/router_z"], 0.7 * logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(aux["stat/router_entropy"], -(p * p.log()).sum(-1).mean())
    counts = torch.bincount(p.topk(2).indices.flatten(), minlength=EXPERTS)
    torch.testing.assert_close(aux["stat/load"], counts.double() / 36)
    assert aux["stat/dropped"] == 0
    assert all(not value.requires_grad for name, value in aux.items() if name.startswith("stat/"))
    assert all(value.requires_grad for name, value in aux.items() if name.startswith("loss/"))
    none = MoE(WIDTH, load_balance=0.0)(torch.randn(1, 3, WIDTH)).aux
    assert set(none) == {"stat/load", "stat/dropped", "stat/router_entropy", "sum/choices"}


@pytest.mark.parametrize("train", [False, True])
def test_padding_changes_no_loss_and_no_statistic(train):
    """Left, right and between, full of NaN; with a capacity too, which counts valid tokens alone."""
    router = {"kind": "top_k", "capacity_factor": 0.8}
    block = MoE(WIDTH, experts=EXPERTS, router=router, router_z=0.1).double().train(train)
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    padded = torch.full((2, 13, WIDTH), torch.nan, dtype=torch.float64)
    places = torch.tensor([[2, 3, 4, 6, 7, 8, 9, 11], [0, 1, 2, 3, 4, 10, 11, 12]])
    segments = torch.zeros(2, 13, dtype=torch.long).scatter_(1, places, 1)
    index = places[..., None].expand(-1, -1, WIDTH)
    padded.scatter_(1, index, x)
    found, wanted = block(padded, None, segments), block(x)
    torch.testing.assert_close(found.y.gather(1, index), wanted.y, rtol=0, atol=1e-12)
    assert torch.equal(found.y[segments == 0], torch.zeros(10, WIDTH, dtype=torch.float64))
    assert found.aux.keys() == wanted.aux.keys()
    for name in wanted.aux:
        torch.testing.assert_close(found.aux[name], wanted.aux[name], rtol=0, atol=1e-12)
    assert (wanted.aux["stat/dropped"] > 0) == train


# Dropping and jitter --------------------------------------------------------------------------------------------


def greedy(chosen, segments, capacity_factor, experts):
    """Serve choices in order of time, document by document, with plain counters."""
    kept = torch.zeros_like(chosen, dtype=torch.bool)
    for row in range(chosen.shape[0]):
        taken, last, size = {}, None, 0
        for time in range(chosen.shape[1]):
            document = int(segments[row, time])
            if document == 0:
                continue
            if document != last:
                taken, last = dict.fromkeys(range(experts), 0), document
                rest = segments[row, time:].tolist()
                size = 0
                for each in rest:  # the run: up to the next other document
                    if each not in (0, document):
                        break
                    size += each == document
            capacity = math.ceil(capacity_factor * size * chosen.shape[2] / experts)
            for choice, expert in enumerate(chosen[row, time].tolist()):
                kept[row, time, choice] = taken[expert] < capacity
                taken[expert] += 1
    return kept


@pytest.mark.parametrize("capacity_factor", [0.3, 0.75, 1.0, 1.25, 8.0])
@pytest.mark.parametrize("packed", [False, True])
def test_dropping_serves_in_order_of_time(capacity_factor, packed):
    router = TopK(WIDTH, EXPERTS, 2, capacity_factor=capacity_factor).double().train()
    x = torch.randn(3, 14, WIDTH, dtype=torch.float64)
    segments = None
    if packed:
        segments = torch.tensor(
            [[1] * 14, [0, 1, 1, 1, 0, 1, 2, 2, 2, 2, 0, 1, 1, 1], [5, 5, 5, 5, 5, 5, 0, 0, 3, 3, 3, 0, 0, 0]]
        )
    routing = router(x, segments)
    everyone = torch.ones(3, 14, dtype=torch.long) if segments is None else segments
    chosen = routing.probabilities.topk(2).indices.reshape(3, 14, 2)
    kept = greedy(chosen, everyone, capacity_factor, EXPERTS).reshape(-1, 2)
    assert torch.equal(routing.experts, torch.where(kept, chosen.reshape(-1, 2), EXPERTS))
    assert torch.equal(routing.weights != 0, kept)
    block = MoE(WIDTH, experts=EXPERTS, router=router).double().train()
    dropped = block(x, None, segments).aux["stat/dropped"]
    choices = 2 * int((everyone != 0).sum())
    torch.testing.assert_close(dropped, 1 - kept.sum().double() / choices)
    assert (dropped == 0) == (capacity_factor == 8.0)
    assert not (router.eval()(x).experts == EXPERTS).any()


def test_dropping_is_causal_and_rows_do_not_compete():
    block = MoE(WIDTH, experts=EXPERTS, router={"kind": "top_k", "capacity_factor": 0.6}).double().train()
    x, other = torch.randn(2, 2, 14, WIDTH, dtype=torch.float64)
    whole = block(x)
    assert whole.aux["stat/dropped"] > 0
    for cut in range(1, 14):
        mixed = torch.cat([x[:, :cut], other[:, cut:]], 1)
        torch.testing.assert_close(block(mixed).y[:, :cut], whole.y[:, :cut], rtol=0, atol=1e-12)
    torch.testing.assert_close(block(x[1:]).y, whole.y[1:], rtol=0, atol=1e-12)


def test_jitter_is_for_training_and_for_the_router_alone():
    x = torch.randn(2, 9, WIDTH)
    router = TopK(WIDTH, EXPERTS, 2, jitter=0.3)
    plain = router.eval()(x)
    assert torch.equal(plain.logits, router(x).logits)
    before = x.clone()
    noisy = router.train()(x)
    assert torch.equal(x, before)
    assert not torch.allclose(noisy.logits, plain.logits)
    # x · U(0.7, 1.3): a logit moves by at most 0.3 · Σ |w x|.
    bound = 0.3 * (x.reshape(-1, WIDTH).abs() @ router.weight.abs().T)
    assert ((noisy.logits - plain.logits).abs() <= bound + 1e-5).all()


# GShard's second expert -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["softmax_then_top_k", "top_k_then_softmax"])
def test_random_second_is_visited_by_its_weight(order):
    """With probability min(1, 2 g2), g2 its share of the two weights; the first always; neither weight changes."""
    router = TopK(WIDTH, EXPERTS, 2, order=order, random_second=True).double()
    with torch.no_grad():
        router.weight.mul_(3)
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    routing = router(x.expand(4000, -1, -1))
    whole = router.eval()(x)
    assert torch.equal(routing.experts, routing.chosen)
    experts, weights = routing.experts.reshape(4000, 6, 2), routing.weights.reshape(4000, 6, 2)
    assert torch.equal(experts[..., 0], whole.experts[:, 0].expand(4000, -1))
    torch.testing.assert_close(weights[..., 0], whole.weights[:, 0].expand(4000, -1), rtol=0, atol=1e-14)
    visited = experts[..., 1] < EXPERTS
    second = whole.weights[:, 1].expand(4000, -1)
    torch.testing.assert_close(weights[..., 1], torch.where(visited, second, 0.0), rtol=0, atol=1e-14)
    assert torch.equal(experts[..., 1][visited], whole.experts[:, 1].expand(4000, -1)[visited])
    share = whole.weights[:, 1] / whole.weights.sum(-1)
    torch.testing.assert_close(visited.double().mean(0), (2 * share).clamp_max(1), rtol=0, atol=0.03)
    assert share.min() < 0.3


def test_random_second_counts_where_it_is_made():
    """A choice not made is in no load, takes no place of a capacity and is not called dropped; padding stays out."""
    router = {"kind": "top_k", "random_second": True, "capacity_factor": 4.0}
    block = MoE(WIDTH, experts=EXPERTS, router=router).double()
    with torch.no_grad():
        block.router.weight.mul_(5)
    segments = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2, 2]]).expand(8, -1)
    aux = block(torch.randn(8, 10, WIDTH, dtype=torch.float64), None, segments).aux
    assert 64 < aux["sum/choices"].sum() < 128
    assert aux["stat/dropped"] == 0
    with pytest.raises(ValueError, match=r"random_second=True needs a second expert and no third.*not top_k=3"):
        TopK(WIDTH, EXPERTS, 3, random_second=True)


@pytest.mark.parametrize("order", ["softmax_then_top_k", "top_k_then_softmax"])
def test_experts_of_the_best_groups(order):
    """Groups are ranked by their one best expert; weights are those of the chosen, times the scale."""
    router = TopK(WIDTH, 6, 3, order=order, groups=3, top_groups=2, scale=2.5).double()
    routing = router(torch.randn(4, 7, WIDTH, dtype=torch.float64))
    for logits, experts, weights in zip(routing.logits, routing.experts, routing.weights, strict=True):
        best = logits.reshape(3, 2).amax(1).topk(2).indices.tolist()
        allowed = sorted((e for e in range(6) if e // 2 in best), key=lambda e, row=logits: -row[e])[:3]
        assert experts.tolist() == allowed
        torch.testing.assert_close(weights, 2.5 * logits[allowed].softmax(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 4}, "groups=4 must divide experts=6; try groups=2"),
        ({"groups": 2, "top_groups": 3}, "top_groups=3 must not be above groups=2"),
        ({"groups": 6, "top_groups": 2}, "top_k=3 is above the 2 experts in top_groups=2 of 1 each; use top_groups=3"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
    ],
)
def test_groups_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TopK(WIDTH, 6, 3, **options)
