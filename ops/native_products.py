"""Many small matrix products at once on a CPU: each on one thread, several threads beside each other.

A product of a hundred rows divided between threads spends a fifth of its time on waiting for them; two such products,
one a thread, do not wait. PyTorch's are divided by MKL, which can be told a number of threads for the calling one.
"""

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ops.native_threads import run_blocks

Job = tuple[Tensor, Tensor, Tensor]

SMALL = 2**24  # multiply-adds of all jobs: below, one thread is done before a second has started


@functools.cache
def _local() -> Callable[[int], int] | None:
    """MKL's `mkl_set_num_threads_local`, which gives the number before; None where PyTorch has no MKL or hides it."""
    if not torch.backends.mkl.is_available():
        return None
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.CDLL(str(path)).MKL_Set_Num_Threads_Local
    return None


@contextlib.contextmanager
def _alone(tell: Callable[[int], int]) -> Iterator[None]:
    before = tell(1)
    try:
        yield
    finally:
        tell(before)


def multiply(jobs: Sequence[Job]) -> None:
    """out = left @ right for every (left [m, k], right [k, n], out [m, n]) of `jobs`, of one dtype and device.

    Outputs must not overlap. Every number is the same whatever the number of threads.
    """
    if not jobs:
        return
    out = jobs[0][2]
    tell = _local() if out.device.type == "cpu" and out.dtype in (torch.float32, torch.float64) else None
    work = [left.shape[0] * left.shape[1] * right.shape[1] for left, right, _ in jobs]
    threads = torch.get_num_threads()
    if tell is None or threads == 1 or len(jobs) == 1 or sum(work) < SMALL:
        for left, right, result in jobs:
            torch.mm(left, right, out=result)
        return
    # The longest first and none longer than half a thread's share, so that all end together.
    pieces = [
        (amount / parts, left, right, result)
        for amount, job in zip(work, jobs, strict=True)
        for parts in (-(-2 * threads * amount // sum(work)),)
        for left, right, result in _divided(job, parts)
    ]
    pieces.sort(key=lambda piece: -piece[0])
    inference = torch.is_inference_mode_enabled()

    turns = itertools.count()

    def share(first: int, end: int) -> None:
        # Modes belong to a thread.
        with torch.inference_mode(inference), torch.no_grad(), _alone(tell):
            while (turn := next(turns)) < len(pieces):
                _, left, right, result = pieces[turn]
                torch.mm(left, right, out=result)

    run_blocks(share, threads, pieces=1)


def _divided(job: Job, parts: int) -> list[Job]:
    """The same product in so many, by rows."""
    if parts < 2:
        return [job]
    left, right, out = job
    rows = -(-len(left) // parts)
    return [(one, right, into) for one, into in zip(left.split(rows), out.split(rows), strict=True)]
