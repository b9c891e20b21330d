"""Mamba against transformers' mixers, and the places where implementations go wrong."""

import math

import pytest
import torch
from torch import nn

import zoo
from zoo.block import leaves, map_state, state_bytes, tags
from zoo.ssm.mamba import Mamba


def randomised(block: nn.Module) -> nn.Module:
    """Random weights everywhere, so that no term is hidden by its initial value."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if "A_log" in name or "bias" in name else 0.3))
    return block


def copy_to_transformers(ours: Mamba, mixer: nn.Module, norms: dict[str, str]) -> None:
    weights = {
        "in_proj.weight": ours.in_proj.weight,
        "conv1d.weight": ours.conv.weight[:, None, :],
        "x_proj.weight": ours.x_proj.weight,
        "dt_proj.weight": ours.dt_proj.weight,
        "dt_proj.bias": ours.dt_proj.bias,
        "A_log": ours.A_log,
        "D": ours.D,
        "out_proj.weight": ours.out_proj.weight,
    }
    if ours.conv.bias is not None:
        weights["conv1d.bias"] = ours.conv.bias
    if ours.in_proj.bias is not None:
        weights |= {"in_proj.bias": ours.in_proj.bias, "out_proj.bias": ours.out_proj.bias}
    weights |= {f"{theirs}.weight": getattr(ours, name).weight for theirs, name in norms.items()}
    mixer.load_state_dict({name: each.detach().clone() for name, each in weights.items()}, strict=True)


@pytest.fixture
def exact(monkeypatch):
    """transformers' mixers round to float32 on the way; in float64 they are an oracle to the last bits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("time", "bias", "conv_bias"), [(37, False, True), (1, True, False), (5, True, True)])
def test_equals_transformers_mamba(time, bias, conv_bias):
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    ours = randomised(Mamba(20, expand=3, state_size=5, conv_width=3, dt_rank=7, bias=bias, conv_bias=conv_bias))
    config = MambaConfig(
        hidden_size=20, expand=3, state_size=5, conv_kernel=3, time_step_rank=7, use_bias=bias, use_conv_bias=conv_bias
    )
    _equal(ours.double(), MambaMixer(config, 0).double(), {}, time)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("time", [23, 2])
def test_inner_norm_equals_transformers_jamba(time):
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    ours = randomised(Mamba(24, state_size=6, inner_norm=True))
    config = JambaConfig(hidden_size=24, mamba_d_state=6, mamba_dt_rank=2)
    norms = {"dt_layernorm": "dt_norm", "b_layernorm": "B_norm", "c_layernorm": "C_norm"}
    # Its norms round to float32 by another way than .float().
    _equal(ours.double(), JambaMambaMixer(config, 0).double(), norms, time, tolerance=3e-5)


def _equal(ours: Mamba, mixer: nn.Module, norms: dict[str, str], time: int, tolerance: float = 1e-10) -> None:
    copy_to_transformers(ours, mixer, norms)
    x = torch.randn(3, time, ours.width, dtype=torch.float64)
    theirs, mine = (x.clone().requires_grad_() for _ in range(2))
    expected, y = mixer.eval()(theirs), ours(mine).y
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(y)
    (expected * weight).sum().backward()
    (y * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=10 * tolerance, atol=10 * tolerance)
    torch.testing.assert_close(ours.A_log.grad, mixer.A_log.grad, rtol=10 * tolerance, atol=10 * tolerance)
    torch.testing.assert_close(
        ours.dt_proj.bias.grad, mixer.dt_proj.bias.grad, rtol=10 * tolerance, atol=10 * tolerance
    )


def test_whole_model_equals_transformers():
    """A stack of two, with norms and residuals, in float32 as published checkpoints run."""
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(vocab_size=31, hidden_size=24, num_hidden_layers=2, state_size=8, residual_in_fp32=False)
    model = MambaModel(config).eval()
    blocks = [randomised(Mamba(24, state_size=8)) for _ in range(2)]
    for ours, layer in zip(blocks, model.layers, strict=True):
        copy_to_transformers(ours, layer.mixer, {})
    tokens = torch.randint(31, (2, 41))
    with torch.no_grad():
        x = model.embeddings(tokens)
        for ours, layer in zip(blocks, model.layers, strict=True):
            x = x + ours(layer.norm(x)).y
        expected = model(tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(model.norm_f(x), expected, rtol=2e-5, atol=2e-5)


def test_steps_start_log_uniform():
    block = Mamba(512, dt_min=1e-3, dt_max=1e-1)
    dt = nn.functional.softplus(block.dt_proj.bias.double()).detach()
    assert 1e-3 * 0.999 <= dt.min() < 1.2e-3
    assert 0.8e-1 < dt.max() <= 1e-1 * 1.001
    # log-uniform: as many steps in each half decade
    counts = torch.histc(dt.log10(), 4, -3, -1) / dt.numel()
    torch.testing.assert_close(counts, torch.full_like(counts, 0.25), atol=0.06, rtol=0)


def test_initial_decay_and_skip():
    block = Mamba(24, state_size=5)
    expected = -torch.arange(1.0, 6).expand(48, 5)
    torch.testing.assert_close(-block.A_log.exp(), expected)
    torch.testing.assert_close(block.D, torch.ones(48))
    assert block.dt_rank == math.ceil(24 / 16)


def test_no_weight_decay_where_the_dynamics_are():
    free = {name for name, each in tags(Mamba(24, bias=True, inner_norm=True)).items() if not each.weight_decay}
    assert free == {
        *("A_log", "D", "dt_proj.bias", "conv.bias", "in_proj.bias", "out_proj.bias"),
        *("dt_norm.weight", "B_norm.weight", "C_norm.weight"),
    }


@pytest.mark.parametrize("lost", ["conv", "scan"])
def test_both_states_are_carried(lost):
    """Whole = two halves; and each of the two states matters to it."""
    block = randomised(Mamba(24)).double()
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = block(x).y
        first = block(x[:, :5], block.init_state(2))
        second = block(x[:, 5:], first.state)
        torch.testing.assert_close(torch.cat([first.y, second.y], 1), whole, rtol=1e-11, atol=1e-11)
        first = block(x[:, :5], block.init_state(2))
        broken = first.state._replace(**{lost: torch.zeros_like(getattr(first.state, lost))})
        assert (block(x[:, 5:], broken).y - whole[:, 5:]).abs().max() > 1e-4


def test_token_by_token_is_whole():
    block = randomised(Mamba(24, inner_norm=True)).double()
    x = torch.randn(3, 9, 24, dtype=torch.float64)
    state, outputs = block.init_state(3), []
    with torch.no_grad():
        for t in range(9):
            y, state, _ = block(x[:, t : t + 1], state)
            outputs.append(y)
        whole = block(x, block.init_state(3))
    torch.testing.assert_close(torch.cat(outputs, 1), whole.y, rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(leaves(state), leaves(whole.state), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_state_is_of_constant_size():
    block = Mamba(24)
    state = block.init_state(2, dtype=torch.bfloat16)
    assert state.scan.dtype == torch.float32
    assert state.conv.dtype == torch.bfloat16
    before = state_bytes(state)
    out = block.bfloat16()(torch.randn(2, 50, 24, dtype=torch.bfloat16), state)
    assert state_bytes(out.state) == before == 2 * block.state_bytes(1, dtype=torch.bfloat16)
    assert block.state_bytes(100) == block.state_bytes(1)
    assert [each.dtype for each in leaves(out.state)] == [each.dtype for each in leaves(state)]


@pytest.mark.parametrize("bias", [False, True])
def test_padding_and_packing(bias):
    """Two documents in a row with NaN at the padding around and between = each alone; gradients stay finite."""
    block = randomised(Mamba(24, bias=bias)).double()
    first, second = torch.randn(1, 5, 24).double(), torch.randn(1, 7, 24).double()
    garbage = torch.full((1, 2, 24), torch.nan, dtype=torch.float64)
    x = torch.cat([garbage, first[:, :3], garbage, first[:, 3:], second, garbage], 1).requires_grad_()
    segments = torch.tensor([[0, 0, 4, 4, 4, 0, 0, 4, 4, 9, 9, 9, 9, 9, 9, 9, 0, 0]])
    out = block(x, block.init_state(1), segments)
    alone = [block(each, block.init_state(1)) for each in (first, second)]
    torch.testing.assert_close(out.y[segments == 4], alone[0].y[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.y[segments == 9], alone[1].y[0], rtol=1e-11, atol=1e-11)
    assert (out.y[segments == 0] == 0).all()
    torch.testing.assert_close(out.state.scan, alone[1].state.scan, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.state.conv, alone[1].state.conv, rtol=1e-11, atol=1e-11)
    assert out.state.segment.tolist() == [9]
    (out.y.sum() + out.state.scan.sum()).backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in block.parameters())
    assert (x.grad[segments == 0] == 0).all()


def test_a_state_goes_on_in_its_document_alone():
    block = randomised(Mamba(24)).double()
    x = torch.randn(2, 4, 24).double()
    with torch.no_grad():
        state = block(x, block.init_state(2), torch.full((2, 4), 3)).state
        kept = map_state(torch.clone, state)
        out = block(x, state, torch.tensor([[3] * 4, [5] * 4]))
        goes_on, fresh = block(x, kept).y, block(x).y
    torch.testing.assert_close(out.y[0], goes_on[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.y[1], fresh[1], rtol=1e-11, atol=1e-11)
    assert out.state.segment.tolist() == [3, 5]


def test_compiles_into_one_graph():
    block = Mamba(24)
    x = torch.randn(2, 10, 24, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, block.init_state(2)), block(x, block.init_state(2))
    torch.testing.assert_close(out.y, expected.y)
    (gradient,) = torch.autograd.grad(out.y.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.y.square().sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_flops_follow_the_published_count():
    """2 a weight of the matrices and the convolution, 9 a state (2312.00752's own count of the scan: 9·B·L·D·N)."""
    block = Mamba(768)
    weights = 768 * 3072 + 1536 * (48 + 32) + 48 * 1536 + 1536 * 768 + 1536 * 4
    assert block.flops_per_token(1000) == 2 * weights + 9 * 1536 * 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state_size": 0}, "state_size=0"),
        ({"conv_width": -1}, "conv_width=-1"),
        ({"expand": 1.5}, "expand=1.5"),
        ({"dt_rank": 49}, "dt_rank=49.*48"),
        ({"dt_min": 0.2}, "dt_min=0.2"),
        ({"dt_min": "1e-3"}, "dt_min='1e-3' is text.*write 1.0e-3"),
        ({"dt_max": float("inf")}, "dt_max=inf must be a finite number"),
        ({"inner_norm_eps": 0.1}, "inner_norm_eps=0.1 needs norms of dt, B and C"),
        ({"inner_norm": True, "inner_norm_eps": -0.1}, "inner_norm_eps=-0.1 must not be negative"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        zoo.block("mamba", 24, **options)
