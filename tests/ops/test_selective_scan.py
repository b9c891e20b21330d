"""The selective scan: the reference against the closed form, every implementation against the reference."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ops
from ops import selective_scan

IMPLEMENTATIONS = ("chunked", "native", "triton")
GPU = torch.cuda.is_available()


def device(impl: str) -> str:
    return "cuda" if impl == "triton" and GPU else "cpu"


def inputs(batch=3, time=37, channels=5, n=3, dtype=torch.float64, without=()):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    made = {
        "x": normal(batch, time, channels),
        "dt": normal(batch, time, channels).exp() / 4,
        "A": -normal(channels, n).exp(),
        "B": normal(batch, time, n),
        "C": normal(batch, time, n),
        "D": normal(channels),
        "z": normal(batch, time, channels),
        "initial_state": normal(batch, channels, n),
    }
    return {name: each.to(dtype) for name, each in made.items() if name not in without}


def ragged(batch, time):
    """Documents of random lengths with padding at both ends, between and inside; one row all padding."""
    segments = torch.randint(1, 6, (batch, time)).sort(1).values * (torch.rand(batch, time) > 0.2)
    segments[:, 0] = 0
    segments[-1] = 0
    return segments


def run(impl, arguments, segments=None, weights=None):
    """y, the final state and the gradient of every input, of a random weighing of both."""
    place = device(impl)
    leaves = {name: each.detach().clone().to(place).requires_grad_() for name, each in arguments.items()}
    segments = None if segments is None else segments.to(place)
    y, final = selective_scan(**leaves, segments=segments, impl=impl)
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in (y, final)]
    torch.autograd.backward([y, final], [w.to(each) for w, each in zip(weights, (y, final), strict=True)])
    return {"y": y, "final": final} | {f"d{name}": each.grad for name, each in leaves.items()}


def close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, each in found.items():
        # Relative to the tensor's scale: a gradient is a sum of many terms that cancel.
        scale = expected[name].double().abs().max().clamp_min(1).item()
        torch.testing.assert_close(
            each.detach().cpu().double(),
            expected[name].detach().cpu().double(),
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_reference_is_the_closed_form():
    """y_t = <C_t, Σ_{s<=t} exp(A Σ_{s<j<=t} dt_j) dt_s B_s x_s + exp(A Σ_{j<=t} dt_j) h_0> + D x_t, times silu(z_t)."""
    given = inputs(time=9)
    x, dt, A, B, C, D, z, h0 = given.values()
    total = dt.cumsum(1)
    expected, state = torch.empty_like(x), None
    for t in range(9):
        state = torch.exp(total[:, t, :, None] * A) * h0
        for s in range(t + 1):
            decay = torch.exp((total[:, t] - total[:, s])[..., None] * A)
            state = state + decay * (dt[:, s] * x[:, s])[..., None] * B[:, s, None, :]
        expected[:, t] = ((state * C[:, t, None, :]).sum(-1) + D * x[:, t]) * z[:, t] * torch.sigmoid(z[:, t])
    y, final = selective_scan(**given, impl="reference")
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, state, rtol=1e-12, atol=1e-12)


def test_reference_has_the_right_gradients():
    given = {name: each.requires_grad_() for name, each in inputs(2, 4, 2, 2).items()}
    segments = torch.tensor([[0, 1, 1, 2], [3, 0, 3, 0]])

    def function(*values):
        return selective_scan(**dict(zip(given, values, strict=True)), segments=segments, impl="reference")

    assert torch.autograd.gradcheck(function, tuple(given.values()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("without", [(), ("D", "z", "initial_state"), ("D",), ("z",), ("initial_state",)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equals_reference(impl, without, packed):
    given = inputs(3, 11, 5, 3, without=without)
    segments = ragged(3, 11) if packed else None
    close(run(impl, given, segments), run("reference", given, segments), 1e-11)


@pytest.mark.parametrize(
    ("impl", "batch", "time", "channels", "n"),
    [
        *[(impl, 2, 131, 3, 16) for impl in ("chunked", "native")],
        *[(impl, 3, 64, 65, 2) for impl in ("chunked", "native")],
        *[(impl, 1, 65, 130, 5) for impl in ("chunked", "native")],
        *[(impl, 5, 18, 48, 16) for impl in ("chunked", "native")],
        *[(impl, 1, 1, 2, 1) for impl in IMPLEMENTATIONS],
        *[(impl, 2, 7, 1, 4) for impl in IMPLEMENTATIONS],
        ("triton", 1, 66, 3, 3),  # the interpreter takes milliseconds a token and program
        ("triton", 1, 5, 70, 5),
    ],
)
def test_odd_sizes(impl, batch, time, channels, n):
    """Over the edges of every chunk (16, 64, 128) and tile (64) and under them."""
    given = inputs(batch, time, channels, n)
    segments = ragged(batch + 1, time)[:batch]
    close(run(impl, given, segments), run("reference", given, segments), 1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_sums_in_float32(impl, dtype, tolerance):
    """Inputs in bfloat16, sums in float32: against float64 of the same rounded inputs, only the outputs' rounding."""
    time = 20 if impl == "triton" and not GPU else 140
    given = inputs(2, time, 6, 4, dtype=dtype) | {"A": -torch.rand(6, 4), "D": torch.rand(6)}
    given["initial_state"] = torch.randn(2, 6, 4)
    segments = ragged(3, time)[:2]
    found = run(impl, given, segments)
    assert found["y"].dtype == dtype
    assert found["final"].dtype == torch.float32
    assert all(found[f"d{name}"].dtype == each.dtype for name, each in given.items())
    expected = run("reference", {name: each.double() for name, each in given.items()}, segments)
    close(found, expected, tolerance)
    torch.testing.assert_close(found["final"].cpu().double(), expected["final"], rtol=0, atol=2e-6 * 10)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_padding_may_hold_anything(impl):
    """NaN and inf at padding reach no output, no state and no gradient."""
    given, segments = inputs(time=17), ragged(3, 17)
    padding = segments == 0
    clean, dirty = dict(given), dict(given)
    for name in ("x", "dt", "B", "C", "z"):
        clean[name] = given[name].masked_fill(padding[..., None], 0)
        dirty[name] = given[name].masked_fill(padding[..., None], torch.nan)
        dirty[name][1] = given[name][1].masked_fill(padding[1, :, None], torch.inf)
    found = run(impl, dirty, segments)
    close(found, run("reference", clean, segments), 1e-11)
    assert (found["y"].cpu()[padding] == 0).all()
    assert all((found[f"d{name}"].cpu()[padding] == 0).all() for name in ("x", "dt", "B", "C", "z"))


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_packed_is_separate(impl):
    """Each document alone; the row's first goes on from the initial state, and the last leaves the final one."""
    given = inputs(1, 30, 5, 3)
    segments = torch.tensor([[0] * 3 + [7] * 9 + [0] * 2 + [7] * 2 + [8] * 10 + [7] * 4])
    placed = {k: v.to(device(impl)) for k, v in given.items()}
    y, final = selective_scan(**placed, segments=segments.to(device(impl)), impl=impl)
    for places in ([*range(3, 12), 14, 15], range(16, 26), range(26, 30)):
        part = {k: v[:, list(places)] if v.shape[:2] == (1, 30) else v for k, v in given.items()}
        if places[0] > 3:
            part.pop("initial_state")
        alone, last = selective_scan(**part, impl="reference")
        torch.testing.assert_close(y[:, list(places)].cpu(), alone, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(final.cpu(), last, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_any_split_is_whole(impl):
    time = 12 if impl == "triton" and not GPU else 170
    given = {name: each.to(device(impl)) for name, each in inputs(2, time, 4, 3).items()}
    whole, final = selective_scan(**given, impl=impl)
    state, outputs = given["initial_state"], []
    for start, end in ((0, 1), (1, 2), (2, 10), (10, time - 1), (time - 1, time)):
        part = {k: v[:, start:end] if v.shape[:2] == (2, time) else v for k, v in given.items()}
        y, state = selective_scan(**part | {"initial_state": state}, impl=impl)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_extreme_decays_stay_finite(impl, dtype):
    """Steps of 1e4 with rates of -1e4, steps of 1e-8, both in one chunk, and gates of ±1e4."""
    given = inputs(1, 20, 4, 2, dtype=dtype)
    given["dt"][:, ::3], given["dt"][:, 1::3] = 1e4, 1e-8
    given["A"][0], given["A"][1] = -1e4, 0
    given["z"][:, ::2] = torch.tensor([1e4, -1e4, 100, -100], dtype=dtype)
    found = run(impl, given)
    assert all(each.isfinite().all() for each in found.values())
    expected = run("reference", {name: each.double() for name, each in given.items()})
    close(found, expected, 1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("impl", ["chunked", "native"])
def test_a_long_sequence_keeps_few_states(impl):
    """The graph holds an eighth of batch·time·channels·n numbers beyond its inputs, at most."""
    given = {name: each.requires_grad_() for name, each in inputs(1, 1024, 8, 16, torch.float32).items()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = selective_scan(**given, impl=impl)
    for each in given.values():
        kept.pop(each.untyped_storage().data_ptr(), None)
    beyond = sum(kept.values()) - 3 * 1024 * 8  # what D and z keep is of x's size
    assert beyond <= 1024 * 8 * 16 / 8


@pytest.mark.parametrize(
    ("impl", "time"), [("native", 1), ("native", 19), ("triton", 5), ("chunked", 5), ("reference", 2)]
)
def test_compiles_into_one_graph(impl, time):
    given = inputs(2, time, 4, 3)

    def function(segments, *values):
        return selective_scan(**dict(zip(given, values, strict=True)), segments=segments, impl=impl)

    values = [each.to(device(impl)).requires_grad_() for each in given.values()]
    segments = ragged(3, time)[:2].to(device(impl))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = compiled(segments, *values), function(segments, *values)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(sum(each.sum() for each in out), values) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("without", [(), ("D", "z", "initial_state")])
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_custom_ops_keep_their_promises(impl, without):
    """torch's own check of schema, fake and gradient registration, of forward and backward."""
    from importlib import import_module

    from ops.segments import marks

    module = import_module(f"ops.selective_scan.{impl}")
    names = ("x", "dt", "A", "B", "C", "D", "z", "initial_state")
    given = inputs(2, 6, 4, 3, torch.float32, without)
    values = [given[k].to(device(impl)).requires_grad_() if k in given else None for k in names]
    mark = marks(torch.tensor([[0, 1, 1, 2, 2, 0], [1] * 6])).to(device(impl))
    torch.library.opcheck(module._forward_op, (*values, mark, True))
    y, final, boundary = (each.detach() for each in module._forward_op(*values, mark, True))
    values = [None if each is None else each.detach() for each in values]
    torch.library.opcheck(module._backward_op, (*values[:7], mark, boundary, y, final))


@pytest.mark.parametrize("segments", [None, torch.tensor([[1], [0], [3]])])
@pytest.mark.parametrize("without", [(), ("D", "z", "initial_state")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_token_without_gradient(dtype, without, segments):
    """Decoding takes a kernel of its own."""
    given = inputs(3, 1, 37, 16, dtype, without)
    with torch.no_grad():
        found = selective_scan(**given, segments=segments, impl="native")
        expected = selective_scan(**given, segments=segments, impl="reference")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_strided_inputs():
    """Slices of one projection, as a block makes them, are taken as they are."""
    given = inputs(2, 20, 6, 3, without=("z",))
    both = torch.randn(2, 20, 18, dtype=torch.float64)
    given["x"], given["z"] = both[..., :6], both[..., 6:12]
    given["B"], given["C"] = both[..., 12:15], both[..., 15:]
    expected = selective_scan(**given, impl="reference")
    for impl in ("native", "chunked"):
        torch.testing.assert_close(selective_scan(**given, impl=impl), expected, rtol=1e-11, atol=1e-11)


def test_threads_share_and_callers_overlap(monkeypatch):
    """Rows and channels split over threads, called from several threads at once: the numbers of one thread alone."""
    from ops.selective_scan import native

    given, segments = inputs(3, 40, 150, 4), ragged(3, 40)
    expected = run("native", given, segments)
    monkeypatch.setattr(native, "SMALL", 0)
    threads = torch.get_num_threads()
    results = {}

    def call(index):
        results[index] = run("native", given, segments)

    try:
        torch.set_num_threads(2)
        callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 4
    for each in results.values():
        close(each, expected, 1e-13)
        assert torch.equal(each["y"], expected["y"])


def test_auto_takes_native_on_the_cpu_and_says_why_not():
    given = inputs(1, 2, 2, 2)
    assert ops.explain(selective_scan, **given).chosen == "native"
    half = {name: each.half() for name, each in given.items()}
    told = ops.explain(selective_scan, **half)
    assert told.chosen == "chunked"
    assert "float16" in told.refused["native"]
    close(run("auto", half), run("reference", half), 1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dt": torch.ones(3, 37, 4)}, r"dt has shape \(3, 37, 4\).*\(3, 37, 5\)"),
        ({"A": torch.ones(5, 2)}, r"B has shape \(3, 37, 3\).*n=2"),
        ({"A": torch.ones(5)}, r"A \[channels, n\]"),
        ({"D": torch.ones(3)}, r"D has shape \(3,\)"),
        ({"z": torch.ones(3, 36, 5)}, "z has shape"),
        ({"initial_state": torch.ones(3, 3, 5)}, r"initial_state has shape \(3, 3, 5\).*\(3, 5, 3\)"),
        ({"segments": torch.ones(3, 2).long()}, "segments has shape"),
        ({"x": torch.ones(3, 0, 5)}, "empty sequence"),
        ({"impl": "magic"}, "impl='magic'.*native"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        selective_scan(**inputs() | change)


@pytest.mark.parametrize(("name", "dtype"), [("x", torch.int64), ("dt", torch.int64), ("A", torch.complex64)])
def test_other_types_are_refused(name, dtype):
    given = inputs()
    with pytest.raises(TypeError, match=rf"but {name} is {dtype}"):
        selective_scan(**given | {name: given[name].to(dtype)})


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_compile_for_a_gpu():
    """Down to machine code for Hopper, which needs no GPU; the interpreter takes more than the compiler does."""
    program = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.selective_scan import triton_kernels as kernels
values = dict(ACC=tl.float32, CHUNK=64, BLOCK=16, STATES=16)
for kernel in (kernels.forward, kernels.backward):
    signature, constants = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name.isupper() and len(name) > 1:
            signature[name], constants[(place,)] = "constexpr", values.get(name, True)
        elif name in ("batch", "time", "channels", "n"):
            signature[name] = "i32"
        elif name == "mark":
            signature[name] = "*i8"
        else:
            signature[name] = "*bf16" if name in ("x", "B", "C", "z", "y", "dy", "dx", "dz") else "*fp32"
    source = ASTSource(kernel, signature, constants)
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 0)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [64, 32, 16, 8])
def test_every_block_size_on_a_gpu(monkeypatch, block, dtype):
    from ops.selective_scan import triton

    assert block in triton.BLOCKS
    monkeypatch.setattr(triton, "forced_block", block)
    given, segments = inputs(3, 200, 130, 16, dtype), ragged(3, 200)
    wide = {name: each.double() for name, each in given.items()}
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    close(run("triton", given, segments), run("reference", wide, segments), tolerance)


PEAK = """
import torch, ops

def highest():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def run(time, channels, n):
    x, dt = (torch.rand(1, time, channels, requires_grad=True) for _ in range(2))
    A = -torch.rand(channels, n, requires_grad=True)
    B, C = (torch.rand(1, time, n, requires_grad=True) for _ in range(2))
    open("/proc/self/clear_refs", "w").write("5")
    before = highest()
    y, _ = ops.selective_scan(x, dt, A, B, C, impl="native")
    y.sum().backward()
    return highest() - before

run(128, 64, 64)
print(run(4096, 256, 64))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the highest memory from Linux's /proc")
def test_training_memory_does_not_hold_every_state():
    """x has 4 MB and all states together 268 MB. Those of every 64th token, gradients and what they are made of remain
    below 16 times x."""
    pytest.importorskip("numba")
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 4 * 4096 * 256 < int(done.stdout) < 16 * 4 * 4096 * 256
