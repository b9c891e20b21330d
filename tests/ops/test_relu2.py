"""relu2: the native kernels beside the formula, gradients of gradients, and where it steps aside."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ops
from ops import relu2
from ops.dispatch import LEAST

IMPLEMENTATIONS = ("native", "torch", "reference")
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-7}


def made(*shape: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x.requires_grad_(), dy


def wanted(x, dy):
    """max(x, 0)² and its slope, by hand."""
    x, dy = x.detach().double(), dy.double()
    return x * x * (x > 0), 2 * x * dy * (x > 0)


def outcome(y, x, dy):
    return y, *torch.autograd.grad(y, x, dy)


def same(found, wanted, tolerance):
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 5, 24), (300, 211)])
def test_it_is_the_formula(impl, dtype, shape):
    x, dy = made(*shape, dtype=dtype)
    found = outcome(relu2(x, impl=impl), x, dy)
    assert {each.dtype for each in found} == {dtype}
    same(found, wanted(x, dy), TOLERANCE[dtype])
    with torch.no_grad():
        assert torch.equal(relu2(x, impl=impl), found[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_without_bounds(impl, dtype):
    """A NaN is not taken for a negative value, and what is far below zero is zero, as is its gradient."""
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0, -1e30], dtype=dtype, requires_grad=True)
    y, dx = outcome(relu2(x, impl=impl), x, torch.ones_like(x))
    for each in (y, dx):
        assert each[0].isnan() and each[1] == float("inf")
        assert not each[2:].any()


def test_strides_of_any_kind():
    x, dy = made(30, 8, 12)
    for turned, slopes in ((x.transpose(0, 1), dy.transpose(0, 1)), (x[::2, :, 3:7], dy[::2, :, :1].expand(15, 8, 4))):
        same([relu2(turned, impl="native")], [wanted(turned, slopes)[0]], 1e-14)
        (dx,) = torch.autograd.grad(relu2(turned, impl="native"), x, slopes)
        (by_torch,) = torch.autograd.grad(relu2(turned, impl="torch"), x, slopes)
        same([dx], [by_torch], 1e-14)


def test_gradients_of_gradients():
    x, _ = made(3, 6)
    assert torch.autograd.gradcheck(lambda v: relu2(v, impl="native"), x)
    assert torch.autograd.gradgradcheck(lambda v: relu2(v, impl="native"), x)


def test_the_same_on_any_number_of_threads():
    x, dy = made(501, 167, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(outcome(relu2(x, impl="native"), x, dy))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_what_is_taken():
    big, small = torch.randn(LEAST // 64, 64), torch.randn(2, 64)
    assert ops.explain(relu2, big).chosen == "native"
    assert ops.explain(relu2, small).chosen == "torch"
    assert ops.explain(relu2, big.bfloat16()).chosen == "torch"
    with FlopCounterMode(display=False):
        assert "dispatch mode" in ops.explain(relu2, big).refused["native"]
    with pytest.raises(RuntimeError, match="has nothing to do"):
        relu2(small[:0], impl="native")
    assert relu2(small[:0]).shape == (0, 64)


def test_transforms_and_checkpoints():
    x, dy = made(LEAST // 64, 65)
    gradient = wanted(x, dy)[1]
    same([torch.func.grad(lambda v: (relu2(v) * dy).sum())(x)], [gradient], 1e-12)
    kept = checkpoint(lambda v: relu2(v), x, use_reentrant=False)
    same(torch.autograd.grad(kept, x, dy), [gradient], 1e-12)
    torch.compiler.reset()
    compiled = torch.compile(lambda v: relu2(v), fullgraph=True, backend="aot_eager")
    same(torch.autograd.grad(compiled(x), x, dy), [gradient], 1e-12)
