"""The gated delta rule (Gated DeltaNet)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import logsigmoid, normalize

import ops
from benchmarks.gpu.checking import Part, same
from benchmarks.gpu.contest import BOTH, FORWARD, Contestant, Task, rows_of
from benchmarks.gpu.linear_attention import CHUNK, shapes
from benchmarks.gpu.peers import FLA, peer
from benchmarks.gpu.setting import Setting, Work


def rows(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    return rows_of(tasks(setting), setting)


def tasks(setting: Setting) -> Iterator[Task]:
    for batch, time, heads, d in shapes(setting):
        values = batch * time * heads * d
        moved = values * torch.finfo(setting.dtype).bits // 8
        gates = Work(2 * 4 * values // d, special=values // d)
        flops = values * (6 * d + 7 * CHUNK)
        forward = Work(4 * moved, flops) + gates
        backward = Work(7 * moved, 2 * flops) + gates + gates

        def ours(impl: str = "auto", scale: float = d**-0.5, **given: Any) -> Any:
            return ops.delta_rule(**given, scale=scale, impl=impl)[0]

        def theirs(function: Any, scale: float = d**-0.5) -> Contestant:
            return Contestant(
                lambda q, k, v, beta, log_decay: function(q, k, v, g=log_decay, beta=beta, scale=scale)[0]
            )

        yield Task(
            "delta_rule, gated",
            f"batch {batch}, time {time}, heads {heads}, d {d}",
            "forward and forward+backward >= 1.3 times flash-linear-attention",
            {
                "q": normalize(setting.normal(batch, time, heads, d), dim=-1),
                "k": normalize(setting.normal(batch, time, heads, d), dim=-1),
                "v": setting.normal(batch, time, heads, d),
                "beta": setting.normal(batch, time, heads).sigmoid(),
                "log_decay": logsigmoid(setting.normal(batch, time, heads, dtype=torch.float32) + 3),
            },
            {"zoo": Contestant(ours), FLA: peer("fla.ops.gated_delta_rule:chunk_gated_delta_rule", theirs)},
            {FORWARD: forward, BOTH: forward + backward},
            Part(
                same("batch time heads d", "q", "k", "v", "out") | same("batch time heads", "beta", "log_decay"),
                lambda run=ours, **given: run("reference", **given),
            ),
        )
