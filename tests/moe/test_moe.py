"""The mixture of experts against a loop over dense experts and against transformers' own blocks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zoo
from zoo.block import NoState
from zoo.layers.ffn import MLP, SwiGLU
from zoo.moe.experts import MLPExperts, SwiGLUExperts
from zoo.moe.moe import MoE
from zoo.moe.router_top_k import TopK
from zoo.moe.routers import Router, Routing

WIDTH, EXPERTS = 16, 5


def loop(block, x, segments=None):
    """The definition, token by token and expert by expert, with full matrices."""
    router = block.router
    y = torch.zeros_like(x)
    for row, time in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        if segments is not None and segments[row, time] == 0:
            continue
        token = x[row, time]
        logits = router.weight @ token
        if router.order == "softmax_then_top_k":
            weights, chosen = logits.softmax(-1).topk(router.top_k)
            weights = weights / weights.sum() if router.renormalise else weights
        else:
            weights, chosen = logits.topk(router.top_k)
            weights = weights.softmax(-1)
        for weight, expert in zip(weights, chosen, strict=True):
            biased = block.experts.up_bias is not None
            inner = token @ block.experts.up[expert] + (block.experts.up_bias[expert] if biased else 0)
            if isinstance(block.experts, SwiGLUExperts):
                gate, value = inner.chunk(2)
                inner = F.silu(gate) * value
            else:
                inner = F.gelu(inner)
            bias = block.experts.down_bias[expert] if biased else 0
            y[row, time] += weight * (inner @ block.experts.down[expert] + bias)
        if block.shared is not None:
            y[row, time] += block.shared(token[None, None]).y[0, 0]
        if block.out_bias is not None:
            y[row, time] += block.out_bias
    return y


def all_gradients(block, x, y):
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    return torch.autograd.grad((y * direction).sum(), [x, *block.parameters()])


@pytest.mark.parametrize("case", ["some", "empty experts", "all on one", "one token", "padding", "all padding"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 3, "router": {"kind": "top_k", "renormalise": False}, "expert": "mlp"},
        {"router": {"kind": "top_k", "order": "top_k_then_softmax"}, "shared_experts": 2},
        {"expert": {"kind": "swiglu", "bias": True}, "shared_experts": 1, "out_bias": True},
    ],
    ids=["default", "top1", "mlp", "shared", "biases"],
)
def test_equals_the_loop(options, case):
    """Values and gradients of every parameter, in float64."""
    block = MoE(WIDTH, experts=EXPERTS, hidden=12, **options).double()
    if block.out_bias is not None:
        torch.nn.init.normal_(block.out_bias)  # it starts at 0
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    segments = None
    if case == "empty experts":
        x[:] = x[0, 0] * (1 + 0.01 * torch.rand(2, 7, 1, dtype=torch.float64))
    elif case == "all on one":
        with torch.no_grad():
            x[..., 0] = 5.0
            block.router.weight[:, 0] = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0])
    elif case == "one token":
        x = x[:1, :1]
    elif case == "padding":
        segments = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 2, 2, 0, 0]])
    elif case == "all padding":
        segments = torch.zeros(2, 7, dtype=torch.long)
    x.requires_grad_()
    found, wanted = block(x, None, segments), loop(block, x, segments)
    load = found.aux["stat/load"]
    if case == "empty experts":
        assert (load == 0).sum() == EXPERTS - block.router.top_k
    if case == "all on one":
        assert load[2] == load.max() == 1 / block.router.top_k
    torch.testing.assert_close(found.y, wanted, rtol=0, atol=1e-12)
    if case == "all padding":
        assert not found.y.any()
        return
    for each, other in zip(all_gradients(block, x, found.y), all_gradients(block, x, wanted), strict=True):
        torch.testing.assert_close(each, other, rtol=0, atol=1e-11)


# transformers ---------------------------------------------------------------------------------------------------


def peer_block(name, renormalise):
    import transformers

    sizes = {"hidden_size": WIDTH, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    if name == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Peer

        config = transformers.MixtralConfig(**sizes, intermediate_size=12, num_local_experts=EXPERTS)
    elif name == "olmoe":
        from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock as Peer

        config = transformers.OlmoeConfig(
            **sizes, intermediate_size=12, num_experts=EXPERTS, norm_topk_prob=renormalise
        )
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Peer

        config = transformers.Qwen3MoeConfig(
            **sizes, moe_intermediate_size=12, num_experts=EXPERTS, norm_topk_prob=renormalise
        )
    config._experts_implementation = "eager"
    peer = Peer(config)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.3)
    return peer.eval()


def copy_from(block, peer):
    with torch.no_grad():
        block.router.weight.copy_(peer.gate.weight)
        block.experts.up.copy_(peer.experts.gate_up_proj.transpose(1, 2))
        block.experts.down.copy_(peer.experts.down_proj.transpose(1, 2))


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("router", "renormalise"),
    [
        ({"order": "softmax_then_top_k", "renormalise": True}, True),
        ({"order": "top_k_then_softmax"}, True),
        ({"order": "softmax_then_top_k", "renormalise": False}, False),
    ],
    ids=["renormalised", "top_k_then_softmax", "plain"],
)
def test_equals_transformers(name, router, renormalise):
    if name == "mixtral" and not renormalise:
        router, renormalise = {}, True  # Mixtral always renormalises: our default is its
    peer = peer_block(name, renormalise)
    block = MoE(WIDTH, experts=EXPERTS, top_k=2, hidden=12, router={"kind": "top_k", **router})
    copy_from(block, peer)
    x = torch.randn(3, 11, WIDTH)
    torch.testing.assert_close(block(x).y, peer(x), rtol=1e-5, atol=1e-5)


# Independence, decoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"expert": {"kind": "mlp", "bias": True}, "shared_experts": 1, "top_k": 3}])
def test_a_token_does_not_depend_on_the_batch(options):
    """Alone, in a batch, one by one with and without gradients: the same to the last digits of float64."""
    block = MoE(WIDTH, experts=EXPERTS, **options).double().eval()
    x = torch.randn(4, 9, WIDTH, dtype=torch.float64)
    whole = block(x).y
    for row in range(4):
        torch.testing.assert_close(block(x[row : row + 1]).y[0], whole[row], rtol=0, atol=1e-12)
    with torch.no_grad():
        for time in range(9):
            assert block.is_few(block.router(x[:1, time : time + 1]), x)
            y, state, aux = block(x[:1, time : time + 1], NoState())
            assert state == NoState()
            torch.testing.assert_close(y[0, 0], whole[0, time], rtol=0, atol=1e-12)
            assert aux.keys() == block(x).aux.keys()
            token = block(x[:1, time : time + 1]).aux
            with torch.enable_grad():
                sorted_way = block(x[:1, time : time + 1]).aux
            for name in token:
                torch.testing.assert_close(token[name], sorted_way[name].detach(), rtol=0, atol=1e-12)


def test_few_tokens_with_padding():
    block = MoE(WIDTH, experts=EXPERTS).double().eval()
    x = torch.randn(4, 1, WIDTH, dtype=torch.float64)
    segments = torch.tensor([[1], [0], [7], [0]])
    wanted = block(x).y.detach()
    x[segments == 0] = torch.nan
    with torch.no_grad():
        assert block.is_few(block.router(x, segments), x)
        y = block(x, None, segments).y
    torch.testing.assert_close(y[[0, 2]], wanted[[0, 2]], rtol=0, atol=1e-12)
    assert not y[[1, 3]].any()


@pytest.mark.parametrize("expert", ["swiglu", {"kind": "mlp", "bias": True}])
def test_few_gathered(expert):
    """The way for GPUs, which does not read the numbers on the host, is that of the CPU."""
    experts = MoE(WIDTH, experts=EXPERTS, expert=expert).double().experts
    tokens = torch.randn(3, WIDTH, dtype=torch.float64)
    chosen = torch.tensor([[0, 3], [4, EXPERTS], [EXPERTS, EXPERTS]])
    weights = torch.tensor([[0.2, 0.7], [0.4, 0.0], [0.0, 0.0]])
    with torch.no_grad():
        found, wanted = (run(tokens, chosen, weights) for run in (experts.few_gathered, experts.few))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert wanted[:2].abs().sum() > 0


@pytest.mark.gpu
def test_few_on_a_gpu():
    block = MoE(WIDTH, experts=EXPERTS).double().cuda().eval()
    x = torch.randn(4, 1, WIDTH, dtype=torch.float64, device="cuda")
    segments = torch.tensor([[1], [0], [7], [0]]).cuda()
    wanted = block(x, None, segments).y.detach()
    with torch.no_grad():
        torch.testing.assert_close(block(x, None, segments).y, wanted, rtol=0, atol=1e-12)


# Parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", ["swiglu", {"kind": "mlp", "activation": "relu2"}])
def test_shared_experts_are_a_sum_of_experts(expert):
    block = MoE(WIDTH, experts=EXPERTS, hidden=12, expert=expert, shared_experts=2, load_balance=0).double()
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    dense = block.shared
    wanted = 0
    for half in torch.arange(24).split(12):
        up = dense.up.weight[half] if isinstance(dense, MLP) else dense.up.weight[torch.cat([half, 24 + half])]
        part = (MLP(WIDTH, 12, "relu2") if isinstance(dense, MLP) else SwiGLU(WIDTH, 12)).double()
        with torch.no_grad():
            part.up.weight.copy_(up)
            part.down.weight.copy_(dense.down.weight[:, half])
        wanted = wanted + part(x).y
    block.shared = None
    without = block(x).y
    block.shared = dense
    torch.testing.assert_close(block(x).y - without, wanted, rtol=0, atol=1e-12)


def test_shared_experts_of_another_size_behind_a_gate():
    block = MoE(WIDTH, experts=EXPERTS, hidden=12, shared_experts=2, shared_hidden=5, shared_gate=True).double()
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    assert block.shared.hidden == 10
    y, always, gate = block(x).y, block.shared(x).y, block.shared_gate
    assert gate.weight.shape == (1, WIDTH)
    block.shared = None
    wanted = block(x).y + always / (1 + torch.exp(-(x * gate.weight[0]).sum(-1, keepdim=True)))
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    for options in ({"shared_gate": True}, {"shared_hidden": 5}):
        with pytest.raises(ValueError, match="need shared_experts of at least 1"):
            MoE(WIDTH, **options)


def test_counts_of_work():
    block = MoE(WIDTH, experts=8, top_k=2, hidden=12, shared_experts=1)
    one = 3 * WIDTH * 12
    assert block.active_parameters() == 8 * WIDTH + 2 * one + one
    assert block.flops_per_token(0) == block.flops_per_token(10**6) == 2 * block.active_parameters()
    assert sum(p.numel() for p in block.parameters()) == 8 * WIDTH + 9 * one
    block = MoE(WIDTH, experts=8, top_k=2, hidden=12, shared_experts=1, shared_hidden=7, shared_gate=True)
    assert block.active_parameters() == 8 * WIDTH + 2 * one + 3 * WIDTH * 7 + WIDTH
    assert block.flops_per_token(0) == 2 * block.active_parameters()


def test_initialisation_and_meta_device():
    block = MoE(512, experts=4)
    for weight, inputs in ((block.experts.up, 512), (block.experts.down, block.experts.hidden)):
        dense = nn.Linear(inputs, 512).weight.std()
        torch.testing.assert_close(weight.std(), dense, rtol=0.02, atol=0)
    with torch.device("meta"):
        block = MoE(512, experts=4, shared_experts=1)
        assert block.experts.up.is_meta
        assert block(torch.empty(2, 9, 512)).y.shape == (2, 9, 512)


class Hash(Router):
    """Token t visits expert t mod E: a router of somebody's own."""

    def __init__(self, width, experts, top_k=1):
        super().__init__(width, experts, top_k)

    def forward(self, x, segments=None):
        experts = (torch.arange(x.shape[1]) % self.experts).repeat(x.shape[0])[:, None]
        p = F.one_hot(experts[:, 0], self.experts).to(x)
        return Routing(experts, torch.ones_like(p[:, :1]), experts, p.log(), p, {"stat/mine": p.new_ones(())})


class Later(Hash):
    causal = False


def test_a_router_is_one_file(tmp_path, monkeypatch):
    """Found by its file's name; nothing else names it."""
    import zoo.moe

    (tmp_path / "router_mine.py").write_text("from zoo.moe.router_top_k import TopK\n\n\nclass Mine(TopK):\n    pass\n")
    with pytest.raises(ValueError, match=r"unknown router 'mine'.*Known: base, expert_choice, loss_free, "):
        MoE(WIDTH, router="mine")
    monkeypatch.setattr(zoo.moe, "__path__", [*zoo.moe.__path__, str(tmp_path)])
    block = MoE(WIDTH, router={"kind": "mine", "jitter": 0.1})
    assert type(block.router).__name__ == "Mine"
    assert block.router.jitter == 0.1


def test_an_injected_router_and_experts():
    block = MoE(WIDTH, experts=3, top_k=1, router=Hash(WIDTH, 3), expert=MLPExperts(WIDTH, 3, 20)).double()
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    found = block(x)
    inner = torch.einsum("btd,tdh->bth", x, block.experts.up[torch.arange(6) % 3])
    wanted = torch.einsum("bth,thd->btd", F.gelu(inner), block.experts.down[torch.arange(6) % 3])
    torch.testing.assert_close(found.y, wanted, rtol=0, atol=1e-12)
    assert found.aux["stat/mine"] == 1
    torch.testing.assert_close(found.aux["loss/load_balance"], torch.tensor(0.01, dtype=torch.float64))
    assert MoE.causal
    assert block.causal
    later = MoE(WIDTH, experts=3, top_k=1, router=Later(WIDTH, 3))
    assert not later.causal
    assert "has the router Later, which looks at later tokens" in later.refusal
    assert block.refusal is None


def test_choices_are_counted_while_training():
    """As they were chosen, before any is dropped, and without padding; the sum goes back to the router."""
    block = MoE(WIDTH, experts=EXPERTS, router={"kind": "top_k", "capacity_factor": 0.5}).double()
    segments = torch.tensor([[0, 1, 1, 1, 1, 1, 2, 2, 2]])
    aux = block(torch.randn(1, 9, WIDTH, dtype=torch.float64), None, segments).aux
    assert aux["stat/dropped"] > 0
    assert int(aux["sum/choices"].sum()) == 2 * 8
    assert not aux["sum/choices"].is_floating_point()
    torch.testing.assert_close(aux["stat/load"], aux["sum/choices"] / 16.0, check_dtype=False)
    told = []
    block.router.after_step = lambda step, sums: told.append((step, sums))
    block.after_step(3, {"sum/choices": aux["sum/choices"]})
    assert told == [(3, {"sum/choices": aux["sum/choices"]})]
    assert "sum/choices" not in block.eval()(torch.randn(1, 9, WIDTH, dtype=torch.float64)).aux


def test_autocast_keeps_the_router_exact():
    """Under autocast the logits are those of float32; experts run in bfloat16; training gets every gradient."""
    block = MoE(WIDTH, experts=EXPERTS)
    x = torch.randn(2, 9, WIDTH)
    exact = block.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block.router(x).logits, exact.logits)
        out = block(x)
        with torch.no_grad():
            one = block(x[:1, :1]).y
    assert out.y.dtype == torch.bfloat16
    torch.testing.assert_close(out.y.float(), block(x).y, rtol=0.05, atol=0.02)
    torch.testing.assert_close(one[0, 0].float(), out.y[0, 0].float(), rtol=0.05, atol=0.02)
    out.y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in block.parameters())


def test_compiles_in_training_with_capacity_and_segments():
    block = MoE(WIDTH, experts=EXPERTS, router={"kind": "top_k", "capacity_factor": 0.9}, router_z=0.1).double()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64).requires_grad_()
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    results = []
    for run in (block, compiled):
        y, _, aux = run(x, None, segments)
        loss = y.square().sum() + aux["loss/load_balance"] + aux["loss/router_z"]
        results.append([y, *aux.values(), *torch.autograd.grad(loss, [x, *block.parameters()])])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4, "top_k": 5}, r"top_k=5 must be between 1 and experts=4"),
        ({"experts": 0}, r"experts=0"),
        ({"router": "topk"}, r"unknown router 'topk'.*did you mean 'top_k'"),
        ({"router": {"kind": "top_k", "jiter": 0.1}}, r"no option 'jiter'.*did you mean 'jitter'"),
        ({"router": {"jitter": 0.1}}, r"unknown router None"),
        ({"router": {"kind": "top_k", "order": "top_k"}}, r"order='top_k'.*softmax_then_top_k"),
        ({"router": {"kind": "top_k", "order": "top_k_then_softmax", "renormalise": False}}, r"renormalise=False"),
        ({"router": {"kind": "top_k", "jitter": 1.5}}, r"jitter=1.5"),
        ({"router": {"kind": "top_k", "capacity_factor": 0}}, r"capacity_factor=0"),
        ({"expert": "swigl"}, r"unknown expert 'swigl'.*did you mean 'swiglu'"),
        ({"expert": {"kind": "mlp", "activation": "silly"}}, r"activation='silly'.*silu"),
        ({"hidden": -1}, r"hidden=-1"),
        ({"shared_experts": -1}, r"shared_experts=-1"),
        ({"shared_experts": 1.5}, r"shared_experts=1.5 must be an integer"),
        ({"load_balance": -0.1}, r"load_balance=-0.1"),
        ({"load_balance": "1e-2"}, r"load_balance='1e-2' is text.*YAML"),
        ({"router_z": float("inf")}, r"router_z=inf must be a finite number"),
        ({"router": {"kind": "top_k", "jitter": "0.1"}}, r"jitter='0.1' is text"),
        ({"router": {"kind": "top_k", "capacity_factor": float("inf")}}, r"capacity_factor=inf"),
        ({"router": TopK(WIDTH, 4, 2)}, r"built for experts=4, the block has experts=8"),
        ({"expert": SwiGLUExperts(WIDTH, 4)}, r"built for experts=4, the block has experts=8"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("moe", WIDTH, **options)
