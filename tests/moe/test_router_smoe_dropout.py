"""SMoE-Dropout: a router that nothing changes, and a k that follows the step."""

import copy

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.moe.moe import MoE
from zoo.moe.router_smoe_dropout import SMoEDropout

WIDTH, EXPERTS = 16, 6


def after(router, steps):
    for step in range(steps):
        router.after_step(step + 1, {})
    return router


def test_routing_is_the_softmax_over_the_k_largest():
    router = after(SMoEDropout(WIDTH, EXPERTS, 2, steps=8).double(), 2)  # 2 + round(4 · 2/8) = 3
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    routing = router(x)
    for token, experts, weights in zip(x.reshape(-1, WIDTH), routing.experts, routing.weights, strict=True):
        logits = router.weight @ token + router.bias
        chosen = sorted(range(EXPERTS), key=lambda e: -float(logits[e]))[:3]
        assert experts.tolist() == chosen
        torch.testing.assert_close(weights, logits[chosen].exp() / logits[chosen].exp().sum(), rtol=0, atol=1e-14)


def test_k_grows_with_the_step_to_all_experts():
    """round((max - min) · step / steps) + min, as the authors compute it, where `step` updates are done."""
    router = SMoEDropout(WIDTH, 16, 8, steps=20)
    found = [router.train_top_k]
    for step in range(25):
        router.after_step(step + 1, {})
        found.append(router.train_top_k)
    assert found == [8, 8, 9, 9, 10, 10, 10, 11, 11, 12, 12, 12, 13, 13, 14, 14, 14, 15, 15, 16, 16, *[16] * 5]
    assert router.step == 25
    x = torch.randn(1, 3, WIDTH)
    assert router(x).experts.shape == (3, 16)


def test_with_all_experts_it_is_their_softmax():
    block = MoE(WIDTH, experts=EXPERTS, router={"kind": "smoe_dropout", "steps": 1}, expert="mlp").double()
    after(block.router, 1)
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    weights = F.linear(x[0], block.router.weight, block.router.bias).softmax(-1)
    each = torch.stack(
        [F.gelu(x[0] @ up) @ down for up, down in zip(block.experts.up, block.experts.down, strict=True)]
    )
    torch.testing.assert_close(block(x).y[0], torch.einsum("te,etd->td", weights, each), rtol=0, atol=1e-12)


def test_k_in_eval_mode_is_free_to_choose():
    block = MoE(WIDTH, experts=EXPERTS, top_k=2, router="smoe_dropout").eval()
    router, x = block.router, torch.randn(1, 3, WIDTH)
    one = sum(p.numel() for p in block.experts.parameters()) // EXPERTS
    assert router(x).experts.shape[1] == 2  # as many as in training by now
    for k in (1, 4, EXPERTS):
        router.eval_top_k = k
        assert router(x).experts.shape[1] == k
        torch.testing.assert_close(router(x).weights.sum(-1), torch.ones(3))
        assert block.active_parameters() == k * one
        assert block.flops_per_token(0) == 2 * (k * one + EXPERTS * WIDTH)
    router.train()
    assert router(x).experts.shape[1] == 2
    assert block.active_parameters() == 2 * one
    with pytest.raises(ValueError, match="eval_top_k=7 must be between 1 and experts=6, or None"):
        router.eval_top_k = 7
    with pytest.raises(ValueError, match="eval_top_k=0 must be a positive integer"):
        router.eval_top_k = 0


def test_nothing_changes_the_router_but_a_load():
    block = MoE(WIDTH, experts=EXPERTS, router="smoe_dropout", load_balance=0.0)
    assert not list(block.router.parameters())
    before = copy.deepcopy(block.router.state_dict())
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1)
    block(torch.randn(2, 5, WIDTH)).y.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in block.router.state_dict().items())


def test_the_step_goes_with_the_weights():
    trained = after(SMoEDropout(WIDTH, EXPERTS, 1, steps=10), 6)
    loaded = SMoEDropout(WIDTH, EXPERTS, 1, steps=10)
    loaded.load_state_dict(trained.state_dict())
    assert loaded.train_top_k == trained.train_top_k == 4
    other = SMoEDropout(WIDTH, EXPERTS, 1, steps=10)  # as loaders do that fill the buffers themselves
    other.step = trained.step.clone()
    assert other.train().train_top_k == 4
    assert copy.deepcopy(trained).train_top_k == 4
    after(loaded, 2)
    assert loaded.step == 8
    assert loaded.train_top_k == 5
    with torch.device("meta"):
        empty = SMoEDropout(WIDTH, EXPERTS, 1)
    empty.load_state_dict(trained.state_dict(), assign=True)
    assert empty.step == 6


def test_padding_counts_nowhere():
    block = after(MoE(WIDTH, experts=EXPERTS, router={"kind": "smoe_dropout", "steps": 4}).double(), 1)
    x = torch.randn(1, 8, WIDTH, dtype=torch.float64)
    padded = torch.full((1, 12, WIDTH), torch.nan, dtype=torch.float64)
    padded[:, 2:10] = x
    segments = torch.tensor([[0] * 2 + [1] * 8 + [0] * 2])
    found, wanted = block(padded, None, segments), block(x)
    torch.testing.assert_close(found.y[:, 2:10], wanted.y, rtol=0, atol=1e-12)
    assert not found.y[:, :2].any()
    assert wanted.aux["sum/choices"].sum() == 3 * 8
    for name, value in wanted.aux.items():
        torch.testing.assert_close(found.aux[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0 must be a positive integer"),
        ({"eval_top_k": 9}, "eval_top_k=9 must be between 1 and experts=8"),
        ({"step": 3}, "router 'smoe_dropout' has no option 'step'.*did you mean 'steps'"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        zoo.block("moe", 24, router={"kind": "smoe_dropout"} | options)
