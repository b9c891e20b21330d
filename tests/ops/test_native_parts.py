"""What native kernels share: the thread pool and the exponential that vectorises."""

import multiprocessing
import threading
import time

import numpy as np
import pytest
import torch

from ops import native_products, native_threads
from ops.native_math import exp
from ops.native_products import multiply
from ops.native_threads import run_blocks


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["team", "pool"])
def threads(request, two_threads, monkeypatch):
    """Torch's own threads, and those that stand in for them."""
    monkeypatch.setattr(native_threads, "_forked", request.param == "pool")
    return request.param


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_every_index_once(count, threads):
    seen = np.zeros(count, int)

    def mark(begin, end, amount):
        seen[begin:end] += amount

    run_blocks(mark, count, 3)
    assert (seen == 3).all()


def test_the_caller_and_another_thread_share_the_work(threads):
    both, names = threading.Barrier(2, timeout=60), []

    def meet(begin, end):
        both.wait()
        names.append(threading.current_thread().name)

    run_blocks(meet, 2)
    assert len(names) == 2
    assert threading.current_thread().name in names
    pooled = sum(name.startswith("zoo-native") for name in names)
    assert pooled == (threads == "pool" or native_threads._parallel() is None)


@pytest.mark.skipif("GCC" not in torch.__config__.show(), reason="this torch was not built by GCC")
def test_torch_lends_its_team():
    assert native_threads._parallel() is not None


def test_several_callers_at_once(threads):
    """Each caller has a team of its own."""
    totals = []

    def call():
        torch.set_num_threads(2)
        seen = np.zeros(50, int)

        def mark(begin, end):
            seen[begin:end] += 1

        for _ in range(20):
            run_blocks(mark, 50)
        totals.append((seen == 20).all())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(60)
    assert totals == [True] * 4
    assert not native_threads._jobs


@pytest.mark.parametrize("where", ["here", "there"])
def test_an_error_reaches_the_caller_when_all_have_ended(where, threads):
    both, ended = threading.Barrier(2, timeout=60), []

    def fail(begin, end):
        both.wait()
        if (threading.current_thread() is threading.main_thread()) == (where == "here"):
            raise ArithmeticError("a piece")
        time.sleep(0.05)
        ended.append(begin)

    with pytest.raises(ArithmeticError, match="a piece"):
        run_blocks(fail, 2, pieces=1)
    assert len(ended) == 1


def _sum_in_child(results):
    torch.set_num_threads(2)
    parts = []
    run_blocks(lambda begin, end: parts.append(sum(range(begin, end))), 10)
    results.put(sum(parts))


def test_works_in_a_forked_child(two_threads):
    """The parent's pool has no threads in a child: waiting for it would never end."""
    run_blocks(lambda begin, end: None, 8)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_sum_in_child, args=(results,))
    child.start()
    try:
        assert results.get(timeout=60) == 45
    finally:
        child.join(10)
        child.kill()


def test_exp():
    from numba import njit

    @njit(error_model="numpy")
    def all_of(x):
        out = np.empty_like(x)
        for i in range(len(x)):
            out[i] = exp(x[i])
        return out

    x = np.linspace(-87, 87, 100_001).astype(np.float32)
    wanted = np.exp(x.astype(np.float64))
    assert np.abs(all_of(x) / wanted - 1).max() < 2 * 2**-23
    edges = all_of(np.array([-np.inf, -200, 0, np.inf, np.nan], np.float32))
    assert edges[:3].tolist() == [0, 0, 1]
    assert edges[3] > 1e38
    assert np.isnan(edges[4])
    np.testing.assert_allclose(all_of(np.array([-700.0, 1.5])), np.exp([-700.0, 1.5]), rtol=1e-15)


def jobs(sizes, dtype, k=130, n=257):
    return [
        (torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype).mT, torch.empty(m, n, dtype=dtype))
        for m in sizes
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[], [3], [1, 2, 3], [300, 1, 700, 64, 65], [2000, 5], [700] * 3])
def test_products_are_those_of_mm(sizes, dtype, threads, monkeypatch):
    """Large jobs are divided, small ones go to whom is free, and each thread writes only what is its own."""
    monkeypatch.setattr(native_products, "SMALL", 0)
    given = jobs(sizes, dtype)
    multiply(given)
    for left, right, out in given:
        expected = left.double() @ right.double()
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_products_in_every_mode(mode, threads, monkeypatch):
    """Modes are a thread's own: the other one has the caller's, and no gradients."""
    monkeypatch.setattr(native_products, "SMALL", 0)
    with mode():
        given = jobs([40] * 9, torch.float32)
    with torch.no_grad() if mode is torch.enable_grad else mode():
        multiply([(left, right.requires_grad_(mode is torch.enable_grad), out) for left, right, out in given])
    for left, right, out in given:
        torch.testing.assert_close(out, (left @ right).detach(), rtol=1e-5, atol=1e-5)
        assert not out.requires_grad


def test_products_leave_the_number_of_threads(threads, monkeypatch):
    """MKL's for the calling thread is what it was."""
    tell = native_products._local()
    if tell is None:
        pytest.skip("this torch has no MKL")
    monkeypatch.setattr(native_products, "SMALL", 0)
    before = tell(0)
    multiply(jobs([30] * 5, torch.float32))
    assert tell(before) == 0


@pytest.mark.parametrize(
    ("channels", "batch", "tile"), [(1536, 1, 768), (1280, 2, 640), (1024, 3, 1024), (24, 1, 16), (7, 1, 7)]
)
def test_tasks_of_channels_are_alike(channels, batch, tile, two_threads):
    assert native_threads.even_tile(channels, batch, 1024) == tile
