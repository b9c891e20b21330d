"""linear_cross_entropy: every implementation beside torch's cross entropy of all logits; what a model makes of it."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

import ops
import zoo
from ops import linear_cross_entropy
from ops.linear_cross_entropy import common

IN_PIECES = ("native", "chunked")
IMPLEMENTATIONS = (*IN_PIECES, "torch", "reference")


def made(rows: int, vocab: int, dtype: torch.dtype = torch.float64, width: int = 5, ignored: int = 0):
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[torch.randperm(rows, generator=generator)[:ignored]] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets


def oracle(x, weight, targets, scale=1.0, softcap=None, reduction="sum"):
    logits = scale * (x.double() @ weight.double().T)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits, targets, reduction=reduction)


def outcome(loss, *leaves):
    return loss.detach(), *torch.autograd.grad(2.5 * loss, leaves)


def same(found, wanted, tolerance):
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        size = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        assert not mine.numel() or (mine.double() - theirs.double()).abs().max().item() <= tolerance * size


@pytest.fixture
def pieces(monkeypatch):
    """So few logits at once that a handful of rows are several pieces."""
    monkeypatch.setattr(common, "LOGITS_ON_CPU", 1100)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("rows", "vocab", "ignored"), [(1, 1, 0), (3, 7, 1), (40, 513, 0), (40, 100, 23), (9, 64, 9)])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"scale": 2.0, "softcap": 1.5}, {"softcap": 30.0}])
def test_it_is_the_cross_entropy_of_all_logits(impl, dtype, tolerance, rows, vocab, ignored, options, pieces):
    x, weight, targets = made(rows, vocab, dtype, ignored=ignored)
    wanted = outcome(oracle(x, weight, targets, **options), x, weight)
    found = outcome(linear_cross_entropy(x, weight, targets, impl=impl, **options), x, weight)
    assert [each.dtype for each in found] == [dtype] * 3
    same(found, wanted, tolerance)
    with torch.no_grad():
        same([linear_cross_entropy(x, weight, targets, impl=impl, **options)], wanted[:1], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab", "ignored"), [(1, 1, 0), (3, 7, 1), (12, 5000, 4), (40, 100, 23)])
@pytest.mark.parametrize("options", [{}, {"scale": -0.3}, {"scale": 2.0, "softcap": 1.5}])
def test_triton_is_the_cross_entropy(dtype, rows, vocab, ignored, options, pieces):
    x, weight, targets = made(rows, vocab, dtype, ignored=ignored)
    wanted = outcome(oracle(x, weight, targets, **options), x, weight)
    nats, *slopes = outcome(linear_cross_entropy(x, weight, targets, impl="triton", **options), x, weight)
    assert nats.dtype == torch.float32
    same([nats], wanted[:1], 2e-6 if dtype == torch.float32 else 5e-3)
    same(slopes, wanted[1:], 1e-5 if dtype == torch.float32 else 3e-2)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, targets, impl="triton", **options), nats)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernel_compiles_for_a_gpu():
    """Down to machine code for Hopper, which needs no GPU."""
    program = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.linear_cross_entropy.triton_kernels import losses
def compile(gradient, capped, products):
    values = dict(GRADIENT=gradient, CAPPED=capped, BLOCK=4096)
    types = dict(products=products, targets="*i64", nats="*fp32", scale="fp32", softcap="fp32")
    signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in losses.arg_names}
    constants = {(place,): values[name] for place, name in enumerate(losses.arg_names) if name in values}
    source = ASTSource(losses, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    return len(made.asm["cubin"]) > 0
print(*(compile(g, c, p) for g in (False, True) for c in (False, True) for p in ("*bf16", "*fp32")))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["True"] * 8, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("vocab", "softcap"), [(50257, None), (128256, 30.0), (256, None)])
def test_on_a_gpu(vocab, softcap):
    x, weight, targets = (each.detach().cuda() for each in made(3000, vocab, torch.bfloat16, width=256, ignored=700))
    weight = weight / 16
    x.requires_grad_(), weight.requires_grad_()
    assert ops.explain(linear_cross_entropy, x, weight, targets).chosen == "triton"
    wanted = outcome(oracle(x, weight, targets, softcap=softcap), x, weight)
    for impl in ("triton", "chunked"):
        found = outcome(linear_cross_entropy(x, weight, targets, softcap=softcap, impl=impl), x, weight)
        same(found[:1], wanted[:1], 2e-3)
        same(found[1:], wanted[1:], 2e-2)


@pytest.mark.parametrize("impl", IN_PIECES)
def test_no_more_logits_at_once_than_told(impl, pieces, monkeypatch):
    x, weight, targets = made(40, 100)
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given, **named: seen.append(mm(*given, **named)) or seen[-1])
    linear_cross_entropy(x, weight, targets, impl=impl)
    logits = [each for each in seen if each.shape[1] == 100]
    assert len(logits) == 4 and max(each.numel() for each in logits) <= 1100
    assert len({each.data_ptr() for each in logits}) == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_mean_is_over_the_rows_that_count(impl):
    x, weight, targets = made(20, 30, ignored=6)
    same(
        [linear_cross_entropy(x, weight, targets, reduction="mean", impl=impl)],
        [oracle(x, weight, targets) / 14],
        1e-12,
    )
    nothing = torch.full_like(targets, -100)
    assert linear_cross_entropy(x, weight, nothing, impl=impl) == 0
    assert linear_cross_entropy(x, weight, nothing, reduction="mean", impl=impl).isnan()


@pytest.mark.parametrize("impl", IN_PIECES)
def test_another_mark_for_rows_that_do_not_count(impl):
    x, weight, targets = made(12, 9)
    found = outcome(linear_cross_entropy(x, weight, targets, ignore_index=3, impl=impl), x, weight)
    logits = x @ weight.T
    same(found, outcome(cross_entropy(logits, targets, ignore_index=3, reduction="sum"), x, weight), 1e-12)
    assert (targets == 3).any()


@pytest.mark.parametrize("impl", IN_PIECES)
def test_bfloat16_sums_in_float32(impl, pieces):
    x, weight, targets = made(300, 50, torch.bfloat16, width=64)
    if impl == "native":
        with pytest.raises(RuntimeError, match="takes float32 and float64"):
            linear_cross_entropy(x, weight, targets, impl=impl)
        return
    nats, dx, dweight = outcome(linear_cross_entropy(x, weight, targets, impl=impl), x, weight)
    wanted = outcome(oracle(x, weight, targets), x, weight)
    assert nats.dtype == torch.float32 and dx.dtype == dweight.dtype == torch.bfloat16
    same([nats], wanted[:1], 2e-3)
    same([dx, dweight], wanted[1:], 2e-2)
    # 1/7 is 0.2% from any bfloat16: scaled by a rounded factor, all would be off to one side.
    scaled = torch.autograd.grad(linear_cross_entropy(x, weight, targets, impl=impl) / 7, weight)[0].double()
    whole = torch.autograd.grad(linear_cross_entropy(x, weight, targets, impl=impl), weight)[0].double()
    assert abs((scaled * whole).sum() / whole.square().sum() * 7 - 1) < 2e-4


def test_bfloat16_compiled():
    x, weight, targets = made(30, 50, torch.bfloat16, width=64)

    def loss(x, weight):
        return linear_cross_entropy(x, weight, targets, reduction="mean")

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    same(outcome(compiled(x, weight), x, weight), outcome(loss(x, weight), x, weight), 1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_logits_stay_finite(impl):
    x, weight, targets = made(10, 40, torch.float32)
    with torch.no_grad():
        weight *= 1e4
    same(outcome(linear_cross_entropy(x, weight, targets, impl=impl), x), outcome(oracle(x, weight, targets), x), 1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_is_not_hidden(impl, bad):
    x, weight, targets = made(6, 40, torch.float32)
    with torch.no_grad():
        x[2, 0] = bad
    nats, dx = outcome(linear_cross_entropy(x, weight, targets, impl=impl), x)
    assert not nats.isfinite() and not dx[2].isfinite().any() and dx[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("impl", IN_PIECES)
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient(impl, frozen, pieces):
    x, weight, targets = made(40, 100, ignored=5)
    (x, weight)[frozen].requires_grad_(False)
    leaf = (x, weight)[1 - frozen]
    same(
        outcome(linear_cross_entropy(x, weight, targets, impl=impl), leaf),
        outcome(oracle(x, weight, targets), leaf),
        1e-12,
    )


@pytest.mark.parametrize("impl", IN_PIECES)
def test_gradients_of_gradients(impl, pieces):
    x, weight, targets = made(4, 6, ignored=1)

    def loss(x, weight):
        return linear_cross_entropy(x, weight, targets, scale=0.7, softcap=2.0, impl=impl)

    assert torch.autograd.gradcheck(loss, (x, weight))
    assert torch.autograd.gradgradcheck(loss, (x, weight))


@pytest.mark.parametrize("impl", IN_PIECES)
def test_a_graph_kept_can_be_walked_again(impl):
    x, weight, targets = made(7, 11)
    loss = linear_cross_entropy(x, weight, targets, impl=impl)
    first = torch.autograd.grad(3 * loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (x, weight))
    same(again, first, 0)
    assert first[0].abs().sum() > 0


def test_the_same_on_any_number_of_threads():
    x, weight, targets = made(64, 3000, torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            products = (x @ weight.T).detach().clone()
            from ops.linear_cross_entropy.native import losses

            found.append(losses(products, targets, -100, 1.0, 0.0, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_autocast_casts_as_a_product():
    x, weight, targets = made(30, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.explain(linear_cross_entropy, x, weight, targets).chosen == "chunked"
        nats, dx, dweight = outcome(linear_cross_entropy(x, weight, targets), x, weight)
        logits = torch.nn.functional.linear(x, weight)
    assert logits.dtype == torch.bfloat16 and nats.dtype == dx.dtype == dweight.dtype == torch.float32
    same([nats], [cross_entropy(logits.float(), targets, reduction="sum")], 1e-5)
    same([dx, dweight], outcome(oracle(x, weight, targets), x, weight)[1:], 2e-2)


def test_what_is_taken():
    x, weight, targets = made(3, 4, torch.float32)
    assert ops.explain(linear_cross_entropy, x, weight, targets).chosen == "native"
    wanted = torch.autograd.grad(oracle(x, weight, targets), x)[0]

    def loss(v):
        assert ops.explain(linear_cross_entropy, v, weight, targets).chosen == "torch"
        return linear_cross_entropy(v, weight, targets)

    same([torch.func.grad(loss)(x)], [wanted], 1e-5)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"x": torch.ones(2, 3, 4)}, ValueError, "flatten batch and time first"),
        ({"weight": torch.ones(7, 5)}, ValueError, r"weight \(7, 5\)"),
        ({"targets": torch.zeros(4).long()}, ValueError, r"targets \(4,\)"),
        ({"targets": torch.zeros(3)}, TypeError, "int64 or int32, got torch.float32"),
        ({"weight": torch.ones(7, 4).double()}, TypeError, "one dtype"),
        ({"reduction": "none"}, ValueError, "choose 'sum' or 'mean'"),
        ({"targets": torch.tensor([0, 7, 1])}, ValueError, "target 7 is outside of the vocabulary of 7"),
        ({"targets": torch.tensor([0, -1, 1])}, ValueError, "target -1 is outside"),
        ({"impl": "cut"}, ValueError, "choose from auto, triton, native"),
    ],
)
def test_mistakes_are_told(change, error, told):
    given = {"x": torch.ones(3, 4), "weight": torch.ones(7, 4), "targets": torch.zeros(3).long()} | change
    with pytest.raises(error, match=told):
        linear_cross_entropy(**given)


# In a model ------------------------------------------------------------------------------------------------------


def model(**options) -> zoo.LanguageModel:
    torch.manual_seed(0)
    stack = [{"kind": "gla", "heads": 2}, {"kind": "swiglu", "hidden": 12}]
    return zoo.LanguageModel({"vocab_size": 50, "width": 8, "stack": stack, **options}).double()


def tokens():
    given = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    targets = given.roll(-1, 1)
    targets[:, -1] = -100
    return given, targets


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.4, "logit_softcap": 3.0, "tied_embeddings": True}])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_model_gives_nats_of_its_logits(options, hooked):
    network, (given, targets) = model(**options), tokens()
    parameters = list(network.parameters())
    whole = network(given)
    wanted = outcome(cross_entropy(whole.logits.flatten(0, 1), targets.flatten(), reduction="sum"), *parameters)
    seen = []
    if hooked:  # somebody who watches the head gets to see it called
        network.head.register_forward_hook(lambda *call: seen.append(call))
    out = network(given, targets=targets)
    same(outcome(out.nats, *parameters), wanted, 1e-10)
    assert out.logits.shape == (2, 0, 50) and torch.equal(out.hidden, whole.hidden) and len(seen) == hooked
    assert whole.nats is None


def test_a_compiled_model_gives_the_same():
    network, (given, targets) = model(), tokens()
    parameters = list(network.parameters())
    wanted = outcome(network(given, targets=targets).nats, *parameters)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    same(outcome(compiled(given, targets=targets).nats, *parameters), wanted, 1e-10)


def test_a_model_refuses_targets_that_do_not_fit():
    network, (given, targets) = model(), tokens()
    with pytest.raises(ValueError, match="one target a token"):
        network(given, targets=targets[:, 1:])
    with pytest.raises(ValueError, match="no logits to keep"):
        network(given, targets=targets, logits_to_keep=1)
