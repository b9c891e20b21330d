"""upcycle, moefy and share_kv: what stays the same, what changes as it must, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.convert import moefy, share_kv, upcycle
from zoo.convert.moefy import balanced_assignment, balanced_clusters
from zoo.model import LanguageModel, losses

FFNS = {
    "swiglu": {"kind": "swiglu", "hidden": 24},
    "geglu": {"kind": "geglu", "hidden": 24, "approximate": "tanh"},
    "relu": {"kind": "mlp", "hidden": 24, "activation": "relu"},
    "relu2": {"kind": "mlp", "activation": "relu2"},
    "default": "mlp",
    "gated, biases": {"kind": "swiglu", "hidden": 24, "bias": True},
    "biases": {"kind": "mlp", "hidden": 24, "bias": True},
}
TURNED = {"kind": "rotary", "fraction": 0.7}  # heads of 3 features: 2 of them
ffns = pytest.mark.parametrize("ffn", FFNS.values(), ids=FFNS)


def dense(ffn, **options) -> LanguageModel:
    """A model of attention, recurrence and feed-forward layers in float64, none of its tensors at a special value."""
    stack = [
        {"kind": "gqa", "heads": 4, "kv_heads": 4, "position": TURNED},
        ffn,
        {"kind": "mamba", "state_size": 3},
        ffn,
        ffn,
    ]
    model = LanguageModel({"vocab_size": 19, "width": 12, "stack": stack} | options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(time=11):
    return torch.randint(0, 19, (3, time))


def check(made, parent):
    """What holds for every operation: its configuration builds it, and the parent neither changed nor is shared."""
    again = LanguageModel(made.config).double()
    again.load_state_dict(made.state_dict())
    x = tokens()
    assert torch.equal(again.eval()(x).logits, made.eval()(x).logits)
    assert (made.head.weight is made.embedding.weight) == made.config.tied_embeddings
    held = {each.untyped_storage().data_ptr() for each in parent.state_dict().values()}
    assert not held & {each.untyped_storage().data_ptr() for each in made.state_dict().values()}


@ffns
@pytest.mark.parametrize("tied", [True, False])
def test_upcycled_equals_its_parent_at_the_start(ffn, tied):
    parent = dense(ffn, tied_embeddings=tied)
    before, x = {name: each.clone() for name, each in parent.state_dict().items()}, tokens()
    made = upcycle(parent, experts=5, top_k=2)
    assert [spec.kind for spec in made.config.blocks()] == ["gqa", "moe", "mamba", "moe", "moe"]
    torch.testing.assert_close(made(x).logits, parent(x).logits, rtol=0, atol=1e-11)
    assert len({each.block.router.weight[0, 0].item() for each in made.residuals if hasattr(each.block, "router")}) == 3
    check(made, parent)
    assert all(torch.equal(each, before[name]) for name, each in parent.state_dict().items())


def test_upcycled_model_trains_and_its_experts_grow_apart():
    made = upcycle(dense(FFNS["swiglu"]), experts=3, top_k=2).train()
    x = tokens()
    out = made(x)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()) + losses(out.aux)
    loss.backward()
    for residual in (made.residuals[1], made.residuals[4]):
        gradient = residual.block.experts.up.grad
        assert not torch.allclose(gradient[0], gradient[1])
        assert residual.block.router.weight.grad.any()


def test_blocks_side_by_side_and_weighed_residuals():
    """Operations reach the blocks inside parallel ones, and leave what stands around them."""
    attends = {"kind": "gqa", "heads": 4, "kv_heads": 4, "position": TURNED}
    weighed = FFNS["relu"] | {"residual": {"skip": 0.5, "scale": 2.0}}
    stack = [{"kind": "parallel", "blocks": [attends, FFNS["biases"]], "norm": "layer", "norm_eps": 0.1}, weighed]
    parent, x = dense("swiglu", stack=stack), tokens()
    for make in (upcycle, lambda model: moefy(model, experts=4), lambda model: moefy(model, 4, tokens=tokens(40))):
        made = make(parent)
        both, after = made.config.blocks()
        assert [each["kind"] for each in both.options["blocks"]] == ["gqa", "moe"]
        assert (after.kind, after.skip, after.scale) == ("moe", 0.5, 2.0)
        torch.testing.assert_close(made(x).logits, parent(x).logits, rtol=0, atol=1e-11)
        check(made, parent)
    made = share_kv(parent, 2)
    assert made.config.blocks()[0].options["blocks"] == [attends | {"kv_heads": 2}, FFNS["biases"]]
    assert made.config.blocks()[1] == parent.config.blocks()[1]
    check(made, parent)
    with pytest.raises(ValueError, match=r"stack\[0\].blocks\[0\]: kv_heads=3 must divide the 4"):
        share_kv(parent, 3)
    with pytest.raises(ValueError, match=r"no block of kind gqa with more than 4 .*; its blocks are gqa, mlp"):
        share_kv(parent, 4)


def test_every_second_layer_and_the_seed():
    parent = dense("swiglu")
    made = upcycle(parent, experts=2, every=2)
    assert [spec.kind for spec in made.config.blocks()] == ["gqa", "swiglu", "mamba", "moe", "swiglu"]
    one, same, other = (upcycle(parent, seed=seed).blocks[1].block.router.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with pytest.raises(
        ValueError, match=r"no dense feed-forward layer \(of which every=4 would be taken\); its blocks are"
    ):
        upcycle(parent, every=4)


@ffns
@pytest.mark.parametrize("learned", [False, True])
def test_moefied_with_all_experts_on_equals_its_parent(ffn, learned):
    parent, x = dense(ffn).train(), tokens()
    made = moefy(parent, experts=4, tokens=tokens(40) if learned else None)
    assert parent.training
    assert made.training
    torch.testing.assert_close(made(x).logits, parent(x).logits, rtol=0, atol=1e-11)
    check(made, parent)
    segments = torch.tensor([[0] * 3 + [1] * 8, [1] * 11, [1] * 5 + [2] * 6])
    both = [model(x, segments=segments).logits[segments != 0] for model in (made, parent)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-11)


def test_moefied_experts_are_the_neurons_of_their_cluster():
    """Two kinds of neurons, shuffled: each expert gets one kind, and the router sends a token to those it excites."""
    parent = LanguageModel(
        {"vocab_size": 5, "width": 8, "stack": [{"kind": "mlp", "hidden": 12, "activation": "relu"}]}
    )
    layer = parent.residuals[0].block
    kind = torch.randperm(12) % 2
    with torch.no_grad():
        layer.up.weight.copy_(torch.eye(8)[kind] * torch.linspace(1, 5, 12)[:, None] + 0.01 * torch.randn(12, 8))
    made = moefy(parent, experts=2, top_k=1).residuals[0].block
    for e in range(2):
        assert made.experts.up[e].argmax(0).unique().numel() == 1
    x = torch.eye(8)[None, :2]  # one token for each kind
    torch.testing.assert_close(made(x).y, layer(x).y, rtol=0, atol=0.05 * layer(x).y.abs().max().item())
    assert made.router(x).experts.unique().numel() == 2


def test_fewer_experts_cost_quality_and_a_learned_router_less_of_it():
    parent = dense(FFNS["relu"])
    fit, x = tokens(200), tokens(100)
    wanted = parent(x).logits

    def error(model):
        return (model(x).logits - wanted).square().mean().item()

    few, more = (moefy(parent, 6, k, tokens=fit) for k in (2, 4))
    assert 0 < error(more) < error(few)
    chance = moefy(parent, 6, 2)
    for residual in (chance.residuals[1], chance.residuals[3], chance.residuals[4]):
        residual.block.router.reset_parameters()
    assert error(few) < 0.8 * error(chance)
    assert error(few) < error(moefy(parent, 6, 2))


def test_the_fit_predicts_what_experts_give_out():
    """A layer whose sizes are linear in the token (all neurons positive on it) is predicted exactly."""
    parent = LanguageModel(
        {"vocab_size": 29, "width": 6, "stack": [{"kind": "mlp", "hidden": 8, "activation": "relu"}]}
    )
    parent.double()
    with torch.no_grad():
        parent.embedding.weight.normal_().abs_()
        parent.residuals[0].block.up.weight.normal_().abs_()
        parent.residuals[0].block.down.weight.normal_()
    made = moefy(parent, 2, tokens=torch.randint(0, 29, (4, 50)))
    block = made.residuals[0].block
    x = parent.residuals[0].norm(parent.embedding(torch.arange(29)))[None]
    pairs = zip(block.experts.up, block.experts.down, strict=True)
    sizes = [((x @ up).relu() * down.norm(dim=1)).sum(-1) for up, down in pairs]
    torch.testing.assert_close(block.router(x).logits, torch.stack(sizes, -1)[0], rtol=1e-2, atol=1e-2)


def test_clusters_are_balanced_and_found():
    centres = 10 * torch.eye(4)[:, :, None].expand(4, 4, 3).flatten(1)
    truth = torch.arange(4).repeat(5)
    points = centres[truth] + 0.1 * torch.randn(20, 12)
    found = min((balanced_clusters(points, 4, seed) for seed in range(8)), key=lambda each: _spread(points, each))
    assert torch.bincount(found).tolist() == [5] * 4
    assert len({(t, f) for t, f in zip(truth.tolist(), found.tolist(), strict=True)}) == 4
    assert torch.equal(balanced_clusters(points, 4, 3), balanced_clusters(points, 4, 3))
    alike = balanced_clusters(torch.zeros(12, 3), 4, 0)
    assert torch.bincount(alike).tolist() == [3] * 4


def _spread(points, cluster):
    return sum((points[cluster == each] - points[cluster == each].mean(0)).square().sum().item() for each in range(4))


def test_assignment_is_balanced_and_stable():
    costs = torch.rand(30, 5)
    found = balanced_assignment(costs)
    assert torch.bincount(found, minlength=5).tolist() == [6] * 5
    mine = costs[torch.arange(30), found]
    worst = torch.stack([mine[found == each].max() for each in range(5)])
    assert not ((costs < mine[:, None]) & (costs < worst)).any()


# share_kv -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_heads_are_means(kv_heads):
    options = {"kind": "gqa", "heads": 4, "kv_heads": 4, "position": TURNED, "bias": True, "qk_norm": "rms"}
    options |= {"gate": True}
    parent = dense("swiglu", stack=[options, "swiglu", options])
    made = share_kv(parent, kv_heads)
    assert [spec.options.get("kv_heads") for spec in made.config.blocks()] == [kv_heads, None, kv_heads]
    for old, new in ((parent.residuals[i].block, made.residuals[i].block) for i in (0, 2)):
        assert torch.equal(old.qkv.weight[:12], new.qkv.weight[:12])
        for name in ("weight", "bias"):
            assert torch.equal(getattr(old.qkv, name)[-12:], getattr(new.qkv, name)[-12:])  # the gate
            theirs = getattr(old.qkv, name)[12:-12].reshape(2, 4, 3, -1)  # keys and values, heads, features
            ours = getattr(new.qkv, name)[12:-12].reshape(2, kv_heads, 3, -1)
            for g in range(kv_heads):
                members = range(g * 4 // kv_heads, (g + 1) * 4 // kv_heads)
                wanted = sum(theirs[:, h] for h in members) / len(members)
                torch.testing.assert_close(ours[:, g], wanted, rtol=0, atol=1e-14)
    check(made, parent)


def test_alike_heads_lose_nothing():
    parent = dense("swiglu", stack=[{"kind": "gqa", "heads": 4, "kv_heads": 4, "position": TURNED}, "swiglu"])
    with torch.no_grad():
        rows = parent.residuals[0].block.qkv.weight[12:].view(2, 2, 2, 3, 12)  # two groups of two heads
        rows[:, :, 1] = rows[:, :, 0]
    x = tokens()
    torch.testing.assert_close(share_kv(parent, 2)(x).logits, parent(x).logits, rtol=0, atol=1e-12)
    assert not torch.allclose(share_kv(parent, 1)(x).logits, parent(x).logits)


def test_precision_is_kept():
    parent = dense(FFNS["swiglu"]).bfloat16()
    for made in (upcycle(parent), moefy(parent, 4), share_kv(parent)):
        assert {each.dtype for each in made.state_dict().values()} == {torch.bfloat16}
    one = torch.randn(4, 3, 12).bfloat16()
    with torch.no_grad():
        parent.residuals[0].block.qkv.weight[12:24] = one.flatten(0, 1)
    found = share_kv(parent).residuals[0].block.qkv.weight[12:15]
    assert torch.equal(found, one.double().mean(0).bfloat16())


@pytest.mark.parametrize(
    ("operation", "ffn", "options", "message"),
    [
        (upcycle, "swiglu", {"top_k": 1}, "top_k=1 must be an integer from 2 .a lone renormalised weight"),
        (upcycle, "swiglu", {"top_k": 9}, "top_k=9 must be at most experts=8"),
        (upcycle, "swiglu", {"every": 0}, "every=0 must be a positive integer"),
        (
            upcycle,
            "rwkv4_channel_mix",
            {},
            "no dense feed-forward layer .*; its blocks are gqa, rwkv4_channel_mix, mamba",
        ),
        (moefy, "rwkv4_channel_mix", {}, "no dense feed-forward layer; its blocks are gqa, rwkv4_channel_mix, mamba"),
        (moefy, FFNS["swiglu"], {"experts": 7}, r"stack\[1\] .* has 24 neurons, which experts=7 cannot share out"),
        (moefy, "swiglu", {"top_k": 9}, "top_k=9 must be at most experts=8"),
        (share_kv, "swiglu", {"kv_heads": 3}, r"stack\[0\]: kv_heads=3 must divide the 4 .*; choose from 1, 2, 4"),
        (share_kv, "swiglu", {"kv_heads": 4}, "no block of kind gqa with more than 4 key and value heads"),
    ],
)
def test_refusals(operation, ffn, options, message):
    with pytest.raises(ValueError, match=message):
        operation(dense(ffn), **options)


def test_weights_that_are_not_finite_are_named():
    parent = dense(FFNS["swiglu"])
    with torch.no_grad():
        parent.residuals[3].block.up.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"stack\[3\] \(kind swiglu\) holds weights that are not finite"):
        moefy(parent, 4)


def test_unweighted_router():
    block = zoo.block("moe", 12, experts=4, top_k=3, router="unweighted", load_balance=0.0).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        block.router.bias.copy_(torch.tensor([0.0, -100.0, 0.0, 0.0]))
    segments = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    routing = block.router(x, segments)
    valid = (segments != 0).flatten()
    assert sorted(routing.experts[valid].unique().tolist()) == [0, 2, 3]
    assert (routing.weights == valid[:, None]).all()
    assert (routing.experts[~valid] == 4).all()
    assert not list(block.router.parameters())
    assert block.flops_per_token(0) == 2 * (12 * 4 + 3 * 3 * 12 * block.experts.hidden)
