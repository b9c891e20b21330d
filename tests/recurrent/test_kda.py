"""Kimi delta attention against transformers' Kimi Linear and its equations, its decays' ends and its sizes."""

import pytest
import torch
from torch.nn.functional import silu, softplus

import ops
import zoo
from zoo.block import tags
from zoo.recurrent.kda import KDA

WIDTH, HEADS, DIM = 20, 3, 6


def randomised(block: KDA) -> KDA:
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if name in ("A_log", "dt_bias") else 0.2))
    return block


@pytest.fixture
def pair(monkeypatch):
    """Ours and transformers' mixer of the same weights, float64 throughout."""
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    to = torch.Tensor.to

    def stay(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64 and torch.float32 in args:
            return to(tensor, torch.float64, **kwargs)
        return to(tensor, *args, **kwargs)

    config = KimiLinearConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=HEADS,
        linear_head_dim=DIM,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
    )
    mixer = KimiLinearDeltaAttention(config, 0).double().eval()
    torch.manual_seed(0)
    block = randomised(KDA(WIDTH, heads=HEADS, head_dim=DIM, norm_eps=1e-6).double())
    q, k, v, beta = block.in_proj.weight.split([HEADS * DIM] * 3 + [HEADS])
    weights = {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "b_proj.weight": beta,
        "conv1d.weight": block.conv.weight[:, None],
        "forget_gate.f_a_proj.weight": block.decay_proj.encode.weight,
        "forget_gate.f_b_proj.weight": block.decay_proj.decode.weight,
        "forget_gate.dt_bias": block.dt_bias,
        "forget_gate.A_log": block.A_log[None, None, :, None],
        "g_a_proj.weight": block.gate_proj.encode.weight,
        "g_b_proj.weight": block.gate_proj.decode.weight,
        "o_norm.weight": block.norm.weight,
        "o_proj.weight": block.out_proj.weight,
    }
    mixer.load_state_dict({name: each.detach().clone() for name, each in weights.items()})
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "to", stay)
    return block, mixer, config


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_it_is_kimi_linears(pair, impl):
    block, mixer, _ = pair
    x = torch.randn(2, 71, WIDTH, dtype=torch.float64)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    with ops.use(impl):
        y = block(mine).y
    wanted = mixer(theirs)
    assert wanted.dtype == torch.float64
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (wanted * direction).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    for found, right in (
        (block.A_log, mixer.forget_gate.A_log),
        (block.dt_bias, mixer.forget_gate.dt_bias),
        (block.decay_proj.encode.weight, mixer.forget_gate.f_a_proj.weight),
        (block.gate_proj.decode.weight, mixer.g_b_proj.weight),
        (block.conv.weight, mixer.conv1d.weight),
        (block.in_proj.weight[-HEADS:], mixer.b_proj.weight),
    ):
        gradient = block.in_proj.weight.grad[-HEADS:] if found.grad_fn is not None else found.grad
        torch.testing.assert_close(gradient, right.grad.reshape(found.shape), rtol=1e-8, atol=1e-8)


def test_decoding_is_theirs(pair):
    """A prompt, then a token after another with a cache, in both; and both hold the same sums."""
    from transformers import DynamicCache

    block, mixer, config = pair
    x = torch.randn(2, 12, WIDTH, dtype=torch.float64)
    cache, state = DynamicCache(config=config), block.init_state(2)
    with torch.no_grad():
        for start, end in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 11), (11, 12)):
            wanted = mixer(x[:, start:end], cache_params=cache)
            y, state, _ = block(x[:, start:end], state)
            torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.S, cache.layers[0].recurrent_states[0], rtol=1e-9, atol=1e-9)


def equations(block, x):
    """2510.26692, eq. 1, in float64, a token after another: decay, erase, write, read. x: [time width]."""
    heads, k_dim, v_dim = block.heads, block.k_dim, block.v_dim
    projected = x @ block.in_proj.weight.T
    mixed, beta = silu(projected[:, :-heads] * block.conv.weight[:, 0]), 2 * torch.sigmoid(projected[:, -heads:])
    q, k = (each.unflatten(-1, (heads, k_dim)) for each in mixed[:, : 2 * heads * k_dim].chunk(2, -1))
    q, k = (each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (q, k))
    v = mixed[:, 2 * heads * k_dim :].unflatten(-1, (heads, v_dim))
    step = softplus(x @ block.decay_proj.dense().T + block.dt_bias).unflatten(-1, (heads, k_dim))
    alpha = torch.exp(-block.A_log.exp()[:, None] * step)
    gate = torch.sigmoid(x @ block.gate_proj.dense().T + block.gate_proj.bias).unflatten(-1, (heads, v_dim))
    S, rows = x.new_zeros(heads, k_dim, v_dim), []
    for t in range(len(x)):
        erase = torch.eye(k_dim).to(x) - torch.einsum("h,hi,hj->hij", beta[t], k[t], k[t])
        S = erase @ (alpha[t][..., None] * S) + torch.einsum("h,hk,hv->hkv", beta[t], k[t], v[t])
        rows.append(torch.einsum("hkv,hk->hv", S, q[t]) / k_dim**0.5)
    o = torch.stack(rows)
    normed = block.norm.weight * o / (o.square().mean(-1, keepdim=True) + block.norm.eps).sqrt()
    return block.out_proj((normed * gate).flatten(-2))


def test_it_is_the_equations():
    """With the options that Kimi Linear does not use, in two documents; values and gradients."""
    torch.manual_seed(0)
    options = {"heads": 2, "head_dim": 5, "value_head_dim": 7, "rank": 3, "gate_bias": True, "conv_width": 1}
    block = randomised(zoo.block("kda", WIDTH, **options, negative_eigenvalues=True)).double()
    x = torch.randn(1, 41, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = torch.cat([equations(block, each) for each in x[0].split([6, 35])])
    y = block(x, None, torch.tensor([[2] * 6 + [5] * 35])).y[0]
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
    inputs, direction = [x, *block.parameters()], torch.randn_like(wanted)
    found, right = (torch.autograd.grad((each * direction).sum(), inputs) for each in (y, wanted))
    for name, a, b in zip(["x", *(name for name, _ in block.named_parameters())], found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


# Biases of the decay: α of every channel is 0 to the last bit, or 1, or a channel is either or in between.
ENDS = {"forgets all": [1e4], "forgets nothing": [-80.0], "mixed": [1e4, 30.0, 3.0, 0.0, -9.0, -80.0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", ENDS.values(), ids=ENDS)
def test_decays_near_0_and_near_1(biases, dtype):
    """Finite values and gradients, near float64's, through the chunked form."""
    torch.manual_seed(0)
    block, wide = (KDA(WIDTH, heads=2, head_dim=6, norm_eps=1e-2) for _ in range(2))
    with torch.no_grad():
        block.dt_bias.copy_(torch.tensor(biases * (12 // len(biases))))
    block.to(dtype)
    wide.double().load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    x = torch.randn(1, 150, WIDTH).to(dtype)
    results = []
    for each in (block, wide):
        given = x.detach().to(each.in_proj.weight.dtype).requires_grad_()
        with ops.use("chunked"):
            y = each(given).y
        results.append([y, *torch.autograd.grad(y.square().sum(), [given, *each.parameters()])])
    for name, a, b in zip(["y", "x", *(name for name, _ in block.named_parameters())], *results, strict=True):
        assert a.isfinite().all(), name
        error = (a.double() - b).norm() / max(b.norm(), 1e-3 * results[1][0].norm())
        assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"{name}: {error}"


def test_its_sizes_and_its_tags():
    """Kimi Linear 48B-A3B: width 2304, 32 heads of 128."""
    block = KDA(2304, heads=32, head_dim=128)
    d, inner = 2304, 4096
    thin = 2 * 128 * (d + inner)
    wanted = 4 * d * inner + 32 * d + thin + 4 * 3 * inner + 32 + inner + 128
    assert sum(p.numel() for p in block.parameters()) == wanted
    free = {name for name, each in tags(KDA(WIDTH, gate_bias=True)).items() if not each.weight_decay}
    assert free == {"A_log", "dt_bias", "norm.weight", "gate_proj.decode.bias"}
    assert KDA(1)(torch.randn(1, 3, 1)).y.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 2, "rank": 21}, "rank=21 is above 20"),
        ({"rank": 0}, "rank=0 must be a positive integer"),
        ({"gate_bias": "no"}, "gate_bias='no' must be true or false"),
        ({"value_head_dim": 1.5}, "value_head_dim=1.5 must be a positive integer"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("kda", WIDTH, **options)
