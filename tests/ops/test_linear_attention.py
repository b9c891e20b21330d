"""Linear attention: the reference against the closed form, every implementation against the reference."""

import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch

import ops
from ops import linear_attention

GPU = torch.cuda.is_available()
IMPLEMENTATIONS = ("chunked", "native", "triton")
FORMS = (0, 1, 3, 4)  # dimensions of the log decay: none, a head, a head and step, a key channel and step
OPTIONS = ("normalise", "bonus", "initial", "packed", "grouped")
EVERY = [each for count in range(6) for each in itertools.combinations(OPTIONS, count)]


def module(name):
    return importlib.import_module(f"ops.linear_attention.{name}")


def on_gpu(impl):
    return impl == "triton" and GPU


def inputs(form=4, options=OPTIONS, batch=3, time=11, groups=2, k_dim=5, v_dim=3, dtype=torch.float64):
    """All tensor inputs and `segments`, by name."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    heads = groups * 2 if "grouped" in options else groups
    shapes = {1: (heads,), 3: (batch, time, heads), 4: (batch, time, heads, k_dim)}
    made = {
        "q": normal(batch, time, groups, k_dim),
        "k": normal(batch, time, groups, k_dim),
        "v": normal(batch, time, heads, v_dim),
    }
    if "normalise" in options:  # positive features, or the sum divided by may come near 0
        made |= {name: made[name].abs() + 0.1 for name in ("q", "k")}
    if form:
        made["log_decay"] = -normal(*shapes[form]).exp() / 2
    if "bonus" in options:
        made["bonus"] = normal(heads, k_dim).abs()
    if "initial" in options:
        made["initial_state"] = normal(batch, heads, k_dim, v_dim)
        if "normalise" in options:
            made["initial_normaliser"] = normal(batch, heads, k_dim).abs()
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


def run(impl, given, normalise=False, **options):
    """Outputs, final states and the gradient of every input, of a random weighing of all outputs."""
    place = "cuda" if on_gpu(impl) else "cpu"
    leaves = {
        name: each.detach().clone().to(place).requires_grad_(each.is_floating_point()) for name, each in given.items()
    }
    found = linear_attention(**leaves, normalise=normalise, impl=impl, **options)
    outputs = {name: each for name, each in zip(("y", "S", "z"), found, strict=True) if each is not None}
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


def compare(impl, given, tolerance=1e-11, **options):
    """`impl` equals the reference, in float64 where it can."""
    if on_gpu(impl):
        given = {name: each.float() if each.is_floating_point() else each for name, each in given.items()}
        tolerance = max(tolerance, 1e-4)
    wide = {name: each.double() if each.is_floating_point() else each for name, each in given.items()}
    close(run(impl, given, **options), run("reference", wide, **options), tolerance)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module("chunked"), "CHUNK", dict.fromkeys(FORMS, 4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bonus", [False, True])
def test_reference_is_the_closed_form(form, bonus):
    """y_t = Σ_s (q_t ⊙ exp(Σ of log decays after s) ⊙ k_s) v_s, as one T×T matrix, over the same for v = 1."""
    given = inputs(form, {"normalise", "bonus"} if bonus else {"normalise"}, time=9)
    q, k, v, u = (given.get(name) for name in ("q", "k", "v", "bonus"))
    g = torch.zeros_like(q)
    if form:
        g = given["log_decay"] if form == 4 else given["log_decay"][..., None].expand_as(q)
    total = g.cumsum(1)
    weights = torch.zeros(3, 9, 9, 2, dtype=torch.float64)
    for t, s in itertools.product(range(9), range(9)):
        if s < t:
            between = total[:, t] - total[:, s] - (g[:, t] if bonus else 0)
            weights[:, t, s] = (q[:, t] * between.exp() * k[:, s]).sum(-1)
        if s == t:
            weights[:, t, s] = (q[:, t] * (u if bonus else 1) * k[:, s]).sum(-1)
    expected = torch.einsum("b t s h, b s h v -> b t h v", weights, v) / weights.sum(2)[..., None]
    state = torch.einsum("b s h k, b s h v -> b h k v", k * (total[:, -1:] - total).exp(), v)
    y, final, _ = linear_attention(**given, normalise=True, scale=0.5, impl="reference")
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(final, state, rtol=1e-11, atol=1e-11)
    y, _, _ = linear_attention(**given, scale=0.5, impl="reference")
    torch.testing.assert_close(y, 0.5 * expected * weights.sum(2)[..., None], rtol=1e-11, atol=1e-11)


def test_eps_bounds_the_divisor():
    """A token whose normalising sum is below eps is divided by eps, and the sum gets no gradient there."""
    for impl in ("reference", *IMPLEMENTATIONS):
        given = inputs(3, {"normalise"}, batch=1, time=6)
        given["q"][:, 2] = -given["q"][:, 2]
        compare(impl, given, normalise=True, eps=0.3)
        y = run(impl, given, normalise=True, eps=0.3)["y"]
        plain = run("reference", given)["y"]
        torch.testing.assert_close(y[:, 2].cpu().double(), plain[:, 2] / 0.3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("impl", "form"), [*itertools.product(["reference", "chunked"], FORMS), ("native", 4)])
def test_gradients_are_the_slopes(impl, form, small_chunks):
    """Against finite differences; chunked twice."""
    given = inputs(form, OPTIONS, batch=1, time=6, groups=1, k_dim=2, v_dim=1)
    given["segments"] = torch.tensor([[0, 1, 1, 0, 1, 2]])
    names = [name for name, each in given.items() if each.is_floating_point()]
    values = tuple(given.pop(name).requires_grad_() for name in names)

    def function(*values):
        return linear_attention(**dict(zip(names, values, strict=True)), **given, normalise=True, impl=impl)

    assert torch.autograd.gradcheck(function, values)
    assert impl != "chunked" or torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("options", EVERY, ids="-".join)
@pytest.mark.parametrize("form", FORMS)
def test_chunked_equals_reference(form, options, small_chunks):
    compare("chunked", inputs(form, options, batch=2), normalise="normalise" in options, scale=0.7)


@pytest.mark.parametrize("options", EVERY, ids="-".join)
def test_native_equals_reference(options, small_chunks):
    compare("native", inputs(4, options, batch=2), normalise="normalise" in options, scale=0.7)


@pytest.mark.parametrize("options", [(), ("packed", "grouped"), ("normalise", "initial"), OPTIONS], ids="-".join)
@pytest.mark.parametrize("form", FORMS)
def test_triton_equals_reference(form, options):
    """Over two chunks; the interpreter takes some milliseconds a program."""
    compare("triton", inputs(form, options, 2, 35, 1), normalise="normalise" in options, scale=0.7)


def test_chunked_is_the_quadratic_form():
    """Without decay, causal attention with the weights q·k as they are (2006.16236, eq. 8 and 9)."""
    given = inputs(0, {"normalise"}, time=150)
    weights = torch.einsum("b t h k, b s h k -> b h t s", given["q"], given["k"]).tril()
    expected = torch.einsum("b h t s, b s h v -> b t h v", weights / weights.sum(-1, keepdim=True), given["v"])
    y, _, _ = linear_attention(**given, normalise=True, impl="chunked")
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize(("impl", "form"), [*itertools.product(["chunked"], FORMS), ("native", 4)])
def test_lengths_around_a_chunk(impl, form, time):
    """The chunks as they are, of 32 and 64 tokens."""
    compare(impl, inputs(form, ("initial", "packed"), batch=2, time=time, groups=1))


@pytest.mark.parametrize(
    ("form", "time", "groups", "k_dim", "v_dim"),
    [(3, 32, 2, 16, 17), (4, 15, 2, 16, 17), (3, 33, 1, 70, 2), (4, 33, 1, 70, 2), (3, 5, 1, 1, 66), (4, 5, 1, 1, 66)],
)
def test_triton_at_odd_sizes(form, time, groups, k_dim, v_dim):
    """Over the edges of its chunks (32 under the interpreter) and blocks (64 keys, or 32, and 64 values)."""
    compare("triton", inputs(form, OPTIONS, 1, time, groups, k_dim, v_dim) | one_row(time), normalise=True)


@pytest.mark.skipif(GPU, reason="these are the sizes on a GPU")
def test_triton_with_a_gpus_chunk(monkeypatch):
    monkeypatch.setattr(module("triton"), "INTERPRETED_CHUNK", 64)
    compare("triton", inputs(3, OPTIONS, 1, 71, 1, 4, 4) | one_row(71), normalise=True)


@pytest.mark.parametrize("form", [0, 3])
def test_triton_takes_several_heads_of_a_group_in_a_program(form, monkeypatch):
    monkeypatch.setattr(module("triton"), "PROGRAMS", 1)
    compare("triton", inputs(form, ("grouped", "bonus") if form else ("grouped",), 1, 18, 1))


def strong(form, time, dtype):
    """Log decays of 0, -0.01, -90, -200 and -inf in one chunk, at random."""
    given = inputs(form, ("normalise", "bonus", "initial"), 1, time, 1)
    choices = torch.tensor([0.0, -0.01, -0.01, -90.0, -200.0, -torch.inf], dtype=torch.float64)
    given["log_decay"] = choices[torch.randint(0, 6, given["log_decay"].shape)]
    return {name: each.to(dtype) for name, each in given.items()}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", [1, 3, 4])
def test_decays_of_any_strength(impl, dtype, form):
    """Finite, and as exact as sums of this many numbers can be: no difference of large sums, no large exponent."""
    given = strong(form, 35 if impl == "triton" else 140, dtype)
    found = run(impl, given, normalise=True)
    assert all(each.isfinite().all() for each in found.values())
    compare(impl, given, {torch.float64: 1e-11, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype], normalise=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", [0.0, -200.0, -torch.inf])
@pytest.mark.parametrize("form", [1, 3, 4])
def test_one_decay_throughout(impl, decay, form):
    """Exactly 1 sums up everything, exactly 0 keeps the last token alone."""
    given = inputs(form, (), 1, 20, 1, dtype=torch.float32)
    given["log_decay"] = torch.full_like(given["log_decay"], decay)
    found = run(impl, given)
    assert all(each.isfinite().all() for each in found.values())
    compare(impl, given, 3e-6)
    if decay:
        last = torch.einsum("b h k, b h v -> b h k v", given["k"][:, -1], given["v"][:, -1])
        torch.testing.assert_close(found["S"].detach().cpu(), last)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_sums_in_float32(impl, form):
    """Inputs in bfloat16, sums in float32: against float64 of the same rounded inputs, only roundings apart."""
    time = 20 if impl == "triton" and not GPU else 140
    given = inputs(form, OPTIONS, 2, time, 1, dtype=torch.bfloat16)
    given |= {name: given[name].float() for name in ("initial_state", "initial_normaliser")}
    found = run(impl, given, normalise=True)
    assert found["y"].dtype == torch.bfloat16
    assert found["S"].dtype == found["z"].dtype == torch.float32
    assert all(found[f"d{name}"].dtype == each.dtype for name, each in given.items() if each.is_floating_point())
    expected = run("reference", {n: e.double() if n != "segments" else e for n, e in given.items()}, normalise=True)
    close(found, expected, 2e-2)
    if impl == "chunked":
        torch.testing.assert_close(found["S"].double(), expected["S"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("form", [3, 4])
@pytest.mark.parametrize("time", [1, 17])
def test_padding_may_hold_anything(impl, form, time, small_chunks):
    """NaN and inf at padding reach no output, no state and no gradient."""
    given = inputs(form, OPTIONS, 3, time, 1, dtype=torch.float32 if on_gpu(impl) else torch.float64)
    padding = given["segments"] == 0
    clean, dirty = dict(given), dict(given)
    for name in ("q", "k", "v", "log_decay"):
        where = padding.reshape(3, time, *[1] * (given[name].ndim - 2))
        clean[name] = given[name].masked_fill(where, 0)
        dirty[name] = given[name].masked_fill(where, torch.nan)
        dirty[name][1] = given[name][1].masked_fill(where[1], torch.inf)
    found = run(impl, dirty, normalise=True)
    close(found, run("reference", clean, normalise=True), 1e-4 if on_gpu(impl) else 1e-11)
    assert (found["y"].cpu()[padding] == 0).all()
    assert all((found[f"d{name}"].cpu()[padding] == 0).all() for name in ("q", "k", "v", "log_decay"))
    assert torch.equal(found["S"][-1].cpu(), given["initial_state"][-1])  # a row of padding alone


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_packed_is_separate(impl, bonus, form, small_chunks):
    """Each document alone; the row's first goes on from the initial state, and the last leaves the final one."""
    given = inputs(form, {"initial", "bonus"} if bonus else {"initial"}, 1, 30, 1)
    if on_gpu(impl):
        given = {name: each.float() for name, each in given.items()}
    segments = torch.tensor([[0] * 3 + [7] * 9 + [0] * 2 + [7] * 2 + [8] * 10 + [7] * 4])
    place = "cuda" if on_gpu(impl) else "cpu"
    placed = {name: each.to(place) for name, each in given.items()}
    y, final, _ = linear_attention(**placed, segments=segments.to(place), impl=impl)
    tolerance = 1e-4 if on_gpu(impl) else 1e-11
    for places in ([*range(3, 12), 14, 15], range(16, 26), range(26, 30)):
        part = {name: e[:, list(places)] if e.shape[:2] == (1, 30) else e for name, e in given.items()}
        if places[0] > 3:
            part.pop("initial_state")
        alone, last, _ = linear_attention(**part, impl="reference")
        torch.testing.assert_close(y[:, list(places)].cpu(), alone, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(final.cpu(), last, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("form", FORMS)
def test_any_split_is_whole(impl, form):
    time = 36 if impl == "triton" and not GPU else 80
    given = inputs(form, OPTIONS, 2, time, 1, dtype=torch.float32 if on_gpu(impl) else torch.float64)
    given["segments"] = torch.ones(2, time, dtype=torch.long)  # one document: a block says where it goes on
    given["segments"][:, 3:5] = 0
    given = {name: each.to("cuda" if on_gpu(impl) else "cpu") for name, each in given.items()}
    whole = linear_attention(**given, normalise=True, impl=impl)
    states = {name: given[name] for name in ("initial_state", "initial_normaliser")}
    outputs = []
    for start, end in ((0, 1), (1, 2), (2, 4), (4, 5), (5, time - 1), (time - 1, time)):
        part = {name: e[:, start:end] if e.shape[:2] == (2, time) else e for name, e in given.items()}
        y, *after = linear_attention(**part | states, normalise=True, impl=impl)
        states = dict(zip(states, after, strict=True))
        outputs.append(y)
    tolerance = 1e-4 if on_gpu(impl) else 1e-11
    torch.testing.assert_close((torch.cat(outputs, 1), *after), whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [(), ("initial",), OPTIONS], ids="-".join)
@pytest.mark.parametrize("form", FORMS)
def test_one_token(form, options):
    """Decoding takes a route of its own."""
    compare("chunked", inputs(form, options, time=1), normalise="normalise" in options, scale=0.7)


@pytest.mark.parametrize("form", [0, 3, 4])
def test_chunked_keeps_little(form):
    """The graph of 1024 tokens keeps a few numbers a token, head and channel, not a state a token."""
    given = inputs(form, (), 1, 1024, 1, 64, 64, torch.float32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = linear_attention(**{name: each.requires_grad_() for name, each in given.items()}, impl="chunked")
    assert sum(kept.values()) <= 16 * 1024 * 64  # a state a token would be 64 of this unit


def test_groups_are_not_repeated():
    """With 16 heads on one group chunked never holds q or k a head, nor, without decay, pairs a head."""
    given = inputs(0, (), 1, 256, 1, 64, 1, torch.float32)
    given["v"] = torch.randn(1, 256, 16, 1)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                sizes.append(found.untyped_storage().nbytes() // found.element_size())
            return found

    with Watch():
        linear_attention(**given, impl="chunked")
    assert max(sizes) < 256 * 16 * 64 / 4


@pytest.mark.parametrize(
    ("impl", "form", "time"),
    [("triton", 3, 5), ("chunked", 3, 6), ("chunked", 4, 6), ("chunked", 4, 1), ("native", 4, 6), ("reference", 4, 2)],
)
def test_compiles_into_one_graph(impl, form, time, small_chunks):
    given = inputs(form, OPTIONS, 2, time, 1, dtype=torch.float32 if on_gpu(impl) else torch.float64)
    given = {name: each.to("cuda" if on_gpu(impl) else "cpu") for name, each in given.items()}
    segments = given.pop("segments")
    torch._dynamo.reset()

    def function(*values):
        named = dict(zip(given, values, strict=True))
        return linear_attention(**named, segments=segments, normalise=True, impl=impl)

    values = [each.requires_grad_() for each in given.values()]
    found, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(*values), function(*values)
    tolerance = 1e-5 if on_gpu(impl) else 1e-11
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(sum(e.sum() for e in out), values, allow_unused=True) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("time", [1, 20])
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_autocast_leaves_the_sums_alone(impl, time):
    given = inputs(4, OPTIONS, 2, time, 1, dtype=torch.float32)
    place = "cuda" if on_gpu(impl) else "cpu"
    placed = {name: each.to(place) for name, each in given.items()}
    with torch.autocast(place, dtype=torch.bfloat16):
        found = linear_attention(**placed, normalise=True, impl=impl)
    expected = linear_attention(**given, normalise=True, impl="reference")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "options"), [(0, ()), (3, OPTIONS), (4, OPTIONS)])
def test_custom_ops_keep_their_promises(form, options):
    """torch's own check of schema, fake and gradient registration, of forward and backward."""
    from ops.segments import marks

    triton = module("triton")
    given = inputs(form, options, 1, 3, 1, dtype=torch.float32)
    place = "cuda" if GPU else "cpu"
    names = ("q", "k", "v", "log_decay", "bonus", "initial_state", "initial_normaliser")
    values = [given[name].to(place).requires_grad_() if name in given else None for name in names]
    mark = marks(given["segments"]).to(place) if "segments" in given else None
    normalise = bool(options)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += [] if options else ["test_aot_dispatch_dynamic"]  # runs every kernel many times
    torch.library.opcheck(triton._forward_op, (*values, mark, 1.0, 1e-6, normalise), test_utils=checks)
    y, final, final_z, *kept = (e.detach() for e in triton._forward_op(*values, mark, 1.0, 1e-6, normalise))
    values = [None if each is None else each.detach() for each in values[:5]]
    arguments = (y, final, final_z if normalise else None, *values, mark, y if normalise else None, *kept)
    torch.library.opcheck(triton._backward_op, (*arguments, 1.0, 1e-6, normalise), test_utils=checks)


@pytest.mark.parametrize("itself", [True, False])
def test_native_pairs_keep_their_promises(itself):
    """The same, of the custom op that `native` is made of: two readers, three writers, two heads a group."""
    native = module("native")
    q, k = torch.randn(2, 3, 5, 4), torch.randn(3, 3, 5, 4)
    log_decay = -torch.rand(3, 2, 5, 4)
    given = [each.requires_grad_() for each in (q, k, log_decay, 2 * log_decay.detach())]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(native._forward_op, (*given, itself), test_utils=checks)
    given = [each.detach() for each in given]
    seen, *weights = native._forward_op(*given, itself)
    arguments = *(torch.randn_like(each) for each in (seen, *weights)), *given, *weights, itself
    torch.library.opcheck(native._backward_op, arguments, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("itself", [True, False])
def test_native_pairs_are_pairs(itself, dtype):
    """In memory that held NaN before, with decays of 0, of ordinary size and of nothing left."""
    from ops.linear_attention.pairs import pairs

    native = module("native")
    choices = torch.tensor([0.0, -0.1, -3.0, -90.0, -torch.inf], dtype=dtype)
    log_decay, read = choices[torch.randint(0, 5, (2, 3, 2, 16, 11))]
    given = [torch.randn(2, 3, 1, 16, 11, dtype=dtype), torch.randn(1, 3, 1, 16, 11, dtype=dtype), log_decay, read]
    both = []
    for run in (
        lambda q, k, *decays: native.native_pairs(q, k, *decays, itself),
        lambda q, k, *decays: pairs(q[:, None], k[None], *decays, itself),
    ):
        leaves = [each.detach().clone().requires_grad_() for each in given]
        found = run(*leaves)
        torch.manual_seed(0)
        torch.autograd.backward(found, [torch.randn(each.shape, dtype=dtype) for each in found])
        both.append([*found, *(each.grad for each in leaves)])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(*both, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_inputs(impl):
    """Slices of one projection, as a block makes them, are taken as they are."""
    both = torch.randn(2, 20, 3, 12, dtype=torch.float64)
    given = {"q": both[..., :4], "k": both[..., 4:8], "v": both[..., 8:]}
    decay = -torch.rand(2, 3, 20, dtype=torch.float64).mT
    compare(impl, given | {"log_decay": decay})


@pytest.mark.parametrize(
    ("form", "time", "chosen"), [(0, 11, "chunked"), (3, 11, "native"), (4, 11, "native"), (4, 1, "chunked")]
)
def test_auto_on_the_cpu_says_why_not_others(form, time, chosen):
    told = ops.explain(linear_attention, **inputs(form, time=time), normalise=True)
    assert told.chosen == chosen
    assert chosen == "native" or "several tokens with a decay alone" in told.refused["native"]
    assert "needs CUDA tensors" in told.refused["triton"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.ones(3, 11, 5)}, r"q \[batch, time, groups, k_dim\]"),
        ({"q": torch.ones(3, 0, 2, 5)}, "empty sequence"),
        ({"q": torch.ones(3, 11, 3, 5)}, "groups=3 of q and k must divide heads=4 of v; try groups=1"),
        ({"k": torch.ones(3, 11, 4, 5)}, r"k has shape \(3, 11, 4, 5\).*\(3, 11, 2, 5\)"),
        ({"v": torch.ones(3, 10, 4, 3)}, r"v has shape \(3, 10, 4, 3\).*time=11"),
        ({"log_decay": torch.ones(3, 11)}, r"log_decay has shape \(3, 11\); pass \[heads\]=\(4,\)"),
        ({"log_decay": torch.ones(2)}, r"log_decay has shape \(2,\).*\(4,\)"),
        ({"bonus": torch.ones(4, 4)}, r"bonus has shape \(4, 4\).*\(4, 5\)"),
        ({"initial_state": torch.ones(3, 4, 3, 5)}, r"initial_state has shape.*\(3, 4, 5, 3\)"),
        ({"initial_normaliser": torch.ones(3, 4, 3)}, r"initial_normaliser has shape.*\(3, 4, 5\)"),
        ({"initial_normaliser": None}, "initial_normaliser is None"),
        ({"initial_state": None}, "initial_state is None"),
        ({"normalise": False}, "initial_normaliser but normalise=False"),
        ({"segments": torch.ones(3, 2).long()}, "segments has shape"),
        ({"impl": "magic"}, "impl='magic'.*chunked"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        linear_attention(**inputs() | {"normalise": True} | change)


@pytest.mark.parametrize(("name", "dtype"), [("q", torch.int64), ("log_decay", torch.complex64)])
def test_other_types_are_refused(name, dtype):
    given = inputs()
    with pytest.raises(TypeError, match=rf"but {name} is {dtype}"):
        linear_attention(**given | {name: given[name].to(dtype)}, normalise=True)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_compile_for_a_gpu():
    """Down to machine code for Hopper, which needs no GPU, with everything on."""
    program = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.linear_attention import triton_backward as b, triton_forward as f
OPERANDS = {"Q", "X", "W", "DY", "A", "STATES", "DSTATES", "Y", "DV", "DQ", "DK"}
def compile(kernel, form):
    values = dict(K=32, V=32, FORM=form, HAS_BONUS=True, HAS_MARK=True, NORM=True, HAS_FIRST=True, HAS_FIRSTZ=True,
                  BACK=True, SUM=tl.float32, PRECISION="tf32x3", EXACT="tf32x3", SLOPE="tf32", FLOOR=-110.0, C=32,
                  BK=32, BV=32)
    signature, constants = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name], constants[(place,)] = "constexpr", values[name]
        elif name in ("scale", "eps"):
            signature[name] = "fp32"
        elif name.islower() or name in f.SIZES:
            signature[name] = "i32"
        else:
            signature[name] = "*u8" if name == "MARK" else "*bf16" if name in OPERANDS else "*fp32"
    source = ASTSource(kernel, signature, constants)
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 0
print(all(compile(kernel, 3) for kernel in (f.pairs, b.pair_gradients, b.key_gradients)))
print(all(compile(kernel, 4) for kernel in (f.wide_pairs, f.carry, f.outputs, b.value_gradients, b.key_gradients)))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(), OPTIONS], ids="-".join)
@pytest.mark.parametrize("form", FORMS)
def test_every_configuration_on_a_gpu(form, options, dtype, monkeypatch):
    """Values and gradients of each configuration that autotuning may pick."""
    import triton

    ours = module("triton")
    given = inputs(form, options, 3, 150, 2, 72, 80, dtype)
    if form:
        given["log_decay"] = given["log_decay"] / 4
    expected = run("reference", {n: e.double() if n != "segments" else e for n, e in given.items()}, bool(options))
    for config in ours._fitting(ours.configs(), {"X": given["q"]}, V=80):
        kernels = {name: triton.autotune(configs=[config], key=[])(kernel.fn) for name, kernel in ours.KERNELS.items()}
        with monkeypatch.context() as patch:
            patch.setattr(ours, "KERNELS", kernels)
            found = run("triton", given, bool(options))
        close(found, expected, 1e-4 if dtype == torch.float32 else 2e-2)
