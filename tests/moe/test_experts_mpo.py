"""MPO experts: decomposition, parameters, values through the mixture, the masked gradient."""

import math

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.describe import active, count
from zoo.model import LanguageModel
from zoo.moe.experts import EXPERTS, MLPExperts, SwiGLUExperts
from zoo.moe.experts_mpo import MPOExperts, bonds, decompose, factorise

WIDTH, HIDDEN, EXPERTS_USED = 12, 20, 4


def contract(sites):
    """The matrix of a chain of tensors, by one sum over all bonds for each pair of indices: the definition."""
    inputs = [site.shape[1] for site in sites]
    outputs = [site.shape[2] for site in sites]
    matrix = torch.empty(math.prod(inputs), math.prod(outputs), dtype=sites[0].dtype)
    for i in range(matrix.shape[0]):
        for o in range(matrix.shape[1]):
            row, rest_i, rest_o = torch.ones(1, 1, dtype=matrix.dtype), i, o
            for k, site in enumerate(sites):
                after_i, after_o = math.prod(inputs[k + 1 :]), math.prod(outputs[k + 1 :])
                row = row @ site[:, rest_i // after_i, rest_o // after_o]
                rest_i, rest_o = rest_i % after_i, rest_o % after_o
            matrix[i, o] = row[0, 0]
    return matrix


@pytest.mark.parametrize(
    ("size", "sites", "wanted"),
    [(768, 5, [3, 4, 4, 4, 4]), (24, 3, [2, 4, 3]), (7, 3, [1, 7, 1]), (1, 3, [1, 1, 1]), (3072, 5, [4, 4, 8, 6, 4])],
)
def test_factors(size, sites, wanted):
    found = factorise(size, sites)
    assert math.prod(found) == size
    assert sorted(found) == sorted(wanted)
    assert found[sites // 2] == max(found)


def test_bonds_follow_the_formula():
    assert bonds([2, 3, 2], [4, 3, 2], None) == [1, 8, 4, 1]
    assert bonds([3, 4, 4, 4, 4], [4, 4, 4, 4, 3], None) == [1, 12, 192, 192, 12, 1]
    assert bonds([3, 4, 4, 4, 4], [4, 4, 4, 4, 3], 20) == [1, 12, 20, 20, 12, 1]


@pytest.mark.parametrize("sites", [3, 5])
def test_decomposition_is_exact_without_a_bound(sites):
    matrix = torch.randn(WIDTH, HIDDEN, dtype=torch.float64)
    inputs, outputs = factorise(WIDTH, sites), factorise(HIDDEN, sites)
    parts = decompose(matrix, inputs, outputs)
    assert [part.shape[0] for part in parts] == bonds(inputs, outputs, None)[:-1]
    torch.testing.assert_close(contract(parts), matrix, rtol=0, atol=1e-10)


def test_decomposition_with_a_bound_errs_by_no_more_than_what_is_left_out():
    """The squared error is at most the sum over cuts of the squares of the singular values behind the bond."""
    matrix = torch.randn(24, 36, dtype=torch.float64)
    inputs, outputs, bond = [2, 4, 3], [3, 4, 3], 4
    found = contract(decompose(matrix, inputs, outputs, bond))
    allowed = 0.0
    for cut in (1, 2):
        first_i, first_o = math.prod(inputs[:cut]), math.prod(outputs[:cut])
        unfolded = matrix.reshape(first_i, 24 // first_i, first_o, 36 // first_o).transpose(1, 2)
        values = torch.linalg.svdvals(unfolded.reshape(first_i * first_o, -1))
        allowed += values[bond:].square().sum().item()
    error = (found - matrix).square().sum().item()
    assert 0 < error <= allowed
    # A matrix that such a chain can hold is found again.
    torch.testing.assert_close(contract(decompose(found, inputs, outputs, bond)), found, rtol=0, atol=1e-10)


def test_written_out_as_the_sum_over_bonds():
    experts = MPOExperts(WIDTH, EXPERTS_USED, HIDDEN, bond=3, sites=5).double()
    for name in ("gate", "value", "down"):
        for e, found in enumerate(experts.matrix(name)):
            sites = [site if k == 2 else site[e] for k, site in enumerate(experts.sites(name))]
            torch.testing.assert_close(found, contract(sites), rtol=0, atol=1e-12)
    chosen = torch.tensor([2, 0, 2])
    torch.testing.assert_close(experts.matrix("down", chosen), experts.matrix("down")[chosen], rtol=0, atol=1e-14)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_a_dense_expert_is_reconstructed_exactly(activation):
    """At the full bond, in the matrices and in the values of the whole mixture."""
    if activation == "swiglu":
        dense = SwiGLUExperts(WIDTH, 1, HIDDEN).double()
        gate, value = dense.up[0].chunk(2, -1)
        matrices = {"gate": gate, "value": value, "down": dense.down[0]}
    else:
        dense = MLPExperts(WIDTH, 1, HIDDEN, activation="relu").double()
        matrices = {"up": dense.up[0], "down": dense.down[0]}
    experts = MPOExperts(WIDTH, EXPERTS_USED, HIDDEN, activation=activation).double().from_dense(**matrices)
    for name, matrix in matrices.items():
        torch.testing.assert_close(experts.matrix(name), matrix.expand(EXPERTS_USED, -1, -1), rtol=0, atol=1e-10)
    block = zoo.block("moe", WIDTH, experts=EXPERTS_USED, hidden=HIDDEN, expert=experts).double()
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    wanted = dense(x.flatten(0, 1), torch.tensor([18])).reshape(x.shape)  # weights sum to 1
    torch.testing.assert_close(block(x).y, wanted, rtol=0, atol=1e-10)
    with torch.no_grad():  # one token takes the way of few
        torch.testing.assert_close(block(x[:1, :1]).y, wanted[:1, :1], rtol=0, atol=1e-10)


def test_different_experts_equal_a_loop_over_them_with_gradients():
    options = {"kind": "mpo", "bond": 4, "activation": "relu"}
    block = zoo.block("moe", WIDTH, experts=EXPERTS_USED, hidden=HIDDEN, expert=options).double()
    x = torch.randn(1, 11, WIDTH, dtype=torch.float64)
    routing = block.router(x)
    y = torch.zeros_like(x)
    for token in range(11):
        for expert, weight in zip(routing.experts[token].tolist(), routing.weights[token], strict=True):
            up, down = (
                contract([s if k == 1 else s[expert] for k, s in enumerate(block.experts.sites(name))])
                for name in ("up", "down")
            )
            y[0, token] = y[0, token] + weight * (F.relu(x[0, token] @ up) @ down)
    found = block(x).y
    torch.testing.assert_close(found, y, rtol=0, atol=1e-12)
    parameters = list(block.parameters())
    direction = torch.randn_like(y)
    both = [torch.autograd.grad((each * direction).sum(), parameters) for each in (found, y)]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("bond", "sites"), [(None, 3), (3, 3), (4, 5)])
def test_parameters_follow_the_formula(bond, sites):
    block = zoo.block("moe", WIDTH, hidden=HIDDEN, expert={"kind": "mpo", "bond": bond, "sites": sites})
    middle, total, used = sites // 2, WIDTH * 8, WIDTH * 8
    for sizes in [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]:
        inputs, outputs = (factorise(size, sites) for size in sizes)
        d = bonds(inputs, outputs, bond)
        each = [d[k] * inputs[k] * outputs[k] * d[k + 1] for k in range(sites)]
        total += each[middle] + 8 * (sum(each) - each[middle])
        used += each[middle] + 2 * (sum(each) - each[middle])
    assert count(block) == total
    assert block.active_parameters() == used
    assert block.flops_per_token(0) == 2 * (WIDTH * 8 + 2 * 3 * WIDTH * HIDDEN)


def test_sharing_saves_parameters():
    """At the sizes of T5-base the paper's kind of operator is a fraction of dense experts."""
    with torch.device("meta"):
        dense = zoo.block("moe", 768, experts=16, hidden=3072, expert={"kind": "mlp", "activation": "relu"})
        options = {"kind": "mpo", "sites": 5, "activation": "relu"}
        shared = zoo.block("moe", 768, experts=16, hidden=3072, expert=options)
    one = 2 * 768 * 3072
    assert count(dense) > 16 * one
    assert one < count(shared) < 3 * one


def test_initial_matrices_have_the_variance_of_a_linear_layers():
    for options in ({}, {"bond": 6}, {"sites": 5, "bond": 8}):
        experts = MPOExperts(64, 8, 96, **options)
        for name, inputs in (("gate", 64), ("down", 96)):
            assert experts.matrix(name).var().item() == pytest.approx(1 / (3 * inputs), rel=0.1)
    moved = MPOExperts(WIDTH, 2).bfloat16()
    moved.reset_parameters()
    assert all(p.isfinite().all() and p.any() for p in moved.parameters())


def test_mask_leaves_out_whole_experts_of_the_shared_tensors_gradient():
    experts = MPOExperts(WIDTH, 64, HIDDEN, bond=3, activation="relu", mask=0.75).double()
    rows, sizes = torch.randn(64, WIDTH, dtype=torch.float64), torch.ones(64, dtype=torch.long)
    reference = MPOExperts(WIDTH, 64, HIDDEN, bond=3, activation="relu").double()
    reference.load_state_dict(experts.state_dict())

    def gradients(module):
        y = module(rows, sizes)
        return y, dict(
            zip(module.state_dict(), torch.autograd.grad(y.square().sum(), list(module.parameters())), strict=True)
        )

    (y, masked), (wanted, whole) = gradients(experts), gradients(reference)
    assert torch.equal(y, wanted)
    for name in experts.per_expert:  # auxiliary tensors learn as ever
        torch.testing.assert_close(masked[name], whole[name], rtol=0, atol=1e-12)
    # The shared tensor's gradient is a sum over a quarter of the experts, whole ones.
    draws = torch.stack([gradients(experts)[1]["down_1"] for _ in range(200)])
    near = 0.15 * whole["down_1"].abs().max().item()
    torch.testing.assert_close(draws.mean(0), 0.25 * whole["down_1"], rtol=0, atol=near)
    assert not torch.allclose(draws[0], draws[1])
    single = MPOExperts(WIDTH, 1, HIDDEN, activation="relu", mask=0.5).double()
    found = []
    for _ in range(20):
        y = single(rows, torch.tensor([64]))
        found.append(torch.autograd.grad(y.sum(), single.down_1)[0].abs().max().item())
    assert {each > 0 for each in found} == {True, False}  # one expert: all of it or nothing
    experts.eval()
    torch.testing.assert_close(gradients(experts)[1]["down_1"], whole["down_1"], rtol=0, atol=1e-12)


def test_shared_experts_and_the_name():
    assert EXPERTS["mpo"] == "zoo.moe.experts_mpo:MPOExperts"
    for activation in ("swiglu", "silu"):
        options = {"kind": "mpo", "bond": 4, "activation": activation}
        block = zoo.block("moe", WIDTH, hidden=HIDDEN, expert=options, shared_experts=2)
        assert block.shared.hidden == 2 * HIDDEN
        assert block(torch.randn(1, 3, WIDTH)).y.isfinite().all()


def test_in_a_model_on_meta_and_active_parameters():
    described = {
        "vocab_size": 7,
        "width": WIDTH,
        "stack": [{"kind": "moe", "hidden": HIDDEN, "expert": {"kind": "mpo", "bond": 4}}],
    }
    with torch.device("meta"):
        model = LanguageModel(described)
    assert active(model) < count(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": 4}, "sites=4 has no middle; use 3 or 5"),
        ({"sites": 1}, "sites=1 must be an integer from 3"),
        ({"bond": 0}, "bond=0 must be a positive integer, or None for no bound"),
        ({"mask": 1}, "mask=1 must be at least 0 and below 1"),
        ({"activation": "tanh"}, "activation='tanh' is unknown; choose from swiglu, gelu"),
        ({"bnod": 3}, "expert 'mpo' has no option 'bnod' .did you mean 'bond'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("moe", WIDTH, expert={"kind": "mpo", **options})


def test_errors_of_from_dense():
    experts = MPOExperts(WIDTH, 2, HIDDEN, activation="relu")
    with pytest.raises(ValueError, match="have the matrices up, down, got gate"):
        experts.from_dense(gate=torch.zeros(1))
    with pytest.raises(ValueError, match=r"down has shape \(12, 20\), these experts need .*\(20, 12\)"):
        experts.from_dense(up=torch.zeros(WIDTH, HIDDEN), down=torch.zeros(WIDTH, HIDDEN))
