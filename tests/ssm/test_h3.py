"""H3: the paper's recurrence, the shift system and its state, recall by construction, what the optimizer is told."""

import pytest
import torch
from torch.nn.functional import one_hot

from zoo.block import snapshot, tags
from zoo.ssm.h3 import H3, H3State, ShiftSystem
from zoo.ssm.lti import LTIState

SEGMENTS = torch.ones(4, 29, dtype=torch.long)  # left padding and a gap, documents, an empty row, one long document
SEGMENTS[0, :5], SEGMENTS[0, 17:23] = 0, 0
SEGMENTS[1, 8:20], SEGMENTS[1, 20:27], SEGMENTS[1, 27:] = 2, 9, 0
SEGMENTS[2] = 0


def perturbed(block):
    """B of the shift systems away from e_1, and all parameters away from special values."""
    torch.manual_seed(7)
    with torch.no_grad():
        for each in block.parameters():
            each.add_(0.2 * torch.randn_like(each))
    return block.double()


def recurrence(block, u, state):
    """Algorithm 1 of the paper token by token, with matrices: y, and both systems' states (the diagonal one's as
    h = A h + B u has it). `state` is in the block's own form, whose h lacks the factor B."""
    p, heads, n = block.head_dim, block.heads, block.shift_size
    shift = torch.diag(u.new_ones(n - 1), -1)
    diagonal = block.diagonal
    step = diagonal.log_step.exp()[:, None]
    A = torch.complex(-diagonal.log_A_real.exp(), diagonal.A_imag)
    B, C = torch.view_as_complex(diagonal.B), torch.view_as_complex(diagonal.C)
    if diagonal.discretisation == "zoh":
        A_bar, B_bar = (step * A).exp(), ((step * A).exp() - 1) / A * B
    else:
        A_bar, B_bar = (1 + step / 2 * A) / (1 - step / 2 * A), step / (1 - step / 2 * A) * B
    h = state.shift
    S = B_bar * torch.view_as_complex(state.diagonal)  # batch p r heads n
    outputs = []
    for t in range(u.shape[1]):
        q, k, v = (u[:, t] @ block.in_proj.weight.T + block.in_proj.bias).split(p * heads, -1)
        h = h @ shift.T + block.shift.B * k[..., None]
        k = (block.shift.C * h).sum(-1) + block.shift.D * k
        o = torch.zeros_like(q)
        rows = [[None] * p for _ in range(p)]
        for head in range(heads):
            for i in range(p):
                for j in range(p):
                    product = k[:, head * p + i] * v[:, head * p + j]
                    new = A_bar[head] * S[:, i, j, head] + B_bar[head] * product[:, None]
                    y = 2 * (C[head] * new).sum(-1).real + diagonal.D[head] * product
                    o[:, head * p + j] += q[:, head * p + i] * y
                    rows[i][j] = [*(rows[i][j] or []), new]
        S = torch.stack([torch.stack([torch.stack(each, 1) for each in row], 1) for row in rows], 1)
        outputs.append(o @ block.out_proj.weight.T + block.out_proj.bias)
    return torch.stack(outputs, 1), h, S, B_bar


@pytest.mark.parametrize(
    ("head_dim", "shift_size", "discretisation"),
    [(1, 4, "bilinear"), (3, 5, "zoh"), (2, 1, "bilinear"), (6, 30, "zoh")],
)
def test_equals_the_papers_recurrence_from_any_state(head_dim, shift_size, discretisation):
    """Whole, in chunks and token by token; the states too. The given state is no convolution's past inputs."""
    block = perturbed(H3(6, head_dim, 4, shift_size, discretisation=discretisation, dt_min=0.05, dt_max=0.5))
    u = torch.randn(2, 13, 6, dtype=torch.float64)
    given = block.init_state(2)
    given = H3State(torch.randn_like(given.shift), torch.randn_like(given.diagonal), given.segment)
    with torch.no_grad():
        wanted, h, S, B_bar = recurrence(block, u, given)
        assert wanted.std() > 0.1
        for sizes in ([13], [1] * 13, [2, 7, 1, 3]):
            state, outputs = snapshot(given), []
            for part in u.split(sizes, 1):
                y, state, _ = block(part, state)
                outputs.append(y)
            torch.testing.assert_close(torch.cat(outputs, 1), wanted, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state.shift, h, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(B_bar * torch.view_as_complex(state.diagonal), S, rtol=1e-10, atol=1e-10)
        zeros, *_ = recurrence(block, u, block.init_state(2))
        torch.testing.assert_close(block(u).y, zeros, rtol=1e-10, atol=1e-10)


def test_the_shift_state_is_the_last_inputs_and_its_filter_forgets_older_ones():
    torch.manual_seed(1)
    block = H3(6, 2, 4, shift_size=5).double()
    u = torch.randn(1, 9, 6, dtype=torch.float64)
    k = block.in_proj(u)[..., 6:12]
    state = block.init_state(1)
    for t in range(9):
        state = block(u[:, t : t + 1], state).state
        last = k[:, max(0, t - 4) : t + 1].flip(1).mT
        torch.testing.assert_close(state.shift[..., : t + 1], last)
        assert (state.shift[..., t + 1 :] == 0).all()
    system = block.shift
    assert (system.kernel(9)[:, 5:] == 0).all() and system.kernel(9).shape == (6, 9)
    torch.testing.assert_close(system.kernel(9)[:, :5], system.C)
    torch.testing.assert_close(system.kernel(3), system.C[:, :3])


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
    gradients = torch.autograd.grad((y * wave).sum() + end.h.cos().sum(), [u, h, *system.parameters()])
    return {"y": y, "h": end.h, **dict(zip(["u", "h'", "D", "B", "C"], gradients, strict=True))}


@pytest.mark.parametrize("n", [1, 4, 40])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
def test_the_shift_systems_convolution_is_its_recurrence(segments, n):
    system = perturbed(ShiftSystem(5, n))
    u = torch.randn(4, 29, 5, dtype=torch.float64)
    wanted = outcome(system, "recurrence", u, segments)
    for view in ("convolution", "auto"):
        for name, value in outcome(system, view, u, segments).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, v=view: f"{v}: {m}")
    with pytest.raises(ValueError, match=r"view='scan' is unknown to ShiftSystem.*convolution, recurrence"):
        outcome(system, "scan", u, segments)


def test_recalls_what_followed_a_token():
    """Section 3.1: the shift system puts the token before next to each token, the diagonal one keeps all such pairs,
    and q picks those whose first token is the present one. Here by hand, keys 0-3 and values 4-7."""
    block = H3(8, head_dim=8, state_size=2, shift_size=2, discretisation="zoh").double()
    keys, values = torch.diag((torch.arange(8) < 4).double()), torch.diag((torch.arange(8) >= 4).double())
    with torch.no_grad():
        for each in block.parameters():
            each.zero_()
        block.in_proj.weight.copy_(torch.cat([keys, keys, values]))
        block.out_proj.weight.copy_(torch.eye(8))
        block.shift.B[:, 0] = block.shift.C[:, 1] = 1  # the input before
        block.diagonal.log_A_real.fill_(-40)  # a sum that forgets nothing
        block.diagonal.B[..., 0], block.diagonal.C[..., 0] = 1, 0.5
    story = torch.tensor([0, 6, 2, 4, 3, 5, 1, 7, 2, 4, 0, 6, 1, 7, 3])
    y = block(one_hot(story, 8).double()[None]).y[0]
    # What was read after this key before, as often as it was; nothing at its first time and at values.
    for t, token in enumerate(story.tolist()):
        wanted = torch.zeros(8, dtype=torch.float64)
        for s in range(1, t + 1):
            if token < 4 and story[s - 1] == token:
                wanted[story[s]] += 1
        torch.testing.assert_close(y[t], wanted)
    assert y[8].argmax() == 4 and y[14].argmax() == 5


def test_heads_do_not_mix_before_the_last_projection():
    torch.manual_seed(2)
    block = H3(6, head_dim=2, state_size=4).double()
    with torch.no_grad():
        block.in_proj.weight.copy_(torch.eye(6).repeat(3, 1))
        block.out_proj.weight.copy_(torch.eye(6))
    u = torch.randn(1, 7, 6, dtype=torch.float64)
    other = u.clone()
    other[..., 2:4] += 1
    difference = (block(u).y - block(other).y).abs().amax((0, 1))
    assert (difference[[0, 1, 4, 5]] == 0).all() and (difference[2:4] > 1e-3).all()


def test_starts_as_published():
    torch.manual_seed(0)
    block = H3(600, head_dim=2, state_size=8, shift_size=16, dt_min=0.01, dt_max=0.02)
    assert (block.shift.B[:, 0] == 1).all() and (block.shift.B[:, 1:] == 0).all()
    assert block.shift.C.abs().max() <= 0.25 and block.shift.C.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.02)
    assert block.shift.D is not None and block.diagonal.D is not None
    assert block.shift.D.shape == (600,) and block.diagonal.D.shape == (300,)
    assert block.diagonal.discretisation == "bilinear"
    torch.testing.assert_close(block.diagonal.A_imag, torch.pi * torch.arange(4.0).expand(300, 4))
    step = block.diagonal.log_step.exp()
    assert step.min() >= 0.0099 and step.max() <= 0.0201


def test_the_optimizer_is_told():
    found = tags(H3(6, learning_rate=2.0e-4))
    own = {name for name, each in found.items() if each.learning_rate == 2e-4}
    assert own == {"shift.B", *(f"diagonal.{name}" for name in ("log_step", "log_A_real", "A_imag", "B"))}
    assert not any(each.weight_decay for each in found.values())
    assert set(found) - own == {"in_proj.bias", "out_proj.bias", "shift.D", "diagonal.D"}
    assert all(each.learning_rate is None for each in tags(H3(6, learning_rate=None)).values())


def test_between_the_projections_all_is_float32_in_a_bfloat16_block():
    torch.manual_seed(4)
    block = H3(6, 2, 4, 5).bfloat16()
    exact = H3(6, 2, 4, 5).double()
    exact.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    state, u = block.init_state(2), torch.randn(2, 30, 6).bfloat16()
    assert state.shift.dtype == state.diagonal.dtype == torch.float32
    exact.in_proj.register_forward_hook(lambda *_: block.in_proj(u).double())  # the same rounding of q, k and v
    with torch.no_grad():
        y, end, _ = block(u, state)
        wanted = exact(u.double(), exact.init_state(2)).state
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(end.shift, wanted.shift.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end.diagonal, wanted.diagonal.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 4}, "head_dim=4 must divide width=6; try 2"),
        ({"head_dim": 0}, "head_dim=0 must be a positive integer"),
        ({"state_size": 7}, "state_size=7 must be even: states are conjugate pairs; try 8"),
        ({"shift_size": 0}, "shift_size=0 must be a positive integer"),
        ({"shift_size": 2.5}, "shift_size=2.5 must be a positive integer"),
        ({"init": "lim"}, "init='lim' is unknown.*choose from lin, inv, legs"),
        ({"discretisation": "euler"}, "discretisation='euler' is unknown; choose from zoh, bilinear"),
        ({"dt_max": 1e-4}, "dt_min=0.001 and dt_max=0.0001 must satisfy 0 < dt_min <= dt_max"),
        ({"learning_rate": -1}, "learning_rate=-1 must be positive, or None"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        H3(6, **options)


def test_another_blocks_state_is_refused():
    with pytest.raises(ValueError, match="H3State of other sizes"):
        H3(6, shift_size=4)(torch.zeros(1, 2, 6), H3(6, shift_size=5).init_state(1))
