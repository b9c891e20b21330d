"""rms_norm: the native kernels beside torch's and the formula, gradients of gradients, and where it steps aside."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ops
from ops import rms_norm
from ops.dispatch import LEAST

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def made(*shape: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), dy


def formula(x, weight, eps):
    """Summed by float64, whatever comes."""
    x = x.double()
    y = x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    return y if weight is None else y * weight.double()


def outcome(run, leaves, dy):
    y = run()
    return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def same(found, wanted, tolerance):
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        size = max(1.0, theirs.abs().max().item())
        assert (mine.double() - theirs.double()).abs().max().item() <= tolerance * size


@pytest.mark.parametrize("impl", ["native", "torch", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 24), (40, 513), (300, 200), (24,)])
@pytest.mark.parametrize("weighed", [True, False])
def test_it_is_the_formula(impl, dtype, shape, weighed):
    x, weight, dy = made(*shape, dtype=dtype)
    weight = weight if weighed else None
    leaves = [each for each in (x, weight) if each is not None]
    found = outcome(lambda: rms_norm(x, weight, 1e-3, impl=impl), leaves, dy)
    assert {each.dtype for each in found} == {dtype}
    same(found, outcome(lambda: formula(x, weight, 1e-3), leaves, dy), TOLERANCE[dtype] * shape[0] ** 0.5)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-3, impl=impl), found[0])


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    x, weight, dy = made(64, 33)
    (x, weight)[frozen].requires_grad_(False)
    leaf = (x, weight)[1 - frozen]
    found = outcome(lambda: rms_norm(x, weight, 1e-6, impl="native"), [leaf], dy)
    same(found, outcome(lambda: formula(x, weight, 1e-6), [leaf], dy), 1e-12)


def test_strides_of_any_kind():
    x, weight, dy = made(30, 8, 12)
    turned = x.transpose(0, 1)
    found = outcome(lambda: rms_norm(turned, weight[::1].flip(0), 1e-6, impl="native"), [x, weight], dy.transpose(0, 1))
    wanted = outcome(lambda: formula(turned, weight.flip(0), 1e-6), [x, weight], dy.transpose(0, 1))
    same(found, wanted, 1e-12)
    spread = dy[..., :1].expand(dy.shape)  # a gradient without a memory of its own
    found = outcome(lambda: rms_norm(x, weight, 1e-6, impl="native"), [x, weight], spread)
    same(found, outcome(lambda: formula(x, weight, 1e-6), [x, weight], spread), 1e-12)


@pytest.mark.parametrize("size", [1e18, 1e-30, 0.0])
def test_any_size(size):
    x = (size * torch.randn(4, 100)).requires_grad_()
    weight, dy = torch.ones(100, requires_grad=True), torch.randn(4, 100)
    found = outcome(lambda: rms_norm(x, weight, 1e-6, impl="native"), [x, weight], dy)
    same(found, outcome(lambda: rms_norm(x, weight, 1e-6, impl="torch"), [x, weight], dy), 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_stays_one_row(bad):
    x = torch.randn(4, 100)
    x[1, 3] = bad
    y = rms_norm(x, torch.ones(100), 1e-6, impl="native")
    assert y[1].isnan().any() and y[[0, 2, 3]].isfinite().all()
    assert torch.equal(y.isnan(), rms_norm(x, torch.ones(100), 1e-6, impl="torch").isnan())


def test_gradients_of_gradients():
    x, weight, _ = made(3, 5)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3, impl="native"), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, 1e-3, impl="native"), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x: rms_norm(x, None, 1e-3, impl="native"), x)


def test_the_same_on_any_number_of_threads():
    x, weight, dy = made(500, 333, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(outcome(lambda: rms_norm(x, weight, 1e-6, impl="native"), [x, weight], dy))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_what_is_taken():
    big, small = torch.randn(LEAST // 64, 64), torch.randn(2, 64)
    weight = torch.ones(64)
    assert ops.explain(rms_norm, big, weight, 1e-6).chosen == "native"
    assert ops.explain(rms_norm, small, weight, 1e-6).chosen == "torch"
    assert ops.explain(rms_norm, big.bfloat16(), weight.bfloat16(), 1e-6).chosen == "torch"
    assert ops.explain(rms_norm, big[:0], None, 1e-6).chosen == "torch"
    with FlopCounterMode(display=False):
        assert "dispatch mode" in ops.explain(rms_norm, big, weight, 1e-6).refused["native"]
    with pytest.raises(RuntimeError, match="float32 or float64, all alike"):
        rms_norm(big, weight.double(), 1e-6, impl="native")
    with pytest.raises(ValueError, match=r"got \(2, 64\) and \(63,\)"):
        rms_norm(small, weight[:63], 1e-6)


def test_transforms_and_checkpoints():
    x, weight, dy = made(LEAST // 64, 64)
    wanted = outcome(lambda: formula(x, weight, 1e-6), [x], dy)[1]

    def run(v):
        return rms_norm(v, weight, 1e-6)

    same([torch.func.grad(lambda v: (run(v) * dy).sum())(x)], [wanted], 1e-12)
    same([torch.func.vmap(run)(x[:, None])[:, 0]], [run(x)], 1e-12)
    _, slope = torch.func.jvp(run, (x,), (dy,))
    same([(slope * dy).sum()], [(torch.autograd.grad(run(x), x, dy)[0] * dy).sum()], 1e-12)
    kept = checkpoint(run, x, use_reentrant=False)
    same(torch.autograd.grad(kept, x, dy), [wanted], 1e-12)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    same(torch.autograd.grad(compiled(x), x, dy), [wanted], 1e-12)
