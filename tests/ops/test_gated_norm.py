"""gated_norm: both kernels beside torch's norms and activations, gradients of gradients, and where they step aside."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ops
from ops import gated_norm
from ops.dispatch import LEAST
from ops.gated_norm import WIDEST

TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-6, torch.bfloat16: 3e-2}
OPTIONS = [
    {"activation": activation, "gate_first": first, "center": center}
    for activation, first, center in itertools.product(("silu", "sigmoid"), (False, True), (False, True))
]
# x and gate, weight and bias: one row, heads that share a weight, heads with their own, one channel, none at all
SHAPES = [((7,), (7,)), ((5, 9), (9,)), ((2, 3, 4, 6), (6,)), ((2, 3, 4, 6), (4, 6)), ((70, 2, 33), (2, 33))]
SHAPES += [((3, 1), (1,)), ((2, 30, 20), None)]


def made(shape, weights, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [draw(shape), 2 * draw(shape)] + ([] if weights is None else [draw(weights), draw(weights)])
    return [each.requires_grad_() for each in tensors], draw(shape)


def formula(x, gate, weight=None, bias=None, eps=1e-5, *, activation="silu", gate_first=False, center=False):
    """By torch's own norms in float64."""
    x, gate = x.double(), gate.double()
    opened = F.silu(gate) if activation == "silu" else torch.sigmoid(gate)
    u = x * opened if gate_first else x
    y = F.layer_norm(u, u.shape[-1:], eps=eps) if center else F.rms_norm(u, u.shape[-1:], eps=eps)
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    return y if gate_first else y * opened


def run(tensors, impl="auto", **options):
    weight, bias = tensors[2:] or (None, None)
    return gated_norm(*tensors[:2], weight, bias, 1e-5, impl=impl, **options)


def outcome(y, tensors, dy):
    return y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))


def same(found, wanted, tolerance):
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        size = max(1.0, theirs.abs().max().item())
        assert (mine.double() - theirs.double()).abs().max().item() <= tolerance * size


@pytest.mark.parametrize("impl", ["native", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "weights"), SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_formula(impl, dtype, shape, weights, options):
    tensors, dy = made(shape, weights, dtype)
    found = outcome(run(tensors, impl, **options), tensors, dy)
    assert {each.dtype for each in found} == {dtype}
    same(found, outcome(formula(*tensors, **options), tensors, dy), TOLERANCE[dtype])
    with torch.no_grad():
        assert torch.equal(run(tensors, impl, **options), found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "weights"), [*SHAPES, ((700, 2, 40), (2, 40)), ((1, 5000), (5000,))])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_triton_is_the_formula(dtype, shape, weights, options):
    tensors, dy = made(shape, weights, dtype)
    found = outcome(run(tensors, "triton", **options), tensors, dy)
    assert {each.dtype for each in found} == {dtype}
    same(found, outcome(formula(*tensors, **options), tensors, dy), TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "weights"),
    [((2, 512, 8, 64), (8, 64)), ((4, 300, 5, 100), (100,)), ((2, 700, 4096), (4096,)), ((3, 11, 16384), (16384,))],
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_triton_on_a_gpu(dtype, shape, weights, options):
    tensors, dy = made(shape, weights, dtype)
    tensors, dy = [each.detach().cuda().requires_grad_() for each in tensors], dy.cuda()
    assert ops.explain(gated_norm, *tensors, 1e-5, **options).chosen == "triton"
    found = outcome(run(tensors, **options), tensors, dy)
    same(found, outcome(formula(*tensors, **options), tensors, dy), 3 * TOLERANCE[dtype])


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernels_compile_for_a_gpu():
    """Down to machine code for Hopper, which needs no GPU."""
    program = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.gated_norm.triton_kernels import backward, forward
def build(kernel, products, **options):
    values = dict(INNER=4, SILU=True, FIRST=False, CENTER=False, WEIGHT=True, BIAS=False, ROWS=32, BLOCK=128) | options
    whole = ("lines", "groups", "width", "down", "along", "across")
    wide = dict(means="*fp32", rates="*fp32", sums="*fp32", eps="fp32") | dict.fromkeys(whole, "i32")
    signature = {name: "constexpr" if name in values else wide.get(name, products) for name in kernel.arg_names}
    constants = {(place,): values[name] for place, name in enumerate(kernel.arg_names) if name in values}
    source = ASTSource(kernel, signature, constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert len(made.asm["cubin"]) > 1000
for kernel in (forward, backward):
    build(kernel, "*bf16")
    build(kernel, "*fp32", SILU=False, CENTER=True, BIAS=True, INNER=1)
    build(kernel, "*bf16", FIRST=True, ROWS=1, BLOCK=4096)
print("compiled")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert done.stdout.split() == ["compiled"], done.stderr


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_strides_of_any_kind(impl):
    """Parts of a projection, turned tensors, and a gradient without a memory of its own."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 40, 30, generator=generator, requires_grad=True)
    weight = torch.randn(5, generator=generator, requires_grad=True)
    first, second = (part.unflatten(-1, (2, 5)) for part in (wide[..., :10], wide[..., 12:22]))
    turned = wide.transpose(0, 1)[..., 20:30].unflatten(-1, (2, 5)).transpose(0, 1)
    dy = torch.randn(3, 40, 1, 1, generator=generator).expand(3, 40, 2, 5)
    for x, gate in (
        (first, second),
        (turned, first),
        (second, turned),
        (first.transpose(0, 1), turned.transpose(0, 1)),
    ):
        slope = dy.transpose(0, 1) if x.shape[0] == 40 else dy
        found = outcome(gated_norm(x, gate, weight, impl=impl), (wide, weight), slope)
        same(found, outcome(formula(x, gate, weight, eps=1e-6), (wide, weight), slope), 1e-5)


@pytest.mark.parametrize("given", ["weight", "bias"])
@pytest.mark.parametrize("impl", ["native", "triton", "torch", "reference"])
def test_a_weight_or_a_bias_alone(impl, given):
    (x, gate, weight, _), dy = made((6, 3, 10), (3, 10), torch.float32)
    found = gated_norm(x, gate, eps=1e-5, center=True, impl=impl, **{given: weight})
    wanted = formula(x, gate, center=True, **{given: weight})
    same(outcome(found, (x, weight), dy), outcome(wanted, (x, weight), dy), 3e-6)


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_large_and_broken_values(impl):
    gate = torch.tensor([100.0, -100.0, 1e9, -1e9, 0.0, float("nan"), 1.0])[:, None].expand(7, 4).clone()
    x = torch.ones(7, 4)
    x[6] = float("inf")
    for options in OPTIONS:
        found = gated_norm(x, gate, impl=impl, **options)
        wanted = gated_norm(x, gate, impl="torch", **options)
        assert torch.equal(found[:5].isfinite(), wanted[:5].isfinite()) and found[5].isnan().all()
        torch.testing.assert_close(found[:5], wanted[:5], rtol=1e-5, atol=1e-6)
        assert torch.equal(found[6].isnan(), wanted[6].isnan())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_gradients(options):
    tensors, _ = made((3, 2, 5), (2, 5))

    def f(*given):
        return run(list(given), "native", **options)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_on_any_number_of_threads(options):
    tensors, dy = made((501, 4, 167), (4, 167), torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(outcome(run(tensors, "native", **options), tensors, dy))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_what_is_taken():
    big, small = torch.randn(LEAST // 64, 64), torch.randn(2, 64)
    assert ops.explain(gated_norm, big, big).chosen == "native"
    assert ops.explain(gated_norm, small, small).chosen == "torch"
    assert ops.explain(gated_norm, big.bfloat16(), big.bfloat16()).chosen == "torch"
    assert "all alike" in ops.explain(gated_norm, big, big.double()).refused["native"]
    wide = torch.randn(WIDEST // 4, WIDEST + 1, device="meta")
    assert f"rows of up to {WIDEST} values" in ops.explain(gated_norm, wide, wide).refused["triton"]
    with FlopCounterMode(display=False):
        assert "dispatch mode" in ops.explain(gated_norm, big, big).refused["native"]


def test_errors():
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="activation='swish' is unknown; choose from silu, sigmoid"):
        gated_norm(x, x, activation="swish")
    with pytest.raises(ValueError, match=r"x and gate alike.*\(2, 3, 8\) and \(2, 3, 7\)"):
        gated_norm(x, x[..., :7])
    with pytest.raises(
        ValueError, match=r"weight must have the last one or two dimensions of x \(2, 3, 8\), got \(7,\)"
    ):
        gated_norm(x, x, torch.ones(7))
    with pytest.raises(ValueError, match=r"bias must have.*got \(2, 3, 8\)"):
        gated_norm(x, x, None, x)
    for impl in ("native", "triton"):
        with pytest.raises(RuntimeError, match="has nothing to do"):
            gated_norm(x[:0], x[:0], impl=impl)
    assert gated_norm(x[:0], x[:0]).shape == (0, 3, 8)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_transforms_and_checkpoints(options):
    tensors, dy = made((LEAST // 64, 2, 32), (2, 32))
    wanted = outcome(formula(*tensors, **options), tensors, dy)

    def f(*given):
        return run(list(given), **options)

    def loss(*given):
        return (f(*given) * dy).sum()

    same(torch.func.grad(loss, (0, 1, 2, 3))(*tensors), wanted[1:], 1e-11)
    same([torch.func.vmap(f, (0, 0, None, None))(*tensors)], wanted[:1], 1e-11)
    kept = checkpoint(f, *tensors, use_reentrant=False)
    same(torch.autograd.grad(kept, tensors, dy), wanted[1:], 1e-11)
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    same(torch.autograd.grad(compiled(*tensors), tensors, dy), wanted[1:], 1e-11)
