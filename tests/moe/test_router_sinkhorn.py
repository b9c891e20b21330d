"""Sinkhorn's plan, and the router that takes the best of it while training and the best logit after."""

import math

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.moe.moe import MoE
from zoo.moe.router_sinkhorn import Sinkhorn, sinkhorn

WIDTH, EXPERTS = 16, 5


def published(cost, tolerance):
    """BlackMamba's iteration as it stands in its equations: factors of rows and columns, until columns rest."""
    tokens, experts = cost.shape
    columns = 1 / (experts * cost.sum(0))
    error = math.inf
    while error > tolerance:
        rows = 1 / tokens / (cost * columns).sum(1)
        before, columns = columns, 1 / experts / (cost * rows[:, None]).sum(0)
        error = (columns - before).abs().mean()
    return rows[:, None] * cost * columns


def plan(scores, valid=None, iterations=8):
    f, g = sinkhorn(scores, valid, iterations)
    return (f[:, None] + g + scores).exp()


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_plan_is_the_published_iterations(spread):
    scores = spread * torch.randn(30, EXPERTS, dtype=torch.float64)
    expected = published(scores.exp(), 1e-16)
    torch.testing.assert_close(plan(scores, iterations=400), expected, rtol=1e-9, atol=1e-12)
    # The start too: one turn of each from columns 1 / (E · Σ).
    columns = 1 / (EXPERTS * scores.exp().sum(0))
    rows = 1 / 30 / (scores.exp() * columns).sum(1)
    columns = 1 / EXPERTS / (scores.exp() * rows[:, None]).sum(0)
    torch.testing.assert_close(plan(scores, iterations=1), rows[:, None] * scores.exp() * columns)


def test_rows_and_columns_sum_as_they_must():
    """Experts' sums are exact after any number of turns, tokens' sums come ever nearer to 1/N."""
    scores = 2 * torch.randn(40, EXPERTS, dtype=torch.float64)
    errors = []
    for iterations in (1, 4, 8, 16, 200):
        found = plan(scores, iterations=iterations)
        torch.testing.assert_close(found.sum(0), torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64))
        errors.append((40 * found.sum(1) - 1).abs().max())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2
    assert errors[-1] < 1e-12
    assert errors[2] < 2e-2


def test_padding_has_no_part_in_the_plan():
    scores = 2 * torch.randn(20, EXPERTS, dtype=torch.float64)
    padded = torch.full((31, EXPERTS), 7.0, dtype=torch.float64)
    valid = torch.zeros(31, dtype=torch.bool)
    valid[torch.randperm(31)[:20]] = True
    padded[valid] = scores
    found = plan(padded, valid)
    torch.testing.assert_close(found[valid], plan(scores), rtol=1e-12, atol=1e-15)
    assert (found[~valid] == 0).all()
    _, g = sinkhorn(padded.float(), torch.zeros(31, dtype=torch.bool))  # nothing but padding
    assert g.isfinite().all()


def test_extreme_scores_are_finite():
    """exp(2 · 500) overflows even float64; in logarithms it is a number like any other."""
    scores = 1000 * torch.randn(20, EXPERTS)
    f, g = sinkhorn(scores)
    assert f.isfinite().all()
    assert g.isfinite().all()
    torch.testing.assert_close(plan(scores).sum(0), torch.full((EXPERTS,), 1 / EXPERTS), rtol=1e-3, atol=1e-4)


def biased(favourite=4.0):
    """A router whose logits favour one expert, so that without a plan it would take nearly all tokens."""
    router = Sinkhorn(WIDTH, EXPERTS, 1)
    with torch.no_grad():
        router.bias[2] = favourite
    return router.double()


def test_training_takes_the_best_of_the_plan():
    router = biased().train()
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    routing = router(x)
    logits = x.reshape(-1, WIDTH) @ router.weight.T + router.bias
    expected = plan(2 * logits.detach()).argmax(1)
    assert torch.equal(routing.experts[:, 0], expected)
    assert (expected != logits.argmax(1)).any()
    # The weight is the plain gate's, of the chosen expert.
    torch.testing.assert_close(routing.weights[:, 0], logits.sigmoid().gather(1, expected[:, None])[:, 0])
    once = Sinkhorn(WIDTH, EXPERTS, 1, sharpness=0.5, iterations=1).double().train()
    once.load_state_dict(router.state_dict())
    expected = plan(0.5 * logits.detach(), iterations=1).argmax(1)
    assert torch.equal(once(x).experts[:, 0], expected)
    assert (expected != routing.experts[:, 0]).any()


def test_training_is_balanced_and_evaluation_is_not():
    router = biased()
    x = torch.randn(4, 100, WIDTH, dtype=torch.float64)
    loads = {}
    for train in (True, False):
        chosen = router.train(train)(x).experts.flatten()
        loads[train] = torch.bincount(chosen, minlength=EXPERTS) / chosen.numel()
    assert loads[False][2] > 0.9
    assert loads[True].max() < 0.35
    assert loads[True].min() > 0.1


def test_evaluation_is_the_published_inference():
    """argmax and value of sigmoid(W x + b), for each token alone."""
    router = Sinkhorn(WIDTH, EXPERTS, 1).double().eval()
    torch.nn.init.normal_(router.bias)
    x = torch.randn(3, 7, WIDTH, dtype=torch.float64)
    value, index = (x @ router.weight.T + router.bias).sigmoid().max(-1)
    routing = router(x)
    assert torch.equal(routing.experts.flatten(), index.flatten())
    torch.testing.assert_close(routing.weights.flatten(), value.flatten())
    assert router(x[1:2, 3:4]).experts.item() == index[1, 3]


def test_gradient_reaches_the_weight_of_the_chosen_alone():
    router = biased().train()
    x = torch.randn(1, 12, WIDTH, dtype=torch.float64)
    routing = router(x)
    (found,) = torch.autograd.grad(routing.weights.sum(), router.weight)
    logits = x[0] @ router.weight.T + router.bias
    (expected,) = torch.autograd.grad(logits.sigmoid().gather(1, routing.experts).sum(), router.weight)
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0


def test_while_training_a_choice_looks_at_other_tokens_and_the_weight_does_not():
    """As published, and said in the docstring; after training a token is on its own."""
    router = biased()
    x = torch.randn(1, 30, WIDTH, dtype=torch.float64)
    other = x.clone()
    other[:, 15:] = 3 * torch.randn(1, 15, WIDTH, dtype=torch.float64)
    router.train()
    one, two = router(x), router(other)
    changed = one.experts[:15] != two.experts[:15]
    assert changed.any()
    torch.testing.assert_close(one.weights[:15][~changed], two.weights[:15][~changed])
    router.eval()
    assert torch.equal(router(x).experts[:15], router(other).experts[:15])
    assert torch.equal(router(x).weights[:15], router(other).weights[:15])


@pytest.mark.parametrize("train", [False, True])
def test_padding_changes_nothing(train):
    block = MoE(WIDTH, experts=EXPERTS, top_k=1, router="sinkhorn", load_balance=0.1).double().train(train)
    with torch.no_grad():
        block.router.bias[0] = 2.0
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    padded = torch.full((2, 13, WIDTH), torch.nan, dtype=torch.float64)
    places = torch.tensor([[2, 3, 4, 6, 7, 8, 9, 11], [0, 1, 2, 3, 4, 10, 11, 12]])
    segments = torch.zeros(2, 13, dtype=torch.long).scatter_(1, places, 1)
    index = places[..., None].expand(-1, -1, WIDTH)
    padded.scatter_(1, index, x)
    found, wanted = block(padded, None, segments), block(x)
    torch.testing.assert_close(found.y.gather(1, index), wanted.y, rtol=0, atol=1e-12)
    assert torch.equal(found.y[segments == 0], torch.zeros(10, WIDTH, dtype=torch.float64))
    for name in wanted.aux:
        torch.testing.assert_close(found.aux[name], wanted.aux[name], rtol=0, atol=1e-12)
    nothing = block(padded, None, torch.zeros_like(segments)).y
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_padding_does_not_draw_the_others_away():
    """Four times as much padding as tokens, all of which would go to the favourite."""
    router = biased().train()
    x = torch.randn(1, 40, WIDTH, dtype=torch.float64)
    padded = torch.cat([x, torch.zeros(1, 160, WIDTH, dtype=torch.float64)], 1)
    segments = torch.cat([torch.ones(1, 40), torch.zeros(1, 160)], 1).long()
    found, wanted = router(padded, segments), router(x)
    assert torch.equal(found.experts[:40], wanted.experts)
    assert (found.experts[40:] == EXPERTS).all()
    assert (found.weights[40:] == 0).all()
    assert not torch.equal(router(padded).experts[:40], wanted.experts)


def test_block_is_the_chosen_expert_times_its_gate():
    block = MoE(WIDTH, experts=EXPERTS, top_k=1, router="sinkhorn", load_balance=0.0).double().train()
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    routing = block.router(x)
    rows = []
    for token, expert, weight in zip(x[0], routing.experts[:, 0], routing.weights[:, 0], strict=True):
        gate, value = (token @ block.experts.up[expert]).chunk(2)
        rows.append(weight * ((F.silu(gate) * value) @ block.experts.down[expert]))
    torch.testing.assert_close(block(x).y[0], torch.stack(rows), rtol=1e-12, atol=1e-12)
    assert "loss/load_balance" not in block(x).aux


def test_more_than_one_choice_is_megatrons():
    router = Sinkhorn(WIDTH, EXPERTS, 2, sharpness=1.0, bias=False).double().train()
    assert router.bias is None
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    logits = (x[0] @ router.weight.T).detach()
    expected = plan(logits).topk(2).indices
    routing = router(x)
    assert torch.equal(routing.experts, expected)
    torch.testing.assert_close(routing.weights, logits.softmax(-1).gather(1, expected))


def test_compiles_into_one_graph_and_works_in_bfloat16():
    block = MoE(WIDTH, experts=EXPERTS, top_k=1, router="sinkhorn").train()
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    segments = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(x, None, segments), block(x, None, segments)
    torch.testing.assert_close(found.y, wanted.y)
    (gradient,) = torch.autograd.grad(found.y.square().sum(), x)
    (expected,) = torch.autograd.grad(wanted.y.square().sum(), x)
    torch.testing.assert_close(gradient, expected)
    routing = block.router.bfloat16()(x.bfloat16())
    assert routing.logits.dtype == torch.float32
    assert routing.weights.isfinite().all()


def test_bias_is_free_of_weight_decay():
    from zoo.block import tags

    assert {name for name, tag in tags(Sinkhorn(WIDTH, EXPERTS, 1)).items() if not tag.weight_decay} == {"bias"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sharpness": 0.0}, "sharpness=0.0 must be positive"),
        ({"sharpness": "2e0"}, "sharpness='2e0' is text"),
        ({"iterations": 0}, "iterations=0 must be a positive integer"),
        ({"tolerance": 1e-4}, "router 'sinkhorn' has no option 'tolerance'.*sharpness, iterations, bias"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        zoo.block("moe", 24, top_k=1, router={"kind": "sinkhorn"} | options)
