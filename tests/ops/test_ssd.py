"""State space duality against the recurrence it computes, written as a loop."""

import pytest
import torch

import ops
from ops import ssd

IMPLEMENTATIONS = ("reference", "chunked", "triton")
GPU = torch.cuda.is_available()


def device(impl: str) -> str:
    return "cuda" if impl == "triton" and GPU else "cpu"


def inputs(batch=2, time=70, heads=4, groups=2, n=3, p=5, without=(), dtype=torch.float64):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    made = {
        "x": normal(batch, time, heads, p),
        "dt": normal(batch, time, heads).exp() / 4,
        "A": -normal(heads).exp(),
        "B": normal(batch, time, groups, n),
        "C": normal(batch, time, groups, n),
        "D": normal(heads),
        "initial_state": normal(batch, heads, n, p),
    }
    return {name: each.to(dtype) for name, each in made.items() if name not in without}


def loop(x, dt, A, B, C, D=None, initial_state=None, segments=None):
    """One head, one token at a time: h = exp(dt A) h + dt B xᵀ, y = Cᵀ h + D x; documents and padding by hand."""
    batch, time, heads, p = x.shape
    share = heads // B.shape[2]
    rows, finals = [], []
    for b in range(batch):
        columns, ends = [], []
        for i in range(heads):
            h = x.new_zeros(B.shape[-1], p) if initial_state is None else initial_state[b, i]
            document, outputs = 0, []
            for t in range(time):
                now = 1 if segments is None else int(segments[b, t])
                if now == 0:
                    outputs.append(torch.zeros_like(h[0]))
                    continue
                if document not in (0, now):
                    h = torch.zeros_like(h)
                document = now
                step = dt[b, t, i]
                h = torch.exp(step * A[i]) * h + step * torch.outer(B[b, t, i // share], x[b, t, i])
                outputs.append(C[b, t, i // share] @ h + (0 if D is None else D[i] * x[b, t, i]))
            columns.append(torch.stack(outputs))
            ends.append(h)
        rows.append(torch.stack(columns, 1))
        finals.append(torch.stack(ends))
    return torch.stack(rows), torch.stack(finals)


def gradients(outputs, leaves):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator, dtype=torch.float64).to(each) for each in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("without", [(), ("D", "initial_state")])
@pytest.mark.parametrize(
    ("impl", "time", "heads", "groups"),
    [
        ("reference", 5, 4, 2),
        ("chunked", 70, 4, 2),  # over a chunk's edge
        ("chunked", 1, 6, 3),
        ("chunked", 67, 3, 3),
        ("chunked", 9, 3, 1),
        ("triton", 19, 2, 1),
    ],
)
def test_equals_the_recurrence(impl, time, heads, groups, without, packed):
    given = inputs(2, time, heads, groups, without=without)
    segments = None
    if packed:
        segments = torch.randint(1, 4, (2, time)).sort(1).values * (torch.rand(2, time) > 0.2)
    leaves = {name: each.requires_grad_() for name, each in given.items()}
    expected = loop(**leaves, segments=segments)
    wanted = gradients(expected, list(leaves.values()))
    placed = {name: each.detach().to(device(impl)).requires_grad_() for name, each in given.items()}
    found = ssd(**placed, segments=None if segments is None else segments.to(device(impl)), impl=impl)
    got = gradients(found, list(placed.values()))
    tolerance = 1e-10
    for one, other in zip((*found, *got), (*expected, *wanted), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_padding_may_hold_anything(impl):
    """NaN and inf at padding reach no output, no state and no gradient, of a factor of a product either."""
    time = 9 if impl == "triton" else 70
    given = inputs(2, time)
    segments = torch.randint(0, 3, (2, time))
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        leaves = {}
        for name, each in given.items():
            value = each.clone()
            if each.shape[:2] == (2, time):
                value[segments == 0] = garbage
            leaves[name] = value.to(device(impl)).requires_grad_()
        found = ssd(**leaves, segments=segments.to(device(impl)), impl=impl)
        results.append([each.cpu() for each in (*found, *gradients(found, list(leaves.values())))])
    assert (results[0][0][segments == 0] == 0).all()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_sums_in_float32(dtype):
    """Steps, decays and states in float32 as a block makes them, the rest in bfloat16."""
    given = inputs(2, 300, 4, 2, 8, 8)
    given = {name: each.to(dtype if name in ("x", "B", "C") else torch.float32) for name, each in given.items()}
    y, final = ssd(**given)
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    expected = ssd(**{name: each.double() for name, each in given.items()}, impl="reference")
    scale = expected[0].abs().max().item()
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(y.double(), expected[0], rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(final.double(), expected[1], rtol=tolerance, atol=tolerance * scale)


def test_any_split_is_whole():
    given = inputs(2, 150)
    whole, final = ssd(**given)
    state, outputs = given["initial_state"], []
    for start, end in ((0, 1), (1, 3), (3, 90), (90, 149), (149, 150)):
        part = {k: v[:, start:end] if v.shape[:2] == (2, 150) else v for k, v in given.items()}
        y, state = ssd(**part | {"initial_state": state})
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("time", [1, 70])
def test_extreme_steps_stay_finite(time):
    """Steps of 1e4 with rates of -1e4 and steps of 1e-8 in one chunk."""
    given = inputs(1, time, dtype=torch.float32)
    given["dt"][:, ::3], given["dt"][:, 1::3] = 1e4, 1e-8
    given["A"][0], given["A"][1] = -1e4, 0
    leaves = {name: each.requires_grad_() for name, each in given.items()}
    found = ssd(**leaves)
    expected = ssd(**{name: each.detach().double() for name, each in given.items()}, impl="reference")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
    assert all(each.isfinite().all() for each in gradients(found, list(leaves.values())))


def test_compiles_into_one_graph():
    given = inputs(2, 20)

    def function(segments, *values):
        return ssd(**dict(zip(given, values, strict=True)), segments=segments)

    values = [each.requires_grad_() for each in given.values()]
    segments = torch.randint(0, 3, (2, 20))
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(segments, *values)
    torch.testing.assert_close(found, function(segments, *values), rtol=1e-11, atol=1e-11)


def test_explain_tells_what_linear_attention_takes():
    given = inputs(1, 4)
    assert ops.explain(ssd, **given).chosen == "native"
    with pytest.raises(RuntimeError, match="CUDA"):
        ssd(**{name: each.to("meta") for name, each in given.items()}, impl="triton")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(2, 70, 4)}, r"x \[batch, time, heads, p\].*\(2, 70, 4\)"),
        ({"B": torch.ones(2, 70, 3)}, r"B \[batch, time, groups, n\].*\(2, 70, 3\)"),
        ({"B": torch.ones(2, 70, 3, 3)}, r"groups=3 of B and C must divide heads=4 of x; try groups=1"),
        ({"C": torch.ones(2, 70, 2, 4)}, r"C has shape \(2, 70, 2, 4\).*\(2, 70, 2, 3\)"),
        ({"dt": torch.ones(2, 70, 5)}, r"dt has shape \(2, 70, 5\).*\(2, 70, 4\)"),
        ({"A": torch.ones(4, 3)}, r"A has shape \(4, 3\).*\(4,\)"),
        ({"D": torch.ones(3)}, r"D has shape \(3,\)"),
        ({"initial_state": torch.ones(2, 4, 5, 3)}, r"initial_state has shape \(2, 4, 5, 3\).*\(2, 4, 3, 5\)"),
        ({"segments": torch.ones(2, 2).long()}, "segments has shape"),
        ({"x": torch.ones(2, 0, 4, 5)}, "empty sequence"),
        ({"impl": "magic"}, "impl='magic'.*chunked"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        ssd(**inputs() | change)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=r"A is torch\.complex64"):
        ssd(**inputs() | {"A": torch.ones(4, dtype=torch.complex64)})
