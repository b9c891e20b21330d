"""The short causal convolution."""

from collections.abc import Iterator
from typing import Any

import torch

import ops
from benchmarks.gpu.checking import Part
from benchmarks.gpu.contest import BACKWARD, BOTH, FORWARD, Contestant, Inputs, Task, rows_of
from benchmarks.gpu.peers import FLA, peer
from benchmarks.gpu.setting import Setting, Work


def rows(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    return rows_of(tasks(setting), setting)


def tasks(setting: Setting) -> Iterator[Task]:
    time, channels, taps = setting.size(16384, 200), setting.size(12288, 40), 4
    x = setting.normal(1, time, channels)
    size, values = x.element_size(), x.numel()
    forward = Work(2 * values * size, special=values)
    backward = Work(3 * values * size, special=values)

    def ours(x: Any, weight: Any, bias: Any, impl: str = "auto") -> Any:
        return ops.causal_conv1d(x, weight, bias, activation="silu", impl=impl)[0]

    yield Task(
        "causal_conv1d, silu",
        f"batch 1, time {time}, channels {channels}, taps {taps}",
        "forward >= 85% of bandwidth, backward >= 65%, >= 1.2 times flash-linear-attention",
        {"x": x, "weight": setting.normal(channels, taps) / 2, "bias": setting.normal(channels)},
        {
            "zoo": Contestant(ours),
            FLA: peer(
                "fla.modules.causal_conv1d:causal_conv1d",
                lambda f: Contestant(lambda x, weight, bias: f(x, weight, bias, activation="silu")[0]),
            ),
            "causal-conv1d": peer("causal_conv1d:causal_conv1d_fn", _package),
            "F.conv1d": Contestant(_plain, _channels_first, lambda y: y.transpose(1, 2)),
        },
        {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward},
        Part(
            {"x": "batch time channels", "weight": "channels taps", "bias": "channels", "out": "batch time channels"},
            lambda **given: ours(**given, impl="reference"),
        ),
    )


def _package(function: Any) -> Contestant:
    """The package's [batch, channels, time] may be strided as ours is, which its kernel for that layout takes."""

    def run(x: Any, weight: Any, bias: Any) -> Any:
        return function(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    return Contestant(run)


def _channels_first(inputs: Inputs) -> Inputs:
    return inputs | {"x": inputs["x"].transpose(1, 2).contiguous(), "weight": inputs["weight"][:, None].contiguous()}


def _plain(x: Any, weight: Any, bias: Any) -> Any:
    y = torch.nn.functional.conv1d(x, weight, bias, padding=weight.shape[2] - 1, groups=weight.shape[0])
    return torch.nn.functional.silu(y[..., : x.shape[2]])
