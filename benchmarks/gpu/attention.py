"""Attention over a sliding window, beside full causal attention."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import ops
from benchmarks.gpu.checking import Part, same
from benchmarks.gpu.contest import BOTH, FORWARD, Contestant, Task, rows_of
from benchmarks.gpu.peers import FLA, peer
from benchmarks.gpu.setting import Setting, Work


def rows(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    return rows_of(tasks(setting), setting)


def tasks(setting: Setting) -> Iterator[Task]:
    time, window = setting.size(32768, 300), setting.size(2048, 40)
    heads, d = setting.size(16, 3), setting.size(128, 16)
    tensors = {name: setting.normal(1, time, heads, d) for name in ("q", "k", "v")}
    moved = tensors["q"].numel() * tensors["q"].element_size()

    def work(seen: float) -> dict[str, Work]:
        flops = 4 * d * heads * seen
        forward, backward = Work(4 * moved, flops, heads * seen), Work(8 * moved, 2.5 * flops, heads * seen)
        return {FORWARD: forward, BOTH: forward + backward}

    def ours(window: int | None = window, impl: str = "auto") -> Any:
        return lambda q, k, v: ops.attention(q, k, v, window=window, impl=impl)

    dims = same("batch time heads d", "q", "k", "v", "out")
    whole = work(time * (time + 1) / 2)

    def full(run: Any) -> Contestant:
        return Contestant(run, work=whole, same=False)

    runs: dict[str, Contestant | str] = {"zoo": Contestant(ours())}
    if setting.gpu:  # auto may take another
        runs["zoo, Triton"] = Contestant(ours(impl="triton"))
    runs[f"{FLA}, window"] = peer(
        "fla.ops.attn:parallel_attn", lambda f: Contestant(lambda q, k, v: f(q, k, v, window_size=window))
    )
    runs["flash-attn, window"] = peer(
        "flash_attn:flash_attn_func",
        lambda f: Contestant(lambda q, k, v: f(q, k, v, causal=True, window_size=(window - 1, 0))),
    )
    runs["full causal: zoo"] = full(ours(None))
    runs["full causal: SDPA, flash"] = full(_sdpa(SDPBackend.FLASH_ATTENTION))
    runs["full causal: SDPA, cuDNN"] = full(_sdpa(SDPBackend.CUDNN_ATTENTION))
    yield Task(
        f"attention, window {window}",
        f"batch 1, time {time}, heads {heads}, d {d}",
        ">= 5 times full causal attention",
        tensors,
        runs,
        work(window * time - window * (window - 1) / 2),
        Part(dims, ours(impl="reference"), window=window, tokens=96),
    )


def _sdpa(backend: SDPBackend) -> Any:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (each.transpose(1, 2) for each in (q, k, v))
            y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2)

    return run
