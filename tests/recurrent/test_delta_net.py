"""DeltaNet against its equations, and what the block's pieces promise: keys of length 1, heads that fit, its state."""

import pytest
import torch
from torch.nn.functional import silu

import ops
import zoo
from zoo.block import tags
from zoo.recurrent.delta import fit_heads, unit
from zoo.recurrent.delta_net import DeltaNet

WIDTH = 12


def equations(block, x, strength=1):
    """2406.06484, eq. 3 with a key's old value taken out, a token after another in float64. x: [time width]."""
    heads, k_dim, v_dim = block.heads, block.k_dim, block.v_dim
    projected = x @ block.in_proj.weight.T
    channels, logits = projected[:, :-heads], projected[:, -heads:]
    taps = block.conv.weight.shape[1]
    padded = torch.cat([channels.new_zeros(taps - 1, channels.shape[1]), channels])
    mixed = silu(sum(block.conv.weight[:, j] * padded[j : j + len(x)] for j in range(taps)))
    q, k = (each.unflatten(-1, (heads, k_dim)) for each in mixed[:, : 2 * heads * k_dim].chunk(2, -1))
    q, k = (each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (q, k))
    v, beta = mixed[:, 2 * heads * k_dim :].unflatten(-1, (heads, v_dim)), strength * torch.sigmoid(logits)
    S, rows = x.new_zeros(heads, k_dim, v_dim), []
    for t in range(len(x)):
        old = torch.einsum("hkv,hk->hv", S, k[t])
        new = beta[t][:, None] * v[t] + (1 - beta[t][:, None]) * old
        S = S + k[t][..., None] * (new - old)[:, None]
        rows.append(torch.einsum("hkv,hk->hv", S, q[t]) / k_dim**0.5)
    o = torch.stack(rows)
    normed = block.norm.weight * o / (o.square().mean(-1, keepdim=True) + block.norm.eps).sqrt()
    return normed.flatten(-2) @ block.out_proj.weight.T


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("options", "strength"),
    [({}, 1), ({"heads": 3, "head_dim": 5, "value_head_dim": 7, "conv_width": 2, "negative_eigenvalues": True}, 2)],
    ids=["paper", "options"],
)
def test_it_is_the_equations(options, strength, impl):
    """Values and gradients, two documents in a row."""
    torch.manual_seed(0)
    block = zoo.block("delta_net", WIDTH, **options).double()
    torch.nn.init.normal_(block.norm.weight)
    x = torch.randn(1, 41, WIDTH, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[2] * 6 + [5] * 35])
    wanted = torch.cat([equations(block, each, strength) for each in x[0].split([6, 35])])
    inputs, direction = [x, *block.parameters()], torch.randn_like(wanted)
    right = torch.autograd.grad((wanted * direction).sum(), inputs)
    with ops.use(impl):
        y = block(x, None, segments).y[0]
        found = torch.autograd.grad((y * direction).sum(), inputs)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
    for name, a, b in zip(["x", *(name for name, _ in block.named_parameters())], found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_a_second_write_replaces_the_first():
    """β = 1 (the same token twice, no convolution): the state holds the value under the key once."""
    torch.manual_seed(0)
    block = zoo.block("delta_net", WIDTH, heads=1, conv_width=1).double()
    with torch.no_grad():
        block.in_proj.weight[-1] = 0
        block.in_proj.weight[-1, 0] = 1e3  # x starts with 1: β = σ(1000) = 1
        x = torch.randn(1, 1, WIDTH, dtype=torch.float64)
        x[..., 0] = 1
        once = block(x, block.init_state(1)).state.S
        thrice = block(x.expand(-1, 3, -1), block.init_state(1)).state.S
    assert once.norm() > 0.1
    torch.testing.assert_close(thrice, once, rtol=0, atol=1e-5 * once.norm().item())  # 1e-6 under the key's root


@pytest.mark.parametrize("lost", ["conv", "S"])
def test_both_states_are_carried(lost):
    """Whole = two parts; and each of the two states matters to it."""
    torch.manual_seed(0)
    block = zoo.block("delta_net", WIDTH).double()
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        whole = block(x).y
        first = block(x[:, :5], block.init_state(2))
        second = block(x[:, 5:], first.state)
        torch.testing.assert_close(torch.cat([first.y, second.y], 1), whole, rtol=1e-11, atol=1e-11)
        first = block(x[:, :5], block.init_state(2))
        broken = first.state._replace(**{lost: torch.zeros_like(getattr(first.state, lost))})
        assert (block(x[:, 5:], broken).y - whole[:, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_eigenvalues_do_not_grow(dtype):
    """β = 2 and one key for 2,000 tokens: each flips what the key holds, and none may make it longer."""
    torch.manual_seed(0)
    block = zoo.block("delta_net", 64, heads=1, conv_width=1, negative_eigenvalues=True)
    with torch.no_grad():
        block.in_proj.weight[-1] = 0
        block.in_proj.weight[-1, 0] = 1e3
    block.to(dtype)
    for seed in range(3):
        x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        x[..., 0] = 1
        with torch.no_grad():
            once = block(x, block.init_state(1, dtype=dtype)).state.S.norm()
            many = block(x.expand(-1, 2001, -1), block.init_state(1, dtype=dtype)).state.S.norm()
        assert many < 1.05 * once


def test_rounded_keys_are_not_longer_than_1():
    x = (10 * torch.randn(1, 1000, 4, 24, generator=torch.Generator().manual_seed(0))).bfloat16()
    lengths = [unit(x, never_longer=each).double().norm(dim=-1) for each in (False, True)]
    assert lengths[0].max() > 1.0005
    assert lengths[1].max() <= 1
    assert lengths[1].min() > 0.99
    wide = x.double()
    wanted = wide / (wide.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(unit(wide, never_longer=True), wanted)
    nothing = torch.zeros(1, 1, 1, 4, requires_grad=True)
    unit(nothing).sum().backward()
    assert nothing.grad.isfinite().all()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((2048, None, None, 128), (16, 128)),
        ((24, None, None, 128), (2, 12)),
        ((1, None, None, 128), (2, 1)),
        ((0, None, None, 256), (2, 1)),
        ((24, 5, None, 128), (5, 4)),
        ((24, None, 7, 128), (3, 7)),
        ((24, None, 100, 128), (1, 100)),
        ((24, 3, 9, 128), (3, 9)),
    ],
)
def test_heads_fit(given, wanted):
    assert fit_heads(*given) == wanted


def test_its_sizes_and_its_tags():
    """Four square matrices, β, four taps a channel and a norm: the 1.3B layer of the paper, with heads of 128."""
    block = DeltaNet(2048)
    assert (block.heads, block.k_dim, block.v_dim) == (16, 128, 128)
    d = 2048
    assert sum(p.numel() for p in block.parameters()) == 4 * d * d + 16 * d + 4 * 3 * d + 128
    assert {name for name, each in tags(block).items() if not each.weight_decay} == {"norm.weight"}


def test_bfloat16_keeps_float32_sums():
    block = zoo.block("delta_net", WIDTH).bfloat16()
    state = block.init_state(2)
    y, state, _ = block(torch.randn(2, 7, WIDTH).bfloat16(), state)
    assert (y.dtype, state.conv.dtype, state.S.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads=0 must be a positive integer"),
        ({"head_dim": 2.0}, "head_dim=2.0 must be a positive integer"),
        ({"value_head_dim": 0}, "value_head_dim=0 must be a positive integer"),
        ({"conv_width": 0}, "conv_width=0 must be a positive integer"),
        ({"negative_eigenvalues": 2}, "negative_eigenvalues=2 must be true or false"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must not be negative"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("delta_net", WIDTH, **options)
