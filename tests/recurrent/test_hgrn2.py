"""HGRN2 against its recurrence, its gates at both ends, and its lower bounds against the papers' over layers."""

import pytest
import torch
from torch.nn.functional import silu

import ops
import zoo
from zoo.block import tags

WIDTH = 12


def equations(block, x, bound):
    """2404.07904, a token after another in float64. x: [time width]; bound: β of each channel."""
    o, z, i = block.in_proj(x).split(block.width, -1)
    f = bound + (1 - bound) * torch.sigmoid(z)
    q, f, i = (each.unflatten(-1, (block.heads, -1)) for each in (silu(o), f, i))
    S, rows = x.new_zeros(block.heads, block.head_dim, block.head_dim), []
    for t in range(len(x)):
        S = f[t][..., None] * S + (1 - f[t])[..., None] * i[t][:, None]
        rows.append(torch.einsum("hk,hkv->hv", q[t], S).flatten() / block.head_dim**0.5)
    h = torch.stack(rows)
    return block.out_proj(block.norm.weight * h / (h.square().mean(-1, keepdim=True) + block.norm.eps).sqrt())


def make(**options):
    torch.manual_seed(0)
    block = zoo.block("hgrn2", WIDTH, **options).double()
    torch.nn.init.normal_(block.norm.weight)
    if block.lower_bound is not None:
        torch.nn.init.normal_(block.lower_bound)
    return block


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("options", [{}, {"head_dim": 4, "lower_bound": 0.3}], ids=["first layer", "bounded"])
def test_it_is_the_equations(options, impl):
    """Values and gradients, two documents in a row."""
    block = make(**options)
    x = torch.randn(1, 41, WIDTH, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[2] * 6 + [5] * 35])
    bound = torch.zeros(WIDTH) if block.lower_bound is None else torch.sigmoid(block.lower_bound)
    wanted = torch.cat([equations(block, each, bound) for each in x[0].split([6, 35])])
    names = ["x", *(name for name, _ in block.named_parameters())]
    inputs, direction = [x, *block.parameters()], torch.randn_like(wanted)
    right = torch.autograd.grad((wanted * direction).sum(), inputs)
    with ops.use(impl):
        y = block(x, None, segments).y[0]
        found = torch.autograd.grad((y * direction).sum(), inputs)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
    for name, a, b in zip(names, found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("bound", [0.0, 1e-6, 0.02, 0.5, 0.999])
def test_the_gates_keep_their_digits(bound):
    """log f and 1 - f in float32 to float32's digits, wherever f is, and their slopes finite."""
    block = zoo.block("hgrn2", WIDTH, lower_bound=bound)
    z = torch.linspace(-80, 80, 200 * WIDTH).reshape(1, -1, WIDTH).requires_grad_()
    log_f, k = block.gates(z)
    wide = z.detach().double()
    beta = 0.0 if block.lower_bound is None else torch.sigmoid(block.lower_bound.detach().double())
    right = (1 - beta) * torch.sigmoid(-wide)
    torch.testing.assert_close(k.double(), right, rtol=2e-6, atol=1e-37)
    exact = torch.where(right < 0.5, torch.log1p(-right), torch.log(beta + (1 - beta) * torch.sigmoid(wide)))
    torch.testing.assert_close(log_f.double(), exact, rtol=2e-6, atol=1e-37)
    (slope,) = torch.autograd.grad(log_f.sum(), z, retain_graph=True)
    share = (1 - beta) * torch.sigmoid(wide) * torch.sigmoid(-wide) / exact.exp()
    torch.testing.assert_close(slope.double(), share, rtol=1e-5, atol=1e-7)
    if block.lower_bound is not None:
        (slope,) = torch.autograd.grad(log_f.sum() + k.sum(), block.lower_bound)
        assert slope.isfinite().all()


def test_the_gates_of_bfloat16_have_float32s_digits():
    block, z = zoo.block("hgrn2", WIDTH, lower_bound=0.5).bfloat16(), torch.randn(1, 50, WIDTH).bfloat16()
    k = 0.5 * torch.sigmoid(-z.double())
    for found, wanted in zip(block.gates(z), (torch.log1p(-k), k), strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=0)


# Preactivations of the forget gate that a head's channels share: f is its bound, or 1, or a channel is either.
ENDS = {"forgets all": [-1e4], "forgets nothing": [60.0], "mixed": [-1e4, -60.0, -8.0, 0.0, 8.0, 60.0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [0.0, 0.02])
@pytest.mark.parametrize("shifts", ENDS.values(), ids=ENDS)
def test_decays_near_0_and_near_1(shifts, bound, dtype):
    """Finite, and as near float64 as the dtype's digits, in values and in every gradient, through the chunked form. The
    first feature of x is 1, and the forget gate's weights for it are the shifts."""
    torch.manual_seed(0)
    block = zoo.block("hgrn2", WIDTH, lower_bound=bound, norm_eps=1e-2)
    with torch.no_grad():
        block.in_proj.weight[WIDTH : 2 * WIDTH, 0] = torch.tensor(shifts * (WIDTH // len(shifts)))
    block.to(dtype)
    exact = zoo.block("hgrn2", WIDTH, lower_bound=bound, norm_eps=1e-2).double()
    exact.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    x = torch.randn(1, 300, WIDTH).to(dtype)
    x[..., 0] = 1
    found, wanted = [], []
    for each, into in ((block, found), (exact, wanted)):
        given = x.detach().to(each.in_proj.weight.dtype).requires_grad_()
        with ops.use("chunked"):
            y = each(given).y
            into += [y, *torch.autograd.grad(y.double().square().sum(), [given, *each.parameters()])]
    names = ["y", "x", *(name for name, _ in block.named_parameters())]
    for name, a, b in zip(names, found, wanted, strict=True):
        assert a.isfinite().all(), name
        size = max(b.norm().item(), 1e-3 * wanted[0].norm().item())  # gradients of a saturated gate are all but 0
        error = (a.double() - b).norm().item() / size
        assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"{name}: {error}"


def test_it_never_forgets_faster_than_its_bound():
    block = zoo.block("hgrn2", WIDTH, lower_bound=0.75).double()
    log_f, k = block.gates(torch.full((1, 1, WIDTH), -1e4, dtype=torch.float64))
    torch.testing.assert_close(log_f.exp(), torch.full_like(log_f, 0.75))
    torch.testing.assert_close(k, torch.full_like(k, 0.25))


def test_a_models_bounds_start_where_the_papers_do():
    """The softmax over layers of equal numbers, added up from the second layer on (HGRN, 2311.04823)."""
    layers = 5
    model = zoo.LanguageModel(
        {"vocab_size": 7, "width": WIDTH, "stack": [{"repeat": layers, "blocks": ["hgrn2", "swiglu"]}]}
    )
    share = torch.zeros(layers, WIDTH).softmax(0)
    wanted = share.cumsum(0) - share[0]
    mixers = [each.block for each in model.residuals[::2]]
    assert mixers[0].lower_bound is None
    found = torch.stack([torch.sigmoid(each.lower_bound) for each in mixers[1:]])
    torch.testing.assert_close(found, wanted[1:])
    assert not tags(mixers[1])["lower_bound"].weight_decay


def test_its_sizes():
    block = zoo.block("hgrn2", 1024)
    assert (block.head_dim, block.heads) == (128, 8)
    assert sum(p.numel() for p in block.parameters()) == 4 * 1024**2 + 1024
    assert [zoo.block("hgrn2", width).head_dim for width in (1, 2, 7, 24, 300)] == [1, 1, 1, 12, 100]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, "head_dim=5 must divide width=12; try 1"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"lower_bound": 1.0}, r"lower_bound=1.0 must be in \[0, 1\)"),
        ({"lower_bound": "0"}, "lower_bound='0' is text"),
        ({"layer": 3, "layers": 3}, r"layer=3 must be in \[0, layers=3\); count layers from 0"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must not be negative"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("hgrn2", WIDTH, **options)
