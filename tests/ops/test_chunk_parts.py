"""What stands between the products of chunks: the loops beside torch's formulas, and gradients of gradients."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ops
from ops import delta_rule, linear_attention
from ops.delta_rule import chunked as delta_chunked
from ops.delta_rule.native import _Carry as DeltaCarry
from ops.linear_attention import chunk_native, chunked

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def drawn(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def decays(*shape, dtype=torch.float64):
    """Log decays of all strengths; of some the document before is forgotten."""
    generator = torch.Generator().manual_seed(1)
    drawn = -torch.rand(shape, generator=generator, dtype=torch.float64) * 10 ** torch.arange(shape[-1]).remainder(3)
    drawn[..., 3::5] = -torch.inf
    return drawn.to(dtype).requires_grad_()


def weigh(dtype):
    several, m, heads, chunk = 2, 5, 3, 16
    (scores,) = drawn((several, m, chunk, chunk), dtype=dtype)
    return (scores, decays(m, heads, chunk, dtype=dtype), decays(m, heads, chunk, dtype=dtype), True)


def weigh_without_itself(dtype):
    (scores,) = drawn((1, 70, 64, 64), dtype=dtype)
    log_decay = decays(70, 1, 64, dtype=dtype)
    return (scores, log_decay, torch.zeros_like(log_decay).requires_grad_(), False)


def carry(dtype):
    return drawn((2, 4, 37, 9), (2, 4, 37), (2, 37, 9), dtype=dtype)


def values(dtype):
    """With a chunk that ends behind the values, of heads that are a part of more."""
    wide, keep = drawn((2, 13, 50), (2 * 4 * 2, 3, 4), dtype=dtype)
    return wide[..., 5:35].unflatten(-1, (6, 5)), keep, 4


def combine(dtype):
    m, heads, chunk, v = 2 * 4 * 2, 3, 4, 5
    return *drawn((m, heads, chunk, v), (m, chunk, heads, v), (m, heads, chunk), dtype=dtype), 2, 13


PARTS = {each.__name__: each for each in (weigh, weigh_without_itself, carry, values, combine)}


def functions(name):
    name = name.split("_")[0]
    return getattr(chunk_native, name), getattr(chunked, name)


def outcome(function, given):
    found = function(*given)
    found = found if isinstance(found, tuple) else (found,)
    leaves = [each for each in given if isinstance(each, torch.Tensor)]
    slopes = [each.detach() for each in drawn(*(each.shape for each in found), dtype=found[0].dtype, seed=5)]
    return *found, *torch.autograd.grad(found, leaves, slopes)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("part", PARTS)
def test_it_is_the_formula(part, dtype):
    given = PARTS[part](dtype)
    native, formula = functions(part)
    exact = [each.detach().double().requires_grad_() if isinstance(each, torch.Tensor) else each for each in given]
    for mine, theirs in zip(outcome(native, given), outcome(formula, exact), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == dtype and mine.isfinite().all()
        size = max(1.0, theirs.abs().max().item())
        assert (mine.double() - theirs).abs().max().item() <= TOLERANCE[dtype] * size


@pytest.mark.parametrize("part", PARTS)
def test_the_same_on_any_number_of_threads(part, monkeypatch):
    monkeypatch.setattr(chunk_native, "SMALL", 0)
    given, before, found = PARTS[part](torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(outcome(functions(part)[0], given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_gradients_of_gradients(part):
    given = PARTS[part](torch.float64)
    if part.startswith("weigh"):  # which would take minutes; a decay of -inf has no numeric slope either
        (scores,), itself = drawn((1, 1, 4, 4)), given[3]
        few = (-each.detach().square() for each in drawn((1, 2, 4), (1, 2, 4), seed=4))
        given = scores, *(each.requires_grad_() for each in few), itself
    leaves = [each for each in given if isinstance(each, torch.Tensor)]
    rest = given[len(leaves) :]
    assert torch.autograd.gradgradcheck(lambda *each: functions(part)[0](*each, *rest), leaves)


@pytest.mark.parametrize("part", PARTS)
def test_torch_stands_in_where_something_looks_on(part):
    given = PARTS[part](torch.float64)
    leaves = [each for each in given if isinstance(each, torch.Tensor)]
    rest = given[len(leaves) :]
    native, formula = functions(part)

    def loss(*each):
        found = native(*each, *rest)
        return sum(one.sum() for one in (found if isinstance(found, tuple) else (found,)))

    if not part.startswith("weigh"):  # whose formula is a function of autograd, which torch.func does not take either
        wanted = torch.autograd.grad(loss(*leaves), leaves)
        found = torch.func.grad(loss, tuple(range(len(leaves))))(*leaves)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    with FlopCounterMode(display=False):
        native(*given)
    torch.compiler.reset()
    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(compiled, formula(*given), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("total", [None, (1, 1), (6, 1), (1, 6), (6, 6)])
def test_the_delta_rules_carry(total, add, dtype):
    """total: one number for all heads and key channels, or one each."""
    n, b, h, c, k, v = 4, 2, 6, 5, 6, 7
    wide, row = (n, b, h, c, v), (n, b, h, c, k)
    q, a, writers, new, state = drawn(row, row, row, wide, (b, h, k, v), dtype=dtype)
    added = drawn((n, b, h, k, v), dtype=dtype, seed=2)[0] if add else None
    kept = None if total is None else drawn((n, 1 if total[0] == 1 else b, *total, 1), dtype=dtype, seed=3)[0]
    given = [q, a / 3, writers / 3, new, added, kept, state]

    def run(function):
        leaves = [each for each in given if each is not None]
        found = function(*given)
        slopes = [each.detach() for each in drawn(*(each.shape for each in found), dtype=dtype, seed=5)]
        return *found, *torch.autograd.grad(found, leaves, slopes, retain_graph=True)

    for mine, theirs in zip(run(DeltaCarry.apply), run(delta_chunked.carry), strict=True):
        size = max(1.0, theirs.abs().max().item())
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max().item() <= 5 * TOLERANCE[dtype] * size


def test_the_delta_rules_carry_has_second_derivatives():
    shapes = (
        (2, 1, 2, 3, 2),
        (2, 1, 2, 3, 2),
        (2, 1, 2, 3, 2),
        (2, 1, 2, 3, 2),
        (2, 1, 2, 2, 2),
        (2, 1, 2, 1, 1),
        (1, 2, 2, 2),
    )
    given = drawn(*shapes)
    assert torch.autograd.gradcheck(DeltaCarry.apply, given)
    assert torch.autograd.gradgradcheck(DeltaCarry.apply, given)


def test_a_state_does_not_keep_all_states():
    q, k, v = drawn((1, 640, 1, 8), (1, 640, 1, 8), (1, 640, 1, 8), dtype=torch.float32)
    _, state = delta_rule(q, k, v)
    assert state.untyped_storage().nbytes() == state.numel() * 4


@pytest.mark.parametrize("op", [linear_attention, delta_rule])
def test_second_derivatives_of_an_op(op):
    q, k, v, d = drawn((1, 5, 1, 2), (1, 5, 1, 2), (1, 5, 2, 2), (1, 5, 2))

    def function(q, k, v, d):
        return op(q, k / 2, v, log_decay=-d.square(), impl="native")[0]

    assert ops.explain(op, q, k, v, log_decay=d).chosen == "native"
    assert torch.autograd.gradgradcheck(function, (q, k, v, d))
