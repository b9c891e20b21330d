"""Mamba-3 against the paper's equations with complex states, and what its three changes are for."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, softplus

import zoo
from zoo.block import leaves, tags
from zoo.ssm.mamba3 import Mamba3
from zoo.ssm.trapezoid import angles, trapezoid


def randomised(block: nn.Module) -> nn.Module:
    """Random weights everywhere, so that no term is hidden by its initial value."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return block


def normed(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def as_complex(x: torch.Tensor, pairs: int) -> torch.Tensor:
    """Components (2i, 2i + 1) as one complex number, those that do not turn as real ones."""
    zeros = torch.zeros_like(x[..., 2 * pairs :])
    real = torch.cat([x[..., 0 : 2 * pairs : 2], x[..., 2 * pairs :]], -1)
    return torch.complex(real, torch.cat([x[..., 1 : 2 * pairs : 2], zeros], -1))


def equations(block: Mamba3, u: torch.Tensor) -> torch.Tensor:
    """One row, token by token and head by head; the states themselves turn, B and C stay where they are."""
    H, P, N, R, G = block.heads, block.head_dim, block.state_size, block.rank, block.groups
    outputs, h, before = [], [0.0] * H, [0.0] * H
    for t in range(len(u)):
        z, x, B, C, dt, a, trap, theta = block.in_proj(u[t]).split(block.sizes)
        B = normed(B.reshape(R, G, N)) * block.B_norm.weight
        C = normed(C.reshape(R, G, N)) * block.C_norm.weight
        parts = []
        for i in range(H):
            step, share = softplus(dt[i] + block.dt_bias[i]), torch.sigmoid(trap[i])
            rate = 1 + a[i] if a[i] >= 0 else 1 / (1 - a[i])
            phase = -math.pi * step * torch.tanh(theta)
            turn = torch.cat([torch.polar(torch.ones_like(phase), phase), torch.ones(N - 2 * block.pairs)])
            alpha = torch.exp(-step * torch.clamp(rate, min=block.A_floor)) * turn
            v = [x[i * P : i * P + P] * (block.mimo_x[i, r] if R > 1 else 1) for r in range(R)]
            group = i // (H // G)
            k = [as_complex(B[r, group] + block.B_bias[i, r], block.pairs) for r in range(R)]
            now = sum(torch.outer(k[r], v[r].to(k[r].dtype)) for r in range(R))
            h[i] = alpha[:, None] * (h[i] + (1 - share) * step * before[i]) + share * step * now
            before[i] = now
            total = 0
            for r in range(R):
                q = as_complex(C[r, group] + block.C_bias[i, r], block.pairs)
                y = (q.conj()[:, None] * h[i]).sum(0).real + block.D[i] * v[r]
                gate = z[i * P : i * P + P] * (block.mimo_z[i, r] if R > 1 else 1)
                if block.norm is not None:
                    y = normed(y) * block.norm.weight[i * P : i * P + P]
                total = total + y * silu(gate) * (block.mimo_o[i, r] if R > 1 else 1)
            parts.append(total)
        outputs.append(block.out_proj(torch.cat(parts)))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("time", "options"),
    [
        (9, {"state_size": 8}),
        (1, {"state_size": 5, "rope_fraction": 1.0, "A_floor": 0.8}),
        (7, {"state_size": 7, "head_dim": 2, "groups": 2, "rope_fraction": 1.0, "A_floor": 0.8, "out_norm": True}),
        (1, {"state_size": 4, "rank": 2}),
        (8, {"state_size": 6, "head_dim": 3, "groups": 2, "rank": 3}),
        (6, {"state_size": 5, "rank": 2, "rope_fraction": 1.0, "out_norm": True}),
    ],
)
def test_equals_the_equations(time, options):
    """Values, and gradients of the input and of every parameter."""
    torch.manual_seed(3)
    block = randomised(Mamba3(6, dt_min=0.1, dt_max=1.0, **options)).double()
    u = torch.randn(1, time, 6, dtype=torch.float64)
    names, weight = ["input", *dict(block.named_parameters())], torch.randn(time, 6, dtype=torch.float64)

    def outcome(run):
        given = u.clone().requires_grad_()
        y = run(given)
        return y, torch.autograd.grad((y * weight).sum(), [given, *block.parameters()])

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wanted, gradients = outcome(lambda given: equations(block, given[0]))
    finally:
        torch.set_default_dtype(default)
    y, found = outcome(lambda given: block(given).y[0])
    torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)
    for name, mine, theirs in zip(names, found, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


# The trapezoid --------------------------------------------------------------------------------------------------


def integral(steps: int, share: float) -> float:
    """h(2) of h' = -h + sin(t), h(0) = 0, in so many steps; tokens are sin at 0, dt, 2 dt, ..., 2."""
    dt = 2 / steps
    x = torch.linspace(0, 2, steps + 1, dtype=torch.float64).sin().reshape(1, -1, 1, 1)
    ones = torch.ones_like(x)[..., None]
    each = torch.full((1, steps + 1, 1), dt, dtype=torch.float64)
    return trapezoid(ones, ones, x, -each, share * each, (1 - share) * each, None, None, None)[0][0, -1].item()


def test_the_rule_is_of_second_order():
    """Half the step, a quarter of the error, where both ends count alike; half of it with one end, as in Mamba-2."""
    exact = (math.sin(2) - math.cos(2) + math.exp(-2)) / 2
    for share, factor in ((0.5, 4), (1.0, 2), (0.0, 2)):
        errors = [abs(integral(steps, share) - exact) for steps in (100, 200)]
        assert errors[0] / errors[1] == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize("lost", ["h", "k", "x", "angle"])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_previous_input_is_state_too(lost, rank):
    """Two halves are the whole, and each leaf matters to it: h, the turned B and the x of the last token, the angle."""
    torch.manual_seed(0)
    block = randomised(Mamba3(24, state_size=8, rank=rank)).double()
    u = torch.randn(2, 11, 24, dtype=torch.float64)

    def broken(state):
        if lost == "angle":
            return state._replace(angle=torch.zeros_like(state.angle))
        kept = state.trapezoid
        return state._replace(trapezoid=kept._replace(**{lost: torch.zeros_like(getattr(kept, lost))}))

    with torch.no_grad():
        whole = block(u).y
        for cut in (5, 10):  # then several tokens, or one
            first, state, _ = block(u[:, :cut], block.init_state(2))
            torch.testing.assert_close(first, whole[:, :cut], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(block(u[:, cut:], state).y, whole[:, cut:], rtol=1e-11, atol=1e-11)
            assert (block(u[:, cut:], broken(state)).y - whole[:, cut:]).abs().max() > 1e-3
        if lost in ("k", "x"):  # where only this token counts (λ = 1), the one before is not needed
            start = sum(block.sizes[:6])
            block.in_proj.weight[start : start + block.heads] = 0
            u[..., 0], block.in_proj.weight[start : start + block.heads, 0] = 1, 60.0
            state = block(u[:, :5], block.init_state(2)).state
            torch.testing.assert_close(block(u[:, 5:], broken(state)).y, block(u).y[:, 5:], rtol=1e-11, atol=1e-11)


# The angle ------------------------------------------------------------------------------------------------------


def test_angles_stay_exact_over_a_long_sequence():
    steps = torch.rand(1, 20000, 1, 2, generator=torch.Generator().manual_seed(0)) + 2
    exact = steps.double().cumsum(1)

    def error(found):
        return torch.remainder(found.double() - exact[:, -found.shape[1] :] + 1, 2 * math.pi).sub(1).abs().max()

    whole, last = angles(steps, None, None)
    assert whole.dtype == torch.float32
    assert whole.abs().max() <= math.pi + 1e-6
    assert error(whole) < 1e-6
    assert error(steps.cumsum(1)) > 1e-3  # what float32 alone would give
    torch.testing.assert_close(last, whole[:, -1], rtol=0, atol=0)
    _, middle = angles(steps[:, :12345], None, None)
    assert error(angles(steps[:, 12345:], middle, None)[0]) < 1e-6
    packed = torch.ones(1, 20000, dtype=torch.long)
    torch.testing.assert_close(angles(steps, None, packed)[0], whole, rtol=0, atol=1e-6)


def test_angles_begin_again_with_each_document():
    steps = torch.rand(1, 9, 2, 3, dtype=torch.float64)
    segments = torch.tensor([[0, 4, 4, 0, 5, 5, 0, 5, 0]])
    before = torch.rand(1, 2, 3, dtype=torch.float64)
    found, last = angles(steps, before, segments)
    torch.testing.assert_close(found[:, 2], before + steps[:, 1] + steps[:, 2])
    torch.testing.assert_close(found[:, 4], steps[:, 4])
    torch.testing.assert_close(last, steps[:, 4] + steps[:, 5] + steps[:, 7])


# Parity ---------------------------------------------------------------------------------------------------------


def parity_block(dtype: torch.dtype) -> Mamba3:
    """y_t = the number of ones so far modulo 2, of inputs (1, bit).

    A one turns the state by π: dt = 2 and tanh(θ) = bit / 2. Nothing decays, and only this token's input counts, which
    is the bit itself: the ones so far add up with alternating signs, the last one's +, to 0 or 1.
    """
    block = Mamba3(2, expand=1, head_dim=2, state_size=2, rope_fraction=1.0, A_floor=0.0).to(dtype)
    weight = torch.zeros_like(block.in_proj.weight)
    z, x, a, trap, theta = 0, 2, 9, 10, 11
    weight[z, 0] = 1.0
    weight[x, 1] = 1.0
    weight[a, 0] = -1e30
    weight[trap, 0] = 60.0
    weight[theta, 1] = math.atanh(0.5)
    with torch.no_grad():
        block.in_proj.weight.copy_(weight)
        block.dt_bias.fill_(math.log(math.expm1(2.0)))
        block.B_bias.copy_(torch.tensor([1.0, 0.0]))
        block.C_bias.copy_(torch.tensor([1.0, 0.0]))
        block.D.zero_()
        block.out_proj.weight.zero_()
        block.out_proj.weight[0, 0] = 1 / (2.0 / (1 + math.exp(-1.0)))  # dt silu(z)
    return block


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_parity_by_construction(dtype, tolerance):
    """Half a turn a one gives the parity of a string of any length, whole and token by token."""
    torch.manual_seed(0)
    block = parity_block(dtype)
    bits = torch.randint(0, 2, (3, 1000))
    u = torch.stack([torch.ones_like(bits), bits], -1).to(dtype)
    parity = (bits.cumsum(1) % 2).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(block(u).y[..., 0], parity, rtol=0, atol=tolerance)
        state = block(u[:, :900], block.init_state(3)).state
        for t in range(900, 1000):
            y, state, _ = block(u[:, t : t + 1], state)
            torch.testing.assert_close(y[:, 0, 0], parity[:, t], rtol=0, atol=tolerance)
        block.in_proj.weight[11] = 0  # a state that does not turn counts the ones instead
        assert (block(u).y[..., 0] - bits.cumsum(1)).abs().max() < 1e-2


def learn_parity(kind: str, steps: int, **options) -> tuple[float, float]:
    """Accuracy at all tokens and at the last of 16, after training one block with a residual around it."""
    torch.manual_seed(0)
    embedding, block, head = nn.Embedding(2, 16), zoo.block(kind, 16, **options), nn.Linear(16, 2)
    norm = nn.RMSNorm(16)
    parameters = [p for each in (embedding, block, head, norm) for p in each.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(1)

    def run(rows):
        bits = torch.randint(0, 2, (rows, 16), generator=generator)
        x = embedding(bits)
        return head(x + block(norm(x)).y), bits.cumsum(1) % 2

    for _ in range(steps):
        logits, parity = run(48)
        loss = cross_entropy(logits.flatten(0, 1), parity.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        logits, parity = run(500)
        right = (logits.argmax(-1) == parity).float()
    return right.mean().item(), right[:, -1].mean().item()


def test_parity_is_learned_and_mamba2_fails_it():
    dynamics = {"state_size": 8, "head_dim": 8, "dt_min": 0.5, "dt_max": 2.0}
    everywhere, last = learn_parity("mamba3", 160, **dynamics)
    assert everywhere > 0.95 and last > 0.9
    _, last = learn_parity("mamba2", 160, **dynamics)
    assert 0.35 < last < 0.65


# The contract ---------------------------------------------------------------------------------------------------


def test_no_factor_comes_from_a_later_token():
    """Causal to the last bit: the step a token takes, however long, changes nothing before it."""
    torch.manual_seed(0)
    for rank in (1, 3):
        block = randomised(Mamba3(24, state_size=8, rank=rank))
        u = torch.randn(1, 9, 24)
        other = u.clone()
        other[:, 6:] *= 1e4
        assert torch.equal(block(u).y[:, :6], block(other).y[:, :6])


@pytest.mark.parametrize("time", [1, 5])
def test_sums_are_float32_in_bfloat16_and_under_autocast(time):
    torch.manual_seed(0)
    block = randomised(Mamba3(24, state_size=8, rank=2))
    u = torch.randn(2, time, 24)
    exact = block(u, block.init_state(2)).state
    with torch.autocast("cpu", torch.bfloat16):
        y, state, _ = block(u, block.init_state(2))
    h = state.trapezoid.h
    assert h.dtype == torch.float32
    assert (h != h.bfloat16().float()).float().mean() > 0.5
    torch.testing.assert_close(h, exact.trapezoid.h, rtol=0.1, atol=0.05)
    half = block.bfloat16()
    before = half.init_state(2)
    y, state, _ = half(u.bfloat16(), before)
    assert y.dtype == torch.bfloat16
    assert [leaf.dtype for leaf in leaves(state)] == [leaf.dtype for leaf in leaves(before)]
    assert (state.trapezoid.h.dtype, state.angle.dtype) == (torch.float32, torch.float32)


def test_initial_values_are_the_authors():
    block = Mamba3(512, head_dim=2, state_size=4, rank=4)
    dt = softplus(block.dt_bias.double()).detach()
    assert 1e-3 * 0.999 <= dt.min() < 1.2e-3
    assert 0.8e-1 < dt.max() <= 1e-1 * 1.001
    counts = torch.histc(dt.log10(), 4, -3, -1) / dt.numel()  # log-uniform
    torch.testing.assert_close(counts, torch.full_like(counts, 0.25), atol=0.08, rtol=0)
    values = {"B_bias": 1.0, "C_bias": 1.0, "D": 1.0, "mimo_x": 0.25, "mimo_z": 1.0, "mimo_o": 0.25}
    for name, value in values.items():
        each = block.get_parameter(name)
        torch.testing.assert_close(each, torch.full_like(each, value))


def test_parameter_count_of_the_authors_layer():
    """Width 768, 128 states, heads of 64: z and x, B and C, three numbers a head and 32 angles are projected."""
    count = sum(each.numel() for each in Mamba3(768).parameters())
    assert count == 768 * (2 * 1536 + 2 * 128 + 3 * 24 + 32) + 1536 * 768 + 2 * 24 * 128 + 2 * 128 + 2 * 24
    many = sum(each.numel() for each in Mamba3(768, rank=4).parameters())
    assert many - count == 768 * 3 * 2 * 128 + 3 * 2 * 24 * 128 + 3 * 4 * 24 * 64


def test_no_weight_decay_where_the_dynamics_are():
    free = {name for name, each in tags(Mamba3(24, rank=2, out_norm=True)).items() if not each.weight_decay}
    assert free == {"D", "dt_bias", "B_bias", "C_bias", "B_norm.weight", "C_norm.weight", "norm.weight"}


def test_flops_count_both_inputs_of_every_rank():
    one, four = Mamba3(24, state_size=8), Mamba3(24, state_size=8, rank=4)
    assert one.flops_per_token(0) == 2 * (one.in_proj.weight.numel() + 48 * 24) + 7 * 48 * 8
    assert four.flops_per_token(0) == 2 * (four.in_proj.weight.numel() + 48 * 24) + 25 * 48 * 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expand": 0}, "expand=0 must be a positive integer"),
        ({"state_size": 2.0}, "state_size=2.0 must be a positive integer"),
        ({"state_size": 3}, "state_size=3 and rope_fraction=0.5 leave no pair.*must be at least 4"),
        ({"state_size": 1, "rope_fraction": 1}, "must be at least 2"),
        ({"rank": 0}, "rank=0 must be a positive integer"),
        ({"head_dim": 7}, "head_dim=7 must divide expand \\* width / groups = 48.*try 6"),
        ({"groups": 5}, "groups=5 must divide expand \\* width = 48; try 1"),
        ({"rope_fraction": 0}, "rope_fraction=0 must be above 0 and at most 1"),
        ({"rope_fraction": 1.5}, "rope_fraction=1.5 must be above 0"),
        ({"rope_fraction": "0.5"}, "rope_fraction='0.5' is text"),
        ({"dt_min": 0.0}, "dt_min=0.0 and dt_max=0.1 must satisfy 0 < dt_min <= dt_max"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max"),
        ({"A_floor": -1.0}, "A_floor=-1.0 must not be negative"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        zoo.block("mamba3", 24, **options)
