"""grouped_mm: every implementation against a product a group, in values and all gradients."""

import itertools

import pytest
import torch

import ops
from ops import grouped_mm

IMPLEMENTATIONS = ["reference", "chunked", "torch", "triton"]
# sizes, rows: ragged; with empty groups at the ends and inside; all rows in one; none in any; rows behind.
DIVISIONS = {
    "ragged": ([5, 40, 1, 23], 69),
    "empty": ([0, 7, 0, 30, 0], 37),
    "one": ([0, 70, 0], 70),
    "none": ([0, 0], 3),
    "behind": ([4, 0, 33], 45),
    "no rows": ([0, 0], 0),
    "one group": ([9], 9),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.3}


def make(rows, sizes, k=16, n=40, dtype=torch.float64):
    x = torch.randn(rows, k, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(len(sizes), k, n, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, torch.tensor(sizes)


def by_mask(x, weight, sizes):
    """An independent formula: every row times every matrix, and a mask."""
    group = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    mask = torch.zeros(len(x), len(sizes), dtype=x.dtype)
    mask[torch.arange(len(group)), group] = 1
    return torch.einsum("mg,mk,gkn->mn", mask, x, weight)


def with_gradients(function, x, weight, direction):
    y = function(x, weight)
    return y, *torch.autograd.grad((y * direction).sum(), (x, weight))


def fits(impl, dtype):
    return not (impl == "torch" and dtype == torch.float64)


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_values_and_gradients(impl, division):
    sizes, rows = DIVISIONS[division]
    dtype = torch.float64 if fits(impl, torch.float64) else torch.float32
    if impl == "torch" and rows == 0:
        x, weight, sizes = make(rows, sizes, dtype=dtype)
        with pytest.raises(RuntimeError, match="empty product"):
            grouped_mm(x, weight, sizes, impl=impl)
        return
    x, weight, sizes = make(rows, sizes, dtype=dtype)
    direction = torch.randn(rows, 40, dtype=dtype)
    wanted = with_gradients(lambda x, w: by_mask(x, w, sizes), x, weight, direction)
    found = with_gradients(lambda x, w: grouped_mm(x, w, sizes, impl=impl), x, weight, direction)
    for name, each, other in zip(("y", "x", "weight"), found, wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=0, atol=TOLERANCE[dtype], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["chunked", "torch", "triton"])
def test_lower_precision(impl, dtype):
    x, weight, sizes = make(60, [20, 0, 35], dtype=dtype)
    direction = torch.randn(60, 40, dtype=dtype)
    wanted = with_gradients(lambda x, w: by_mask(x.double(), w.double(), sizes), x, weight, direction)
    found = with_gradients(lambda x, w: grouped_mm(x, w, sizes, impl=impl), x, weight, direction)
    for each, other in zip(found, wanted, strict=True):
        assert each.dtype == dtype
        torch.testing.assert_close(each.double(), other.double(), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_behind_are_never_read(impl):
    """NaN in them, and in the gradient that comes back at them, touches nothing."""
    dtype = torch.float64 if fits(impl, torch.float64) else torch.float32
    x, weight, sizes = make(40, [11, 0, 20], dtype=dtype)
    dirty = x.detach().clone()
    dirty[31:] = torch.nan
    dirty.requires_grad_()
    y = grouped_mm(dirty, weight, sizes, impl=impl)
    assert torch.equal(y[31:], torch.zeros(9, 40, dtype=dtype))
    direction = torch.randn(40, 40, dtype=dtype)
    direction[31:] = torch.nan
    to_x, to_weight = torch.autograd.grad(y, (dirty, weight), direction)
    assert torch.equal(to_x[31:], torch.zeros(9, 16, dtype=dtype))
    wanted = torch.autograd.grad(by_mask(x, weight, sizes)[:31], (x, weight), direction[:31])
    torch.testing.assert_close(to_x, wanted[0], rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(to_weight, wanted[1], rtol=0, atol=TOLERANCE[dtype])


def test_kernels_in_many_tiles():
    """Several tiles along every side, none of them full at the end, forward and both gradients."""
    import triton

    from ops.grouped_mm.triton import launch_outer, launch_rows

    config = triton.Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}, num_warps=4, num_stages=2)
    x, weight, sizes = make(71, [35, 0, 16, 17], k=37, n=21)
    y = torch.randn(71, 21, dtype=torch.float64)
    to_x, to_weight = torch.autograd.grad(by_mask(x, weight, sizes), (x, weight), y)
    x, weight = x.detach(), weight.detach()
    if torch.cuda.is_available():
        x, weight, sizes, y = (each.cuda() for each in (x, weight, sizes, y))
    for found, wanted in (
        (launch_rows(x, weight, sizes, config), by_mask(*(each.cpu() for each in (x, weight, sizes)))),
        (launch_rows(y, weight.transpose(1, 2), sizes, config), to_x),
        (launch_outer(x, y, sizes, config), to_weight),
    ):
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["chunked", "torch", "triton"])
def test_any_strides(impl):
    """Transposed, sliced and expanded operands."""
    dtype = torch.float64 if fits(impl, torch.float64) else torch.float32
    x = torch.randn(16, 30, dtype=dtype).T  # column-major
    weight = torch.randn(3, 40, 40, dtype=dtype)[:, 3:35, 4:20].transpose(1, 2)  # [3, 16, 32], odd storage offset
    sizes = torch.tensor([10, 20, 0])
    torch.testing.assert_close(
        grouped_mm(x, weight, sizes, impl=impl), by_mask(x, weight, sizes), rtol=0, atol=TOLERANCE[dtype]
    )
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    found = torch.autograd.grad(grouped_mm(x, weight, sizes, impl=impl).sum(), (x, weight))  # a gradient of stride 0
    wanted = torch.autograd.grad(by_mask(x, weight, sizes).sum(), (x, weight))
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=0, atol=TOLERANCE[dtype])


def test_second_derivatives_numerically():
    x, weight, sizes = make(7, [3, 0, 2], k=3, n=2)
    function = lambda x, weight: grouped_mm(x, weight, sizes, impl="chunked")  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_second_derivatives(impl):
    """The gradient of a gradient's norm, against torch's own."""
    x, weight, sizes = make(40, [11, 0, 20])
    second = {}
    for name, function in (
        ("wanted", lambda x, w: by_mask(x, w, sizes)),
        ("found", lambda x, w: grouped_mm(x, w, sizes, impl=impl)),
    ):
        first = torch.autograd.grad(function(x, weight).pow(3).sum(), (x, weight), create_graph=True)
        second[name] = torch.autograd.grad(sum(each.square().sum() for each in first), (x, weight))
    for found, wanted in zip(second["found"], second["wanted"], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["auto", "chunked", "triton"])
def test_registered_for_compile(impl):
    """Fake tensors, autograd and aliasing of the custom op; and a graph without a break, forward and backward."""
    x, weight, sizes = make(12, [5, 0, 4], k=4, n=6)
    if impl != "auto":
        grouped_mm(x, weight, sizes, impl=impl)  # registers the op
        op = getattr(torch.ops.zoo, f"grouped_mm_{impl}").default
        torch.library.opcheck(op, (x, weight, sizes))
        torch.library.opcheck(
            getattr(torch.ops.zoo, f"grouped_mm_{impl}_outer").default, (x, torch.randn(12, 6).to(x), sizes)
        )
    function = lambda x, w, sizes: grouped_mm(x, w, sizes, impl=impl).square()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for now in (sizes, torch.tensor([0, 12, 0])):
        found = torch.autograd.grad(compiled(x, weight, now).sum(), (x, weight))
        wanted = torch.autograd.grad(function(x, weight, now).sum(), (x, weight))
        for each, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(each, other, rtol=0, atol=1e-12)


def test_autocast():
    x, weight, sizes = make(20, [8, 12], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_mm(x, weight, sizes)
        assert y.dtype == (x @ weight[0]).dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert grad.dtype == torch.float32


def test_choice_on_the_cpu():
    x, weight, sizes = make(20, [8, 12], dtype=torch.float32)
    told = ops.explain(grouped_mm, x, weight, sizes)
    assert told.chosen == "chunked"
    assert set(told.refused) == {"triton", "torch"}
    with pytest.raises(RuntimeError, match="divisible by 4"):
        grouped_mm(x[:, :15], weight[:, :15], sizes, impl="torch")
    with pytest.raises(RuntimeError, match="float64"):
        grouped_mm(x.double(), weight.double(), sizes, impl="torch")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, w, s: (x[None], w, s), ValueError, r"x \(1, 20, 16\)"),
        (lambda x, w, s: (x[:, 1:], w, s), ValueError, r"k=15 columns.*k=16.*transpose"),
        (lambda x, w, s: (x, w, s[:1]), ValueError, "1 sizes for 2 groups"),
        (lambda x, w, s: (x, w, s.double()), TypeError, "integers"),
        (lambda x, w, s: (x, w.float(), s), TypeError, "one dtype"),
        (lambda x, w, s: (x.long(), w, s), TypeError, "floating point"),
        (lambda x, w, s: (x, w, s + 1), ValueError, "sum to 22, but x has 20 rows"),
        (lambda x, w, s: (x, w, s - 10), ValueError, "negative"),
        (lambda x, w, s: (x, w.to("meta"), s), ValueError, "weight on meta"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        grouped_mm(*change(*make(20, [8, 12])))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_configuration_on_a_gpu(dtype):
    """Values of both kernels in every autotune configuration."""
    from ops.grouped_mm.triton import OUTER_CONFIGS, ROWS_CONFIGS, launch_outer, launch_rows

    sizes = torch.tensor([130, 0, 1, 77, 300]).cuda()
    x = torch.randn(531, 136, device="cuda", dtype=dtype)
    weight = torch.randn(5, 136, 200, device="cuda", dtype=dtype)
    y = torch.randn(531, 200, device="cuda", dtype=dtype)
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.5}[dtype]
    for config in ROWS_CONFIGS:
        found = launch_rows(x, weight, sizes, config).double()
        wanted = grouped_mm(x.double(), weight.double(), sizes, impl="reference")
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance, msg=lambda m, c=config: f"{c}: {m}")
    for config in OUTER_CONFIGS:
        found = launch_outer(x, y, sizes, config).double()
        pairs = list(itertools.pairwise([0, *sizes.cumsum(0).tolist()]))
        wanted = torch.stack([x[a:b].double().T @ y[a:b].double() for a, b in pairs])
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance, msg=lambda m, c=config: f"{c}: {m}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", range(6))
def test_gradients_of_every_configuration_on_a_gpu(monkeypatch, number, dtype):
    """The same kernels on what the backward pass hands them: matrices read transposed."""
    import triton

    from ops.grouped_mm import triton as ours

    rows, outers = ours.ROWS_CONFIGS, ours.OUTER_CONFIGS
    assert max(len(rows), len(outers)) == 6
    for name, configs, kernel in (("_rows", rows, ours.rows_kernel), ("_outer", outers, ours.outer_kernel)):
        chosen = configs[number % len(configs)]
        monkeypatch.setattr(ours, f"{name}_tuned", triton.autotune([chosen], key=[])(kernel))
    x, weight, sizes = make(531, [130, 0, 1, 77, 300], k=136, n=200, dtype=dtype)
    direction = torch.randn(531, 200, dtype=dtype)
    wide = x.double().detach().requires_grad_(), weight.double().detach().requires_grad_()
    wanted = with_gradients(lambda x, w: grouped_mm(x, w, sizes, impl="reference"), *wide, direction.double())
    placed = x.detach().cuda().requires_grad_(), weight.detach().cuda().requires_grad_()
    found = with_gradients(lambda x, w: grouped_mm(x, w, sizes.cuda(), impl="triton"), *placed, direction.cuda())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for each, other in zip(found, wanted, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(each.cpu().double(), other, rtol=0, atol=tolerance * scale)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_on_a_gpu(impl):
    x, weight, sizes = (each.detach().cuda() for each in make(512, [200, 0, 12, 250], k=64, n=128))
    direction = torch.randn(512, 128, device="cuda")
    x32, weight32 = x.float().requires_grad_(), weight.float().requires_grad_()
    run = lambda impl: lambda x, w: grouped_mm(x, w, sizes, impl=impl)  # noqa: E731
    found = with_gradients(run(impl), x32, weight32, direction)
    wanted = with_gradients(run("reference"), x.requires_grad_(), weight.requires_grad_(), direction.double())
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each.double(), other, rtol=0, atol=2e-3)
