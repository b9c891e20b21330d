"""GSS: the paper's pseudocode as a plain sum, its simplified DSS in three views, and the state it carries."""

import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

import zoo
from zoo.block import leaves, state_bytes, tags
from zoo.ssm.gss import GSS, GSSSystem
from zoo.ssm.lti import LTIState

SEGMENTS = torch.ones(3, 23, dtype=torch.long)
SEGMENTS[0, :4], SEGMENTS[0, 9], SEGMENTS[0, 15:18] = 0, 0, 0
SEGMENTS[1, 6:14], SEGMENTS[1, 14:20], SEGMENTS[1, 20:] = 2, 5, 0


def the_papers_kernel(system, length):
    """2206.13947, pseudocode of section 3.2, one number after another: K[h, l] = Re Σ C (e^λ - 1)/λ e^(λl)."""
    K = torch.zeros(system.channels, length, dtype=torch.float64)
    for n in range(system.n):
        pole = complex(-math.exp(system.log_A_real[n]), math.exp(system.log_A_imag[n]))
        factor = (torch.exp(torch.tensor(pole, dtype=torch.complex128)) - 1) / pole
        for h in range(system.channels):
            C = complex(*system.C[h, n].tolist())
            for lag in range(length):
                K[h, lag] += (C * factor * torch.exp(torch.tensor(pole * lag, dtype=torch.complex128))).real
    return K


@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_papers_pseudocode(bias):
    torch.manual_seed(0)
    block = GSS(6, hidden=10, reduced=4, state_size=3, bias=bias).double()
    x = torch.randn(2, 14, 6, dtype=torch.float64)
    assert block.lti.D is not None
    with torch.no_grad():
        for each in block.parameters():
            each.add_(0.2 * torch.randn_like(each))

        def dense(layer, value, rows=slice(None)):
            y = value @ layer.weight[rows].T
            return y + layer.bias[rows] if bias else y

        v = gelu(dense(block.in_proj, x, slice(10)))
        u = layer_norm(gelu(dense(block.in_proj, x, slice(10, 14))), (4,), block.norm.weight, block.norm.bias)
        K = the_papers_kernel(block.lti, 14)
        y = block.lti.D * u
        for t in range(14):
            for s in range(t + 1):
                y[:, t] += K[:, s] * u[:, t - s]
        wanted = dense(block.out_proj, dense(block.context_proj, y) * v)
        torch.testing.assert_close(block(x).y, wanted, rtol=1e-11, atol=1e-11)
    assert K[:, 1:].abs().max() > 1e-2 and wanted.abs().max() > 1e-2


def outcome(system, view, u, segments):
    system.view = view
    u = u.clone().requires_grad_()
    state = system.init_state(len(u), dtype=u.dtype)
    h = torch.randn(state.h.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    first, middle = system(u[:, :11], LTIState(h, state.segment), None if segments is None else segments[:, :11])
    second, end = system(u[:, 11:], middle, None if segments is None else segments[:, 11:])
    y = torch.cat([first, second], 1)
    wave = torch.linspace(0, 5, y.numel(), dtype=y.dtype).sin().reshape(y.shape)
    gradients = torch.autograd.grad((y * wave).sum() + end.h.cos().sum(), [u, h, *system.parameters()])
    return {"y": y, "end": end.h, **{f"gradient {i}": each for i, each in enumerate(gradients)}}


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
def test_the_three_views_are_one_function(segments):
    torch.manual_seed(1)
    system = GSSSystem(4, 3).double()
    with torch.no_grad():
        system.log_A_real.sub_(2)  # a memory of more than a few tokens
    u = torch.randn(3, 23, 4, dtype=torch.float64)
    wanted = outcome(system, "recurrence", u, segments)
    assert wanted["y"].abs().max() > 0.1
    for view in ("convolution", "scan", "auto"):
        for name, value in outcome(system, view, u, segments).items():
            torch.testing.assert_close(
                value, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, w=f"{view}, {name}": f"{w}: {m}"
            )


def test_the_start():
    """Both logarithms of λ standard normal, shared by all channels; C of variance 1/N a part: outputs as inputs."""
    torch.manual_seed(0)
    system = GSSSystem(64, 4096)
    assert system.log_A_real.shape == system.log_A_imag.shape == (4096,)
    for each in (system.log_A_real, system.log_A_imag):
        assert each.mean().item() == pytest.approx(0, abs=0.06) and each.std().item() == pytest.approx(1, abs=0.05)
    assert system.C.square().mean().item() * 4096 == pytest.approx(1, abs=0.02)
    for size in (16, 2048):
        y = GSSSystem(64, size, skip=False)(torch.randn(4, 200, 64))[0]
        assert 0.3 < y.std() < 2, size


def test_the_state_is_carried_and_constant():
    """Whole = two parts with the state between; with an empty one not. Its size: 2 N numbers a reduced channel."""
    torch.manual_seed(0)
    block = GSS(8, reduced=4, state_size=6).double()
    with torch.no_grad():
        block.lti.log_A_real.sub_(2)
        x = torch.randn(2, 40, 8, dtype=torch.float64)
        whole = block(x).y
        state, outputs = block.init_state(2), []
        for part in x.split([17, 1, 1, 21], 1):
            y, state, _ = block(part, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-11, atol=1e-11)
        state = block(x[:, :17], block.init_state(2)).state
        broken = state._replace(h=torch.zeros_like(state.h))
        assert (block(x[:, 17:], broken).y - whole[:, 17:]).abs().max() > 1e-4
    assert state_bytes(state) / 2 == 4 * 6 * 2 * 8 + 8 == block.state_bytes(10**6, dtype=torch.float64)
    assert GSS(8, reduced=4, state_size=6).bfloat16().init_state(1).h.dtype == torch.float32


def test_sizes_are_the_papers():
    """E = 1024, F = 4096, H = 256, N = 512."""
    block = GSS(1024)
    count = sum(each.numel() for each in block.parameters())
    assert block.sizes == (4096, 256) and (block.lti.channels, block.lti.n) == (256, 512)
    system = 2 * 512 + 2 * 256 * 512 + 256  # λ, C, D
    assert count == 1024 * (4096 + 256) + 256 * 4096 + 4096 * 1024 + system + 2 * 256
    assert GSS(1, state_size=2)(torch.randn(1, 3, 1)).y.shape == (1, 3, 1)
    assert GSS(5).lti.channels == 2
    chosen = GSS(24, hidden=20, reduced=7, state_size=3)
    assert (chosen.out_proj.in_features, chosen.lti.channels, chosen.lti.n) == (20, 7, 3)
    assert [tuple(leaf.shape) for leaf in leaves(chosen.init_state(3))] == [(3, 7, 3, 2), (3,)]


def test_what_the_optimizer_is_told():
    found = tags(GSS(8, state_size=2, bias=True))
    special = {name for name, each in found.items() if each.learning_rate == 1e-3}
    assert special == {"lti.log_A_real", "lti.log_A_imag"}
    free = {name for name, each in found.items() if not each.weight_decay}
    biases = {"in_proj.bias", "context_proj.bias", "out_proj.bias", "norm.bias"}
    assert free == special | biases | {"lti.D", "norm.weight"}
    assert all(each.learning_rate is None for each in tags(GSS(8, learning_rate=None)).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden=0 must be a positive integer"),
        ({"reduced": 2.5}, "reduced=2.5 must be an integer from 2"),
        ({"reduced": 1}, "reduced=1 must be an integer from 2: a norm of one is 0"),
        ({"state_size": 0}, "state_size=0 must be a positive integer"),
        ({"activation": "glu"}, "activation='glu' is unknown"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be positive"),
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3' is text"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("gss", 8, **options)
