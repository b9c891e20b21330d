"""linear: the native way for few rows against the sum as it is written, and when it is taken."""

import importlib

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ops
from ops import native_threads

ROWS = [(1,), (1, 1), (2,), (3,), (2, 2), ()]


def close(found, wanted, dtype):
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_every_implementation_is_the_sum(rows, dtype, biased):
    if dtype == torch.bfloat16 and rows in ((3,), (2, 2)):
        rows = (2,)
    x, weight = torch.randn(*rows, 37).to(dtype), torch.randn(23, 37).to(dtype)
    bias = torch.randn(23).to(dtype) if biased else None
    wanted = ops.linear(x.double(), weight.double(), None if bias is None else bias.double(), impl="reference")
    for impl in ("native", "torch", "auto"):
        close(ops.linear(x, weight, bias, impl=impl), wanted, dtype)


@pytest.mark.parametrize("team", [True, False], ids=["team", "pool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_are_shared_out_to_threads(dtype, team, monkeypatch):
    monkeypatch.setattr(importlib.import_module("ops.linear.native"), "LARGE", 1)
    monkeypatch.setattr(native_threads, "_forked", not team)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, weight = torch.randn(1, 19).to(dtype), torch.randn(3461, 19).to(dtype)
        close(ops.linear(x, weight, impl="native"), x.double() @ weight.double().mT, dtype)
    finally:
        torch.set_num_threads(before)


def test_what_x_is_made_of_does_not_matter():
    """Rows that are not contiguous, and NaN and infinity where they belong."""
    x, weight = torch.randn(37, 3).mT, torch.randn(5, 37)
    close(ops.linear(x, weight, impl="native"), x.double() @ weight.double().mT, torch.float32)
    weight[1, 2], weight[3, 4] = float("nan"), float("inf")
    y = ops.linear(x[:1].abs(), weight, impl="native")[0]
    assert y.isnan().tolist() == [False, True, False, False, False]
    assert y.isinf().tolist() == [False, False, False, True, False]


SIZE = 257  # squared: just above the size from which auto takes it


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rows": 5}, "is for up to 4 rows of torch.float32, got 5"),
        ({"rows": 3, "dtype": torch.bfloat16}, "is for up to 2 rows of torch.bfloat16, got 3"),
        ({"dtype": torch.float64}, "takes float32 or bfloat16, alike"),
        ({"weight": torch.randn(SIZE, SIZE).mT}, "needs a contiguous weight"),
        ({"weight": torch.randn(SIZE, SIZE, dtype=torch.bfloat16)}, "alike, got torch.float32 and torch.bfloat16"),
        ({"bias": torch.randn(SIZE, dtype=torch.float64)}, "takes a plain bias of the weight's dtype"),
    ],
)
def test_why_native_is_not_taken(options, reason):
    x = torch.randn(options.get("rows", 1), SIZE, dtype=options.get("dtype"))
    weight = options.get("weight", torch.randn(SIZE, SIZE, dtype=options.get("dtype")))
    told = ops.explain(ops.linear, x, weight, options.get("bias"))
    assert told.chosen == "torch"
    assert reason in told.refused["native"]
    with pytest.raises(RuntimeError, match="native: "):
        ops.linear(x, weight, options.get("bias"), impl="native")


def test_small_products_gradients_and_autocast_are_left_to_torch():
    x, weight = torch.randn(1, SIZE), nn.Parameter(torch.randn(SIZE, SIZE))
    with torch.no_grad():
        assert ops.explain(ops.linear, x, weight).chosen == "native"
        assert "gains nothing below" in ops.explain(ops.linear, x[:, :9], weight[:, :9].contiguous()).refused["native"]
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in ops.explain(ops.linear, x, weight).refused["native"]
            assert ops.linear(x, weight).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as count:
            ops.linear(x, weight)
        assert count.get_total_flops() == 2 * SIZE**2
    assert "has no gradient" in ops.explain(ops.linear, x, weight).refused["native"]
    ops.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.expand(SIZE, SIZE))


def test_compiled_graphs_take_torch_in_one_graph():
    x, weight = torch.randn(1, SIZE), torch.randn(SIZE, SIZE)
    compiled = torch.compile(lambda *a: ops.linear(*a), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight), x @ weight.mT)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(5, 4\)"):
        ops.linear(torch.randn(2, 3), torch.randn(5, 4))
