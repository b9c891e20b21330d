"""ops.attention: every implementation against the plain softmax, values and gradients; masks, padding, dispatch."""

import sys
import types
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ops
from ops.attention.flex import attention as flex
from ops.attention.visible import places, visible

attention = ops.attention
LOCAL = ("sdpa", "chunked", "triton")
PLAIN = {
    "causal": True,
    "scale": 0.25,
    "window": None,
    "sinks": 0,
    "softcap": None,
    "slopes": None,
    "q_segments": None,
    "k_segments": None,
    "q_positions": None,
    "k_positions": None,
}


def qkv(time, keys, heads=4, kv_heads=2, d=8, dv=8, batch=3, dtype=torch.float64, device="cpu"):
    shapes = ((time, heads, d), (keys, kv_heads, d), (keys, kv_heads, dv))
    return [torch.randn(batch, *each, dtype=dtype, device=device).requires_grad_() for each in shapes]


def outcome(tensors, impl, **options):
    y = attention(*tensors, impl=impl, **options)
    wave = torch.linspace(0, 9, y.numel(), dtype=torch.float64, device=y.device).cos().reshape(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, tensors, wave)]


def same(found, wanted, tolerance=1e-10):
    for name, a, b in zip(("y", "dq", "dk", "dv"), found, wanted, strict=True):
        assert torch.isfinite(a).all(), name
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def segments_of(batch, time):
    """Documents with padding on the left, between and on the right."""
    segments = torch.randint(1, 4, (batch, time)).sort(1).values
    segments[0, :3] = 0
    segments[batch // 2, time // 2 : time // 2 + 4] = 0
    segments[-1, -2:] = 0
    return segments


CASES = {
    "plain": {},
    "bidirectional": {"causal": False},
    "window": {"window": 6},
    "sinks": {"window": 6, "sinks": 3},
    "many sinks": {"window": 3, "sinks": 19},
    "both sides": {"window": 6, "causal": False, "sinks": 2},
    "alibi": {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64)},
    "alibi, window, bidirectional": {"slopes": torch.linspace(0, 1, 4).double(), "window": 9, "causal": False},
    "softcap": {"softcap": 1.5, "scale": 1.0},
    "softcap, alibi, window": {"softcap": 1.5, "window": 11, "slopes": torch.linspace(0, 1, 4).double()},
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks smaller than the sequences, so that several meet."""
    import ops.attention.chunked  # noqa: F401

    monkeypatch.setattr(sys.modules["ops.attention.chunked"], "BLOCK", 8)


def with_places(options, given, batch, time, keys):
    options = dict(options)
    if given != "nothing":
        segments = segments_of(batch, keys)
        options = options | {"q_segments": segments[:, keys - time :], "k_segments": segments}
    if given == "positions":
        positions = torch.randint(0, keys, (batch, keys))
        options = options | {"q_positions": positions[:, keys - time :], "k_positions": positions}
    return options


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("given", ["nothing", "segments", "positions"])
@pytest.mark.parametrize(("time", "kv_heads"), [(37, 2), (5, 1), (1, 2)])
def test_implementations_equal_the_reference(case, given, time, kv_heads, small_blocks):
    options = with_places(CASES[case], given, 3, time, 37)
    tensors = qkv(time, 37, kv_heads=kv_heads, dv=5 if time == 5 else 8)
    wanted = outcome(tensors, "reference", **options)
    same(outcome(tensors, "chunked", **options), wanted)
    if "softcap" not in options:
        same(outcome(tensors, "sdpa", **options), wanted)
    else:
        with pytest.raises(RuntimeError, match="no softcap"):
            attention(*tensors, impl="sdpa", **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("given", ["nothing", "segments", "positions"])
def test_triton_equals_the_reference(case, given):
    """Fewer heads and rows: the interpreter is slow. Blocks are 16 by 16, so two or three meet on each side."""
    options = with_places(CASES[case], given, 1, 18, 35)
    if "slopes" in options:
        options["slopes"] = options["slopes"][1:3]
    tensors = qkv(18, 35, heads=2, kv_heads=1, d=6, dv=5, batch=1)
    same(outcome(tensors, "triton", **options), outcome(tensors, "reference", **options))


@pytest.mark.parametrize("impl", ["reference", *LOCAL])
def test_softmax_against_a_loop(impl):
    """Pair by pair from the definition, for one small case with everything in it."""
    q, k, v = qkv(7, 9, batch=2)
    segments = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 0, 2], [3, 3, 3, 0, 3, 3, 3, 3, 3]])
    options = {"window": 3, "sinks": 1, "slopes": torch.tensor([0.3, 0.2, 0.1, 0.0], dtype=torch.float64)}
    y = attention(q, k, v, q_segments=segments[:, 2:], k_segments=segments, impl=impl, **options)
    wanted = torch.zeros_like(y)
    for b, h, t in product(range(2), range(4), range(7)):
        p = t + 2
        seen = [s for s in range(9) if segments[b, s] == segments[b, p] != 0 and s <= p and (p - s < 3 or s < 1)]
        if seen:
            logits = torch.stack([q[b, t, h] @ k[b, s, h // 2] / 8**0.5 - options["slopes"][h] * (p - s) for s in seen])
            wanted[b, t, h] = torch.softmax(logits, 0) @ v[b, seen, h // 2]
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", ["reference", *LOCAL])
def test_blind_queries_and_garbage_at_padding(impl):
    """A query that sees nothing gives exactly 0; NaN at padding goes nowhere, gradients neither."""
    tensors = qkv(12, 12)
    segments = segments_of(3, 12)
    segments[2] = 0
    clean = outcome(tensors, impl, q_segments=segments, k_segments=segments)
    with torch.no_grad():
        for each in tensors:
            each[segments == 0] = float("nan")
    found = outcome(tensors, impl, q_segments=segments, k_segments=segments)
    same(found, clean, 0)
    for each in found:
        assert (each[segments == 0] == 0).all()
    # Valid queries that no key matches.
    blind = outcome(qkv(4, 6), impl, q_segments=torch.full((3, 4), 7), k_segments=torch.full((3, 6), 5))
    assert all((each == 0).all() for each in blind)


@pytest.mark.parametrize("impl", LOCAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(impl, dtype):
    exact = qkv(33, 33, heads=2, batch=1)
    low = [each.detach().to(dtype).requires_grad_() for each in exact]
    same_inputs = [each.detach().double().requires_grad_() for each in low]
    options = {"window": 20}
    for a, b in zip(outcome(low, impl, **options), outcome(same_inputs, "reference", **options), strict=True):
        assert a.dtype == dtype
        error = (a.double() - b).norm() / b.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("time", "keys", "sinks"), [(300, 300, 0), (300, 300, 5), (290, 331, 0), (257, 400, 70)])
@pytest.mark.parametrize("packed", [False, True])
def test_banded_windows(time, keys, sinks, packed):
    """A window much shorter than the sequence goes block by block, over the same pairs."""
    options = {"window": 17, "sinks": sinks}
    if packed:
        segments = segments_of(2, keys)
        options |= {"q_segments": segments[:, keys - time :], "k_segments": segments}
    tensors = qkv(time, keys, batch=2)
    same(outcome(tensors, "sdpa", **options), outcome(tensors, "reference", **options))


def test_banded_reads_only_the_window(monkeypatch):
    """Pairs that are computed grow with time · window, not time²."""
    from ops.attention.sdpa import attention as sdpa

    module, pairs = sys.modules[sdpa.__module__], []
    call = module._call
    monkeypatch.setattr(module, "_call", lambda q, k, *r: (pairs.append(q.shape[1] * k.shape[1]), call(q, k, *r))[1])
    for time in (512, 2048):
        pairs.clear()
        attention(*qkv(time, time, batch=1, dtype=torch.float32), window=32, impl="sdpa")
        assert sum(pairs) < time * (32 + 2 * 64)


@pytest.mark.parametrize("given", ["nothing", "segments", "positions"])
@pytest.mark.parametrize("slopes", [None, torch.linspace(0, 1, 6).double()])
def test_few_queries_over_grouped_keys(given, slopes):
    """Heads of a group become queries, each with its own slope and its query's mask; values may be longer, too."""
    options = with_places({"slopes": slopes}, given, 2, 5, 21)
    for dv in (8, 11):
        tensors = qkv(5, 21, heads=6, kv_heads=2, dv=dv, batch=2)
        same(outcome(tensors, "sdpa", **options), outcome(tensors, "reference", **options))


class Largest(TorchDispatchMode):
    """The most elements of a tensor that is made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        self.most = max(self.most, *(each.untyped_storage().nbytes() // each.element_size() for each in made), 0)
        return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("time", "dv"), [(1, 64), (1, 32), (4, 64), (4, 32)])
@torch.no_grad()
def test_few_queries_repeat_no_keys(device, time, dv):
    """One key head under 16 heads, with a mask: neither keys nor values are made once a head. The meta device takes
    the way of a GPU."""
    q, k, v = qkv(time, 400, heads=16, kv_heads=1, d=64, dv=dv, batch=1, dtype=torch.float32, device=device)
    segments = torch.ones(1, 400, dtype=torch.long, device=device)
    with Largest() as made:
        attention(q, k, v, q_segments=segments[:, :time], k_segments=segments, clean=True, impl="sdpa")
    assert made.most <= 400 * max(64, 16 * time)
    with Largest() as made:
        k.repeat_interleave(16, 2)
    assert made.most == 400 * 64 * 16


@pytest.mark.parametrize(("d", "dv"), [(8, 5), (5, 8)])
def test_two_head_sizes_make_no_scores(d, dv):
    """On a CPU one kernel serves keys and values of different sizes, forward and backward."""
    tensors = qkv(300, 300, d=d, dv=dv, batch=1)
    with Largest() as made:
        found = outcome(tensors, "sdpa")
    assert made.most < 300 * 300
    same(found, outcome(tensors, "reference"))


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_gradients_of_slopes(impl):
    """Slopes are learnable where a mask is; elsewhere they are refused rather than silently frozen."""
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    q, k, v = (each.detach() for each in qkv(3, 3, d=2, dv=2, batch=1))
    assert torch.autograd.gradcheck(lambda s: attention(q, k, v, slopes=s, impl=impl), (slopes,))
    for refusing in ("chunked", "triton"):
        with pytest.raises(RuntimeError, match="gives no gradient to slopes"):
            attention(q, k, v, slopes=slopes, impl=refusing)


@pytest.mark.parametrize("impl", LOCAL)
def test_compiles_as_one_graph(impl):
    tensors = qkv(9, 9, dtype=torch.float32)
    segments = segments_of(3, 9)

    def run(q, k, v):
        return attention(q, k, v, window=4, q_segments=segments, k_segments=segments, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    wave = torch.linspace(0, 1, 3 * 9 * 4 * 8).reshape(3, 9, 4, 8)
    found = torch.autograd.grad(compiled(*tensors), tensors, wave)
    wanted = torch.autograd.grad(run(*tensors), tensors, wave)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["chunked", "triton"])
def test_custom_op_is_well_formed(name):
    """Schema, fake and autograd registration agree with what the op does."""
    attention(*qkv(4, 4, dtype=torch.float32), impl=name)
    op = getattr(torch.ops.zoo, f"attention_{name}")
    tensors = [each.detach().requires_grad_() for each in qkv(5, 7, dtype=torch.float32, batch=2)]
    torch.library.opcheck(op.default, (*tensors, True, 0.3, 4, 1, None, None, None, None, None, None))


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 9, "sinks": 2}, {"causal": False, "window": 7}, {"softcap": 3.0, "slopes": torch.rand(4)},
     {"window": 12, "sinks": 1, "packed": True}],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_rules_in_its_plain_form(options):
    """FlexAttention's mask and score functions, run without its compiler on the CPU (which has no backward)."""
    options = dict(options)
    if options.pop("packed", False):
        segments = segments_of(2, 70)
        options |= {"q_segments": segments[:, 30:], "k_segments": segments}
    q, k, v = (each.detach() for each in qkv(40, 70, d=16, dv=16, batch=2, dtype=torch.float32))
    found = flex(q, k, v, **(PLAIN | options), compiled=False)
    torch.testing.assert_close(found, attention(q, k, v, scale=0.25, impl="reference", **options), atol=1e-5, rtol=1e-5)


def test_flash_gets_its_arguments(monkeypatch):
    """What flash-attn is told, by a stand-in with its signature that computes what its documentation says."""
    calls = []

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, softcap, alibi_slopes):
        calls.append(window_size)
        offset = k.shape[1] - q.shape[1]
        t, s = torch.arange(q.shape[1])[:, None] + offset, torch.arange(k.shape[1])
        left, right = window_size
        seen = (s <= t) if causal else torch.ones(len(t), len(s), dtype=torch.bool)
        seen = seen & ((left < 0) | (s >= t - left)) & ((right < 0) | (s <= t + right))
        keys, values = (each.repeat_interleave(q.shape[2] // k.shape[2], 2) for each in (k, v))
        scores = torch.einsum("bthd, bshd -> bhts", q, keys) * softmax_scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[:, None, None] * (t - s).abs()
        return torch.einsum("bhts, bshd -> bthd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    from ops.attention.flash import attention as flash

    q, k, v = (each.detach() for each in qkv(5, 12, dtype=torch.float32))
    for options in ({}, {"window": 4}, {"causal": False, "window": 4}, {"causal": False}, {"softcap": 2.0},
                    {"slopes": torch.rand(4)}):  # fmt: skip
        wanted = attention(q, k, v, scale=0.25, impl="reference", **options)
        torch.testing.assert_close(flash(q, k, v, **(PLAIN | options)), wanted, atol=1e-5, rtol=1e-5)
    assert calls[:3] == [(-1, -1), (3, 0), (3, 3)]


def test_dispatch_and_refusals():
    tensors = qkv(4, 4)
    told = ops.explain(attention, *tensors)
    assert told.chosen == "sdpa"
    assert "CUDA" in told.refused["flash"] and "CUDA" in told.refused["flex"]
    assert ops.explain(attention, *tensors, softcap=2.0).chosen == "chunked"
    for impl in ("flash", "flex"):
        with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
            attention(*tensors, impl=impl)


def test_bad_input():
    q, k, v = qkv(4, 4)
    bad = {
        r"kv_heads=3 must divide heads=4; try 1": (q, k[:, :, :1].repeat(1, 1, 3, 1), v[:, :, :1].repeat(1, 1, 3, 1)),
        r"do not fit": (q, k[..., :5], v),
        r"\[batch, time, heads, d\]": (q[0], k, v),
        r"one dtype": (q, k.float(), v),
        r"no size may be 0": (q, k[:, :, :0], v[:, :, :0]),
        r"no keys": (q, k[:, :0], v[:, :0]),
    }
    for match, tensors in bad.items():
        with pytest.raises(ValueError, match=match):
            attention(*tensors)
    for options in ({"window": 0}, {"window": 2.5}, {"sinks": -1}, {"sinks": 1.5}, {"softcap": 0.0},
                    {"softcap": float("nan")}, {"slopes": torch.ones(3)},
                    {"q_segments": torch.ones(3, 5).long()}, {"k_positions": torch.ones(4).long()}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            attention(q, k, v, **options)
    with pytest.raises(TypeError, match="q_segments must hold integers"):
        attention(q, k, v, q_segments=torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"floating point q, k and v, got torch\.int64"):
        attention(q.long(), k.long(), v.long())


def test_visible_is_none_where_all_is_seen():
    q, k, _ = qkv(3, 5)
    assert visible(*places(q, k, None, None), None, None, False, None, 0) is None


# On a GPU ------------------------------------------------------------------------------------------------------


GPU = [{}, {"window": 60, "sinks": 3}, {"causal": False}, {"softcap": 5.0}, {"slopes": torch.linspace(0, 1, 4)}]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["flex", "sdpa", "triton", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", GPU)
def test_gpu_implementations(impl, dtype, packed, options):
    options = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    if impl == "sdpa":
        options.pop("softcap", None)
    if packed:
        segments = segments_of(2, 300).cuda()
        options |= {"q_segments": segments, "k_segments": segments}
    tensors = qkv(300, 300, d=64, dv=64, batch=2, dtype=dtype, device="cuda")
    exact = [each.detach().double().requires_grad_() for each in tensors]
    for a, b in zip(outcome(tensors, impl, **options), outcome(exact, "reference", **options), strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - b).norm() / b.norm() < (2e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [40, 128, 200])  # blocks of 64, of 128, and of 256, for which few configurations are left
def test_gpu_every_triton_configuration(monkeypatch, d):
    """Values and gradients of each configuration that autotuning may pick."""
    import importlib

    import triton

    module = importlib.import_module("ops.attention.triton")
    for dtype in (torch.float32, torch.bfloat16):
        tensors = qkv(150, 170, d=d, dv=d, batch=2, dtype=dtype, device="cuda")
        exact = [each.detach().double().requires_grad_() for each in tensors]
        options = {"window": 70, "sinks": 2, "softcap": 5.0}
        wanted = outcome(exact, "reference", **options)
        for config in module._fitting(module.configs(), {"Q": tensors[0]}, PD=triton.next_power_of_2(d)):
            kernels = {
                name: triton.autotune(configs=[config], key=[])(kernel.fn) for name, kernel in module.KERNELS.items()
            }
            with monkeypatch.context() as patch:
                patch.setattr(module, "KERNELS", kernels)
                found = outcome(tensors, "triton", **options)
            for a, b in zip(found, wanted, strict=True):
                assert (a.double() - b).norm() / b.norm() < (2e-3 if dtype == torch.float32 else 2e-2), str(config)
