"""The Vandermonde and Cauchy sums: the references against their definitions, the others against the references."""

import math
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from ops import cauchy, vandermonde
from ops.ssm_kernel.common import powers, split

IMPLEMENTATIONS = ("chunked", "triton")
GPU = torch.cuda.is_available()


def device(impl: str) -> str:
    return "cuda" if impl == "triton" and GPU else "cpu"


def normal(*shape):
    return torch.randn(*shape, dtype=torch.complex128)


def entries(channels=3, n=4):
    """Weights, and logarithms of decaying powers whose angles go round several times."""
    log_a = torch.complex(-torch.rand(channels, n).double() / 8, 3 * torch.randn(channels, n).double())
    return normal(channels, n), log_a


def gradients(function, *inputs):
    """The result and the gradients of the inputs, for a random weighing of the result."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    found = function(*leaves)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.complex128)
    found.backward((weights if found.is_complex() else weights.real).to(found))
    return [found.detach().cpu(), *(each.grad.cpu() for each in leaves)]


def close(found, expected, tolerance):
    for each, wanted in zip(found, expected, strict=True):
        scale = wanted.abs().max().clamp_min(1e-30).item()
        assert each.is_complex() == wanted.is_complex()
        assert (each - wanted).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("conjugate", [True, False])
def test_vandermonde_reference_is_the_recurrence(conjugate):
    """h_l = exp(log_a) h_{l-1}, h_0 = weights, K_l = Re Σ_n h_l; with the conjugates, both sums in full."""
    weights, log_a = entries()
    if conjugate:
        both_weights, both = torch.cat([weights, weights.conj()], 1), torch.cat([log_a, log_a.conj()], 1)
    else:
        both_weights, both = weights, log_a
    h, expected = both_weights, []
    for _ in range(9):
        expected.append(h.sum(1).real)
        h = h * both.exp()
    found = vandermonde(weights, log_a, 9, conjugate=conjugate, impl="reference")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("conjugate", [True, False])
def test_cauchy_reference_is_the_resolvent(conjugate):
    """Σ_n w/(z - p) = 1ᵀ (z - diag(p))⁻¹ w."""
    (weights, poles), z = entries(), normal(7)
    if conjugate:
        both_weights, both = torch.cat([weights, weights.conj()], 1), torch.cat([poles, poles.conj()], 1)
    else:
        both_weights, both = weights, poles
    matrix = z[:, None, None, None] * torch.eye(both.shape[1]) - torch.diag_embed(both)
    expected = torch.linalg.solve(matrix, both_weights.expand(7, -1, -1)).sum(-1).T
    found = cauchy(weights, z, poles, conjugate=conjugate, impl="reference")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("conjugate", [True, False])
def test_gradients_are_finite_differences(impl, conjugate):
    weights, log_a = (each.requires_grad_() for each in entries(2, 2))
    z = (2 * normal(5)).requires_grad_()
    options = {"conjugate": conjugate, "impl": impl}
    assert torch.autograd.gradcheck(lambda w, a: vandermonde(w, a, 5, **options), (weights, log_a))
    assert torch.autograd.gradcheck(lambda w, z, p: cauchy(w, z, p, **options), (weights, z, log_a))


@pytest.mark.parametrize("conjugate", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 37, 64, 300])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_vandermonde_is_the_reference(impl, length, conjugate):
    """Odd lengths, squares, one entry."""
    inputs = [each.to(device(impl)) for each in entries()]
    found = gradients(lambda *values: vandermonde(*values, length, conjugate=conjugate, impl=impl), *inputs)
    expected = gradients(lambda *values: vandermonde(*values, length, conjugate=conjugate, impl="reference"), *inputs)
    if length == 1:  # K_0 does not depend on log_a
        assert found.pop().abs().max() == expected.pop().abs().max() == 0
    close(found, expected, 1e-12)


@pytest.mark.parametrize("conjugate", [True, False])
@pytest.mark.parametrize("length", [1, 2, 37, 150])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_cauchy_is_the_reference(impl, length, conjugate):
    weights, poles = entries(5, 9)
    inputs = [each.to(device(impl)) for each in (weights, 2 * normal(length), poles)]
    found = gradients(lambda *values: cauchy(*values, conjugate=conjugate, impl=impl), *inputs)
    expected = gradients(lambda *values: cauchy(*values, conjugate=conjugate, impl="reference"), *inputs)
    close(found, expected, 1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_blocks_of_every_size(impl, monkeypatch):
    """Several blocks of channels, of places, of n, with a rest behind the last."""
    module = import_module(f"ops.ssm_kernel.{impl}")
    if impl == "chunked":
        sizes = {"BLOCK": [1, 100]}
    else:
        sizes = {"forced_vandermonde": [(16, 16)], "forced_cauchy": [(1, 32)], "forced_cauchy_backward": [(4, 32)]}
    weights, poles = entries(2, 6)
    inputs = [each.to(device(impl)) for each in (weights, 2 * normal(45), poles)]
    for name, choices in sizes.items():
        for choice in choices:
            monkeypatch.setattr(module, name, choice)
            if name != "forced_vandermonde":
                found = gradients(lambda *values: cauchy(*values, impl=impl), *inputs)
                close(found, gradients(lambda *values: cauchy(*values, impl="reference"), *inputs), 1e-11)
            if "cauchy" not in name:
                found = gradients(lambda w, a: vandermonde(w, a, 400, impl=impl), inputs[0], inputs[2])
                expected = gradients(lambda w, a: vandermonde(w, a, 400, impl="reference"), inputs[0], inputs[2])
                close(found, expected, 1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 1023, 1024, 1025, 65536])
def test_split_covers_the_length(length):
    starts, step = split(length)
    assert (starts - 1) * step < length <= starts * step
    assert starts + step <= 3 * math.isqrt(length) + 2


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_float32_over_65536_places(impl):
    """Slowly decaying powers, whose angles reach 10⁵: exp(l · log_a) in float32 would be off by a thousandth."""
    n = 8
    angle = math.pi * torch.linspace(0.1, 0.95, n).expand(2, n)
    log_a = torch.complex(-torch.rand(2, n) * 1e-4, angle)
    weights = torch.randn(2, n, dtype=torch.complex64)
    wide = gradients(lambda *v: vandermonde(*v, 65536, impl="reference"), weights.cdouble(), log_a.cdouble())
    found = gradients(lambda *v: vandermonde(*v, 65536, impl=impl), weights, log_a)
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.complex64
    close([each.to(wanted.dtype) for each, wanted in zip(found, wide, strict=True)], wide, 1e-6)
    place = torch.arange(65536)
    naive = 2 * (weights[..., None] * torch.exp(log_a[..., None] * place)).sum(1).real
    assert (naive - wide[0]).abs().max() > 1e-4 * wide[0].abs().max()


@pytest.mark.skipif(not GPU and sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float32_and_mixed_inputs(impl):
    weights, poles = (each.to(device(impl)) for each in entries(3, 5))
    z = (2 * normal(20)).to(device(impl))
    for cast in ((torch.complex64,) * 3, (torch.complex64, torch.complex128, torch.complex64)):
        given = [each.to(dtype) for each, dtype in zip((weights, z, poles), cast, strict=True)]
        K = cauchy(*given, impl=impl)
        assert K.dtype == (torch.complex64 if torch.complex128 not in cast else torch.complex128)
        expected = gradients(lambda *v: cauchy(*v, impl="reference"), *(each.cdouble() for each in given))
        close([each.cdouble() for each in gradients(lambda *v: cauchy(*v, impl=impl), *given)], expected, 2e-5)
    given = weights.to(torch.complex64), poles
    K = vandermonde(*given, 20, impl=impl)
    assert K.dtype == torch.float64
    torch.testing.assert_close(K, vandermonde(given[0].cdouble(), poles, 20, impl="reference"), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_extreme_entries(impl):
    """Powers that vanish at once, z far from and close to a pole."""
    place = device(impl)
    log_a = torch.tensor([[-1e4 + 1j, -1e-9 + 1j, -30 - 3j]], dtype=torch.complex64, device=place)
    found = gradients(lambda w, a: vandermonde(w, a, 40, impl=impl), torch.ones_like(log_a), log_a)
    assert all(each.isfinite().all() for each in found)
    z = torch.tensor([1e25, 1e-30j, 1e8j, 1.0], dtype=torch.complex64, device=place)
    poles = torch.tensor([[-0.5 + 3j, -1e-6 + 0j]], dtype=torch.complex64, device=place)
    found = cauchy(torch.ones_like(poles), z, poles, impl=impl)
    wide = cauchy(torch.ones_like(poles).cdouble(), z.cdouble(), poles.cdouble(), impl="reference")
    torch.testing.assert_close(found.cdouble(), wide, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_and_conjugate_inputs(impl):
    """Transposed, expanded and lazily conjugated tensors are taken as what they say."""
    place = device(impl)
    weights, poles = normal(4, 3).to(place).T, entries(3, 4)[1].to(place).conj()
    shared = poles[:1].expand(3, 4)
    z = normal(9).to(place).conj()
    for each in (poles, shared):
        expected = cauchy(weights.contiguous(), z.resolve_conj(), each.resolve_conj().contiguous(), impl="reference")
        torch.testing.assert_close(cauchy(weights, z, each, impl=impl), expected, rtol=1e-11, atol=1e-11)
        expected = vandermonde(weights.contiguous(), each.resolve_conj().contiguous(), 9, impl="reference")
        torch.testing.assert_close(vandermonde(weights, each, 9, impl=impl), expected, rtol=1e-11, atol=1e-11)
        found = gradients(lambda w, p: cauchy(w, z, p, impl=impl), weights, each)
        close(found, gradients(lambda w, p: cauchy(w, z, p, impl="reference"), weights, each), 1e-11)


@pytest.mark.parametrize("conjugate", [True, False])
@pytest.mark.parametrize("length", [1, 37, 512, 1100])
def test_native_cauchy(length, conjugate):
    """More exact than float32 everywhere: only inputs and outputs are rounded. Lengths beside its parts of 512."""
    pytest.importorskip("numba")
    weights, poles = (each.to(torch.complex64) for each in entries(5, 9))
    inputs = [weights.conj(), (2 * normal(length)).to(torch.complex64), poles[:1].expand(5, 9)]
    found = gradients(lambda *values: cauchy(*values, conjugate=conjugate, impl="native"), *inputs)
    wide = [each.cdouble() for each in inputs]
    expected = gradients(lambda *values: cauchy(*values, conjugate=conjugate, impl="reference"), *wide)
    assert all(each.dtype == torch.complex64 for each in found)
    close([each.cdouble() for each in found], expected, 1e-6)
    assert ops.explain(cauchy, *inputs).chosen == "native"


def test_native_cauchy_far_from_and_close_to_a_pole():
    pytest.importorskip("numba")
    z = torch.tensor([1e25, 1e-30j, 1e8j, 1.0, 3.0000005j], dtype=torch.complex64)
    poles = torch.tensor([[-1e-6 + 3j, -1e-6 + 0j]], dtype=torch.complex64)
    found = cauchy(torch.ones_like(poles), z, poles, impl="native")
    wide = cauchy(torch.ones_like(poles).cdouble(), z.cdouble(), poles.cdouble(), impl="reference")
    torch.testing.assert_close(found.cdouble(), wide, rtol=1e-5, atol=1e-30)
    with pytest.raises(RuntimeError, match="complex64"):
        cauchy(poles.cdouble(), z.cdouble(), poles.cdouble(), impl="native")


class Largest(TorchDispatchMode):
    """The most numbers (a complex one is two) that any tensor made inside holds."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.untyped_storage().nbytes() // each.real.element_size())
        return out


def test_no_tensor_of_channels_by_n_by_length():
    """Forward and backward; called below the custom op, which hides its insides from the dispatcher."""
    from ops.ssm_kernel import chunked

    channels, n, length = 4, 64, 8192
    weights, log_a = entries(channels, n)
    z, dK = normal(length), normal(channels, length)
    with Largest() as inside:
        chunked._vandermonde_forward(weights, log_a, length, True)
        chunked._vandermonde_backward(dK.real.contiguous(), weights, log_a, True)
    assert channels * length <= inside.numbers <= channels * n * length / 8
    with Largest() as inside:
        chunked._cauchy_forward(weights, z, log_a, True)
        chunked._cauchy_backward(dK, weights, z, log_a, True, True)
    assert 2 * channels * length <= inside.numbers <= 2 * chunked.BLOCK < 2 * channels * n * length


def test_the_graph_keeps_the_inputs_alone():
    weights, log_a = (each.requires_grad_() for each in entries())
    z = normal(50).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        vandermonde(weights, log_a, 50, impl="chunked")
        cauchy(weights, z, log_a, impl="chunked")
    assert {each.untyped_storage().data_ptr() for each in kept} == {
        each.untyped_storage().data_ptr() for each in (weights, log_a, z)
    }


def test_autocast_changes_nothing():
    weights, log_a = (each.to(torch.complex64) for each in entries())
    expected = gradients(lambda *v: vandermonde(*v, 37, impl="chunked"), weights, log_a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(lambda *v: vandermonde(*v, 37, impl="chunked"), weights, log_a)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_compiles_into_one_graph(impl):
    inputs = [each.to(device(impl)).requires_grad_() for each in (*entries(2, 3), 2 * normal(6))]

    def function(weights, log_a, z):
        K = vandermonde(weights.conj(), log_a, 6, impl=impl)
        return K * cauchy(weights, z, log_a.conj(), impl=impl).real

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    both = [torch.autograd.grad(each.square().sum(), inputs) for each in (found, expected)]
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_custom_ops_keep_their_promises(impl):
    """torch's own check of schema, fake and gradient registration, of forward and backward."""
    module = import_module(f"ops.ssm_kernel.{impl}")
    weights, log_a, z = (each.to(device(impl)).requires_grad_() for each in (*entries(2, 3), 2 * normal(6)))
    torch.library.opcheck(module._vandermonde, (weights, log_a, 6, True))
    torch.library.opcheck(module._cauchy, (weights, z, log_a, False))
    weights, log_a, z = (each.detach() for each in (weights, log_a, z))
    dK = torch.ones(2, 6, dtype=torch.complex128, device=z.device)
    backward = getattr(torch.ops.zoo, f"vandermonde_{impl}_backward")
    torch.library.opcheck(backward, (dK.real.contiguous(), weights, log_a, True))
    backward = getattr(torch.ops.zoo, f"cauchy_{impl}_backward")
    torch.library.opcheck(backward, (dK, weights, z, log_a, True, True))
    torch.library.opcheck(backward, (dK, weights, z, log_a, False, False))


def test_explain_says_what_and_why():
    weights, log_a = entries()
    for told in (ops.explain(vandermonde, weights, log_a, 5), ops.explain(cauchy, weights, log_a[0], log_a)):
        assert told.chosen == "chunked"
        assert "needs CUDA tensors" in told.refused["triton"]
    assert ops.explain(vandermonde, weights, log_a, 5, impl="reference").chosen == "reference"


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, r"log_a has shape \(3, 5\).*\(3, 4\)", (torch.ones(3, 4), torch.ones(3, 5), 6)),
        (ValueError, r"weights of shape \[channels, n\].*\(3,\)", (torch.ones(3), torch.ones(3), 6)),
        (ValueError, r"n >= 1, got \(3, 0\)", (torch.ones(3, 0), torch.ones(3, 0), 6)),
        (ValueError, "length=0; pass at least 1", (torch.ones(3, 4), torch.ones(3, 4), 0)),
        (TypeError, "integer length, got 2.0", (torch.ones(3, 4), torch.ones(3, 4), 2.0)),
        (TypeError, "integer length, got True", (torch.ones(3, 4), torch.ones(3, 4), True)),
    ],
)
def test_bad_input_of_vandermonde_is_named(error, words, arguments):
    weights, log_a, length = arguments
    with pytest.raises(error, match=words):
        vandermonde(weights.cdouble(), log_a.cdouble(), length)


@pytest.mark.parametrize(
    ("words", "shapes"),
    [
        (r"poles has shape \(2, 4\)", ((3, 4), (6,), (2, 4))),
        (r"z of shape \[length\].*\(6, 1\)", ((3, 4), (6, 1), (3, 4))),
        (r"length >= 1, got \(0,\)", ((3, 4), (0,), (3, 4))),
    ],
)
def test_bad_input_of_cauchy_is_named(words, shapes):
    with pytest.raises(ValueError, match=words):
        cauchy(*(torch.ones(shape, dtype=torch.complex64) for shape in shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.complex32])
def test_other_types_are_refused(dtype):
    weights, log_a = entries()
    other = torch.zeros(3, 4).to(dtype)
    with pytest.raises(TypeError, match=f"weights is {dtype}; .*view_as_complex"):
        vandermonde(other, log_a, 5)
    with pytest.raises(TypeError, match=f"log_a is {dtype}"):
        vandermonde(weights, other, 5)
    with pytest.raises(TypeError, match=f"z is {dtype}"):
        cauchy(weights, other[0], log_a)
    with pytest.raises(ValueError, match=r"impl='magic'.*chunked"):
        vandermonde(weights, log_a, 5, impl="magic")


def test_powers_are_in_two_levels():
    log_a = entries()[1]
    start, within = powers(log_a, 1000)
    full = torch.exp(log_a[..., None] * torch.arange(1000))
    both = (start[..., :, None] * within[..., None, :]).flatten(-2)[..., :1000]
    torch.testing.assert_close(both, full, rtol=1e-11, atol=1e-11)
    assert start.shape[-1] + within.shape[-1] == 64


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_compile_for_a_gpu():
    """Down to machine code for Hopper, which needs no GPU; the interpreter takes more than the compiler does."""
    program = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from ops.ssm_kernel import triton_kernels as kernels
from ops.ssm_kernel.triton import CAUCHY_BACKWARD_BLOCKS, CAUCHY_BLOCKS, VANDERMONDE_BLOCKS
i, j = VANDERMONDE_BLOCKS[0]
(c, l), (n, m) = CAUCHY_BLOCKS[0], CAUCHY_BACKWARD_BLOCKS[0]
for kernel, values in (
    (kernels.vandermonde, dict(BLOCK_I=i, BLOCK_J=j)),
    (kernels.vandermonde_backward, dict(BLOCK_I=i, BLOCK_J=j)),
    (kernels.cauchy, dict(CONJUGATE=True, ORDER=2, BLOCK_C=c, BLOCK_L=l)),
    (kernels.cauchy_backward, dict(CONJUGATE=True, BLOCK_N=n, BLOCK_L=m)),
):
    signature, constants = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name], constants[(place,)] = "constexpr", values[name]
        else:
            signature[name] = "i32" if name in ("channels", "n", "starts", "step", "length") else "*fp32"
    source = ASTSource(kernel, signature, constants)
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 0)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True"] * 4, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("number", range(3))
def test_every_block_size_on_a_gpu(monkeypatch, number, dtype):
    from ops.ssm_kernel import triton

    assert (len(triton.VANDERMONDE_BLOCKS), len(triton.CAUCHY_BLOCKS), len(triton.CAUCHY_BACKWARD_BLOCKS)) == (3, 3, 2)
    monkeypatch.setattr(triton, "forced_vandermonde", triton.VANDERMONDE_BLOCKS[number])
    monkeypatch.setattr(triton, "forced_cauchy", triton.CAUCHY_BLOCKS[number])
    monkeypatch.setattr(triton, "forced_cauchy_backward", triton.CAUCHY_BACKWARD_BLOCKS[number % 2])
    tolerance = 1e-11 if dtype == torch.complex128 else 1e-5
    weights, poles = (each.cuda().to(dtype) for each in entries(37, 19))
    z = (2 * normal(3000)).cuda().to(dtype)
    wide = [each.cdouble() for each in (weights, z, poles)]
    for conjugate in (True, False):
        found = gradients(lambda *v, pairs=conjugate: cauchy(*v, conjugate=pairs, impl="triton"), weights, z, poles)
        expected = gradients(lambda *v, pairs=conjugate: cauchy(*v, conjugate=pairs, impl="chunked"), *wide)
        # Some of 3000 random places lie close to a pole: relative to those gradients.
        close([each.cdouble() for each in found], expected, 10 * tolerance)
        found = gradients(
            lambda *v, pairs=conjugate: vandermonde(*v, 3000, conjugate=pairs, impl="triton"), weights, poles
        )
        expected = gradients(
            lambda *v, pairs=conjugate: vandermonde(*v, 3000, conjugate=pairs, impl="reference"), wide[0], wide[2]
        )
        close([each.to(wanted.dtype) for each, wanted in zip(found, expected, strict=True)], expected, tolerance)
