"""Liquid-S4 against the sums that define it, the liquid recurrence that they are taken from, and S4."""

import pytest
import torch

import zoo
from zoo.block import tags
from zoo.ssm.liquid_s4 import LiquidS4System
from zoo.ssm.s4 import S4System

VIEWS = ["convolution", "recurrence", "scan"]


def made(degree, kernel, size=6):
    torch.manual_seed(0)
    system = LiquidS4System(4, size, degree, kernel, dt_min=0.05, dt_max=0.5).double()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return system


def matrices(system):
    """Ā, B̄, C over modes and conjugates, complex, by dense solves."""
    s4 = system.s4
    half = torch.complex(-s4.log_A_real.exp(), s4.A_imag)
    both = [torch.cat([each, each.conj()], -1) for each in (half, *map(torch.view_as_complex, (s4.P, s4.B, s4.C)))]
    found = []
    for Lambda, P, B, C, step in zip(*both, s4.log_step.exp(), strict=True):
        A, eye = torch.diag(Lambda) - torch.outer(P, P.conj()), torch.eye(len(P), dtype=P.dtype)
        sides = torch.cat([eye + step / 2 * A, step * B[:, None]], 1)
        solved = torch.linalg.solve(eye - step / 2 * A, sides)
        found.append((solved[:, :-1], solved[:, -1], C))
    return found


def sums(system, u):
    """y_t = Σ_p Σ_l C Āˡ (B̄ 1ᵀ)^(p-1) B̄ u_{t-l} ... u_{t-l-p+1} + D u_t, for "pb" with l = 0 alone where p > 1."""
    time = u.shape[1]
    y = torch.zeros_like(u)
    for c, (A, B, C) in enumerate(matrices(system)):
        for p in range(1, system.degree + 1):
            spread = torch.linalg.matrix_power(torch.outer(B, torch.ones_like(B)), p - 1) @ B
            for t in range(time):
                for lag in range(t + 1 if p == 1 or system.kernel_kind == "kb" else 1):
                    if t - lag - p + 1 >= 0:
                        product = u[:, t - lag - p + 1 : t - lag + 1, c].prod(1)
                        y[:, t, c] += (C @ torch.linalg.matrix_power(A, lag) @ spread).real * product
    return y + system.D * u


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["pb", "kb"])
def test_it_is_its_sums(degree, kernel):
    system = made(degree, kernel)
    u = 2 * torch.randn(2, 9, 4, dtype=torch.float64)
    with torch.no_grad():
        wanted = sums(system, u)
        for system.view in VIEWS:
            torch.testing.assert_close(system(u)[0], wanted, rtol=1e-10, atol=1e-10)
        state, outputs = system.init_state(2, dtype=torch.float64), []
        for token in u.unbind(1):
            y, state = system(token[:, None], state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", ["pb", "kb"])
def test_the_products_matter(kernel):
    """Each further degree changes the output, from its own place in the document on."""
    u = 2 * torch.randn(1, 9, 4, dtype=torch.float64)
    outputs = [made(degree, kernel)(u)[0] for degree in (1, 2, 3)]
    for degree in (2, 3):
        change = (outputs[degree - 1] - outputs[degree - 2]).abs().amax((0, 2))
        assert (change[: degree - 1] < 1e-13).all() and (change[degree - 1 :] > 1e-6).all()


@pytest.mark.parametrize("kernel", ["pb", "kb"])
@pytest.mark.parametrize("view", VIEWS)
def test_degree_one_is_s4(kernel, view):
    system = made(1, kernel)
    s4 = S4System(4, 6).double()
    s4.load_state_dict({**system.s4.state_dict(), "D": system.D})
    system.view = s4.view = view
    u = torch.randn(2, 20, 4, dtype=torch.float64)
    found, state = system(u, system.init_state(2))
    wanted, s4_state = s4(u, s4.init_state(2))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    torch.testing.assert_close(state.h, s4_state.h, rtol=0, atol=0)
    assert state.inputs.numel() == 0


def test_kb_is_the_liquid_recurrence_where_all_products_are_of_neighbours():
    """h_t = (Ā + B̄ 1ᵀ u_t) h_{t-1} + B̄ u_t: with two neighbouring inputs other than zero no other product exists."""
    system = made(2, "kb")
    u = torch.zeros(1, 12, 4, dtype=torch.float64)
    u[:, 3:5] = 3 * torch.randn(1, 2, 4, dtype=torch.float64)
    wanted = torch.zeros_like(u)
    for c, (A, B, C) in enumerate(matrices(system)):
        h = torch.zeros_like(B)
        for t in range(12):
            h = (A + torch.outer(B, torch.ones_like(B)) * u[0, t, c]) @ h + B * u[0, t, c]
            wanted[0, t, c] = (C @ h).real + system.D[c] * u[0, t, c]
    torch.testing.assert_close(system(u)[0], wanted, rtol=1e-10, atol=1e-10)


def test_the_state_keeps_the_last_inputs():
    system = made(4, "pb")
    u = torch.randn(2, 10, 4, dtype=torch.float64)
    _, state = system(u, system.init_state(2))
    torch.testing.assert_close(state.inputs, u[:, [9, 8, 7]])
    segments = torch.tensor([[1] * 10, [1, 1, 1, 1, 1, 1, 1, 2, 2, 0]])
    _, state = system(u, system.init_state(2), segments)
    wanted = torch.stack([u[1, 8], u[1, 7], torch.zeros(4, dtype=torch.float64)])  # none of the document before
    torch.testing.assert_close(state.inputs[1], wanted)
    y, _ = system(u[1:, :4], state._replace(**{n: v[1:] for n, v in state._asdict().items()}), segments[1:, :4] + 4)
    torch.testing.assert_close(y, system(u[1:, :4])[0])  # nor of the call before, where another begins


def test_the_skip_and_s4s_tags_are_kept():
    found = tags(zoo.block("liquid_s4", 6, learning_rate=5e-4))
    for name in ("log_step", "log_A_real", "A_imag", "P", "B"):
        assert found[f"lti.s4.{name}"] == (False, 5e-4)
    assert found["lti.D"] == (False, None)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"kernel='polyb' is unknown.*pb, kb"):
        zoo.block("liquid_s4", 6, kernel="polyb")
    with pytest.raises(ValueError, match="degree=0"):
        zoo.block("liquid_s4", 6, degree=0)
    with pytest.raises(ValueError, match="state_size=5 must be even"):
        zoo.block("liquid_s4", 6, state_size=5)
