"""The delta rule: the reference against the papers' matrices and transformers, every implementation against it."""

import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize

import ops
from ops import delta_rule

GPU = torch.cuda.is_available()
IMPLEMENTATIONS = ("chunked", "native", "triton")
FORMS = (0, 1, 3, 4)  # dimensions of the log decay: none, a head, a head and step, a key channel and step
RULES = ("plain", "beta", "erase")
OPTIONS = ("initial", "packed", "grouped")
EVERY = [each for count in range(4) for each in itertools.combinations(OPTIONS, count)]


def module(name):
    return importlib.import_module(f"ops.delta_rule.{name}")


def on_gpu(impl):
    return impl == "triton" and GPU


def inputs(form=4, rule="beta", options=OPTIONS, batch=3, time=11, groups=2, k_dim=5, v_dim=3, dtype=torch.float64):
    """All tensor inputs and `segments`, by name; the pair of `erase` as "a" and "b"."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    heads = groups * 2 if "grouped" in options else groups
    shapes = {1: (heads,), 3: (batch, time, heads), 4: (batch, time, heads, k_dim)}
    made = {
        "q": normal(batch, time, groups, k_dim),
        "k": normalize(normal(batch, time, groups, k_dim), dim=-1),
        "v": normal(batch, time, heads, v_dim),
    }
    if rule == "beta":
        made["beta"] = 2 * torch.rand(shapes[3], dtype=torch.float64)
    if rule == "erase":
        made["a"] = normalize(normal(*shapes[4]), dim=-1)
        made["b"] = -made["a"] * torch.rand(shapes[4], dtype=torch.float64) + 0.1 * normal(*shapes[4])
    if form:
        made["log_decay"] = -normal(*shapes[form]).exp() / 2
    if "initial" in options:
        made["initial_state"] = normal(batch, heads, k_dim, v_dim)
    made = {name: each.to(dtype) for name, each in made.items()}
    if "packed" in options:
        made["segments"] = ragged(batch, time)
    return made


def ragged(batch, time):
    """Documents of random lengths with padding at both ends, between and inside; the last of 3 rows all padding."""
    segments = torch.randint(1, 6, (batch, time)).sort(1).values * (torch.rand(batch, time) > 0.2)
    segments[:, 0] = 0
    segments[2:] = 0
    return segments


def one_row(time):
    return {"segments": ragged(2, time)[:1]}


def call(impl, given, **options):
    given = dict(given)
    if "a" in given:
        given["erase"] = given.pop("a"), given.pop("b")
    return delta_rule(**given, **options, impl=impl)


def placed(given, impl):
    return {name: each.to("cuda" if on_gpu(impl) else "cpu") for name, each in given.items()}


def run(impl, given, **options):
    """Outputs, final states and the gradient of every input, of a random weighing of all outputs."""
    leaves = {
        name: each.detach().clone().requires_grad_(each.is_floating_point())
        for name, each in placed(given, impl).items()
    }
    outputs = dict(zip(("y", "S"), call(impl, leaves, **options), strict=True))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator, dtype=torch.float64).to(each) for each in outputs.values()]
    torch.autograd.backward(list(outputs.values()), weights)
    return outputs | {f"d{name}": each.grad for name, each in leaves.items() if each.is_floating_point()}


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


def widened(given):
    return {name: each.double() if each.is_floating_point() else each for name, each in given.items()}


def compare(impl, given, tolerance=1e-11, **options):
    """`impl` equals the reference, in float64 where it can."""
    if on_gpu(impl):
        given = {name: each.float() if each.is_floating_point() else each for name, each in given.items()}
        tolerance = max(tolerance, 1e-4)
    close(run(impl, given, **options), run("reference", widened(given), **options), tolerance)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module("chunked"), "CHUNK", dict.fromkeys(FORMS, 4))
    if not GPU:
        monkeypatch.setattr(module("triton"), "SMALL_CHUNK", 16)


def by_matrices(given, scale):
    """Each state from the last by one matrix, as the papers write them. 2406.06484, eq. 5; 2412.06464, eq. 10 and
    2510.26692, eq. 1: S = (I - β k kᵀ) Diag(α) S + β k vᵀ; 2503.14456, eq. 17, with S transposed:
    S = S (Diag(w) + aᵀ b) + vᵀ k."""
    q, k, v = given["q"], given["k"], given["v"]
    decay = torch.ones_like(k)
    if "log_decay" in given:
        g = given["log_decay"]
        decay = (g if g.ndim == 4 else g[..., None].expand_as(k)).exp()
    outputs, states = torch.zeros_like(v), given["initial_state"].clone()
    for n, h in itertools.product(range(v.shape[0]), range(v.shape[2])):
        S = states[n, h]
        for t in range(v.shape[1]):
            key, value, alpha = k[n, t, h], v[n, t, h], torch.diag(decay[n, t, h])
            if "a" in given:
                transition = alpha + torch.outer(given["a"][n, t, h], given["b"][n, t, h])
                S = (S.T @ transition + torch.outer(value, key)).T
            else:
                beta = given["beta"][n, t, h] if "beta" in given else 1
                S = (torch.eye(len(key)) - beta * torch.outer(key, key)) @ alpha @ S + beta * torch.outer(key, value)
            outputs[n, t, h] = scale * q[n, t, h] @ S
        states[n, h] = S
    return outputs, states


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_is_the_papers_matrices(form, rule, impl, small_chunks):
    given = inputs(form, rule, ("initial",), time=9 if impl == "reference" else 18, batch=1)
    tolerance = 1e-4 if on_gpu(impl) else 1e-11
    if on_gpu(impl):
        given = {name: each.float() for name, each in given.items()}
    found = [each.cpu().double() for each in call(impl, placed(given, impl), scale=0.5)]
    torch.testing.assert_close(found, list(by_matrices(widened(given), 0.5)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_is_the_gated_delta_rule_of_transformers(impl):
    """Qwen3-Next's, recurrent and chunked, with keys shared by two heads each."""
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    given = inputs(3, "beta", ("initial", "grouped"), 2, 70, dtype=torch.float32)
    y, S = call(impl, given, scale=5**-0.5)
    q, k, v, g, beta, first = (given[name] for name in ("q", "k", "v", "log_decay", "beta", "initial_state"))
    for name in ("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"):
        function = getattr(theirs, name)
        q2, k2 = (each.repeat_interleave(2, 2) for each in (q, k))  # older versions want every head
        expected = function(q2, k2, v, g, beta, initial_state=first.clone(), output_final_state=True)
        torch.testing.assert_close((y, S), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_a_key_holds_what_was_written_last(impl):
    """With β = 1 and orthonormal keys: each key read gives its latest value, however often it was written."""
    keys, values = torch.eye(4)[torch.randint(0, 4, (1, 30, 1))], torch.randn(1, 30, 1, 3)
    y, S = call(impl, placed({"q": keys, "k": keys, "v": values}, impl))
    torch.testing.assert_close(y.cpu(), values, rtol=1e-5, atol=1e-5)
    for key in keys.argmax(-1).unique():
        latest = values[0, (keys.argmax(-1)[0, :, 0] == key).nonzero().max(), 0]
        torch.testing.assert_close(S[0, 0, key].cpu(), latest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["beta", "erase"])
@pytest.mark.parametrize(("impl", "form"), [*itertools.product(["reference", "chunked"], FORMS), ("native", 4)])
def test_gradients_are_the_slopes(impl, rule, form, small_chunks):
    """Against finite differences; chunked twice."""
    given = inputs(form, rule, OPTIONS, batch=1, time=6, groups=1, k_dim=2, v_dim=1)
    given["segments"] = torch.tensor([[0, 1, 1, 0, 1, 2]])
    names = [name for name, each in given.items() if each.is_floating_point()]
    values = tuple(given.pop(name).requires_grad_() for name in names)

    def function(*values):
        return call(impl, dict(zip(names, values, strict=True)) | given)

    assert torch.autograd.gradcheck(function, values)
    assert impl != "chunked" or torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("options", EVERY, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_chunked_equals_reference(form, rule, options, small_chunks):
    compare("chunked", inputs(form, rule, options, batch=2), scale=0.7)


@pytest.mark.parametrize("options", EVERY, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
def test_native_equals_reference(rule, options, small_chunks):
    compare("native", inputs(4, rule, options, batch=2), scale=0.7)


@pytest.mark.parametrize(("rule", "options"), [("plain", ()), ("beta", OPTIONS), ("erase", OPTIONS)])
@pytest.mark.parametrize("form", FORMS)
def test_triton_equals_reference(form, rule, options, small_chunks):
    """Over two chunks; the interpreter takes some milliseconds a program."""
    batch = 1 + ("packed" in options and GPU)
    compare("triton", inputs(form, rule, options, batch, 20, 1), scale=0.7)


@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 64, 65, 130])
@pytest.mark.parametrize(("impl", "form"), [*itertools.product(["chunked"], FORMS), ("native", 4)])
def test_lengths_around_a_chunk(impl, form, time):
    """The chunks as they are, of 32 and 64 tokens."""
    compare(impl, inputs(form, "beta" if time % 2 else "erase", ("initial", "packed"), 2, time, 1))


@pytest.mark.parametrize(
    ("form", "rule", "time", "k_dim", "v_dim"),
    [(3, "erase", 17, 16, 17), (4, "beta", 16, 16, 17), (3, "beta", 33, 70, 2), (4, "erase", 17, 70, 2),
     (0, "beta", 5, 1, 66), (4, "beta", 5, 1, 66)],
)  # fmt: skip
def test_triton_at_odd_sizes(form, rule, time, k_dim, v_dim):
    """Over the edges of its chunks (32 under the interpreter) and blocks (64 keys, or 32, and 64 values)."""
    compare("triton", inputs(form, rule, ("initial",), 1, time, 1, k_dim, v_dim) | one_row(time))


@pytest.mark.skipif(GPU, reason="these are the sizes on a GPU")
def test_triton_with_a_gpus_chunk(monkeypatch):
    monkeypatch.setattr(module("triton"), "SMALL_CHUNK", 64)
    compare("triton", inputs(3, "erase", ("initial",), 1, 71, 1, 4, 4) | one_row(71))


def strong(form, rule, time, dtype):
    """Log decays of 0, -0.01, -90, -200 and -inf in one chunk, at random."""
    given = inputs(form, rule, ("initial",), 1, time, 1)
    choices = torch.tensor([0.0, -0.01, -0.01, -90.0, -200.0, -torch.inf], dtype=torch.float64)
    given["log_decay"] = choices[torch.randint(0, 6, given["log_decay"].shape)]
    return {name: each.to(dtype) for name, each in given.items()}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("form", "rule"), [(1, "beta"), (3, "beta"), (4, "beta"), (4, "erase")])
def test_decays_of_any_strength(impl, dtype, form, rule):
    """Finite, and as exact as sums of this many numbers can be: no difference of large sums, no large exponent."""
    given = strong(form, rule, 35 if impl == "triton" else 140, dtype)
    found = run(impl, given)
    assert all(each.isfinite().all() for each in found.values())
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    close(found, run("reference", widened(given)), max(tolerance, 1e-4) if on_gpu(impl) else tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", [0.0, -1e-6, -200.0, -torch.inf])
@pytest.mark.parametrize(("form", "rule"), [(3, "beta"), (4, "erase")])
def test_one_decay_throughout(impl, decay, form, rule):
    """Near 1 keeps everything that is not erased, exactly 0 the last token alone."""
    given = inputs(form, rule, (), 1, 20, 1, dtype=torch.float32)
    given["log_decay"] = torch.full_like(given["log_decay"], decay)
    found = run(impl, given)
    assert all(each.isfinite().all() for each in found.values())
    compare(impl, given, 1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", [0.5, 1.0, 1.99])
def test_equal_keys(impl, beta):
    """The chunk's system is then as far from the identity as it gets: its powers grow like binomials of 63, its
    inverse stays small."""
    time = 40 if impl == "triton" and not GPU else 130
    given = inputs(0, "beta", ("initial",), 1, time, 1, dtype=torch.float32)
    given["k"][:] = given["k"][:, :1].clone()
    given["beta"] = torch.full_like(given["beta"], beta)
    compare(impl, given, 1e-4)  # sums of 64 reflections that cancel: not quite 1e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", ["beta", "erase"])
@pytest.mark.parametrize("form", [0, 3, 4])
def test_low_precision_sums_in_float32(impl, rule, form):
    """Inputs in bfloat16, sums in float32: against float64 of the same rounded inputs, only roundings apart."""
    time = 20 if impl == "triton" and not GPU else 140
    given = inputs(form, rule, OPTIONS, 2 if impl == "chunked" else 1, time, 1, dtype=torch.bfloat16)
    given["initial_state"] = given["initial_state"].float()
    found = run(impl, given)
    assert found["y"].dtype == torch.bfloat16
    assert found["S"].dtype == torch.float32
    assert all(found[f"d{name}"].dtype == each.dtype for name, each in given.items() if each.is_floating_point())
    expected = run("reference", widened(given))
    close(found, expected, 2e-2)
    if impl == "chunked":
        torch.testing.assert_close(found["S"].double(), expected["S"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize(("form", "rule"), [(3, "beta"), (4, "beta"), (4, "erase")])
@pytest.mark.parametrize("time", [1, 17])
def test_padding_may_hold_anything(impl, form, rule, time, small_chunks):
    """NaN and inf at padding reach no output, no state and no gradient."""
    dtype = torch.float32 if on_gpu(impl) else torch.float64
    given = inputs(form, rule, ("initial", "packed"), 3, time, 1, dtype=dtype)
    padding = given["segments"] == 0
    clean, dirty = dict(given), dict(given)
    names = [name for name in ("q", "k", "v", "beta", "a", "b", "log_decay") if name in given]
    for name in names:
        where = padding.reshape(3, time, *[1] * (given[name].ndim - 2))
        clean[name] = given[name].masked_fill(where, 0)
        dirty[name] = given[name].masked_fill(where, torch.nan)
        dirty[name][1] = given[name][1].masked_fill(where[1], torch.inf)
    found = run(impl, dirty)
    close(found, run("reference", clean), 1e-4 if on_gpu(impl) else 1e-11)
    assert (found["y"].cpu()[padding] == 0).all()
    assert all((found[f"d{name}"].cpu()[padding] == 0).all() for name in names)
    assert torch.equal(found["S"][-1].cpu(), given["initial_state"][-1])  # a row of padding alone


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("rule", ["beta", "erase"])
@pytest.mark.parametrize("form", FORMS)
def test_packed_is_separate(impl, rule, form, small_chunks):
    """Each document alone; the row's first goes on from the initial state, and the last leaves the final one."""
    given = inputs(form, rule, {"initial"}, 1, 30, 1, dtype=torch.float32 if on_gpu(impl) else torch.float64)
    segments = torch.tensor([[0] * 3 + [7] * 9 + [0] * 2 + [7] * 2 + [8] * 10 + [7] * 4])
    y, final = call(impl, placed(given | {"segments": segments}, impl))
    tolerance = 1e-4 if on_gpu(impl) else 1e-11
    for places in ([*range(3, 12), 14, 15], range(16, 26), range(26, 30)):
        part = {name: e[:, list(places)] if e.shape[:2] == (1, 30) else e for name, e in given.items()}
        if places[0] > 3:
            part.pop("initial_state")
        alone, last = call("reference", part)
        torch.testing.assert_close(y[:, list(places)].cpu(), alone, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(final.cpu(), last, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("rule", ["beta", "erase"])
@pytest.mark.parametrize("form", [0, 3, 4])
def test_any_split_is_whole(impl, rule, form):
    time = 36 if impl == "triton" and not GPU else 80
    options, batch = (("initial",), 1) if impl == "triton" else (OPTIONS, 2)
    given = inputs(form, rule, options, batch, time, 1, dtype=torch.float32 if on_gpu(impl) else torch.float64)
    given["segments"] = torch.ones(batch, time, dtype=torch.long)  # one document: a block says where it goes on
    given["segments"][:, 3:5] = 0
    given = placed(given, impl)
    whole = call(impl, given)
    state, outputs = given["initial_state"], []
    for start, end in ((0, 1), (1, 2), (2, 4), (4, 5), (5, time - 1), (time - 1, time)):
        part = {name: e[:, start:end] if e.shape[:2] == (batch, time) else e for name, e in given.items()}
        y, state = call(impl, part | {"initial_state": state})
        outputs.append(y)
    tolerance = 1e-4 if on_gpu(impl) else 1e-11
    torch.testing.assert_close((torch.cat(outputs, 1), state), whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [(), ("initial",), OPTIONS], ids="-".join)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_one_token(form, rule, options):
    """Decoding takes a route of its own."""
    compare("chunked", inputs(form, rule, options, time=1), scale=0.7)


@pytest.mark.parametrize(("form", "rule"), [(0, "beta"), (3, "beta"), (4, "beta"), (4, "erase")])
def test_chunked_keeps_little(form, rule):
    """The graph of 1024 tokens keeps a few numbers a token, head and channel, not a state a token."""
    given = inputs(form, rule, (), 1, 1024, 1, 64, 64, torch.float32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = call("chunked", {name: each.requires_grad_() for name, each in given.items()})
    assert sum(kept.values()) <= 32 * 1024 * 64  # a state a token would be 64 of this unit


@pytest.mark.parametrize(
    ("impl", "form", "rule", "time"),
    [("triton", 3, "beta", 5), ("chunked", 3, "beta", 6), ("chunked", 4, "erase", 6), ("chunked", 4, "beta", 1),
     ("native", 4, "erase", 6), ("reference", 4, "beta", 2)],
)  # fmt: skip
def test_compiles_into_one_graph(impl, form, rule, time, small_chunks):
    dtype = torch.float32 if on_gpu(impl) else torch.float64
    given = placed(inputs(form, rule, ("initial", "packed"), 1, time, 1, dtype=dtype), impl)
    segments = given.pop("segments")
    torch._dynamo.reset()

    def function(*values):
        return call(impl, dict(zip(given, values, strict=True)) | {"segments": segments})

    values = [each.requires_grad_() for each in given.values()]
    found, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(*values), function(*values)
    tolerance = 1e-5 if on_gpu(impl) else 1e-11
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(sum(e.sum() for e in out), values, allow_unused=True) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("time", [1, 20])
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_autocast_leaves_the_sums_alone(impl, time):
    given = inputs(4, "beta", OPTIONS, 2, time, 1, dtype=torch.float32)
    with torch.autocast("cuda" if on_gpu(impl) else "cpu", dtype=torch.bfloat16):
        found = call(impl, placed(given, impl))
    for a, b in zip(found, call("reference", given), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("d", "writers"), [(0, 1), (1, 2), (4, 1)])
def test_custom_ops_keep_their_promises(d, writers):
    """torch's own check of schema, fake and gradient registration, of forward and backward."""
    triton = module("triton")
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]

    def normal(*shape):
        return torch.randn(*shape, device="cuda" if GPU else "cpu")

    def check(op, *arguments, leaves=True):
        given = [each if each is None or not leaves else each.requires_grad_() for each in arguments]
        torch.library.opcheck(op, tuple(given), test_utils=checks)

    readers, pairs = normal(2, 1, 1, 1, 16, 4), normal(writers, 1, 1, 1, 16, 4)
    log_decay = -normal(1, 1, 1, 16, d).abs() if d else None
    check(triton._pairs_op, readers.clone(), pairs.clone(), log_decay)
    log_decay = None if log_decay is None else log_decay.detach()
    system, seen = normal(1, 1, 1, 16, 16), normal(2 * writers - 1, 1, 1, 1, 16, 16)
    check(triton._pairs_backward_op, system, seen, readers, pairs, log_decay, leaves=False)
    check(triton._invert_op, system.tril(-1))
    total = normal(1, 1, 1, d, 1).abs() if d else None
    more = (normal(1, 1, 1, 16, 4), normal(1, 1, 1, 16, 3)) if writers == 2 else (None, None)
    chunk = normal(1, 1, 1, 16, 4), normal(1, 1, 1, 16, 3), normal(1, 1, 1, 16, 4)
    check(triton._carry_op, *chunk, total, *more, normal(1, 1, 4, 3))
    total = None if total is None else total.detach()
    read, du, write = (each.detach() for each in chunk)
    check(
        triton._carry_backward_op, du, normal(1, 1, 1, 4, 3), normal(1, 1, 4, 3), read, write, total, leaves=False
    )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_inputs(impl):
    """Slices of one projection, as a block makes them, are taken as they are."""
    both = torch.randn(1, 20, 3, 12, dtype=torch.float64) / 3
    given = {"q": both[..., :4], "k": both[..., 4:8], "v": both[..., 8:]}
    decay = -torch.rand(1, 3, 20, dtype=torch.float64).mT
    compare(impl, given | {"log_decay": decay})


@pytest.mark.parametrize(
    ("form", "time", "chosen"), [(0, 11, "native"), (3, 11, "native"), (4, 11, "native"), (4, 1, "chunked")]
)
def test_auto_on_the_cpu_says_why_not_others(form, time, chosen):
    told = ops.explain(delta_rule, **inputs(form, time=time))
    assert told.chosen == chosen
    assert chosen == "native" or "several tokens alone" in told.refused["native"]
    assert "needs CUDA tensors" in told.refused["triton"]


def test_triton_refuses_wide_keys():
    given = inputs(0, "plain", (), 1, 2, 1, 257)
    with pytest.raises(RuntimeError, match="at most 256 key channels on the chip, got 257; use chunked"):
        delta_rule(**given, impl="triton")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.ones(3, 11, 5)}, r"q \[batch, time, groups, k_dim\]"),
        ({"q": torch.ones(3, 0, 2, 5)}, "empty sequence"),
        ({"q": torch.ones(3, 11, 3, 5)}, "groups=3 of q and k must divide heads=4 of v; try groups=1"),
        ({"k": torch.ones(3, 11, 4, 5)}, r"k has shape \(3, 11, 4, 5\).*\(3, 11, 2, 5\)"),
        ({"v": torch.ones(3, 10, 4, 3)}, r"v has shape \(3, 10, 4, 3\).*time=11"),
        ({"beta": torch.ones(3, 11, 2)}, r"beta has shape \(3, 11, 2\).*\(3, 11, 4\)"),
        ({"log_decay": torch.ones(3, 11)}, r"log_decay has shape \(3, 11\); pass \[heads\]=\(4,\)"),
        ({"log_decay": torch.ones(2)}, r"log_decay has shape \(2,\).*\(4,\)"),
        ({"erase": (torch.ones(3, 11, 4, 5),) * 2}, "both beta and erase"),
        ({"beta": None, "erase": (torch.ones(3, 11, 4, 5),)}, r"erase has 1 parts; pass \(a, b\)"),
        ({"beta": None, "erase": (torch.ones(3, 11, 2, 5),) * 2}, r"a of erase has shape.*\(3, 11, 4, 5\)"),
        ({"beta": None, "erase": (torch.ones(3, 11, 4, 5), torch.ones(1))}, r"b of erase has shape \(1,\)"),
        ({"initial_state": torch.ones(3, 4, 3, 5)}, r"initial_state has shape.*\(3, 4, 5, 3\)"),
        ({"segments": torch.ones(3, 2).long()}, "segments has shape"),
        ({"impl": "magic"}, "impl='magic'.*chunked"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        delta_rule(**inputs() | change)


@pytest.mark.parametrize(("name", "dtype"), [("q", torch.int64), ("beta", torch.complex64)])
def test_other_types_are_refused(name, dtype):
    given = inputs()
    with pytest.raises(TypeError, match=rf"but {name} is {dtype}"):
        delta_rule(**given | {name: given[name].to(dtype)})


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_compile_for_a_gpu():
    """Down to machine code for Hopper, which needs no GPU, with everything on."""
    program = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.delta_rule import triton_kernels as k
OPERANDS = {"Q", "X", "READ", "NEW", "WRITE", "MORE", "VALUES", "U", "STATES", "SEEN", "DSEEN", "DQ", "DX"}
def compile(kernel, form=2, back=False):
    values = dict(K=16, V=16, FORM=form, EXTRA=True, HAS_FIRST=True, BACK=back, SUM=tl.float32, PRECISION="tf32x3",
                  EXACT="tf32x3", SLOPE="tf32", FLOOR=-110.0, C=16, BK=16, BV=16)
    signature, constants = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name], constants[(place,)] = "constexpr", values[name]
        elif name in k.SIZES:
            signature[name] = "i32"
        else:
            signature[name] = "*bf16" if name in OPERANDS else "*fp32"
    source = ASTSource(kernel, signature, constants)
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 0
print(all(compile(kernel, form) for kernel in (k.pairs, k.pair_gradients) for form in (1, 2)))
print(compile(k.invert), compile(k.carry), compile(k.carry, 1, True))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["True"] * 4, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "options"), [("beta", ()), ("beta", OPTIONS), ("erase", OPTIONS)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k_dim", [72, 256])
def test_every_configuration_on_a_gpu(k_dim, form, rule, options, dtype, monkeypatch):
    """Values and gradients of each configuration that autotuning may pick."""
    import triton

    ours = module("triton")
    given = inputs(form, rule, options, 3, 150, 2, k_dim, 80, dtype)
    if form:
        given["log_decay"] = given["log_decay"] / 4
    expected = run("reference", widened(given))
    carries = ours._fitting(ours._carry_configs(), {"READ": given["q"]}, V=80, BK=triton.next_power_of_2(k_dim))
    assert carries
    for chunk, carry in itertools.zip_longest(ours._chunk_configs(), carries):
        chosen = {name: carry or carries[0] if name == "carry" else chunk or ours._chunk_configs()[0]
                  for name in ours.KERNELS}  # fmt: skip
        kernels = {
            name: triton.autotune(configs=[chosen[name]], key=[])(kernel.fn) for name, kernel in ours.KERNELS.items()
        }
        with monkeypatch.context() as patch:
            patch.setattr(ours, "KERNELS", kernels)
            found = run("triton", given)
        close(found, expected, 1e-4 if dtype == torch.float32 else 2e-2)
