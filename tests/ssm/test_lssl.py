"""LSSL against its equations, HiPPO's matrices, and the form its A keeps."""

import pytest
import torch

import zoo
from zoo.block import tags
from zoo.ssm.hippo import transition
from zoo.ssm.lssl import LSSLSystem


def plain(system, A, B, u):
    """2110.13985, eq. 3 to 5 with α = 1/2, a token after another; outputs [batch time channels M]."""
    outputs = []
    for c in range(system.channels):
        step, eye = system.log_step[c].exp(), torch.eye(len(A), dtype=A.dtype)
        Ad = torch.linalg.solve(eye - step / 2 * A, eye + step / 2 * A)
        Bd = torch.linalg.solve(eye - step / 2 * A, step * B)
        h, y = torch.zeros(len(u), len(A), dtype=A.dtype), []
        D = system.D.reshape(system.channels, -1)[c]
        for t in range(u.shape[1]):
            h = h @ Ad.T + u[:, t, c, None] * Bd
            y.append(h @ system.C[c].T + D * u[:, t, c, None])
        outputs.append(torch.stack(y, 1))
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("measure", ["legs", "lagt"])
@pytest.mark.parametrize("view", ["convolution", "recurrence", "scan"])
def test_it_is_the_equations_with_hippos_matrices(measure, view):
    torch.manual_seed(0)
    system = LSSLSystem(4, 6, measure, outputs=2, dt_min=0.01, dt_max=0.5).double()
    A, B = transition(measure, 6)
    torch.testing.assert_close(system.matrix(), A, rtol=1e-6, atol=1e-6)
    system.view = view
    u = torch.randn(2, 19, 4, dtype=torch.float64)
    y = system(u)[0]
    wanted = plain(system, system.matrix(), system.B, u)
    torch.testing.assert_close(y.unflatten(-1, (4, 2)), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(wanted, plain(system, A, B, u), rtol=1e-4, atol=1e-4)  # parameters made in float32
    direction = torch.randn_like(wanted)
    parameters = list(system.parameters())
    found = torch.autograd.grad((y.unflatten(-1, (4, 2)) * direction).sum(), parameters)
    for gradient, right in zip(found, torch.autograd.grad((wanted * direction).sum(), parameters), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-9)


def test_a_trained_matrix_stays_triangular_and_stable():
    torch.manual_seed(0)
    system = LSSLSystem(3, 8).double()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(torch.randn_like(parameter))
    A = system.matrix()
    assert (A.triu(1) == 0).all() and (A.diagonal() < 0).all()
    assert A.tril(-1).ne(0).sum() == system.A_lower.numel() == 28
    assert torch.linalg.eigvals(system.discrete().A[0]).abs().max() < 1


def test_fixed_matrices_are_not_trained_but_are_saved():
    block = zoo.block("lssl", 6, state_size=4, fixed=True)
    names = dict(block.lti.named_parameters())
    assert set(names) == {"log_step", "C", "D"}
    assert {"lti.A_lower", "lti.A_log_diagonal", "lti.B"} <= set(block.state_dict())
    trained = zoo.block("lssl", 6, state_size=4)
    assert {"A_lower", "A_log_diagonal", "B"} <= set(dict(trained.lti.named_parameters()))
    trained.load_state_dict(block.state_dict())
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(trained(x).y, block(x).y)


def test_the_layer_mixes_all_outputs():
    torch.manual_seed(0)
    block = zoo.block("lssl", 6, state_size=4, outputs=3).double()
    assert block.out_proj.weight.shape == (6, 18)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    y = plain(block.lti, block.lti.matrix(), block.lti.B, x).flatten(2)
    torch.testing.assert_close(block(x).y, block.out_proj(torch.nn.functional.gelu(y)))
    assert block.init_state(1).h.shape == (1, 6, 4)  # one state for all outputs


def test_its_parameters_have_their_own_rate_and_no_decay():
    found = tags(zoo.block("lssl", 6, learning_rate=5e-4))
    for name in ("log_step", "A_lower", "A_log_diagonal", "B"):
        assert found[f"lti.{name}"] == (False, 5e-4)
    assert "lti.C" not in found
    assert "lti.A_lower" not in tags(zoo.block("lssl", 6, fixed=True))


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"'legt' is unknown to LSSL.*triangular"):
        zoo.block("lssl", 6, measure="legt")
    with pytest.raises(ValueError, match="did you mean 'legs'"):
        zoo.block("lssl", 6, measure="leggs")
    with pytest.raises(ValueError, match="outputs=0"):
        zoo.block("lssl", 6, outputs=0)
    with pytest.raises(ValueError, match="state_size=-1"):
        zoo.block("lssl", 6, state_size=-1)
