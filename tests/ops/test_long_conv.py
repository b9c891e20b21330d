"""The long convolution: the reference against its formula, every implementation against the reference."""

import os
import subprocess
import sys

import pytest
import torch

import ops
from ops import long_conv
from ops.long_conv import DIRECT, LIMIT, SHORT
from ops.long_conv.fft import good_size
from ops.long_conv.packing import SHORTEST, groups

IMPLEMENTATIONS = ("native", "chunked", "triton")
GPU = torch.cuda.is_available()


def device(impl: str) -> str:
    return "cuda" if impl == "triton" and GPU else "cpu"


def skip_wide(impl: str, dtype: torch.dtype) -> torch.dtype:
    """Triton takes float64 under the interpreter alone."""
    return torch.float32 if impl == "triton" and GPU else dtype


def inputs(batch=3, time=37, channels=4, taps=37, past=5, dtype=torch.float64, without=()):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    made = {
        "x": normal(batch, time, channels),
        "kernel": normal(channels, taps),
        "D": normal(channels),
        "gate": normal(batch, time, channels),
        "response": normal(batch, time, channels),
        "history": normal(batch, past, channels),
    }
    return {name: each.to(dtype) for name, each in made.items() if name not in without}


def ragged(batch, time):
    """Documents of random lengths with padding at both ends, between and inside; the last row is all padding."""
    segments = torch.randint(1, 5, (batch, time)).sort(1).values * (torch.rand(batch, time) > 0.2)
    segments[-1] = 0
    return segments


def run(impl, arguments, segments=None):
    """y and the gradient of every input for a random weighing of y; NaN stands at padding."""
    place = device(impl)
    leaves = {name: each.detach().clone().to(place).requires_grad_() for name, each in arguments.items()}
    given = dict(leaves)
    if segments is not None:
        segments = segments.to(place)
        padding = (segments == 0)[..., None]
        for name in ("x", "gate", "response"):
            if name in given:
                given[name] = torch.where(padding, torch.nan, given[name])
    y = long_conv(**given, segments=segments, impl=impl)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(weights.to(y))
    return {"y": y} | {f"d{name}": each.grad for name, each in leaves.items()}


def close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, each in found.items():
        wanted = expected[name].detach().cpu().double()
        # Relative to the tensor's scale: a transform's rounding errors are.
        scale = wanted.abs().max().clamp_min(1).item() if wanted.numel() else 1
        torch.testing.assert_close(
            each.detach().cpu().double(),
            wanted,
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("taps", [3, 9, 30])
def test_reference_is_the_formula(taps):
    given = inputs(2, 9, 3, taps, 4)
    x, kernel, D, gate, response, history = given.values()
    expected = torch.zeros_like(x)
    for t in range(9):
        for s in range(taps):
            if t - s >= 0:
                expected[:, t] += kernel[:, s] * x[:, t - s]
            elif t - s >= -4:
                expected[:, t] += kernel[:, s] * history[:, 4 + t - s]
    expected = (expected + response + D * x) * gate
    torch.testing.assert_close(long_conv(**given, impl="reference"), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("time", [DIRECT, DIRECT + 2])
@pytest.mark.parametrize("impl", ["reference", "native", "chunked"])
def test_gradients_are_finite_differences(impl, time):
    given = {name: each.requires_grad_() for name, each in inputs(2, time, 2, 4, 3).items()}
    segments = torch.tensor([[1, 0, 1, 2, 2, 2], [0, 3, 3, 3, 0, 4]])[:, :time]

    def function(*values):
        return long_conv(**dict(zip(given, values, strict=True)), segments=segments, impl=impl)

    assert torch.autograd.gradcheck(function, tuple(given.values()))


# (time, taps, past): the interpreter is slow, so Triton takes fewer.
CASES = [("chunked", time, *sizes) for time in (1, 2, 6, 37) for sizes in ((1, 2), (7, 20), (37, 0), (90, 11))]
# Transforms of 2, 6, 48, 96 and 128 points: every radix, and lanes without a channel.
CASES += [
    ("native", 1, 1, 0),
    ("native", 6, 7, 0),
    ("native", 37, 90, 11),
    ("native", 90, 37, 0),
    ("native", 99, 99, 5),
]
CASES += [("triton", 1, 7, 20), ("triton", 2, 90, 11), ("triton", 37, 7, 20), ("triton", 37, 37, 0)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("impl", "time", "taps", "past"), CASES)
def test_implementations_are_the_reference(impl, time, taps, past, packed):
    """Few taps and many, with and without documents, and with NaN at padding."""
    dtype = skip_wide(impl, torch.float64)
    given = inputs(3, time, 4, taps, past, dtype)
    segments = ragged(3, time) if packed else None
    wide = {name: each.double() for name, each in given.items()}
    close(run(impl, given, segments), run("reference", wide, segments), 1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("without", [("D",), ("gate",), ("response",), ("D", "gate", "response", "history")])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_parts_may_be_left_out(impl, without):
    dtype = skip_wide(impl, torch.float64)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for time in (2, 7) if impl != "triton" else (5,):
        given, segments = inputs(2, time, 3, 5, dtype=dtype, without=without), ragged(2, time)
        for each in (None, segments):
            wide = {name: value.double() for name, value in given.items()}
            close(run(impl, given, each), run("reference", wide, each), tolerance)


@pytest.mark.parametrize("name", ["x", "kernel", "D", "gate", "response", "history"])
def test_one_gradient_alone(name):
    """What is not asked for is not computed; what is asked for is right."""
    given = inputs(2, 9, 3, 5)
    expected = run("reference", given)[f"d{name}"]
    given[name].requires_grad_()
    y = long_conv(**given, impl="chunked")
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = torch.autograd.grad(y, given[name], weights)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_lower_precision(impl, dtype, tolerance):
    """Sums in float32, y and gradients in the inputs' dtypes; a float32 kernel with other bfloat16 inputs, too."""
    given, segments = inputs(2, 20, 3, 20, dtype=dtype), ragged(2, 20)
    given["kernel"] = given["kernel"].float()
    found = run(impl, given, segments)
    assert found["y"].dtype == dtype
    assert all(found[f"d{name}"].dtype == each.dtype for name, each in given.items())
    wide = {name: each.double() for name, each in given.items()}
    close(found, run("reference", wide, segments), tolerance)


def test_float32_over_a_long_sequence():
    """16384 tokens and taps: rounding errors do not grow with the length."""
    x, kernel = torch.randn(1, 16384, 2), torch.randn(2, 16384) / 128
    found, wide = long_conv(x, kernel, impl="chunked"), long_conv(x.double(), kernel.double(), impl="chunked")
    torch.testing.assert_close(found.double(), wide, rtol=0, atol=3e-6)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_packed_is_separate(impl):
    """Each document alone; the row's first goes on from the history. One id after another is another document."""
    dtype = skip_wide(impl, torch.float64)
    given = inputs(1, 30, 3, 50, dtype=dtype)
    segments = torch.tensor([[0] * 3 + [7] * 9 + [0] * 2 + [7] * 2 + [8] * 10 + [7] * 4])
    y = long_conv(**{k: v.to(device(impl)) for k, v in given.items()}, segments=segments.to(device(impl)), impl=impl)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for places in ([*range(3, 12), 14, 15], range(16, 26), range(26, 30)):
        part = {k: v[:, list(places)] if v.shape[:2] == (1, 30) else v for k, v in given.items()}
        if places[0] > 3:
            part.pop("history")
        alone = long_conv(**part, impl="reference")
        torch.testing.assert_close(y[:, list(places)].cpu(), alone, rtol=tolerance, atol=tolerance)
    assert (y.cpu()[segments == 0] == 0).all()


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_any_split_is_whole(impl):
    """Chunks with the inputs before them as history, more of it than taps reach, or zeros where there is none."""
    dtype = skip_wide(impl, torch.float64)
    given = {k: v.to(device(impl)) for k, v in inputs(2, 24, 3, 10, dtype=dtype, without=("history",)).items()}
    whole = long_conv(**given, impl=impl)
    before = torch.zeros_like(given["x"][:, :4])
    outputs = []
    for start, end in ((0, 1), (1, 3), (3, 16), (16, 24)):
        part = {k: v[:, start:end] if v.shape[:2] == (2, 24) else v for k, v in given.items()}
        history = torch.cat([before, given["x"][:, :start]], 1)
        outputs.append(long_conv(**part, history=history, impl=impl))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=tolerance, atol=tolerance)


def test_transforms_have_good_sizes():
    def good(number):
        for prime in (2, 3, 5):
            while number % prime == 0:
                number //= prime
        return number == 1

    for least in range(1, 700):
        assert good_size(least) == next(n for n in range(least, 2 * least + 2) if n % 2 == 0 and good(n))


@pytest.mark.parametrize("history", [False, True])
def test_groups_hold_every_document_once_and_little_else(history):
    """One document of 3000 tokens beside hundreds of a few: a row each, but not all as long as the longest."""
    segments = torch.zeros(2, 4000, dtype=torch.long)
    segments[0, 100:3100] = 5
    segments[1, 10:] = torch.randint(1, 9, (500,)).repeat_interleave(9)[:3990]
    segments[1, ::7] = 0
    found = list(groups(segments, history))
    places = torch.cat([group.position[group.token] for group in found])
    assert torch.equal(places.sort().values, (segments.flatten() != 0).nonzero()[:, 0])
    documents = sum(group.position.shape[0] for group in found)
    assert sum(group.position.numel() for group in found) <= 2 * places.numel() + SHORTEST * documents
    for group in found:
        assert torch.equal(group.token, group.token.cummin(1).values)  # padding on the right
        assert (group.position.diff(dim=1)[group.token[:, 1:]] > 0).all()  # in order
        ids = segments.flatten()[group.position]
        assert (ids == ids[:, :1])[group.token].all()
        if group.row is not None:
            assert torch.equal(group.row, group.position[:, 0] // 4000)
    rows = [group.row for group in found if group.row is not None]
    assert (sorted(torch.cat(rows).tolist()) if rows else []) == ([0, 1] if history else [])


def test_the_graph_keeps_the_inputs_alone():
    given = {name: each.requires_grad_() for name, each in inputs(2, 64, 4, 64, dtype=torch.float32).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        long_conv(**given, segments=ragged(2, 64), impl="chunked")
    beyond = [each for each in kept if each.is_floating_point() and all(each is not leaf for leaf in given.values())]
    own = {each.untyped_storage().data_ptr() for each in given.values()}
    assert len(kept) >= 6
    assert all(each.untyped_storage().data_ptr() in own for each in beyond)


@pytest.mark.parametrize(("impl", "time"), [("chunked", 2), ("chunked", 11), ("triton", 6), ("reference", 3)])
def test_compiles_into_one_graph(impl, time):
    dtype = skip_wide(impl, torch.float64)
    given = inputs(2, time, 3, 7, dtype=dtype)

    def function(segments, *values):
        return long_conv(**dict(zip(given, values, strict=True)), segments=segments, impl=impl)

    values = [each.to(device(impl)).requires_grad_() for each in given.values()]
    segments = ragged(3, time)[:2].to(device(impl))
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for marks in (segments, None):
        found, expected = compiled(marks, *values), function(marks, *values)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(each.square().sum(), values) for each in (found, expected)]
        torch.testing.assert_close(*gradients)
        with torch.no_grad():
            torch.testing.assert_close(compiled(marks, *values), expected)


@pytest.mark.parametrize("without", [(), ("D", "gate", "response", "history")])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_custom_ops_keep_their_promises(impl, without):
    """torch's own check of schema, fake and gradient registration, of forward and backward."""
    from importlib import import_module

    module = import_module(f"ops.long_conv.{impl}")
    op = module.native if impl == "native" else module._conv
    given = inputs(2, 6, 1, 4, dtype=torch.float32, without=without)
    names = ("x", "kernel", "D", "gate", "response", "history")
    values = [given[k].to(device(impl)).requires_grad_() if k in given else None for k in names]
    segments = torch.tensor([[0, 1, 1, 2, 2, 0], [1] * 6]).to(device(impl))
    for marks in (segments, None) if impl == "chunked" else (segments,):
        torch.library.opcheck(op, (*values, marks))
        backward = getattr(torch.ops.zoo, f"long_conv_{'fft' if impl == 'chunked' else impl}_backward")
        plain = [None if each is None else each.detach() for each in values]
        needs = [each is not None for each in values]
        torch.library.opcheck(backward, (torch.ones_like(plain[0]), *plain, marks, needs))


def test_explain_says_what_and_why():
    assert ops.explain(long_conv, **inputs(1, 8, 2, 8)).chosen == "native"
    assert "few tokens" in ops.explain(long_conv, **inputs(1, DIRECT, 2, 3)).refused["native"]
    half = {"dtype": torch.float16}  # which native refuses, so that the others are asked
    given = inputs(1, 8, 2, 8, **half)
    told = ops.explain(long_conv, **given)
    assert told.chosen == "chunked"
    assert "needs CUDA tensors" in told.refused["triton"]
    assert "transform" in ops.explain(long_conv, **inputs(1, SHORT + 1, 2, 3, **half)).refused["triton"]
    assert "few tokens" in ops.explain(long_conv, **inputs(1, DIRECT, 2, 3, **half)).refused["triton"]
    assert ops.explain(long_conv, **given, impl="reference").chosen == "reference"
    with pytest.raises(RuntimeError, match=f"up to {LIMIT}, got {LIMIT + 1}; use chunked"):
        long_conv(**inputs(1, LIMIT + 1, 1, 2), impl="triton")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(3, 37)}, r"\[batch, time, channels\], got \(3, 37\)"),
        ({"x": torch.ones(3, 0, 4)}, "empty sequence"),
        ({"kernel": torch.ones(5, 37)}, r"kernel has shape \(5, 37\).*channels=4"),
        ({"kernel": torch.ones(4, 0)}, "taps >= 1"),
        ({"D": torch.ones(3)}, r"D has shape \(3,\).*\(4,\)"),
        ({"gate": torch.ones(3, 36, 4)}, r"gate has shape \(3, 36, 4\)"),
        ({"response": torch.ones(3, 37, 1)}, "response has shape"),
        ({"history": torch.ones(2, 5, 4)}, r"history has shape \(2, 5, 4\).*batch=3"),
        ({"segments": torch.ones(3, 2).long()}, "segments has shape"),
        ({"impl": "magic"}, "impl='magic'.*chunked"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        long_conv(**inputs() | change)


@pytest.mark.parametrize(("name", "dtype"), [("x", torch.int64), ("kernel", torch.complex64), ("history", torch.int32)])
def test_other_types_are_refused(name, dtype):
    given = inputs()
    with pytest.raises(TypeError, match=rf"but {name} is {dtype}"):
        long_conv(**given | {name: given[name].to(dtype)})


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernel_compiles_for_a_gpu():
    """Down to machine code for Hopper, which needs no GPU, at every block size."""
    program = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.long_conv.toeplitz import BLOCKS
from ops.long_conv.triton_kernels import toeplitz as kernel
for b, w, a, warps in BLOCKS:
    for sign in (1, -1) if (b, w, a, warps) == BLOCKS[0] else (1,):
        values = dict(SIGN=sign, BLOCK_B=b, BLOCK_W=w, BLOCK_A=a)
        signature, constants = {}, {}
        for place, name in enumerate(kernel.arg_names):
            if name in values:
                signature[name], constants[(place,)] = "constexpr", values[name]
            else:
                signature[name] = "*fp32" if name in ("signal", "filter", "out") else "i32"
        source = ASTSource(kernel, signature, constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        print(len(made.asm["cubin"]) > 0)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True"] * 4, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", range(3))
def test_every_block_size_on_a_gpu(monkeypatch, number, dtype):
    from ops.long_conv import toeplitz

    assert len(toeplitz.BLOCKS) == 3
    monkeypatch.setattr(toeplitz, "forced_block", toeplitz.BLOCKS[number])
    given, segments = inputs(3, 700, 5, 300, 40, dtype), ragged(3, 700)
    wide = {name: each.double() for name, each in given.items()}
    for each in (None, segments):
        close(run("triton", given, each), run("chunked", wide, each), 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_transforms_on_a_gpu(dtype):
    given, segments = inputs(3, 700, 5, 300, 40, dtype), ragged(3, 700)
    wide = {name: each.double() for name, each in given.items()}
    expected = run("chunked", wide, segments)
    placed = {name: each.cuda().requires_grad_() for name, each in given.items()}
    y = long_conv(**placed, segments=segments.cuda(), impl="chunked")
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(weights.to(y))
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    close({"y": y} | {f"d{name}": each.grad for name, each in placed.items()}, expected, tolerance)
