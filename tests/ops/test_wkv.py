"""wkv: every implementation against the loop and against the plain sums; extreme keys, long sequences, padding."""

import math

import pytest
import torch

import ops
from ops import wkv
from ops.wkv import chunked, triton

FAST = ("chunked", "native", "triton")
CASES = [1, 2, 37]


def arguments(time, dtype=torch.float64, batch=4, channels=5):
    """k, v, log_decay, bonus, numerator, denominator, maximum."""
    k, v = (torch.randn(batch, time, channels, dtype=dtype) for _ in range(2))
    w, u = -torch.rand(channels, dtype=dtype) * 3 - 0.01, torch.randn(channels, dtype=dtype)
    n, m = (torch.randn(batch, channels, dtype=dtype) for _ in range(2))
    return [2 * k, v, w, u, n, torch.rand(batch, channels, dtype=dtype) + 0.5, m]


def ids(batch, time):
    """Packed documents, padding anywhere, one row of padding alone."""
    segments = torch.randint(1, 4, (batch, time)).sort(1).values
    segments[torch.rand(batch, time) < 0.3] = 0
    segments[0] = 0
    return segments


def weights_like(each):
    """The same numbers for every dtype and device."""
    return torch.randn(each.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(each)


def outcome(inputs, impl, segments=None):
    """y, final state and the seven gradients, with random weights on every output."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    y, final = wkv(*leaves[:4], initial_state=tuple(leaves[4:]), segments=segments, impl=impl)
    loss = sum((each * weights_like(each)).sum() for each in (y, *final))
    return [y, *final, *torch.autograd.grad(loss, leaves)]


def plain_sums(k, v, w, u, sum_n, sum_d):
    """The equation itself, on sums that carry no maximum. Returns y and the two sums after the last token."""
    outputs = []
    for t in range(k.shape[1]):
        now = torch.exp(u + k[:, t])
        outputs.append((sum_n + now * v[:, t]) / (sum_d + now))
        sum_n = torch.exp(w) * sum_n + torch.exp(k[:, t]) * v[:, t]
        sum_d = torch.exp(w) * sum_d + torch.exp(k[:, t])
    return torch.stack(outputs, 1), sum_n, sum_d


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", CASES)
def test_equals_the_loop(impl, packed, time):
    inputs = arguments(time)
    segments = ids(4, time) if packed else None
    if packed:
        for each in inputs[:2]:
            each[segments == 0] = torch.nan
    wanted = outcome(inputs, "reference", segments)
    for found, want in zip(outcome(inputs, impl, segments), wanted, strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_equals_the_plain_sums(impl):
    """The convention for gradients: those of every function of the sums are true, the maximum's included."""
    leaves = [each.requires_grad_() for each in arguments(9)]
    k, v, w, u, n, d, m = leaves
    y, final = wkv(k, v, w, u, initial_state=(n, d, m), impl=impl)
    scale = torch.exp(final.maximum)
    found = (y, final.numerator * scale, final.denominator * scale)
    wanted = plain_sums(k, v, w, u, n * torch.exp(m), d * torch.exp(m))
    for each, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, want)
    assert not final.maximum.requires_grad
    pairs = zip(
        *(torch.autograd.grad(sum((o * weights_like(o)).sum() for o in outs), leaves) for outs in (found, wanted)),
        strict=True,
    )
    for each, want in pairs:
        torch.testing.assert_close(each, want)


@pytest.mark.parametrize("impl", FAST)
def test_finite_differences_of_the_sums(impl):
    inputs = [each.requires_grad_() for each in arguments(4, batch=2, channels=2)]
    segments = torch.tensor([[1, 1, 0, 1], [1, 2, 2, 2]])

    def run(k, v, w, u, n, d, m):
        y, final = wkv(k, v, w, u, initial_state=(n, d, m), segments=segments, impl=impl)
        scale = torch.exp(final.maximum)
        return y, final.numerator * scale, final.denominator * scale

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_chunks_and_tokens_continue(impl):
    """In values and in gradients, which go through the states between the chunks."""
    leaves = [each.requires_grad_() for each in arguments(6)]
    k, v, w, u = leaves[:4]

    def run(sizes):
        outputs, state = [], tuple(leaves[4:])
        for part_k, part_v in zip(k.split(sizes, 1), v.split(sizes, 1), strict=True):
            y, state = wkv(part_k, part_v, w, u, initial_state=state, impl=impl)
            outputs.append(y)
        found = [torch.cat(outputs, 1), *state]
        loss = (found[0] * weights_like(found[0])).sum() + (state.numerator * torch.exp(state.maximum)).sum()
        return [*found, *torch.autograd.grad(loss, leaves)]

    wanted = run([6])
    for sizes in ([1] * 6, [2, 3, 1]):
        for each, want in zip(run(sizes), wanted, strict=True):
            torch.testing.assert_close(each, want)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_packed_equals_separate(impl):
    k, v, w, u, *state = arguments(9, batch=1)
    segments = torch.tensor([[1, 0, 1, 1, 0, 0, 2, 2, 0]])
    y, final = wkv(k, v, w, u, initial_state=tuple(state), segments=segments, impl=impl)
    one, _ = wkv(k[:, [0, 2, 3]], v[:, [0, 2, 3]], w, u, initial_state=tuple(state), impl=impl)
    two, last = wkv(k[:, [6, 7]], v[:, [6, 7]], w, u, impl=impl)
    torch.testing.assert_close(y[:, [0, 2, 3]], one)
    torch.testing.assert_close(y[:, [6, 7]], two)
    assert (y[segments == 0] == 0).all()
    for each, want in zip(final, last, strict=True):
        torch.testing.assert_close(each, want)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_keys_of_three_hundred(impl):
    """e^300 is no float32: only the maximum in the state keeps the sums finite."""
    inputs = arguments(20, torch.float32)
    inputs[0] = 300 * inputs[0].sign()
    found = outcome(inputs, impl)
    assert all(each.isfinite().all() for each in found)
    assert (found[0].abs() <= inputs[1].abs().max() * 3 + 3).all()
    wanted = outcome([each.double() for each in inputs], "reference")
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-4, atol=1e-4)


def test_a_hundred_thousand_tokens():
    """The running average of a constant is that constant, whatever the keys, at the last token as at the first."""
    time = 100_000
    k = 40 * torch.randn(1, time, 2)
    v = torch.full_like(k, 0.75).requires_grad_()
    w = torch.tensor([-1e-4, -3.0]).requires_grad_()
    y, final = wkv(k, v, w, torch.zeros(2), impl="native")
    torch.testing.assert_close(y, v)
    y.sum().backward()
    assert w.grad.isfinite().all()
    # Every y is an average with weights that sum to 1.
    assert math.isclose(v.grad.double().sum().item(), 2 * time, rel_tol=1e-3)
    assert all(each.isfinite().all() for each in final)


@pytest.mark.parametrize("impl", FAST)
def test_low_precision(impl):
    """Sums are float32 for bfloat16 input: the only rounding is that of y and of the gradients."""
    inputs = [each.bfloat16() if i < 2 else each.float() for i, each in enumerate(arguments(37))]
    wanted = outcome([each.double() for each in inputs], "reference")
    found = outcome(inputs, impl)
    assert found[0].dtype == found[4].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    for each, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(each.double(), want, rtol=1e-2, atol=1e-2)


def test_pieces_of_chunked(monkeypatch):
    """Longer than a piece: states and gradients cross its ends, the backward pass computes it again."""
    monkeypatch.setattr(chunked, "PIECE", 8)
    inputs, segments = arguments(29), ids(4, 29)
    for given in (None, segments):
        wanted = outcome(inputs, "reference", given)
        for each, want in zip(outcome(inputs, "chunked", given), wanted, strict=True):
            torch.testing.assert_close(each, want)


def test_many_channels_on_threads():
    """More work than one thread takes alone, and more channels than a tile."""
    inputs, segments = arguments(70, torch.float32, batch=2, channels=700), ids(2, 70)
    wanted = outcome([each.double() for each in inputs], "chunked", segments)
    for each, want in zip(outcome(inputs, "native", segments), wanted, strict=True):
        torch.testing.assert_close(each.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", triton.BLOCKS)
def test_every_triton_block_size(block, monkeypatch):
    monkeypatch.setattr(triton, "BLOCKS", (block,))
    inputs, segments = arguments(34, batch=2, channels=block + 3), ids(2, 34)
    wanted = outcome(inputs, "native", segments)
    for each, want in zip(outcome(inputs, "triton", segments), wanted, strict=True):
        torch.testing.assert_close(each, want)


@pytest.mark.parametrize("impl", FAST)
def test_compiles_whole(impl):
    leaves = [each.requires_grad_() for each in arguments(5, torch.float32)]

    def run(k, v, w, u, n, d, m):
        y, final = wkv(k, v, w, u, initial_state=(n, d, m), impl=impl)
        return y.sum() + final.numerator.square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(run(*leaves), leaves)
    for each, want in zip(torch.autograd.grad(compiled(*leaves), leaves), wanted, strict=True):
        torch.testing.assert_close(each, want)


def test_nan_in_the_input_comes_out():
    """The fast exponential must not turn a NaN into a number."""
    k, v, w, u, *_ = arguments(6, torch.float32)
    k[0, 2, 1] = torch.nan
    y, _ = wkv(k, v, w, u, impl="native")
    assert y[0, 2:, 1].isnan().all()
    assert y[0, :2].isfinite().all()
    assert y[1:].isfinite().all()


def test_explains():
    k, v, w, u, *_ = arguments(3, torch.float32)
    assert ops.explain(wkv, k, v, w, u).chosen == "native"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(2, 3)}, ValueError, r"\[batch, time, channels\], got \(2, 3\)"),
        ({"k": torch.zeros(2, 0, 5), "v": torch.zeros(2, 0, 5)}, ValueError, "time=0"),
        ({"v": torch.zeros(2, 3, 4)}, ValueError, r"v has shape \(2, 3, 4\)"),
        ({"v": torch.zeros(2, 3, 5).long()}, TypeError, "int64"),
        ({"bonus": torch.zeros(4)}, ValueError, r"bonus has shape \(4,\).*channels=5"),
        ({"log_decay": torch.zeros(1, 5)}, ValueError, r"log_decay has shape \(1, 5\)"),
        ({"initial_state": (torch.zeros(2, 5),) * 2}, ValueError, r"numerator, denominator, maximum"),
        ({"segments": torch.ones(2, 4).long()}, ValueError, r"segments has shape \(2, 4\)"),
        ({"impl": "fast"}, ValueError, "'fast' is not an implementation"),
    ],
)
def test_bad_input(change, error, message):
    zeros = torch.zeros(2, 3, 5)
    good = {"k": zeros, "v": zeros, "log_decay": -torch.ones(5), "bonus": torch.zeros(5)}
    with pytest.raises(error, match=message):
        wkv(**{**good, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [128, 64, 32, None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [1, 5, 40, 700])
def test_on_gpu(monkeypatch, time, packed, block, dtype):
    """Values and gradients with every number of channels a program (None: of the chunked form)."""
    assert triton.BLOCKS == (128, 64, 32)
    if block is not None:
        monkeypatch.setattr(triton, "BLOCKS", (block,))
    inputs = [each.to(dtype) for each in arguments(time, channels=200)]
    segments = ids(4, time) if packed else None
    wanted = outcome([each.double() for each in inputs], "native", segments)
    impl = "chunked" if block is None else "triton"
    found = outcome([each.cuda() for each in inputs], impl, None if segments is None else segments.cuda())
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for each, want in zip(found, wanted, strict=True):
        scale = want.abs().max().clamp_min(1).item()  # a gradient is a sum of many terms that cancel
        torch.testing.assert_close(each.cpu().double(), want, rtol=0, atol=tolerance * scale)
