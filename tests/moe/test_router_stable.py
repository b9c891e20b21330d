"""StableMoE: two losses and a light router that learns in stage 1, and is all that chooses in stage 2."""

import copy

import pytest
import torch

import zoo
from zoo.moe.moe import MoE
from zoo.moe.router_stable import Stable

WIDTH, EXPERTS = 16, 5


def made(top_k=1, **options) -> Stable:
    return Stable(WIDTH, EXPERTS, top_k, **{"stage_steps": 3, "rank": 3} | options).double()


def both_logits(router, x):
    x = x.reshape(-1, WIDTH)
    return x @ router.weight.T, x @ router.light.encode.weight.T @ router.light.decode.weight.T


@pytest.mark.parametrize("top_k", [1, 2])
def test_stage_1_routes_by_its_own_scores_and_evaluates_by_the_light(top_k):
    router, x = made(top_k), torch.randn(2, 20, WIDTH, dtype=torch.float64)
    own, light = both_logits(router, x)
    for training, logits in ((True, own), (False, light)):
        routing = router.train(training)(x)
        chosen = logits.topk(top_k).indices
        assert torch.equal(routing.experts, chosen)
        torch.testing.assert_close(routing.weights, own.sigmoid().gather(1, chosen), rtol=0, atol=1e-14)
    assert not torch.equal(own.topk(top_k).indices, light.topk(top_k).indices)
    assert "loss/distill" in router.train()(x).aux
    assert not [name for name in router.eval()(x).aux if name.startswith("loss/")]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_losses_are_the_definitions(top_k, padded):
    """Σ_e (n_e - n)/n Σ_{t of e} σ(s_te) and the cross entropy, by loops; both over the number of choices."""
    router, x = made(top_k, balance=0.7, distill=0.2), torch.randn(1, 30, WIDTH, dtype=torch.float64)
    segments = (torch.rand(1, 30) < 0.7).long() if padded else None
    aux = router(x, segments).aux
    kept = torch.ones(30, dtype=torch.bool) if segments is None else segments[0] != 0
    own, light = (each[kept] for each in both_logits(router, x))
    chosen = own.topk(top_k).indices
    counts = [int((chosen == e).sum()) for e in range(EXPERTS)]
    mean = sum(counts) / EXPERTS
    balance = sum((counts[e] - mean) / mean * own[:, e].sigmoid()[(chosen == e).any(-1)].sum() for e in range(EXPERTS))
    target = torch.nn.functional.cross_entropy(light.repeat_interleave(top_k, 0), chosen.flatten())
    torch.testing.assert_close(aux["loss/balance"], 0.7 * balance / chosen.numel(), rtol=0, atol=1e-12)
    torch.testing.assert_close(aux["loss/distill"], 0.2 * target, rtol=0, atol=1e-12)
    same = [len({*a} & {*b}) for a, b in zip(chosen.tolist(), light.topk(top_k).indices.tolist(), strict=True)]
    assert float(aux["stat/agreement"]) == pytest.approx(sum(same) / chosen.numel())
    assert not aux["stat/agreement"].requires_grad


def test_each_loss_reaches_its_own_part_alone():
    """Distillation teaches the light router, and neither the scores nor what lies below; balance the scores."""
    router, x = made(), torch.randn(1, 30, WIDTH, dtype=torch.float64, requires_grad=True)
    light = [*router.light.parameters()]
    aux = router(x).aux
    gradients = torch.autograd.grad(aux["loss/distill"], [x, router.weight, *light], allow_unused=True)
    assert [each is not None and bool(each.any()) for each in gradients] == [False, False, True, True]
    gradients = torch.autograd.grad(aux["loss/balance"], [x, router.weight, *light], allow_unused=True)
    assert [each is not None and bool(each.any()) for each in gradients] == [True, True, False, False]


def test_stage_2_is_frozen_whatever_the_optimizer_does():
    """The optimizer moves what it holds by momentum and weight decay; the choices stay those of the switch."""
    block = MoE(WIDTH, experts=EXPERTS, top_k=1, router=made(), load_balance=0.0).double()
    router = block.router
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.05, weight_decay=0.1)
    fixed = torch.randn(2, 40, WIDTH, dtype=torch.float64)
    choices, scores = [], []
    for step in range(6):
        choices.append(router.eval()(fixed).experts)
        scores.append(both_logits(router, fixed)[1])
        router.train()
        if step < 3:
            assert router.stage == 1
        out = block(torch.randn(2, 40, WIDTH, dtype=torch.float64))
        optimizer.zero_grad()
        (out.y.square().mean() + sum(value for name, value in out.aux.items() if "loss/" in name)).backward()
        assert all(each.grad is not None for each in block.parameters())  # replicated training waits for each
        if step >= 3:
            assert router.stage == 2
            assert "loss/balance" not in out.aux
            assert out.aux["loss/distill"] == 0
            assert not any(each.grad.any() for each in router.light.parameters())
            assert router.weight.grad.any()
            assert torch.equal(router(fixed).experts, choices[3])
        optimizer.step()
        block.after_step(step + 1, {"sum/choices": out.aux["sum/choices"]})
    assert not torch.equal(choices[0], choices[3])
    assert all(torch.equal(each, choices[3]) for each in choices[4:])
    assert not torch.equal(scores[3], scores[5])  # of the weights that the optimizer holds
    assert torch.equal(choices[3], scores[3].argmax(-1, keepdim=True))


def test_the_light_router_learns_the_choices():
    router, x = made(stage_steps=1000), torch.randn(1, 400, WIDTH, dtype=torch.float64)
    optimizer = torch.optim.Adam(router.light.parameters(), lr=0.02)
    found = []
    for _ in range(150):
        aux = router(x).aux
        found.append(float(aux["stat/agreement"]))
        optimizer.zero_grad()
        aux["loss/distill"].backward()
        optimizer.step()
    assert found[0] < 0.5
    assert found[-1] > 0.75


def test_the_stage_goes_with_the_weights():
    trained, x = made(), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    for step in range(3):
        trained.after_step(step + 1, {})
    with torch.no_grad():
        trained.light.encode.weight.add_(1.0)  # the optimizer goes on
    loaded = made()
    loaded.load_state_dict(trained.state_dict())
    assert loaded.stage == trained.stage == 2
    assert torch.equal(loaded(x).experts, trained(x).experts)
    loaded.after_step(1, {})  # of another run, that trains it further
    assert loaded.stage == 2
    assert torch.equal(loaded(x).experts, trained(x).experts)
    assert copy.deepcopy(trained).stage == 2
    assert made(stage_steps=0).stage == 2


@pytest.mark.parametrize("steps", [0, 3])
def test_padding_counts_nowhere(steps):
    block = MoE(WIDTH, experts=EXPERTS, top_k=2, router=made(2), load_balance=0.0).double()
    for step in range(steps):
        block.after_step(step + 1, {})
    x = torch.randn(1, 8, WIDTH, dtype=torch.float64)
    padded = torch.full((1, 12, WIDTH), torch.nan, dtype=torch.float64)
    padded[:, 3:11] = x
    padded.requires_grad_()
    found, wanted = block(padded, None, torch.tensor([[0] * 3 + [1] * 8 + [0]])), block(x)
    torch.testing.assert_close(found.y[:, 3:11], wanted.y, rtol=0, atol=1e-12)
    assert found.aux.keys() == wanted.aux.keys()
    for name, value in wanted.aux.items():
        torch.testing.assert_close(found.aux[name], value, rtol=0, atol=1e-12)
    loss = found.y.sum() + sum(value for name, value in found.aux.items() if "loss/" in name)
    assert torch.autograd.grad(loss, padded)[0].isfinite().all()


def test_compiles_in_both_stages():
    block = MoE(WIDTH, experts=EXPERTS, top_k=1, router=made(), load_balance=0.0).double()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for step in range(4):
        results = []
        for run in (block, compiled):
            y, _, aux = run(x)
            loss = y.square().sum() + sum(value for name, value in aux.items() if "loss/" in name)
            results.append([y, *aux.values(), *torch.autograd.grad(loss, [*block.parameters()])])
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
        block.after_step(step + 1, {})
    assert block.router.stage == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"balance": -0.1}, "balance=-0.1 must not be negative"),
        ({"distill": -0.1}, "distill=-0.1 must not be negative"),
        ({"stage_steps": -1}, "stage_steps=-1 must be an integer that is not negative"),
        ({"rank": 9}, "rank=9 is above 8"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        zoo.block("moe", 24, router={"kind": "stable"} | options)
