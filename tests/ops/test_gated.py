"""gated: the native kernels beside torch's activations, gradients of gradients, and where it steps aside."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ops
from ops import gated
from ops.dispatch import LEAST
from ops.gated import ACTIVATIONS, COMPILED

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
BY_TORCH = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def made(*shape: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    inner = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    dy = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator, dtype=torch.float64)
    return inner.to(dtype).requires_grad_(), dy.to(dtype)


def formula(inner, activation):
    half = inner.shape[-1] // 2
    return BY_TORCH[activation](inner[..., :half].double()) * inner[..., half:].double()


def outcome(run, inner, dy):
    y = run()
    return y, *torch.autograd.grad(y, inner, dy.to(y.dtype))


def same(found, wanted, tolerance):
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        size = max(1.0, theirs.abs().max().item())
        assert (mine.double() - theirs.double()).abs().max().item() <= tolerance * size


@pytest.mark.parametrize(
    ("impl", "activation"),
    [("native", each) for each in COMPILED] + [(i, each) for i in ("torch", "reference") for each in ACTIVATIONS],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 5, 24), (40, 514), (300, 200), (34,)])
def test_it_is_the_formula(impl, activation, dtype, shape):
    inner, dy = made(*shape, dtype=dtype)
    found = outcome(lambda: gated(inner, activation, impl=impl), inner, dy)
    assert {each.dtype for each in found} == {dtype}
    same(found, outcome(lambda: formula(inner, activation), inner, dy), TOLERANCE[dtype])
    with torch.no_grad():
        assert torch.equal(gated(inner, activation, impl=impl), found[0])


@pytest.mark.parametrize("activation", COMPILED)
def test_strides_of_any_kind(activation):
    inner, dy = made(30, 8, 12)
    turned = inner.transpose(0, 1)
    found = outcome(lambda: gated(turned, activation, impl="native"), inner, dy.transpose(0, 1))
    same(found, outcome(lambda: formula(turned, activation), inner, dy.transpose(0, 1)), 1e-12)
    spread = dy[..., :1].expand(dy.shape)  # a gradient without a memory of its own
    found = outcome(lambda: gated(inner, activation, impl="native"), inner, spread)
    same(found, outcome(lambda: formula(inner, activation), inner, spread), 1e-12)


@pytest.mark.parametrize("activation", COMPILED)
def test_large_and_broken_gates(activation):
    inner = torch.ones(6, 2)
    inner[:, 0] = torch.tensor([100.0, -100.0, 1e9, -1e9, 0.0, float("nan")])
    inner.requires_grad_()
    dy = torch.ones(6, 1)
    found = outcome(lambda: gated(inner, activation, impl="native"), inner, dy)
    wanted = outcome(lambda: gated(inner, activation, impl="torch"), inner, dy)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-6, atol=1e-25)
    assert found[0][5].isnan() and found[0][:5].isfinite().all()


@pytest.mark.parametrize("activation", COMPILED)
def test_gradients_of_gradients(activation):
    inner, _ = made(3, 6)
    assert torch.autograd.gradcheck(lambda v: gated(v, activation, impl="native"), inner)
    assert torch.autograd.gradgradcheck(lambda v: gated(v, activation, impl="native"), inner)


@pytest.mark.parametrize("activation", COMPILED)
def test_the_same_on_any_number_of_threads(activation):
    inner, dy = made(501, 334, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(outcome(lambda: gated(inner, activation, impl="native"), inner, dy))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_what_is_taken():
    big, small = torch.randn(LEAST // 64, 64), torch.randn(2, 64)
    assert ops.explain(gated, big, "silu").chosen == "native"
    assert ops.explain(gated, small, "silu").chosen == "torch"
    assert ops.explain(gated, big.bfloat16(), "silu").chosen == "torch"
    assert "knows silu and gelu_tanh, not gelu" in ops.explain(gated, big, "gelu").refused["native"]
    with FlopCounterMode(display=False):
        assert "dispatch mode" in ops.explain(gated, big, "silu").refused["native"]
    with pytest.raises(ValueError, match="choose from gelu, gelu_tanh"):
        gated(small, "swish")
    with pytest.raises(ValueError, match=r"a gate and a value side by side.*\(2, 63\)"):
        gated(small[:, :63], "silu")


@pytest.mark.parametrize("activation", COMPILED)
def test_transforms_and_checkpoints(activation):
    inner, dy = made(LEAST // 64, 64)
    wanted = outcome(lambda: formula(inner, activation), inner, dy)[1]

    def run(v):
        return gated(v, activation)

    same([torch.func.grad(lambda v: (run(v) * dy).sum())(inner)], [wanted], 1e-12)
    same([torch.func.vmap(run)(inner[:, None])[:, 0]], [run(inner)], 1e-12)
    kept = checkpoint(run, inner, use_reentrant=False)
    same(torch.autograd.grad(kept, inner, dy), [wanted], 1e-12)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    same(torch.autograd.grad(compiled(inner), inner, dy), [wanted], 1e-12)
