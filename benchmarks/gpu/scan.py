"""Mamba's selective scan, and the plain linear recurrence."""

from collections.abc import Iterator
from typing import Any

import torch

import ops
from benchmarks.gpu.checking import Part, same
from benchmarks.gpu.contest import BOTH, FORWARD, Contestant, Inputs, Task, rows_of
from benchmarks.gpu.peers import peer
from benchmarks.gpu.setting import Setting, Work

STATES = 16
SHAPES = ((32, 2048), (4, 16384))  # batch, time: 65,536 tokens


def rows(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    return rows_of(tasks(setting), setting)


def tasks(setting: Setting) -> Iterator[Task]:
    for batch, time in [(2, 80)] if setting.smoke else SHAPES:
        yield _selective(setting, batch, time, setting.size(8192, 40))
    yield _linear(setting, setting.size(8, 2), setting.size(8192, 80), setting.size(4096, 40))


def _selective(setting: Setting, batch: int, time: int, channels: int) -> Task:
    wide = torch.float32

    def ours(impl: str = "auto", **given: Any) -> Any:
        return ops.selective_scan(**given, impl=impl)[0]

    x, z = setting.normal(batch, time, channels), setting.normal(batch, time, channels)
    values, size = x.numel(), x.element_size()
    exponentials = values * STATES + 2 * values  # of each state, and silu(z)
    shared = 2 * batch * time * STATES * size  # B and C
    forward = Work(4 * values * size + shared, special=exponentials)
    # Backward reads x, dt, z, dy, writes three gradients, and makes the states again.
    backward = Work(7 * values * size + 2 * shared, special=exponentials)
    dims = same("batch time channels", "x", "dt", "z", "out")
    dims |= {"A": "channels n", "B": "batch time n", "C": "batch time n", "D": "channels"}
    return Task(
        "selective_scan, D and z",
        f"batch {batch}, time {time}, channels {channels}, states {STATES}",
        "forward <= 5 ms, forward and forward+backward >= 1.5 times mamba-ssm's CUDA",
        {
            "x": x,
            "dt": (setting.uniform(batch, time, channels) * 0.1 + 0.001).to(setting.dtype),
            "A": -torch.arange(1.0, STATES + 1, device=setting.device).repeat(channels, 1),
            "B": setting.normal(batch, time, STATES),
            "C": setting.normal(batch, time, STATES),
            "D": setting.normal(channels, dtype=wide),
            "z": z,
        },
        {
            "zoo": Contestant(ours),
            "mamba-ssm": peer("mamba_ssm.ops.selective_scan_interface:selective_scan_fn", _mamba),
        },
        {FORWARD: forward, BOTH: forward + backward},
        Part(dims, lambda **given: ours("reference", **given)),
    )


def _mamba(function: Any) -> Contestant:
    def first(inputs: Inputs) -> Inputs:
        turned = {name: inputs[name].transpose(1, 2).contiguous() for name in ("x", "dt", "B", "C", "z")}
        return inputs | turned

    return Contestant(lambda x, dt, A, B, C, D, z: function(x, dt, A, B, C, D, z), first, _turned)


def _turned(y: torch.Tensor) -> torch.Tensor:
    return y.transpose(1, 2)


def _linear(setting: Setting, batch: int, time: int, channels: int) -> Task:
    def ours(x: Any, a: Any, impl: str = "auto") -> Any:
        return ops.linear_recurrence(x, a, impl=impl)[0]

    x = setting.normal(batch, time, channels)
    moved = x.numel() * x.element_size()
    forward, backward = Work(3 * moved), Work(5 * moved)  # x, a, h; dh, a, h, dx, da
    return Task(
        "linear_recurrence",
        f"batch {batch}, time {time}, channels {channels}",
        "none; ahead of accelerated-scan",
        {"x": x, "a": setting.uniform(batch, time, channels) * 0.2 + 0.79},
        {"zoo": Contestant(ours), "accelerated-scan": peer("accelerated_scan.scalar:scan", _accelerated)},
        {FORWARD: forward, BOTH: forward + backward},
        Part(
            same("batch time channels", "x", "a", "out"),
            lambda **given: ours(**given, impl="reference"),
        ),
    )


def _accelerated(function: Any) -> Contestant:
    def first(inputs: Inputs) -> Inputs:
        return {name: each.transpose(1, 2).contiguous() for name, each in inputs.items()}

    return Contestant(lambda x, a: function(a, x), first, _turned)
