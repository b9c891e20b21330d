"""Peak memory of sparse attention against T, forward and backward: `python -m benchmarks.sparse_memory`.

Each number is of a fresh process: the highest resident size during one forward and backward pass, less the size just
before it, so inputs are not counted and outputs and gradients are. CPU, float32, one thread. The peer is torch's
scaled_dot_product_attention with the streaming pattern as a boolean mask, up to the length where the mask alone is a
quarter of a GiB. Writes benchmarks/results/sparse_memory.json.
"""

import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import ops
from benchmarks.measure import RESULTS, machine

BATCH, HEADS, D = 1, 2, 32
TIMES = [1024 * 2**n for n in range(6)]
DENSE_MOST = 16384
WINDOW, SINKS = 256, 4
PATTERNS = {
    "streaming": {"kind": "streaming", "window": WINDOW, "sinks": SINKS},
    "longformer, bidirectional": {"kind": "longformer", "window": 256, "global_tokens": 16, "causal": False},
    "bigbird, bidirectional": {"kind": "bigbird", "causal": False},
    "fixed": {"kind": "fixed", "stride": 128, "summaries": 8},
    "strided": {"kind": "strided", "stride": 128},
}
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[1])
    distance = index[:, None] - index
    mask = (distance >= 0) & ((distance < WINDOW) | (index < SINKS))
    del distance
    return scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)), attn_mask=mask).transpose(1, 2)


def qkv(length: int) -> list[Tensor]:
    return [torch.randn(BATCH, length, HEADS, D).requires_grad_() for _ in range(3)]


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(run: Run, length: int, pipe: Connection) -> None:
    """In a process of its own: peak bytes and seconds of one forward and backward pass."""
    warm = qkv(80)  # what torch imports when first called is no memory of the op
    torch.autograd.grad(run(*warm).sum(), warm)
    inputs = qkv(length)
    before, started = resident(), time.perf_counter()
    torch.autograd.grad(run(*inputs).sum(), inputs)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send((peak - before, seconds))


def row(name: str, run: Run, length: int) -> dict:
    # A fork starts with what is imported, and its peak with what is resident then.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(run, length, theirs))
    process.start()
    theirs.close()
    peak, seconds = ours.recv()
    process.join()
    print(f"{name:28s} {length:6d} {peak / 2**20:9.1f} MiB {seconds:7.2f} s", flush=True)
    return {"method": name, "time": length, "peak_bytes": peak, "seconds": round(seconds, 3)}


def main() -> None:
    torch.set_num_threads(1)
    ops.sparse_attention(*qkv(80), PATTERNS["fixed"])  # forward only: a backward pass here would start threads
    rows = [row("sdpa with a mask", masked, length) for length in TIMES if length <= DENSE_MOST]
    for name, options in PATTERNS.items():
        run = lambda *a, o=options: ops.sparse_attention(*a, o)  # noqa: E731
        rows += [row(name, run, length) for length in TIMES]
    shape = {"batch": BATCH, "heads": HEADS, "d": D, "dtype": "float32", "patterns": PATTERNS}
    RESULTS.mkdir(exist_ok=True)
    found = {"machine": machine() | {"threads": 1}, "shape": shape, "rows": rows}
    (RESULTS / "sparse_memory.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
