"""token_mix: the native kernels beside the formula, gradients of gradients, and where they step aside."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ops
from ops import token_mix
from ops.dispatch import LEAST

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
# x, mixes, whether the data move them
CASES = [
    ((1, 1, 3), 1, False),
    ((2, 5, 24), 6, False),
    ((2, 5, 24), 5, True),
    ((3, 40, 50), 3, True),
    ((7, 16), 2, False),
]


def made(shape, mixes, moves, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    given = [draw(*shape), draw(*shape), draw(mixes, shape[-1])] + ([draw(mixes, *shape)] if moves else [])
    return given, [draw(*shape).detach() for _ in range(mixes)]


def formula(x, before, weight, moved=None):
    """Mix by mix, by torch's lerp."""
    return [torch.lerp(x, before, share if moved is None else share + moved[i]) for i, share in enumerate(weight)]


def outcome(mixed, given, slopes):
    return *mixed, *torch.autograd.grad(mixed, given, slopes)


def same(found, wanted, tolerance):
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        size = max(1.0, theirs.abs().max().item())
        assert (mine.double() - theirs.double()).abs().max().item() <= tolerance * size


@pytest.mark.parametrize("impl", ["native", "torch", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_formula(impl, dtype, case):
    given, slopes = made(*case, dtype=dtype)
    found = outcome(token_mix(*given, impl=impl), given, slopes)
    assert {each.dtype for each in found} == {dtype}
    same(found, outcome(formula(*given), given, slopes), TOLERANCE[dtype])
    with torch.no_grad():
        same(token_mix(*given, impl=impl), found[: case[1]], 0)


def test_strides_of_any_kind_and_mixes_nobody_uses():
    (x, before, weight, moved), slopes = made((6, 4, 10), 3, True)
    turned = [x.transpose(0, 1), before.transpose(0, 1), weight.T.contiguous().T, moved.transpose(1, 2)]
    given = [x, before, weight, moved]
    spread = [each[..., :1].transpose(0, 1).expand(4, 6, 10) for each in slopes]
    found = outcome(token_mix(*turned, impl="native")[:2], given, spread[:2])
    same(found, outcome(formula(*turned)[:2], given, spread[:2]), 1e-12)


@pytest.mark.parametrize("moves", [False, True])
def test_gradients_of_gradients(moves):
    given, _ = made((1, 2, 3), 2, moves)
    assert torch.autograd.gradcheck(lambda *each: token_mix(*each, impl="native"), given)
    assert torch.autograd.gradgradcheck(lambda *each: token_mix(*each, impl="native"), given)


def test_the_same_on_any_number_of_threads():
    given, slopes = made((2, 167, 167), 5, True, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(outcome(token_mix(*given, impl="native"), given, slopes))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_what_is_taken():
    big, small, weight = torch.randn(2, LEAST // 128, 64), torch.randn(2, 3, 64), torch.randn(2, 64)
    assert ops.explain(token_mix, big, big, weight).chosen == "native"
    assert ops.explain(token_mix, small, small, weight).chosen == "torch"
    assert ops.explain(token_mix, big.bfloat16(), big.bfloat16(), weight.bfloat16()).chosen == "torch"
    with FlopCounterMode(display=False):
        assert "dispatch mode" in ops.explain(token_mix, big, big, weight).refused["native"]
    with pytest.raises(RuntimeError, match="has nothing to do"):
        token_mix(small[:0], small[:0], weight, impl="native")


def test_errors():
    x, weight = torch.randn(2, 3, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"x and before .* got \(2, 3, 8\), \(2, 2, 8\), \(4, 8\)"):
        token_mix(x, x[:, :2], weight)
    with pytest.raises(ValueError, match=r"weight \[mixes, width\], got .*\(4, 7\)"):
        token_mix(x, x, weight[:, :7])
    with pytest.raises(ValueError, match=r"moved must be \(4, 2, 3, 8\), as weight and x are, got \(2, 3, 8\)"):
        token_mix(x, x, weight, x)


@pytest.mark.parametrize("moves", [False, True])
def test_transforms_and_checkpoints(moves):
    given, slopes = made((2, LEAST // 64, 16), 2, moves)
    wanted = torch.autograd.grad(formula(*given), given, slopes)

    def loss(*each):
        return sum((one * slope).sum() for one, slope in zip(token_mix(*each), slopes, strict=True))

    same(torch.func.grad(loss, tuple(range(len(given))))(*given), wanted, 1e-11)
    kept = checkpoint(lambda *each: token_mix(*each), *given, use_reentrant=False)
    same(torch.autograd.grad(kept, given, slopes), wanted, 1e-11)
    torch.compiler.reset()
    compiled = torch.compile(lambda *each: token_mix(*each), fullgraph=True, backend="aot_eager")
    same(torch.autograd.grad(compiled(*given), given, slopes), wanted, 1e-11)
