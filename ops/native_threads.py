"""Runs a numba kernel over independent pieces of work on torch's number of threads.

The kernels are compiled with `nogil=True` and split by rows and channels here, instead of numba's `parallel=True`,
whose own threads would fight torch's for the same cores. Other threads than torch's would do that too: those of GNU
OpenMP, which torch's operations run on, go on spinning for milliseconds when an operation has ended, so that a thread
beside them gets half a core. So the work is done on that team itself, which is awake already. Where torch has another
OpenMP, or none, and in a forked child, where the team is gone, a pool of Python threads does it.
"""

import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}
_forked = False


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="zoo-native")
        return _pools[threads]


def _forget() -> None:
    """A forked child has the pools' objects and none of their threads: waiting for them would never end."""
    global _lock, _forked
    _lock, _forked = threading.Lock(), True
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


_jobs: dict[int, Callable[[], None]] = {}
_numbers = itertools.count(1)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _work(number: int) -> None:
    """What each thread of the team calls."""
    _jobs[number]()


@functools.cache
def _parallel() -> Callable[..., None] | None:
    """GNU OpenMP's entry to a parallel region, of the library that torch is linked with: GOMP_parallel(function, its
    argument, threads, flags), which compilers emit for `#pragma omp parallel`."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so*"):
        try:
            found = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return found
    return None


def _on_all(work: Callable[[], None], threads: int) -> None:
    """Call `work`, which must not raise, on so many threads at the same time, this one among them."""
    parallel = None if _forked else _parallel()
    if parallel is None:
        waiting = [_pool(threads).submit(work) for _ in range(threads - 1)]
        work()
        for each in waiting:
            each.result()
        return
    number = next(_numbers)
    _jobs[number] = work
    try:
        parallel(_work, number, threads, 0)
    finally:
        del _jobs[number]


def even_tile(channels: int, batch: int, most: int) -> int:
    """Into how many channels to cut each of `batch` rows, at most so many: tasks alike, and one for every thread of
    torch's at least. A multiple of the 16 numbers that a vector holds, if there are as many."""
    tiles = max(-(-channels // most), -(-torch.get_num_threads() // max(batch, 1)))
    return min(most, channels, -(-channels // (tiles * 16)) * 16)


def run_blocks(function: Callable[..., Any], count: int, *arguments: Any, pieces: int = 4) -> None:
    """Call `function(start, stop, *arguments)` until [0, count) is covered, on `torch.get_num_threads()` threads.

    `function` must release the GIL and write to places of its own for each index. `pieces` is how many ranges each
    thread gets on average: several, since another process may hold a core up. The calling thread takes its share while
    the others wake up; with one thread, or one index, it does all. An error in any piece is raised here, after the
    others ended.
    """
    threads = torch.get_num_threads()
    if threads == 1 or count <= 1:
        if count > 0:
            function(0, count, *arguments)
        return
    ranges = min(count, threads * pieces)
    bounds = [count * i // ranges for i in range(ranges + 1)]
    turns = itertools.count()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while (turn := next(turns)) < ranges:
                function(bounds[turn], bounds[turn + 1], *arguments)
        except BaseException as error:
            errors.append(error)

    # The whole team, even for fewer pieces: GNU OpenMP ends the threads that a smaller region leaves out.
    _on_all(work, threads)
    if errors:
        raise errors[0]
