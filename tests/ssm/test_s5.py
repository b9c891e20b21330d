"""S5: one system of many inputs and outputs in three views, its HiPPO-N start, and the gates around it."""

import math

import pytest
import torch
from torch.nn.functional import gelu

import zoo
from zoo.block import leaves, state_bytes, tags
from zoo.ssm import s5
from zoo.ssm.hippo import nplr
from zoo.ssm.lti import LTIState
from zoo.ssm.s5 import S5, S5System

# Left padding, documents with padding inside, an empty row, a single long document.
SEGMENTS = torch.ones(4, 29, dtype=torch.long)
SEGMENTS[0, :5], SEGMENTS[0, 17:23], SEGMENTS[0, 9] = 0, 0, 0
SEGMENTS[1, 8:20], SEGMENTS[1, 20:27], SEGMENTS[1, 27:] = 2, 9, 0
SEGMENTS[2] = 0


def made(discretisation="zoh", channels=5, **options):
    torch.manual_seed(3)
    system = S5System(channels, 12, 2, discretisation, dt_min=0.05, dt_max=0.5, **options).double()
    with torch.no_grad():
        system.A_real.sub_(torch.rand_like(system.A_real))
        system.A_imag.add_(0.3 * torch.randn_like(system.A_imag))
    return system


def outcome(system, view, u, segments):
    """A call that begins documents, another that goes on, and everything's gradients."""
    system.view = view
    u = u.clone().requires_grad_()
    state = system.init_state(len(u), dtype=u.dtype)
    h = torch.randn(state.h.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    first, middle = system(u[:, :11], LTIState(h, state.segment), None if segments is None else segments[:, :11])
    second, end = system(u[:, 11:], middle, None if segments is None else segments[:, 11:])
    y = torch.cat([first, second], 1)
    wave = torch.linspace(0, 5, y.numel(), dtype=y.dtype).sin().reshape(y.shape)
    # Without a state too: that is another way through the convolution.
    alone = system(u, None, segments)[0]
    total = (y * wave).sum() + (alone * wave.flip(1)).sum() + end.h.cos().sum()
    names = ["u", "h", *(name for name, _ in system.named_parameters())]
    gradients = torch.autograd.grad(total, [u, h, *system.parameters()])
    return {
        "y": y,
        "alone": alone,
        "end": end.h,
        "segment": end.segment,
        **{f"gradient of {name}": each for name, each in zip(names, gradients, strict=True)},
    }


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
def test_the_three_views_are_one_function(discretisation, segments):
    system = made(discretisation)
    u = torch.randn(4, 29, 5, dtype=torch.float64)
    wanted = outcome(system, "recurrence", u, segments)
    assert wanted["y"].abs().max() > 0.1 and wanted["gradient of log_step"].abs().min() > 1e-6
    for view in ("convolution", "scan", "auto"):
        for name, value in outcome(system, view, u, segments).items():
            torch.testing.assert_close(
                value, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, w=f"{view}, {name}": f"{w}: {m}"
            )


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
def test_equals_the_dense_system_discretised_and_iterated(discretisation):
    """2208.04933, section 3, with both halves of the pairs, a step a mode, and a loop over time."""
    system = made(discretisation, channels=3)
    u = torch.randn(2, 40, 3, dtype=torch.float64)
    assert system.D is not None
    with torch.no_grad():
        A = torch.complex(system.A_real, system.A_imag)
        A = torch.diag(torch.cat([A, A.conj()]))
        B, C = torch.view_as_complex(system.B), torch.view_as_complex(system.C)
        B, C = torch.cat([B, B.conj()]), torch.cat([C, C.conj()], 1)
        step = torch.diag(system.log_step.exp().repeat(2)).to(A.dtype)
        identity = torch.eye(12, dtype=A.dtype)
        if discretisation == "zoh":
            a_bar = torch.linalg.matrix_exp(step @ A)
            b_bar = torch.linalg.solve(A, (a_bar - identity) @ B)
        else:
            a_bar = torch.linalg.solve(identity - step @ A / 2, identity + step @ A / 2)
            b_bar = torch.linalg.solve(identity - step @ A / 2, step @ B)
        h = torch.zeros(2, 12, dtype=A.dtype)
        wanted = torch.zeros_like(u)
        for t in range(40):
            h = h @ a_bar.T + u[:, t].to(A.dtype) @ b_bar.T
            y = h @ C.T
            assert y.imag.abs().max() < 1e-12
            wanted[:, t] = y.real + system.D * u[:, t]
        found, state = system(u, system.init_state(2, dtype=torch.float64))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.view_as_complex(state.h), h[:, :6], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("view", ["convolution", "recurrence", "scan"])
def test_an_impulse_in_one_channel_is_answered_by_all(view):
    """y_l = K_l[:, i] and D at lag 0; the state holds what the rest of the filter needs."""
    system = made()
    system.view = view
    kernel = system.kernel(60)
    assert system.D is not None
    assert kernel.shape == (5, 5, 60)
    assert kernel.abs().amax(-1).min() > 1e-2  # every channel hears every other
    impulse = torch.zeros(5, 20, 5, dtype=torch.float64)
    impulse[range(5), 0, range(5)] = 1
    y, state = system(impulse, system.init_state(5, dtype=torch.float64))
    rest, _ = system(torch.zeros(5, 40, 5, dtype=torch.float64), state)
    found = torch.cat([y, rest], 1).permute(2, 0, 1)
    found[..., 0] -= torch.diag(system.D)
    torch.testing.assert_close(found, kernel, rtol=1e-10, atol=1e-10)
    assert kernel[..., 20:].abs().max() > 1e-3


def test_sequences_are_scanned_and_tokens_stepped(monkeypatch):
    """No Fourier transform in what `auto` does; one token takes no scan either."""
    calls = []
    scan = s5.linear_recurrence
    monkeypatch.setattr(s5, "linear_recurrence", lambda x, *a, **k: calls.append(x.shape) or scan(x, *a, **k))
    for name in ("rfft", "irfft", "fft", "ifft"):
        monkeypatch.setattr(torch.fft, name, lambda *_, **__: pytest.fail("a Fourier transform"))
    block = S5(6, 8, 2)
    state = block(torch.randn(2, 15, 6), block.init_state(2)).state
    assert calls == [(2, 15, 4)]  # states, not states times features
    block(torch.randn(2, 1, 6), state)
    block(torch.randn(2, 1, 6))
    assert len(calls) == 1
    block.lti.view = "convolution"
    with pytest.raises(pytest.fail.Exception, match="a Fourier transform"):
        block(torch.randn(2, 15, 6))


def test_starts_at_blocks_of_hippo_n():
    """2208.04933, appendix B.1: eigenvalues of -HiPPO-LegS + P Pᵀ of size P/J, once a block, as pairs."""
    system = S5System(7, 24, 3)
    n = torch.arange(8, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    normal = -torch.outer(root, root).tril(-1) - torch.diag(n + 1) + torch.outer(root, root) / 2
    poles = torch.linalg.eigvals(normal)
    wanted = poles[poles.imag > 0].imag.sort().values
    torch.testing.assert_close(system.A_imag.double().reshape(3, 4), wanted.expand(3, 4), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(system.A_real, torch.full((12,), -0.5))
    # One block is another system: its fastest mode is faster.
    assert S5System(7, 24, 1).A_imag.max() > 2 * wanted.max()


def test_B_and_C_start_real_and_complex_in_hippos_basis():
    torch.manual_seed(0)
    system = S5System(400, 24, 3)
    V = nplr("legs", 8).V.to(torch.complex64)
    B = torch.view_as_complex(system.B.detach()).reshape(3, 4, 400)
    C = torch.view_as_complex(system.C.detach()).reshape(400, 3, 4)
    real = 2 * (V @ B).real  # V B + its conjugate: B' again
    torch.testing.assert_close(V.mH @ real.to(V.dtype), B)  # B holds one half of the pairs of a real B'
    # Normal, cut off at ±2 standard deviations of the whole: which is ±2/0.8796 of what is left.
    assert real.var().item() == pytest.approx(1 / 24, rel=0.05)
    assert 2.2 < real.abs().max() * math.sqrt(24) <= 2 / 0.8796 + 1e-3
    assert real[0].flatten().dot(real[1].flatten()).abs() / real[0].square().sum() < 0.1  # blocks are drawn apart
    assert C.abs().square().mean().item() == pytest.approx(2 / 24, rel=0.05)
    # C' is complex: its product with V has no conjugate symmetry, so real and imaginary parts are alike.
    assert C.real.var().item() == pytest.approx(C.imag.var().item(), rel=0.1)
    assert system.D is not None
    assert system.D.std().item() == pytest.approx(1, abs=0.15)


def test_every_mode_has_its_own_step_log_uniform():
    system = S5System(2, 4000, 1000, dt_min=1e-3, dt_max=1e-1)
    step = system.log_step.exp()
    assert step.shape == (2000,)
    assert step.min() >= 0.999e-3 and step.max() <= 1.001e-1
    counts = torch.histc(step.log10(), 4, -3, -1) / 2000
    torch.testing.assert_close(counts, torch.full((4,), 0.25), atol=0.04, rtol=0)


def test_clipped_modes_do_not_grow():
    torch.manual_seed(0)
    free, clipped = (S5System(3, 4, 1, dt_min=0.1, dt_max=0.1, clip=clip).double() for clip in (False, True))
    with torch.no_grad():
        clipped.load_state_dict(free.state_dict())
        for system in (free, clipped):
            system.A_real.fill_(0.5)
        assert free.kernel(400)[..., 300:].abs().max() > 1e3
        at_the_bound = clipped.kernel(400)
        assert at_the_bound.abs().max() < 10
        clipped.A_real.fill_(-1e-4)
        torch.testing.assert_close(clipped.kernel(400), at_the_bound)
        clipped.A_real.fill_(-0.3)
        free.A_real.fill_(-0.3)
        torch.testing.assert_close(clipped.kernel(400), free.kernel(400))


@pytest.mark.parametrize("gate", ["half", "half_linear", "full", None])
def test_the_layer(gate):
    torch.manual_seed(2)
    block = S5(6, 8, 2, gate=gate).double()
    x = torch.randn(2, 15, 6, dtype=torch.float64)
    y, _ = block.lti(x)
    if gate is None:
        wanted = gelu(y)
        assert block.out_proj is None
    else:
        assert block.out_proj is not None
        with torch.no_grad():
            block.out_proj.bias.normal_()
        made = gelu(y) @ block.out_proj.weight.T + block.out_proj.bias
        value = {"half": gelu(y), "half_linear": y, "full": made[..., :6]}[gate]
        wanted = value * made[..., -6:].sigmoid()
    torch.testing.assert_close(block(x).y, wanted, rtol=1e-12, atol=1e-12)
    approximate = S5(6, 8, 2, gate=gate, activation="gelu_tanh").double()
    approximate.load_state_dict(block.state_dict())
    assert 1e-6 < (approximate(x).y - wanted).abs().max() < 1e-2


def test_the_blocks_options_reach_its_system():
    torch.manual_seed(0)
    found = S5(5, 12, 3, "bilinear", 0.02, 0.03, False).lti
    torch.manual_seed(0)
    wanted = S5System(5, 12, 3, "bilinear", 0.02, 0.03, False)
    torch.testing.assert_close(found.kernel(20), wanted.kernel(20))
    assert (found.discretisation, found.clip, found.n) == ("bilinear", False, 6)
    assert (found.log_step.exp() >= 0.0199).all() and (found.log_step.exp() <= 0.0301).all()
    default = S5(5).lti
    assert (default.n, default.discretisation, default.clip) == (128, "zoh", True)
    torch.testing.assert_close(default.A_imag[:16], default.A_imag[-16:])


def test_the_state_does_not_grow_with_the_width():
    narrow, wide = S5(4, 16, 2), S5(64, 16, 2)
    assert state_bytes(narrow.init_state(1)) == state_bytes(wide.init_state(1)) == 8 * 2 * 4 + 8
    assert wide.state_bytes(10**6, dtype=torch.float64) == 8 * 2 * 8 + 8
    state = wide.bfloat16()(torch.randn(2, 7, 64).bfloat16(), wide.init_state(2)).state
    assert [each.dtype for each in leaves(state)] == [torch.float32, torch.int64]


def test_long_sequences_stay_near_float64():
    """4000 tokens with slow modes, where sums of products in bfloat16 or rounded angles would show."""
    torch.manual_seed(1)
    system = S5System(4, 16, 2)
    exact = S5System(4, 16, 2).double()
    exact.load_state_dict({name: value.double() for name, value in system.state_dict().items()})
    u = torch.randn(1, 4000, 4)
    for view in ("scan", "convolution"):
        system.view = view
        found, wanted = system(u)[0].double(), exact(u.double())[0]
        assert (found - wanted).abs().max() / wanted.abs().max() < 1e-4, view


def test_what_the_optimizer_is_told():
    found = tags(S5(6, 8, 2, gate="full"))
    special = {name for name, each in found.items() if each.learning_rate == 1e-3}
    assert special == {"lti.log_step", "lti.A_real", "lti.A_imag", "lti.B"}
    free = {name for name, each in found.items() if not each.weight_decay}
    assert free == special | {"lti.D", "out_proj.bias"}
    assert tags(S5(6, 8, 2, learning_rate=2.0e-4))["lti.B"].learning_rate == 2e-4
    assert all(each.learning_rate is None for each in tags(S5(6, 8, 2, learning_rate=None)).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 20}, "state_size=20 must be a multiple of 2 \\* blocks = 16.*try 32"),
        ({"state_size": 8, "blocks": 3}, "state_size=8 must be a multiple of 2 \\* blocks = 6.*try 12"),
        ({"state_size": 0}, "state_size=0 must be an integer from 2"),
        ({"blocks": 0}, "blocks=0 must be a positive integer"),
        ({"blocks": 2.0}, "blocks=2.0 must be a positive integer"),
        ({"discretisation": "bilnear"}, "discretisation='bilnear' is unknown.*mean 'bilinear'.*zoh, bilinear"),
        ({"dt_min": 0.2}, "dt_min=0.2 and dt_max=0.1 must satisfy 0 < dt_min <= dt_max"),
        ({"gate": "halve"}, "gate='halve' is unknown.*mean 'half'.*choose from full, half, half_linear, or None"),
        ({"activation": "glu"}, "activation='glu' is unknown"),
        ({"learning_rate": 0}, "learning_rate=0 must be positive, or None"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("s5", 6, **options)


def test_an_unknown_view_is_named():
    system = S5System(3, 8, 2)
    system.view = "scna"
    with pytest.raises(ValueError, match=r"view='scna' is unknown to S5System.*mean 'scan'"):
        system(torch.randn(1, 4, 3))
