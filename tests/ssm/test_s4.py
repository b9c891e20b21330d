"""S4 against its equations with dense complex matrices, HiPPO's own A, and what its parametrisation promises."""

import pytest
import torch

import zoo
from zoo.block import tags
from zoo.ssm import s4
from zoo.ssm.hippo import nplr, transition
from zoo.ssm.s4 import S4System


def moved(system):
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return system


def conjugates(pairs):
    """Every mode and its conjugate."""
    half = torch.view_as_complex(pairs)
    return torch.cat([half, half.conj()], -1)


def plain(system, u):
    """2111.00396, eq. 1 and 3 with A = Λ - P P* written out, a token after another."""
    half = torch.complex(-system.log_A_real.exp(), system.A_imag)
    Lambda, P, B, C = torch.cat([half, half.conj()], -1), *(conjugates(x) for x in (system.P, system.B, system.C))
    outputs = []
    for c in range(system.channels):
        A = torch.diag(Lambda[c]) - torch.outer(P[c], P[c].conj())
        step, eye = system.log_step[c].exp(), torch.eye(len(A), dtype=A.dtype)
        Ad = torch.linalg.solve(eye - step / 2 * A, eye + step / 2 * A)
        Bd = torch.linalg.solve(eye - step / 2 * A, step * B[c])
        h, y = torch.zeros(len(u), len(A), dtype=A.dtype), []
        for t in range(u.shape[1]):
            h = h @ Ad.T + u[:, t, c, None] * Bd
            y.append((h @ C[c]).real + system.D[c] * u[:, t, c])
        outputs.append(torch.stack(y, 1))
    return torch.stack(outputs, -1)


@pytest.mark.parametrize("view", ["convolution", "recurrence", "scan"])
def test_it_is_the_equations(view):
    torch.manual_seed(0)
    system = moved(S4System(4, 6, dt_min=0.01, dt_max=0.5).double())
    system.view = view
    u = torch.randn(2, 21, 4, dtype=torch.float64)
    y, wanted = system(u)[0], plain(system, u)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(y)
    found = torch.autograd.grad((y * direction).sum(), list(system.parameters()))
    for gradient, right in zip(
        found, torch.autograd.grad((wanted * direction).sum(), list(system.parameters())), strict=True
    ):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-9)


def test_it_starts_as_hippo():
    """With C taken to HiPPO's real basis it is the system of LegS's own A and B."""
    system = S4System(3, 8, dt_min=0.02, dt_max=0.3).double()
    A, B = transition("legs", 8)
    V = nplr("legs", 8).V
    for c in range(3):
        C = 2 * (V.conj() @ torch.view_as_complex(system.C[c])).real
        step, eye = system.log_step[c].exp(), torch.eye(8, dtype=A.dtype)
        Ad = torch.linalg.solve(eye - step / 2 * A, eye + step / 2 * A)
        h, wanted = torch.linalg.solve(eye - step / 2 * A, step * B), []
        for _ in range(30):
            wanted.append(C @ h)
            h = Ad @ h
        # Parameters are made in float32.
        torch.testing.assert_close(system.kernel(30)[c], torch.stack(wanted), rtol=1e-4, atol=1e-5)


def test_the_filter_holds_for_memories_longer_than_it():
    """Without the correction 1 - Āᴸ what comes after L tokens would be folded onto them: here, most of the filter."""
    torch.manual_seed(0)
    system = S4System(4, 8, dt_min=1e-4, dt_max=1e-3).double()
    long = system.kernel(1000)
    assert long[:, 32:].abs().amax() > 0.5 * long.abs().amax()
    for length in (1, 5, 16, 32):
        torch.testing.assert_close(system.kernel(length), long[:, :length], rtol=1e-9, atol=1e-12)


def test_any_low_rank_part_is_stable():
    """Ā is a contraction whatever P is: -P P* takes energy away."""
    torch.manual_seed(0)
    system = S4System(3, 8).double()
    with torch.no_grad():
        system.P.normal_(0, 30)
        system.log_step.uniform_(-5, 3)
    A = system.discrete().A[0]
    assert torch.linalg.matrix_norm(A, 2).max() <= 1 + 1e-9
    assert torch.linalg.eigvals(A).abs().max() < 1


def test_row_power_and_its_gradient():
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    A = (torch.randn(2, 3, 3, dtype=torch.float64) / 2).requires_grad_()
    for level in (0, 1, 3):
        wanted = torch.einsum("c n, c n k -> c k", x, torch.linalg.matrix_power(A, 2**level))
        torch.testing.assert_close(s4._RowPower.apply(x, A, level), wanted)
        assert torch.autograd.gradcheck(lambda x, A, k=level: s4._RowPower.apply(x, A, k), (x, A))


def test_the_layer_is_gelu_then_glu():
    torch.manual_seed(0)
    block = zoo.block("s4", 6, state_size=4).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    mixed = block.out_proj(torch.nn.functional.gelu(plain(block.lti, x)))
    torch.testing.assert_close(block(x).y, mixed[..., :6] * mixed[..., 6:].sigmoid())


def test_its_parameters_have_their_own_rate_and_no_decay():
    found = tags(zoo.block("s4", 6, learning_rate=5e-4))
    for name in ("log_step", "log_A_real", "A_imag", "P", "B"):
        assert found[f"lti.{name}"] == (False, 5e-4)
    assert "lti.C" not in found
    assert found["lti.D"] == (False, None)
    assert tags(zoo.block("s4", 6, learning_rate=None))["lti.P"] == (False, None)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"state_size=5 must be even.*try 6"):
        zoo.block("s4", 6, state_size=5)
    with pytest.raises(ValueError, match="state_size=0"):
        zoo.block("s4", 6, state_size=0)
    with pytest.raises(ValueError, match=r"dt_min=0.2 and dt_max=0.1"):
        zoo.block("s4", 6, dt_min=0.2)
    with pytest.raises(ValueError, match="learning_rate=0"):
        zoo.block("s4", 6, learning_rate=0)
