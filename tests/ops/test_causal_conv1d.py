"""causal_conv1d: every implementation against the loop and against F.conv1d; state, padding, packing, bad input."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

import ops
from ops import causal_conv1d
from ops.causal_conv1d import triton as triton_conv

FAST = ("chunked", "native", "triton")
CASES = [(1, 7), (2, 1), (4, 1), (4, 2), (4, 19)]  # taps, time


def arguments(taps, time, dtype=torch.float64, batch=4, channels=5):
    shapes = [(batch, time, channels), (channels, taps), (channels,), (batch, taps - 1, channels)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def ids(batch, time):
    """Packed documents, padding anywhere, one row of padding alone."""
    segments = torch.randint(1, 4, (batch, time)).sort(1).values
    segments[torch.rand(batch, time) < 0.3] = 0
    segments[0] = 0
    return segments


def outcome(inputs, impl, segments, **options):
    """y, final state and the four gradients, with random weights on every output."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    x, weight, bias, state = leaves
    y, final = causal_conv1d(x, weight, bias, initial_state=state, segments=segments, impl=impl, **options)
    loss = sum((each * weights_like(each)).sum() for each in (y, final))
    return [y, final, *torch.autograd.grad(loss, leaves)]


def weights_like(each):
    """The same numbers for every dtype and device."""
    seeded = torch.Generator().manual_seed(3)
    return torch.randn(each.shape, generator=seeded).bfloat16().to(each)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("taps", "time"), CASES)
def test_equals_the_loop(impl, activation, packed, taps, time):
    inputs = arguments(taps, time)
    segments = ids(4, time) if packed else None
    if packed:
        inputs[0][segments == 0] = torch.nan
    wanted = outcome(inputs, "reference", segments, activation=activation)
    for found, want in zip(outcome(inputs, impl, segments, activation=activation), wanted, strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_equals_conv1d(impl):
    x, weight, bias, _ = arguments(4, 19)
    wanted = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=5).transpose(1, 2)
    y, final = causal_conv1d(x, weight, bias, impl=impl)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(final, x[:, -3:])
    torch.testing.assert_close(causal_conv1d(x, weight, impl=impl)[0], wanted - bias)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_chunks_and_tokens_continue(impl):
    x, weight, bias, state = arguments(4, 11)
    whole, final = causal_conv1d(x, weight, bias, initial_state=state, activation="silu", impl=impl)
    for sizes in ([1] * 11, [2, 6, 3]):
        parts, held = [], state
        for part in x.split(sizes, 1):
            y, held = causal_conv1d(part, weight, bias, initial_state=held, activation="silu", impl=impl)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(held, final)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_packed_equals_separate(impl):
    x, weight, bias, state = arguments(4, 9, batch=1)
    segments = torch.tensor([[1, 0, 1, 1, 0, 0, 2, 2, 0]])
    y, final = causal_conv1d(x, weight, bias, initial_state=state, segments=segments, impl=impl)
    one, _ = causal_conv1d(x[:, [0, 2, 3]], weight, bias, initial_state=state, impl=impl)
    two, last = causal_conv1d(x[:, [6, 7]], weight, bias, impl=impl)
    torch.testing.assert_close(y[:, [0, 2, 3]], one)
    torch.testing.assert_close(y[:, [6, 7]], two)
    torch.testing.assert_close(final, last)
    assert (y[segments == 0] == 0).all()
    assert (final[:, 0] == 0).all()  # the document has two tokens: zeros stand before its start


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(impl, dtype):
    """Sums are float32: the only rounding is that of y and of the gradients."""
    inputs = arguments(4, 19, dtype)
    wanted = outcome([each.double() for each in inputs], "reference", None, activation="silu")
    for found, want in zip(outcome(inputs, impl, None, activation="silu"), wanted, strict=True):
        assert found.dtype == dtype
        tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("blocks", triton_conv.BLOCKS)
def test_every_triton_block_size(blocks, monkeypatch):
    """Time spans several blocks of ranks, channels several blocks of channels."""
    monkeypatch.setattr(triton_conv, "BLOCKS", (blocks,))
    inputs = arguments(3, 70, batch=2, channels=65)
    segments = ids(2, 70)
    wanted = outcome(inputs, "chunked", segments, activation="silu")
    for found, want in zip(outcome(inputs, "triton", segments, activation="silu"), wanted, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("impl", ["chunked", "native"])
def test_many_channels_on_threads(impl):
    """More work than one thread takes alone, and more channels than a tile."""
    inputs = arguments(4, 40, torch.float32, batch=2, channels=1300)
    segments = ids(2, 40)
    wanted = outcome(inputs, "reference", segments, activation="silu")
    for found, want in zip(outcome(inputs, impl, segments, activation="silu"), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", FAST)
def test_finite_differences(impl):
    inputs = [each.requires_grad_() for each in arguments(3, 4, batch=2, channels=2)]
    segments = torch.tensor([[1, 1, 0, 1], [1, 2, 2, 2]])

    def run(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, initial_state=state, segments=segments, activation="silu", impl=impl)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("impl", FAST)
def test_compiles_whole(impl):
    inputs = arguments(4, 6, torch.float32)

    def run(x, weight, bias, state):
        y, final = causal_conv1d(x, weight, bias, initial_state=state, activation="silu", impl=impl)
        return y.sum() + final.square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [each.requires_grad_() for each in inputs]
    wanted = torch.autograd.grad(run(*leaves), leaves)
    for found, want in zip(torch.autograd.grad(compiled(*leaves), leaves), wanted, strict=True):
        torch.testing.assert_close(found, want)


def test_state_is_of_its_own():
    """Changing the input later changes no state, and the state keeps no sequence alive."""
    x, weight, bias, _ = arguments(4, 50)
    for impl in FAST:
        _, final = causal_conv1d(x.clone(), weight, bias, impl=impl)
        assert final.untyped_storage().nbytes() == final.numel() * final.element_size()


def test_cuda_package_is_called_as_it_wants(monkeypatch):
    """The adapter against a stand-in with the package's layout: [batch, channels, time], channels last."""
    from ops.causal_conv1d.cuda import causal_conv1d as run

    def stand_in(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None):
        assert x.stride(1) == 1
        assert initial_states.stride(1) == 1
        assert seq_idx is None
        assert return_final_states
        y, final = causal_conv1d(
            x.transpose(1, 2),
            weight,
            bias,
            initial_state=initial_states.transpose(1, 2),
            activation=activation,
            impl="reference",
        )
        return y.transpose(1, 2), final.transpose(1, 2)

    package = ModuleType("causal_conv1d")
    package.causal_conv1d_fn = stand_in
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    x, weight, bias, state = arguments(4, 9, torch.float32, channels=8)
    wanted = causal_conv1d(x, weight, bias, initial_state=state, activation="silu", impl="reference")
    for given in (state, None):
        found = run(x, weight, bias, given, None, "silu")
        if given is None:
            wanted = causal_conv1d(x, weight, bias, activation="silu", impl="reference")
        torch.testing.assert_close(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1])


def test_explains_and_refuses():
    x, weight, _, _ = arguments(4, 9, torch.float32)
    assert ops.explain(causal_conv1d, x, weight).chosen == "native"
    assert ops.explain(causal_conv1d, x[:, :1], weight).chosen == "chunked"
    with pytest.raises(RuntimeError, match="needs CUDA tensors"):
        causal_conv1d(x, weight, impl="cuda")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"\[batch, time, channels\], got \(2, 3\)"),
        ({"x": torch.zeros(2, 0, 5)}, ValueError, "time=0"),
        ({"x": torch.zeros(2, 3, 5, dtype=torch.long)}, TypeError, "int64"),
        ({"weight": torch.zeros(5, 4).long()}, TypeError, "floating point weight, got torch.int64"),
        ({"initial_state": torch.zeros(2, 3, 5).int()}, TypeError, "floating point initial_state, got torch.int32"),
        ({"segments": torch.ones(2, 3)}, TypeError, r"segments must hold integers.*float32"),
        ({"weight": torch.zeros(4, 4)}, ValueError, r"\(4, 4\).*channels=5"),
        ({"weight": torch.zeros(5, 1, 4)}, ValueError, r"squeeze\(1\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"\(4,\).*channels=5"),
        ({"initial_state": torch.zeros(2, 4, 5)}, ValueError, r"\(2, 4, 5\).*\(2, 3, 5\)"),
        ({"segments": torch.ones(2, 4).long()}, ValueError, r"segments has shape \(2, 4\)"),
        ({"activation": "relu"}, ValueError, "'relu' is unknown"),
        ({"impl": "fast"}, ValueError, "'fast' is not an implementation"),
    ],
)
def test_bad_input(change, error, message):
    good = {"x": torch.zeros(2, 3, 5), "weight": torch.zeros(5, 4)}
    with pytest.raises(error, match=message):
        causal_conv1d(**{**good, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(32, 64), (8, 128), None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [1, 5, 40, 700])
def test_on_gpu(monkeypatch, time, packed, block, dtype):
    """Values and gradients with every block a program takes (None: of the chunked form)."""
    assert triton_conv.BLOCKS == ((32, 64), (8, 128))
    if block is not None:
        monkeypatch.setattr(triton_conv, "BLOCKS", (block,))
    inputs = [each.to(dtype) for each in arguments(4, time, channels=200)]
    segments = ids(4, time) if packed else None
    wanted = outcome([each.double() for each in inputs], "chunked", segments, activation="silu")
    impl, there = "chunked" if block is None else "triton", None if segments is None else segments.cuda()
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for found, want in zip(outcome([e.cuda() for e in inputs], impl, there, activation="silu"), wanted, strict=True):
        scale = want.abs().max().clamp_min(1).item()  # a gradient is a sum of many terms
        torch.testing.assert_close(found.cpu().double(), want, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("shape", [(2, 40, 1300), (1, 300, 1024), (1, 50, 24), (3, 7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_that_are_a_part_of_a_projection(shape, dtype):
    """Which the native one reads where they lie; on torch's threads, with tasks that are a part of the channels."""
    batch, time, channels = shape
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(batch, time, channels + 37, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(channels, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    dy = torch.randn(batch, time, channels + 3, generator=generator, dtype=torch.float64).to(dtype)[..., 1:-2]
    found = []
    for impl in ("native", "reference"):
        y, last = causal_conv1d(wide[..., 11:-26], weight, activation="silu", impl=impl)
        found.append((y, last, *torch.autograd.grad(y, (wide, weight), dy)))
    for mine, theirs in zip(*found, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
