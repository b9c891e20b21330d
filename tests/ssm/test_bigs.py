"""BiGS: the paper's equations with plain loops, both directions within documents, and masked language models."""

import cmath
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import zoo
from zoo.block import tags
from zoo.ssm.bigs import BiGS, SharedSystem


def perturbed(block):
    torch.manual_seed(7)
    with torch.no_grad():
        for each in block.parameters():
            each.add_(0.2 * torch.randn_like(each))
    return block.double()


def system(ssm, u):
    """h_t = Ā h_{t-1} + B̄ u_t, y = Re Σ C h + D u for each feature alone, by Python's complex numbers. B is 1."""
    step = math.exp(ssm.log_step.item())
    A = [
        complex(min(real, -1e-4), imaginary)
        for real, imaginary in zip(ssm.A_real.tolist(), ssm.A_imag.tolist(), strict=True)
    ]
    C = [complex(*pair) for pair in ssm.C.tolist()]
    A_bar = [cmath.exp(step * a) for a in A]
    B_bar = [(a_bar - 1) / a for a, a_bar in zip(A, A_bar, strict=True)]
    y = torch.zeros_like(u)
    for row in range(u.shape[0]):
        for feature in range(u.shape[2]):
            h = [0j] * len(A)
            for t in range(u.shape[1]):
                now = u[row, t, feature].item()
                h = [a_bar * each + b_bar * now for a_bar, b_bar, each in zip(A_bar, B_bar, h, strict=True)]
                y[row, t, feature] = sum((c * each).real for c, each in zip(C, h, strict=True)) + ssm.D.item() * now
    return y


def layer(block, x, activation):
    """Section 3's equations for whole sequences."""

    def linear(name, value):
        return value @ getattr(block, name).weight.T + getattr(block, name).bias

    V = activation(linear("gate_proj", x))
    F, B = activation(linear("forward_in", x)), activation(linear("backward_in", x.flip(1)))
    U1 = linear("forward_out", system(block.forward_ssm, F))
    U2 = linear("backward_out", system(block.backward_ssm, B)).flip(1)
    return linear("out_proj", activation(linear("mix_proj", U1 * U2)) * V)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2),
        ("silu", lambda x: x * x.sigmoid()),
    ],
)
def test_equals_the_papers_equations(activation, function):
    block = perturbed(BiGS(5, 2, 4, activation=activation))
    with torch.no_grad():
        block.backward_ssm.A_real[1] = 0.5  # would grow, but for the bound
        x = torch.randn(2, 9, 5, dtype=torch.float64)
        wanted = layer(block, x, function)
        assert wanted.std() > 0.1
        torch.testing.assert_close(block(x).y, wanted, rtol=1e-10, atol=1e-10)


def test_reverses_within_documents():
    """Padding on the left, on the right and between, and packed documents: each as the equations have it alone."""
    block = perturbed(BiGS(4, 2, 3))
    segments = torch.tensor([[0, 0, 3, 3, 3, 0, 3, 8, 8, 0, 0], [5, 1, 1, 1, 1, 0, 0, 0, 5, 5, 0], [0] * 11])
    documents = {(0, 3): [2, 3, 4, 6], (0, 8): [7, 8], (1, 1): [1, 2, 3, 4], (1, 5): [8, 9], (1, "first"): [0]}
    x = torch.randn(3, 11, 4, dtype=torch.float64)
    x[segments == 0] = torch.nan
    y = block(x, None, segments).y
    assert (y[segments == 0] == 0).all()
    y.square().sum().backward()
    found = {name: value.grad for name, value in block.named_parameters()}
    block.zero_grad()
    for (row, _), index in documents.items():
        wanted = layer(block, x[row : row + 1, index], torch.nn.functional.gelu)
        torch.testing.assert_close(y[row : row + 1, index], wanted, rtol=1e-10, atol=1e-10)
        block(x[row : row + 1, index]).y.square().sum().backward()
    for name, value in block.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("silent", ["forward_ssm", "backward_ssm"])
def test_each_system_looks_one_way(silent):
    """With one system's memory gone the block sees the present and one side only."""
    block = perturbed(BiGS(4, 2, 3))
    with torch.no_grad():
        getattr(block, silent).C.zero_()
    x = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)
    for t in (0, 3, 6):
        seen = torch.autograd.grad(block(x).y[0, t].square().sum(), x)[0][0].abs().amax(1) > 1e-10
        place = torch.arange(7)
        assert torch.equal(seen, place <= t if silent == "backward_ssm" else place >= t)


def test_a_masked_language_model_reads_both_ways():
    """Rows of one symbol, all of it masked but the first or the last token: the others read it from both sides. A
    packed row gives the same logits as its documents."""
    torch.manual_seed(0)
    stack = [{"kind": "bigs", "state_size": 4, "learning_rate": None}]
    model = zoo.LanguageModel({"vocab_size": 5, "width": 16, "stack": stack, "objective": "masked"})
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    loss = torch.tensor(0.0)
    for _ in range(120):
        tokens = torch.randint(4, (16, 1)).expand(16, 5)
        visible = torch.nn.functional.one_hot(torch.randint(2, (16,)) * 4, 5).bool()
        logits = model(tokens.where(visible, 4)).logits
        loss = cross_entropy(logits[~visible], tokens[~visible])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2, f"chance is {math.log(4):.2f}, it has {loss:.2f}"
    model = model.double().eval()
    tokens = torch.randint(5, (1, 9))
    segments = torch.tensor([[4, 4, 4, 2, 2, 2, 2, 0, 0]])
    logits = model(tokens, segments=segments).logits
    torch.testing.assert_close(logits[:, :3], model(tokens[:, :3]).logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits[:, 3:7], model(tokens[:, 3:7]).logits, rtol=1e-9, atol=1e-9)


def test_is_refused_where_it_would_see_what_is_to_be_predicted():
    with pytest.raises(ValueError, match=r"stack\[0\].*bigs.* is bidirectional.*objective: masked"):
        zoo.LanguageModel({"vocab_size": 7, "width": 8, "stack": ["bigs"]})
    with pytest.raises(ValueError, match="BiGS is bidirectional and takes no state"):
        BiGS(8)(torch.zeros(1, 2, 8), zoo.NoState())


def test_starts_as_published():
    torch.manual_seed(0)
    block = BiGS(8, state_size=9)
    for name, wanted in {
        "lin": math.pi * torch.arange(9.0),
        "inv": 9 / math.pi * (9 / (2 * torch.arange(9.0) + 1) - 1),
    }.items():
        torch.testing.assert_close(SharedSystem(9, name, 0.01, 1.0, None).A_imag, wanted)
    root = (2 * torch.arange(9, dtype=torch.float64) + 1).sqrt()
    hippo = -torch.outer(root, root).tril(-1) - torch.diag(torch.arange(1.0, 10, dtype=torch.float64))
    poles = torch.linalg.eigvals(hippo + torch.outer(root, root) / 2)
    torch.testing.assert_close(block.forward_ssm.A_imag, poles.imag.sort().values.float(), atol=1e-5, rtol=1e-5)
    steps = torch.stack([SharedSystem(2, "lin", 0.01, 1.0, None).log_step.exp() for _ in range(300)])
    assert steps.min() >= 0.0099 and steps.max() <= 1.01
    torch.testing.assert_close(torch.histc(steps.log10(), 2, -2, 0) / 300, torch.full((2,), 0.5), atol=0.1, rtol=0)
    for ssm in (block.forward_ssm, block.backward_ssm):
        assert (ssm.A_real == -0.5).all() and ssm.D.item() == 1
    assert not torch.equal(block.forward_ssm.C, block.backward_ssm.C)
    # A layer of the published models without its norm: hidden 1024, gates 3072, 64 modes; by the authors' shapes.
    with torch.device("meta"):
        count = sum(each.numel() for each in BiGS(1024).parameters())
    assert count == 3 * 1024 * 3072 + 2 * 3072 + 1024 + 4 * (1024 * 1024 + 1024) + 2 * (64 + 64 + 128 + 1 + 1)


def test_the_optimizer_is_told():
    found = tags(BiGS(6, learning_rate=2.0e-4))
    own = {name for name, each in found.items() if each.learning_rate == 2e-4}
    assert own == {f"{way}_ssm.{name}" for way in ("forward", "backward") for name in ("log_step", "A_real", "A_imag")}
    assert not any(each.weight_decay for each in found.values())
    biases = {name for name, _ in BiGS(6).named_parameters() if name.endswith("bias")}
    assert set(found) - own == biases | {"forward_ssm.D", "backward_ssm.D"} and len(biases) == 7
    assert all(each.learning_rate is None for each in tags(BiGS(6, learning_rate=None)).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand": 0}, "expand=0 must be a positive integer"),
        ({"state_size": 0}, "state_size=0 must be a positive integer"),
        ({"init": "leg"}, r"init='leg' is unknown \(did you mean 'legs'\?\); choose from legs, lin, inv"),
        ({"activation": "glu"}, "activation='glu' is unknown"),
        ({"dt_min": 2}, "dt_min=2 and dt_max=1.0 must satisfy 0 < dt_min <= dt_max"),
        ({"learning_rate": 0}, "learning_rate=0 must be positive, or None"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BiGS(6, **options)
