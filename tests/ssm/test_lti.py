"""One system, three views: what holds for every diagonal time-invariant model, and the arithmetic under it."""

from itertools import pairwise

import pytest
import torch

from tests.measure import Operations
from zoo.block import leaves
from zoo.ssm import lti
from zoo.ssm.block import SSMBlock
from zoo.ssm.dss import DSSSystem
from zoo.ssm.lti import DiagonalLTI, LTIState, Modes, expm1, log1p, powers
from zoo.ssm.s4d import S4DSystem

SYSTEMS = {
    "s4d": lambda: S4DSystem(5, 6, dt_min=0.05, dt_max=0.5),
    "s4d bilinear": lambda: S4DSystem(5, 4, "legs", "bilinear", dt_min=0.05, dt_max=0.5, skip=False),
    "dss softmax": lambda: DSSSystem(5, 3, length=40, dt_min=0.05, dt_max=0.5),
    "dss exp": lambda: DSSSystem(5, 3, "exp", separate_steps=True, dt_min=0.05, dt_max=0.5),
}
VIEWS = ("convolution", "recurrence", "scan")
# Left padding, documents, an empty row, a single long document.
SEGMENTS = torch.ones(4, 29, dtype=torch.long)
SEGMENTS[0, :5], SEGMENTS[0, 17:23] = 0, 0
SEGMENTS[1, 8:20], SEGMENTS[1, 20:27], SEGMENTS[1, 27:] = 2, 9, 0
SEGMENTS[2] = 0


@pytest.fixture(params=SYSTEMS)
def system(request):
    torch.manual_seed(3)
    made = SYSTEMS[request.param]().double()
    if request.param == "dss softmax":  # modes that grow
        with torch.no_grad():
            made.Lambda[:2, 0] = torch.tensor([0.3, 0.05])
    return made


@pytest.fixture(params=[4, 64])
def chunk(request, monkeypatch):
    """Sums in blocks of blocks too."""
    monkeypatch.setattr(lti, "CHUNK", request.param)


def outcome(system, view, u, segments):
    """A call that begins documents, another that continues, and everything's gradients."""
    system.view = view
    u = u.clone().requires_grad_()
    state = system.init_state(len(u), dtype=u.dtype)
    h = torch.randn(state.h.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    first, middle = system(u[:, :11], LTIState(h, state.segment), None if segments is None else segments[:, :11])
    second, end = system(u[:, 11:], middle, None if segments is None else segments[:, 11:])
    y = torch.cat([first, second], 1)
    wave = torch.linspace(0, 5, y.numel(), dtype=y.dtype).sin().reshape(y.shape)
    total = (y * wave).sum() + end.h.cos().sum()
    names = ["u", "h", *(name for name, _ in system.named_parameters())]
    gradients = torch.autograd.grad(total, [u, h, *system.parameters()])
    return {"y": y, "h": end.h, "segment": end.segment, **dict(zip(names, gradients, strict=True))}


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
def test_the_three_views_are_one_function(system, segments):
    u = torch.randn(4, 29, 5, dtype=torch.float64)
    wanted = outcome(system, "recurrence", u, segments)
    assert wanted["y"].abs().max() > 0.1
    for view in ("convolution", "scan", "auto"):
        for name, value in outcome(system, view, u, segments).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, v=view: f"{v}: {m}")


@pytest.mark.parametrize("view", VIEWS)
def test_an_impulse_is_answered_with_the_kernel(system, view):
    """A skip adds D at lag 0; the state holds what the rest of the kernel needs."""
    system.view = view
    kernel = system.kernel(60)
    impulse = torch.zeros(1, 20, 5, dtype=torch.float64)
    impulse[:, 0] = 1
    y, state = system(impulse, system.init_state(1, dtype=torch.float64))
    rest, _ = system(torch.zeros(1, 40, 5, dtype=torch.float64), state)
    found = torch.cat([y, rest], 1)[0].T
    skip = 0 if system.D is None else system.D
    torch.testing.assert_close(found[:, 0], kernel[:, 0] + skip, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[:, 1:], kernel[:, 1:], rtol=1e-10, atol=1e-10)
    assert kernel[:, 20:].abs().max() > 1e-3


def test_the_definition(system):
    """h_t = exp(log_a) h_{t-1} + drive u_t, y_t = Re or 2 Re <weights, h_t>, by Python's complex numbers."""
    u = torch.randn(1, 6, 5, dtype=torch.float64)
    system.requires_grad_(False)
    modes = system.discrete()
    drive = torch.ones_like(modes.log_a) if modes.drive is None else modes.drive
    y, state = system(u, system.init_state(1, dtype=torch.float64))
    for channel in range(5):
        total = [0.0] * 6
        for n in range(system.n):
            a, w, b = (complex(each[channel, n]) for each in (modes.log_a.exp(), modes.weights, drive))
            h = 0j
            for t in range(6):
                h = a * h + b * float(u[0, t, channel])
                total[t] += (2 if system.conjugate else 1) * (w * h).real
            assert complex(*state.h[0, channel, n].tolist()) == pytest.approx(h, rel=1e-9)
        skip = 0.0 if system.D is None else float(system.D[channel])
        wanted = [each + skip * float(u[0, t, channel]) for t, each in enumerate(total)]
        assert y[0, :, channel].tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-11)


def test_half_a_conjugate_pair_stands_for_both():
    """2 Re over half the modes is Re over the modes and their conjugates."""

    class Given(DiagonalLTI):
        def __init__(self, modes, conjugate):
            super().__init__(2, modes.log_a.shape[1], conjugate=conjugate)
            self.modes = modes

        def discrete(self):
            return self.modes

    log_a = torch.complex(-torch.rand(2, 3), 3 * torch.randn(2, 3)).to(torch.complex128)
    weights = torch.randn(2, 3, dtype=torch.complex128)
    half = Given(Modes(log_a, weights), True).double()
    both = Given(Modes(torch.cat([log_a, log_a.conj()], 1), torch.cat([weights, weights.conj()], 1)), False).double()
    both.D = half.D
    u = torch.randn(2, 13, 2, dtype=torch.float64)
    for view in VIEWS:
        half.view = both.view = view
        torch.testing.assert_close(half(u)[0], both(u)[0], rtol=1e-12, atol=1e-12)
    assert half.init_state(1).h.shape == (1, 2, 3, 2)


def test_far_powers_keep_their_digits():
    log_a = torch.complex(torch.full((1, 8), -1e-5), torch.linspace(0.1, 3, 8)[None])
    exponents = torch.tensor([0, 1, 1000, 100_003])
    found = powers(log_a, exponents)
    wanted = torch.exp(log_a.to(torch.complex128)[..., None] * exponents)
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found.to(torch.complex128), wanted, rtol=2e-6, atol=1e-6)
    naive = torch.exp(log_a[..., None] * exponents)
    assert (naive.to(torch.complex128) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(("function", "size"), [(expm1, 1.0), (log1p, 1.0)])
def test_small_differences_keep_their_digits(function, size):
    z = torch.complex(torch.tensor([-1e-6, 1e-4, -0.5, 0.3, -0.2]), torch.tensor([3e-6, -1e-5, 2.0, 0.0, -0.9]))
    exact = z.to(torch.complex128)
    wanted = torch.exp(exact) - 1 if function is expm1 else torch.log(1 + exact)
    error = (function(z).to(torch.complex128) - wanted).abs() / wanted.abs()
    assert error.max() < 3e-7
    plain = torch.exp(z) - 1 if function is expm1 else torch.log(1 + z)
    assert ((plain.to(torch.complex128) - wanted).abs() / wanted.abs()).max() > 1e-3


def test_autocast_does_not_reach_the_sums():
    torch.manual_seed(0)
    system = S4DSystem(8, 8)
    u = torch.randn(2, 50, 8)
    _, state = system(u, system.init_state(2))
    wanted, _ = system(u, state)
    with torch.autocast("cpu", torch.bfloat16):
        _, again = system(u, system.init_state(2))
        y, _ = system(u, again)
    torch.testing.assert_close(again.h, state.h)
    torch.testing.assert_close(y, wanted)


def test_a_state_in_bfloat16_is_float32():
    system = S4DSystem(4, 4).to(torch.bfloat16)
    y, state = system(torch.randn(2, 9, 4, dtype=torch.bfloat16), system.init_state(2, dtype=torch.bfloat16))
    assert (y.dtype, state.h.dtype) == (torch.bfloat16, torch.float32)
    assert [leaf.shape for leaf in leaves(state)] == [(2, 4, 2, 2), (2,)]


def test_an_unknown_view_is_named():
    system = S4DSystem(4, 4)
    system.view = "convolutional"
    with pytest.raises(ValueError, match=r"view='convolutional' is unknown to S4DSystem.*auto, convolution, rec"):
        system(torch.randn(1, 2, 4))


def test_a_block_of_another_width_is_refused():
    with pytest.raises(ValueError, match="channels=4, but the block width=5"):
        SSMBlock(5, S4DSystem(4, 4))


def operations(system, u, state):
    """Of one call, and the state after it."""
    with torch.no_grad(), Operations() as counted:
        state = system(u, state)[1]
    return counted.count, state


@pytest.mark.parametrize("name", ["s4d", "dss exp"])
def test_what_a_sequence_and_a_token_cost(name):
    """A whole sequence costs O(L log L), the kernel included; a token after it the same whatever L."""
    system, whole, token = SYSTEMS[name](), [], []
    for length in (512, 1024, 2048, 4096):
        count, state = operations(system, torch.randn(1, length, 5), system.init_state(1))
        whole.append(count)
        token.append(operations(system, torch.randn(1, 1, 5), state)[0])
    assert all(after < 2.2 * before for before, after in pairwise(whole)), whole  # 4 times if it were quadratic
    assert len(set(token)) == 1, token
