"""Three views of every model with a state matrix that is not diagonal, and the arithmetic under them."""

import pytest
import torch

from zoo.ssm import dense
from zoo.ssm.dense import DenseLTI, Squares, doublings, krylov
from zoo.ssm.liquid_s4 import LiquidS4System
from zoo.ssm.lssl import LSSLSystem
from zoo.ssm.s4 import S4System

STEPS = {"dt_min": 0.05, "dt_max": 0.5}
SYSTEMS = {
    "s4": lambda: S4System(5, 6, **STEPS),
    "s4 without a skip": lambda: S4System(5, 4, skip=False, **STEPS),
    "lssl": lambda: LSSLSystem(5, 5, **STEPS),
    "lssl of 3 outputs": lambda: LSSLSystem(5, 4, "lagt", outputs=3, **STEPS),
    "liquid s4 pb": lambda: LiquidS4System(5, 6, degree=3, **STEPS),
    "liquid s4 kb": lambda: LiquidS4System(5, 6, degree=3, kernel="kb", **STEPS),
}
# Left padding, documents, an empty row, a single long document.
SEGMENTS = torch.ones(4, 29, dtype=torch.long)
SEGMENTS[0, :5], SEGMENTS[0, 17:23] = 0, 0
SEGMENTS[1, 8:20], SEGMENTS[1, 20:27], SEGMENTS[1, 27:] = 2, 9, 0
SEGMENTS[2] = 0


@pytest.fixture(params=SYSTEMS)
def system(request):
    torch.manual_seed(3)
    made = SYSTEMS[request.param]().double()
    with torch.no_grad():  # away from HiPPO, where P is real and equals B/√2
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def outcome(system, view, u, segments):
    """A call that begins documents, another that continues, and everything's gradients."""
    system.view = view
    u = u.clone().requires_grad_()
    state = system.init_state(len(u), dtype=u.dtype)
    h = torch.randn(state.h.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    first, middle = system(u[:, :11], state._replace(h=h), None if segments is None else segments[:, :11])
    second, end = system(u[:, 11:], middle, None if segments is None else segments[:, 11:])
    y = torch.cat([first, second], 1)
    wave = torch.linspace(0, 5, y.numel(), dtype=y.dtype).sin().reshape(y.shape)
    total = (y * wave).sum() + end.h.cos().sum()
    names = ["u", "h", *(name for name, _ in system.named_parameters())]
    gradients = torch.autograd.grad(total, [u, h, *system.parameters()])
    return {"y": y, "h": end.h, "segment": end.segment, **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
def test_the_three_views_are_one_function(system, segments, chunk, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK", chunk)
    u = torch.randn(4, 29, 5, dtype=torch.float64)
    wanted = outcome(system, "recurrence", u, segments)
    assert wanted["y"].abs().max() > 0.1
    for view in ("convolution", "scan", "auto"):
        for name, value in outcome(system, view, u, segments).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, v=view: f"{v}: {m}")


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9, 31, 64, 100])
def test_the_filter_of_any_length_is_c_a_b(system, length):
    """Also S4's by its roots of unity: a filter without the correction for what comes after `length` fails here, as
    does one that is right for powers of two alone."""
    inner = getattr(system, "s4", system)
    made = inner.discrete()
    h, wanted = made.B, []
    for _ in range(length):
        wanted.append(torch.einsum("c m n, c n -> c m", made.C, h).flatten())
        h = torch.einsum("c n k, c k -> c n", made.A[0], h)
    torch.testing.assert_close(system.kernel(length), torch.stack(wanted, -1), rtol=1e-10, atol=1e-11)
    taken = DenseLTI.filter(inner, made, length)
    torch.testing.assert_close(taken, torch.stack(wanted, -1), rtol=1e-10, atol=1e-11)


def test_krylov_columns_are_powers():
    torch.manual_seed(0)
    A = torch.randn(2, 3, 3, dtype=torch.float64) / 2
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    for count in (1, 2, 5, 8):
        for transposed in (False, True):
            M = torch.linalg.matrix_power(A.mT if transposed else A, 4)
            found = krylov(Squares(lambda: A), x, count, level=2, transposed=transposed)
            wanted = torch.cat([torch.linalg.matrix_power(M, i) @ x for i in range(count)], -1)
            torch.testing.assert_close(found, wanted)


def test_squares_are_made_when_asked_for():
    calls = []

    def first():
        calls.append(1)
        return torch.full((1, 1, 1), 0.5)

    squares = Squares(first)
    assert not calls
    assert [squares[k].item() for k in (2, 0, 1)] == [0.5**4, 0.5, 0.25]
    assert len(calls) == 1
    assert [doublings(count) for count in (0, 1, 2, 3, 4, 5, 8, 9)] == [0, 0, 1, 2, 2, 3, 3, 4]


def test_a_step_makes_no_matrix(system, monkeypatch):
    """Decoding is O(N) a token for S4, O(N²) for LSSL: no power of Ā is made."""

    def refuse(self, k):
        raise AssertionError("a square was made")

    monkeypatch.setattr(Squares, "__getitem__", refuse)
    state = system.init_state(2, dtype=torch.float64)
    _, state = system(torch.randn(2, 1, 5, dtype=torch.float64), state)
    assert state.h.abs().max() > 0
    with pytest.raises(AssertionError, match="a square"):
        system(torch.randn(2, 2, 5, dtype=torch.float64), state)


@pytest.mark.parametrize("kind", ["s4", "lssl"])
def test_float32_stays_near_float64_over_many_tokens(kind):
    """Powers of Ā in float32 would have lost their digits."""
    torch.manual_seed(1)
    cls = {"s4": S4System, "lssl": LSSLSystem}[kind]
    narrow = cls(3, 32, dt_min=1e-4, dt_max=1e-3)
    wide = cls(3, 32).double()
    wide.load_state_dict({name: value.double() for name, value in narrow.state_dict().items()})
    u = torch.randn(1, 8000, 3)
    with torch.no_grad():
        y, end = narrow(u, narrow.init_state(1))
        wanted, wanted_end = wide(u.double(), wide.init_state(1))
    assert (y - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (end.h - wanted_end.h).abs().max() < 1e-5 * wanted_end.h.abs().max()


@pytest.mark.parametrize("length", [2, 3, 4, 8, 15, 16])
def test_a_state_goes_on_by_powers(system, length):
    """Through `length` silent tokens, in one call and a token after another."""
    h = torch.randn(2, 5, *system.init_state(1).h.shape[2:], dtype=torch.float64)
    u = torch.zeros(2, length, 5, dtype=torch.float64)
    ends = []
    for system.view in ("recurrence", "convolution", "scan"):
        ends.append(system(u, system.init_state(2)._replace(h=h))[1].h)
    assert ends[0].abs().max() > 1e-3
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-10, atol=1e-10)
