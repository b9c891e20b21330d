"""What native kernels share: the thread pool and the exponential that vectorises."""

import multiprocessing
import threading
import time

import numpy as np
import pytest
import torch

from ops.native_math import exp
from ops.native_threads import run_blocks


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_every_index_once(count, two_threads):
    seen = np.zeros(count, int)

    def mark(begin, end, amount):
        seen[begin:end] += amount

    run_blocks(mark, count, 3)
    assert (seen == 3).all()


def test_the_caller_and_another_thread_share_the_work(two_threads):
    both, names = threading.Barrier(2, timeout=60), []

    def meet(begin, end):
        both.wait()
        names.append(threading.current_thread().name)

    run_blocks(meet, 2)
    assert len(names) == 2
    assert threading.current_thread().name in names
    assert sum(name.startswith("zoo-native") for name in names) == 1


@pytest.mark.parametrize("where", ["here", "there"])
def test_an_error_reaches_the_caller_when_all_have_ended(where, two_threads):
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
