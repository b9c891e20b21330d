"""Mamba-2 against transformers' mixers, and the places where implementations differ."""

from importlib import import_module
from inspect import signature

import pytest
import torch
from torch import nn
from torch.nn.functional import silu, softplus

import zoo
from zoo.block import leaves, state_bytes, tags
from zoo.layers.gated_norm import GatedRMSNorm
from zoo.ssm.mamba2 import Mamba2


def randomised(block: nn.Module) -> nn.Module:
    """Random weights everywhere, so that no term is hidden by its initial value."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if "A_log" in name or "bias" in name else 0.3))
    return block


def copy_to_transformers(ours: Mamba2, mixer: nn.Module) -> None:
    weights = {"conv1d.weight": ours.conv.weight[:, None, :]}
    if ours.conv.bias is not None:
        weights["conv1d.bias"] = ours.conv.bias
    for name, each in ours.named_parameters():
        if not name.startswith("conv."):
            weights[name] = each
    mixer.load_state_dict({name: each.detach().clone() for name, each in weights.items()}, strict=True)


@pytest.fixture
def exact(monkeypatch):
    """transformers' mixers round to float32 on the way; in float64 they are an oracle to the last bits."""
    to = torch.Tensor.to

    def stay(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64 and torch.float32 in args:
            return tensor
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "to", stay)


def their_norm(kind: str) -> dict[str, int]:
    """Ours like the gated norm of the transformers installed: older ones had one norm over all groups."""
    module = import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
    norm = module.MambaRMSNormGated if kind == "Mamba2" else module.BambaRMSNormGated
    return {} if "group_size" in signature(norm).parameters else {"norm_groups": 1}


def their_mamba2(ours: Mamba2, **options):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=ours.width,
        expand=ours.inner // ours.width,
        num_heads=ours.heads,
        head_dim=ours.head_dim,
        state_size=ours.state_size,
        n_groups=ours.groups,
        conv_kernel=ours.conv.taps,
        use_bias=ours.in_proj.bias is not None,
        use_conv_bias=ours.conv.bias is not None,
        chunk_size=8,
        num_hidden_layers=1,
        **options,
    )
    mixer = Mamba2Mixer(config, 0).double().eval()
    copy_to_transformers(ours, mixer)
    return mixer, config


def equal(ours: Mamba2, mixer: nn.Module, time: int) -> None:
    x = torch.randn(3, time, ours.width, dtype=torch.float64)
    theirs, mine = (x.clone().requires_grad_() for _ in range(2))
    expected, y = mixer(theirs), ours(mine).y
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(y)
    (expected * weight).sum().backward()
    (y * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    gradients = dict(mixer.named_parameters())
    for name in ("A_log", "D", "dt_bias", "norm.weight", "in_proj.weight"):
        torch.testing.assert_close(ours.get_parameter(name).grad, gradients[name].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("time", "options"),
    [
        (37, {}),
        (1, {"bias": True}),
        (70, {"groups": 3, "head_dim": 5, "conv_width": 3, "expand": 3, "conv_bias": False}),
        (21, {"groups": 2, "dt_limit": (0.01, 0.05), "bias": True}),
    ],
)
def test_equals_transformers_mamba2(time, options):
    ours = randomised(Mamba2(20, state_size=7, **options, **their_norm("Mamba2"))).double()
    limit = {"time_step_limit": options["dt_limit"]} if "dt_limit" in options else {}
    equal(ours, their_mamba2(ours, **limit)[0], time)


@pytest.mark.usefixtures("exact")
def test_equals_transformers_bamba():
    from transformers import BambaConfig
    from transformers.models.bamba.modeling_bamba import BambaMixer

    ours = randomised(Mamba2(24, state_size=6, head_dim=8, groups=2, **their_norm("Bamba"))).double()
    config = BambaConfig(
        hidden_size=24,
        num_hidden_layers=1,
        mamba_n_heads=6,
        mamba_d_head=8,
        mamba_n_groups=2,
        mamba_d_state=6,
        mamba_chunk_size=8,
    )
    mixer = BambaMixer(config, 0).double().eval()
    copy_to_transformers(ours, mixer)
    equal(ours, mixer, 29)


@pytest.mark.usefixtures("exact")
def test_decoding_equals_transformers():
    """A prompt, then one token at a time, each with its cache."""
    from transformers import DynamicCache

    ours = randomised(Mamba2(20, state_size=7, groups=2, conv_width=3, **their_norm("Mamba2"))).double()
    mixer, config = their_mamba2(ours)
    x = torch.randn(2, 9, 20, dtype=torch.float64)
    cache, state = DynamicCache(config=config), ours.init_state(2)
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
            expected = mixer(x[:, start:end], cache_params=cache)
            y, state, _ = ours(x[:, start:end], state)
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        theirs = cache.layers[0].recurrent_states[0]  # [batch, heads, head_dim, state_size]
        torch.testing.assert_close(state.ssd, theirs.mT, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("exact")
def test_decoding_keeps_the_limit_of_steps():
    """transformers' one-token path leaves time_step_limit out, so its decoding differs from its whole sequence; ours
    equals both wholes."""
    from transformers import DynamicCache

    ours = randomised(Mamba2(20, state_size=7, dt_limit=(0.01, 0.02))).double()
    mixer, config = their_mamba2(ours, time_step_limit=(0.01, 0.02))
    x = torch.randn(2, 6, 20, dtype=torch.float64)
    with torch.no_grad():
        whole = mixer(x)
        state, cache = ours.init_state(2), DynamicCache(config=config)
        steps, theirs = [], []
        for t in range(6):
            y, state, _ = ours(x[:, t : t + 1], state)
            steps.append(y)
            theirs.append(mixer(x[:, t : t + 1], cache_params=cache))
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-10, atol=1e-10)
    assert (torch.cat(theirs, 1) - whole).abs().max() > 1e-3


def test_equals_the_equations():
    """Every option at once, one token and head at a time in float64."""
    block = randomised(
        Mamba2(
            6, state_size=3, head_dim=2, groups=3, conv_width=2, norm_before_gate=True, norm_groups=4,
            dt_limit=[0.001, 0.3], bias=True, norm_eps=0.2,
        )
    ).double()  # fmt: skip
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    z, mixed, dt = block.in_proj(x[0]).split([12, 12 + 18, 6], -1)
    expected, h = [], torch.zeros(6, 3, 2, dtype=torch.float64)
    for t in range(7):
        before = mixed[t - 1] if t else torch.zeros_like(mixed[0])
        u = silu(block.conv.weight[:, 0] * before + block.conv.weight[:, 1] * mixed[t] + block.conv.bias)
        y = torch.empty(12, dtype=torch.float64)
        for i in range(6):
            B, C = u[12 + 3 * (i // 2) :][:3], u[21 + 3 * (i // 2) :][:3]
            step = softplus(dt[t, i] + block.dt_bias[i]).clamp(0.001, 0.3)
            own = u[2 * i : 2 * i + 2]
            h[i] = torch.exp(-step * block.A_log[i].exp()) * h[i] + step * torch.outer(B, own)
            y[2 * i : 2 * i + 2] = C @ h[i] + block.D[i] * own
        normed = torch.cat([part * (part.square().mean() + 0.2).rsqrt() for part in y.split(3)])
        expected.append(block.out_proj(normed * block.norm.weight * silu(z[t])))
    torch.testing.assert_close(block(x).y[0], torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_norm_before_and_after_the_gate_differ():
    """The gate's size cancels in norm(x · silu(z)) and not in norm(x) · silu(z)."""
    x, z = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)
    after = GatedRMSNorm(12, groups=3, eps=0).double()
    before = GatedRMSNorm(12, groups=3, before_gate=True, eps=0).double()
    large = torch.full_like(z, 40.0)  # silu(40) = 40
    torch.testing.assert_close(after(x, large), after(x, large / 2))
    torch.testing.assert_close(before(x, large), 2 * before(x, large / 2))
    torch.testing.assert_close(before(x, z), after(x, large) * silu(z))
    # Each group of 4 channels alone: scaling one leaves the others.
    scaled = x.clone()
    scaled[..., :4] *= 3
    torch.testing.assert_close(after(scaled, z), after(x, z))
    assert (GatedRMSNorm(12, eps=0).double()(scaled, z) - after(x, z)).abs().max() > 0.1


def test_gated_norm_works_in_float32():
    x, z = torch.randn(4, 256).bfloat16() * 100, torch.randn(4, 256).bfloat16()
    norm = GatedRMSNorm(256)
    y = norm(x, z)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), norm.float()(x.float(), z.float()), rtol=4e-3, atol=1e-6)


def test_initial_steps_and_decays_are_the_published():
    block = Mamba2(2048, head_dim=2)
    dt = softplus(block.dt_bias.double()).detach()
    assert 1e-3 * 0.999 <= dt.min() < 1.2e-3
    assert 0.8e-1 < dt.max() <= 1e-1 * 1.001
    # log-uniform: as many steps in each half decade
    counts = torch.histc(dt.log10(), 4, -3, -1) / dt.numel()
    torch.testing.assert_close(counts, torch.full_like(counts, 0.25), atol=0.06, rtol=0)
    A = block.A_log.exp().detach()
    assert 1 <= A.min() < 1.2
    assert 15.8 < A.max() <= 16.001
    assert abs(A.mean() - 8.5) < 0.4
    torch.testing.assert_close(block.D, torch.ones(2048))


@pytest.mark.parametrize(
    ("width", "options", "head_dim", "heads"),
    [
        (768, {}, 64, 24),
        (64, {}, 64, 2),
        (24, {}, 24, 2),
        (25, {}, 25, 2),
        (100, {}, 50, 4),
        (24, {"groups": 4}, 6, 8),
        (1, {}, 1, 2),
        (1, {"expand": 1}, 1, 1),
    ],
)
def test_head_dim_shrinks_with_the_width(width, options, head_dim, heads):
    block = Mamba2(width, state_size=2, **options)
    assert (block.head_dim, block.heads) == (head_dim, heads)
    assert block(torch.randn(1, 3, width)).y.isfinite().all()


def test_parameter_count_of_the_smallest_published_layer():
    """mamba2-130m: 24 layers of width 768 with 128 states, 24 heads; a norm of 768 before each."""
    layer = sum(each.numel() for each in Mamba2(768).parameters())
    projections = 768 * (2 * 1536 + 2 * 128 + 24) + 1536 * 768
    assert layer == projections + (4 + 1) * (1536 + 256) + 3 * 24 + 1536
    assert 24 * (layer + 768) + 768 + 50288 * 768 == 128_989_632


def test_no_weight_decay_where_the_dynamics_are():
    free = {name for name, each in tags(Mamba2(24, bias=True)).items() if not each.weight_decay}
    assert free == {"A_log", "D", "dt_bias", "norm.weight", "conv.bias", "in_proj.bias", "out_proj.bias"}


@pytest.mark.parametrize("lost", ["conv", "ssd"])
def test_both_states_are_carried(lost):
    """Whole = two halves; and each of the two states matters to it."""
    block = randomised(Mamba2(24, state_size=8)).double()
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = block(x).y
        first = block(x[:, :5], block.init_state(2))
        second = block(x[:, 5:], first.state)
        torch.testing.assert_close(torch.cat([first.y, second.y], 1), whole, rtol=1e-11, atol=1e-11)
        first = block(x[:, :5], block.init_state(2))
        broken = first.state._replace(**{lost: torch.zeros_like(getattr(first.state, lost))})
        assert (block(x[:, 5:], broken).y - whole[:, 5:]).abs().max() > 1e-4


def test_bfloat16_keeps_float32_sums():
    block = Mamba2(24, state_size=8).bfloat16()
    state = block.init_state(2)
    assert (state.conv.dtype, state.ssd.dtype) == (torch.bfloat16, torch.float32)
    y, state, _ = block(torch.randn(2, 7, 24).bfloat16(), state)
    assert (y.dtype, state.conv.dtype, state.ssd.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert block.state_bytes(7, dtype=torch.bfloat16) == sum(
        leaf[0].numel() * leaf.element_size() for leaf in leaves(state)
    )
    assert block.state_bytes(10**6, dtype=torch.bfloat16) == state_bytes(block.init_state(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expand": 0}, "expand=0 must be a positive integer"),
        ({"state_size": 2.0}, "state_size=2.0 must be a positive integer"),
        ({"conv_width": 0}, "conv_width=0"),
        ({"head_dim": 7}, "head_dim=7 must divide expand \\* width / groups = 48.*try 6"),
        ({"head_dim": 48, "groups": 2}, "head_dim=48 must divide expand \\* width / groups = 24.*try 24"),
        ({"head_dim": 0}, "head_dim=0 must be a positive integer"),
        ({"groups": 5}, "groups=5 must divide expand \\* width = 48; try 1"),
        ({"groups": True}, "groups=True must be a positive integer"),
        ({"norm_groups": 10}, "norm_groups=10 must divide expand \\* width = 48; try 2"),
        ({"norm_groups": 0}, "norm_groups=0 must be a positive integer"),
        ({"dt_min": 0.0}, "dt_min=0.0 and dt_max=0.1"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max"),
        ({"dt_min": "1e-3"}, "dt_min='1e-3' is text"),
        ({"dt_limit": [0.1, 0.1]}, "dt_limit=\\[0.1, 0.1\\] must satisfy 0 <= least < greatest"),
        ({"dt_limit": [-1.0, 0.1]}, "dt_limit"),
        ({"dt_limit": 0.1}, "dt_limit=0.1 must be two numbers.*None for no limit"),
        ({"dt_limit": "ab"}, "dt_limit='ab' must be two numbers"),
        ({"dt_limit": [0.0, float("inf")]}, "dt_limit=inf must be a finite number"),
        ({"dt_limit": [0.0, None]}, "dt_limit=\\[0.0, None\\] limits no step"),
        ({"dt_limit": [None, 1.0]}, "dt_limit=None must be a finite number"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must not be negative"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        zoo.block("mamba2", 24, **options)
