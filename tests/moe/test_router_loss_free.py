"""Loss-free balancing: the bias chooses and never weighs, and moves once a step. DeepSeek-V3's router is one of it."""

import pytest
import torch

import zoo
from zoo.moe.moe import MoE
from zoo.moe.router_loss_free import LossFree

WIDTH, EXPERTS = 16, 8


def biased(**options) -> LossFree:
    router = LossFree(WIDTH, EXPERTS, 2, **options).double()
    with torch.no_grad():
        router.bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    return router


# DeepSeek-V3 ---------------------------------------------------------------------------------------------------


class InDouble:
    """torch, with float64 where the peer asks for float32: what it computes is then compared to the last digits."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 1), (4, 2), (2, 2)])
def test_equals_deepseek_v3(groups, top_groups, renormalise, monkeypatch):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as peers

    config = DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=12,
        n_routed_experts=EXPERTS,
        n_shared_experts=2,
        num_experts_per_tok=2,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
    )
    config._experts_implementation = "eager"
    monkeypatch.setattr(peers, "torch", InDouble())
    peer = peers.DeepseekV3MoE(config).double().eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.3)
        # Not negative: older transformers fill groups that are out with 0, which lies below scores alone.
        peer.gate.e_score_correction_bias.uniform_(0, 0.5)
    router = {"kind": "loss_free", "groups": groups, "top_groups": top_groups, "renormalise": renormalise, "scale": 2.5}
    block = MoE(WIDTH, experts=EXPERTS, top_k=2, hidden=12, router=router, shared_experts=2).double().eval()
    with torch.no_grad():
        block.router.weight.copy_(peer.gate.weight)
        block.router.bias.copy_(peer.gate.e_score_correction_bias)
        block.experts.up.copy_(peer.experts.gate_up_proj.transpose(1, 2))
        block.experts.down.copy_(peer.experts.down_proj.transpose(1, 2))
        block.shared.up.weight.copy_(
            torch.cat([peer.shared_experts.gate_proj.weight, peer.shared_experts.up_proj.weight])
        )
        block.shared.down.weight.copy_(peer.shared_experts.down_proj.weight)
    x = torch.randn(3, 21, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(block(x).y, peer(x), rtol=0, atol=1e-9)
    if groups > top_groups:
        free = MoE(WIDTH, experts=EXPERTS, top_k=2, router="loss_free").double().router
        free.load_state_dict(block.router.state_dict())
        assert not torch.equal(free(x).experts, block.router(x).experts)  # groups exclude some choice here


# The bias ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_the_bias_chooses_and_never_weighs(scores):
    router = biased(scores=scores)
    x = torch.randn(2, 30, WIDTH, dtype=torch.float64)
    routing = router(x)
    logits = x.reshape(-1, WIDTH) @ router.weight.T
    values = logits.sigmoid() if scores == "sigmoid" else logits.softmax(-1)
    chosen = (values + router.bias).topk(2).indices
    assert torch.equal(routing.experts, chosen)
    assert not torch.equal(chosen, values.topk(2).indices)
    torch.testing.assert_close(routing.weights, values.gather(1, chosen), rtol=0, atol=1e-14)
    torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(60, dtype=torch.float64))
    assert {name for name, _ in router.named_parameters()} == {"weight"}
    assert "bias" in router.state_dict()
    assert not router.bias.requires_grad


def test_the_bias_moves_by_the_sign_alone():
    router = biased(update_rate=0.01)
    before = router.bias.clone()
    counts = torch.tensor([4, 0, 3, 5, 1000, 4, 4, 3])  # the mean is 127.875
    router.after_step(1, {"sum/choices": counts})
    wanted = before + 0.01 * torch.tensor([1, 1, 1, 1, -1, 1, 1, 1])
    assert torch.equal(router.bias, wanted)
    router.after_step(2, {"sum/choices": torch.full((EXPERTS,), 7)})
    assert torch.equal(router.bias, wanted)
    router.after_step(3, {"sum/choices": torch.tensor([7, 7, 6, 8, 7, 7, 7, 7])})
    assert torch.equal(router.bias, wanted + 0.01 * torch.tensor([0, 0, 1, -1, 0, 0, 0, 0]))


def test_without_counts_it_says_what_to_do():
    router = biased()
    before = router.bias.clone()
    with pytest.raises(ValueError, match=r"no counts of the step's choices.*add_sums"):
        router.after_step(1, {})
    router.eval().after_step(1, {})
    assert torch.equal(router.bias, before)


def test_it_balances_a_skewed_start():
    """The router starts with two favourites that get nearly all; only the bias moves."""
    block = MoE(WIDTH, experts=EXPERTS, router={"kind": "loss_free", "update_rate": 0.02}, load_balance=0.0)
    with torch.no_grad():
        block.router.weight[:2, 0] += 3.0
    x = torch.randn(8, 64, WIDTH)
    x[..., 0] = 1.0
    first = block(x).aux["stat/load"]
    for step in range(100):
        aux = block(x).aux
        block.after_step(step + 1, {"sum/choices": aux["sum/choices"]})
    last = block(x).aux["stat/load"]
    assert first.max() > 0.45
    assert last.max() < 1.3 / EXPERTS
    assert last.min() > 0.7 / EXPERTS


@pytest.mark.parametrize("padding", [False, True])
def test_padding_counts_nowhere(padding):
    block = MoE(WIDTH, experts=EXPERTS, router=biased(renormalise=True), router_z=0.1).double()
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    wanted = block(x)
    assert int(wanted.aux["sum/choices"].sum()) == 2 * 2 * 8
    padded = torch.full((2, 20, WIDTH), torch.nan, dtype=torch.float64)
    segments = torch.zeros(2, 20, dtype=torch.long)
    if padding:
        padded[:, 5:13], segments[:, 5:13] = x, 1
    found = block(padded, None, segments)
    if not padding:
        assert not found.aux["sum/choices"].any()
        block.after_step(1, found.aux)  # a step of nothing moves nothing
        assert torch.equal(block.router.bias, biased().bias)
        return
    for name, value in wanted.aux.items():
        torch.testing.assert_close(found.aux[name], value, rtol=0, atol=1e-12)


def test_a_model_in_bfloat16_keeps_an_exact_bias():
    """At 0.5 bfloat16's numbers are 0.004 apart: a hundred moves of 0.001 would all be lost."""
    block = MoE(WIDTH, experts=EXPERTS, router="loss_free")
    block.router.bias.fill_(0.5)
    block = block.bfloat16()
    assert block.router.weight.dtype == torch.bfloat16
    assert block.router.bias.dtype == torch.float32
    counts = torch.tensor([0] + [1] * (EXPERTS - 1))
    for step in range(100):
        block.after_step(step + 1, {"sum/choices": counts})
    torch.testing.assert_close(block.router.bias[0], torch.tensor(0.6), rtol=0, atol=1e-5)
    assert block.double().router.bias.dtype == torch.float64
    assert block(torch.randn(1, 3, WIDTH, dtype=torch.float64)).y.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scores": "tanh"}, "scores='tanh' is unknown; choose from sigmoid, softmax"),
        ({"update_rate": -1.0}, "update_rate=-1.0 must not be negative"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"groups": 3}, "groups=3 must divide experts=8; try groups=1"),
        ({"groups": 2, "top_groups": 3}, "top_groups=3 must not be above groups=2"),
        ({"groups": 8, "top_groups": 2}, "groups=8 of size 1 cannot be ranked by their 2 best.*at most groups=4"),
        ({"groups": 4}, "top_k=3 is above the 2 experts in top_groups=1 of 2 each; use top_groups=2 or more"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        zoo.block("moe", 24, experts=8, top_k=3, router={"kind": "loss_free"} | options)
