"""Runs a numba kernel over independent pieces of work on torch's number of threads.

The kernels are compiled with `nogil=True` and split by rows and channels here, on a persistent pool of Python threads,
instead of numba's `parallel=True`, whose own thread pool would fight torch's for the same cores and start at import.
"""

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="zoo-native")
        return _pools[threads]


def _forget() -> None:
    """A forked child has the pools' objects and none of their threads: waiting for them would never end."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run_blocks(function: Callable[..., Any], count: int, *arguments: Any, pieces: int = 4) -> None:
    """Call `function(start, stop, *arguments)` until [0, count) is covered, on `torch.get_num_threads()` threads.

    `function` must release the GIL and write to places of its own for each index. `pieces` is how many ranges each
    thread gets on average: several, since another process may hold a core up. The calling thread takes its share while
    the others wake up; with one thread, or one index, it does all. An error in any piece is raised here, after the
    others ended.
    """
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        if count > 0:
            function(0, count, *arguments)
        return
    ranges = min(count, threads * pieces)
    bounds = [count * i // ranges for i in range(ranges + 1)]
    turns = itertools.count()

    def work() -> None:
        while (turn := next(turns)) < ranges:
            function(bounds[turn], bounds[turn + 1], *arguments)

    pool = _pool(torch.get_num_threads())
    waiting = [pool.submit(work) for _ in range(threads - 1)]
    errors: list[BaseException | None] = []
    try:
        work()
    except BaseException as error:
        errors.append(error)
    errors += [each.exception() for each in waiting]
    for error in errors:
        if error is not None:
            raise error
