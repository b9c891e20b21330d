"""The gated long convolution of Hyena and H3, at short and middle lengths."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ops
from benchmarks.gpu.checking import Part, same
from benchmarks.gpu.contest import BOTH, FORWARD, Contestant, Task, rows_of
from benchmarks.gpu.setting import Setting, Work

LENGTHS = (1024, 4096, 8192)


def rows(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    return rows_of(tasks(setting), setting)


def tasks(setting: Setting) -> Iterator[Task]:
    batch, channels = setting.size(8, 2), setting.size(2048, 40)
    for time in [200] if setting.smoke else LENGTHS:
        x = setting.normal(batch, time, channels)
        moved, filters = x.numel() * x.element_size(), 4 * channels * time
        # Bytes alone: how many operations it takes is the method's own. x, gate, y; x, gate, dy, dx, dgate.
        forward, backward = Work(3 * moved + filters), Work(5 * moved + 2 * filters)

        def ours(impl: str = "auto", **given: Any) -> Any:
            return ops.long_conv(**given, impl=impl)

        decay = torch.exp(-torch.arange(time, device=setting.device) / (time / 4))
        yield Task(
            "long_conv, gated",
            f"batch {batch}, time {time}, channels {channels}, taps {time}",
            ">= 3 times torch.fft",
            {
                "x": x,
                "kernel": setting.normal(channels, time, dtype=torch.float32) * decay,
                "D": setting.normal(channels, dtype=torch.float32),
                "gate": setting.normal(batch, time, channels),
            },
            {"zoo": Contestant(ours), "torch.fft": Contestant(_transformed)},
            {FORWARD: forward, BOTH: forward + backward},
            Part(
                same("batch time channels", "x", "gate", "out") | {"kernel": "channels time", "D": "channels"},
                lambda run=ours, **given: run("reference", **given),
            ),
        )


def _transformed(x: Tensor, kernel: Tensor, D: Tensor, gate: Tensor) -> Tensor:
    """As it is usually written, with transforms of twice the length."""
    n, wide = 2 * x.shape[1], x.float().transpose(1, 2)
    y = torch.fft.irfft(torch.fft.rfft(wide, n) * torch.fft.rfft(kernel, n), n)[..., : x.shape[1]]
    return ((y + D[:, None] * wide).transpose(1, 2) * gate).to(x.dtype)
