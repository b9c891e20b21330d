"""The recurrences of RWKV-4, 6 and 7."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import logsigmoid, normalize

import ops
from benchmarks.gpu.checking import Part, same
from benchmarks.gpu.contest import BOTH, FORWARD, Contestant, Inputs, Task, rows_of
from benchmarks.gpu.linear_attention import CHUNK
from benchmarks.gpu.peers import FLA, peer
from benchmarks.gpu.setting import Setting, Work

TARGET = ">= 1.5 times flash-linear-attention"


def rows(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    return rows_of(tasks(setting), setting)


def tasks(setting: Setting) -> Iterator[Task]:
    batch, time, heads, d = (2, 70, 3, 16) if setting.smoke else (8, 4096, 64, 64)
    yield _four(setting, batch, time, heads * d)
    yield _six(setting, batch, time, heads, d)
    yield _seven(setting, batch, time, heads, d)


def _four(setting: Setting, batch: int, time: int, channels: int) -> Task:
    def ours(k: Any, v: Any, log_decay: Any, bonus: Any, impl: str = "auto") -> Any:
        return ops.wkv(k, v, log_decay, bonus, impl=impl)[0]

    k, v = setting.normal(batch, time, channels), setting.normal(batch, time, channels)
    moved = k.numel() * k.element_size()
    forward, backward = Work(3 * moved, special=2 * k.numel()), Work(5 * moved, special=2 * k.numel())
    return Task(
        "wkv, RWKV-4",
        f"batch {batch}, time {time}, channels {channels}",
        TARGET,
        {
            "k": k,
            "v": v,
            "log_decay": -setting.normal(channels, dtype=torch.float32).exp(),
            "bonus": setting.normal(channels, dtype=torch.float32),
        },
        {"zoo": Contestant(ours), FLA: peer("fla.ops.rwkv4:fused_recurrent_rwkv4", _fla_four)},
        {FORWARD: forward, BOTH: forward + backward},
        Part(
            same("batch time channels", "k", "v", "out") | same("channels", "log_decay", "bonus"),
            lambda **given: ours(**given, impl="reference"),
        ),
    )


def _fla_four(function: Any) -> Contestant:
    """It takes the logarithm of -log_decay, and the state before the first token."""

    def prepare(inputs: Inputs) -> Inputs:
        k = inputs["k"]
        state = torch.zeros(k.shape[0], 3, 1, k.shape[2], device=k.device)
        state[:, 2] = -1e38
        return inputs | {"log_decay": (-inputs["log_decay"]).log(), "state": state}

    return Contestant(lambda k, v, log_decay, bonus, state: function(log_decay, bonus, k, v, state)[0], prepare)


def _gate(setting: Setting, *shape: int) -> torch.Tensor:
    """Log decays in the range of RWKV-7's: -e^-½ σ(·)."""
    return -0.6065 * setting.normal(*shape).sigmoid()


def _six(setting: Setting, batch: int, time: int, heads: int, d: int) -> Task:
    def ours(r: Any, k: Any, v: Any, w: Any, u: Any, impl: str = "auto") -> Any:
        return ops.linear_attention(r, k, v, w, bonus=u, impl=impl)[0]

    values = batch * time * heads * d
    moved = values * torch.finfo(setting.dtype).bits // 8
    flops = values * (4 * d + 2 * CHUNK)
    forward, backward = Work(5 * moved, flops, values), Work(9 * moved, 2 * flops, values)
    inputs = {each: setting.normal(batch, time, heads, d) for each in ("r", "k", "v")}
    inputs |= {"w": logsigmoid(setting.normal(batch, time, heads, d)) / 4, "u": setting.normal(heads, d)}

    def theirs(function: Any) -> Contestant:
        return Contestant(lambda r, k, v, w, u: function(r, k, v, w, u, scale=1.0)[0])

    return Task(
        "wkv, RWKV-6 (linear_attention with a bonus)",
        f"batch {batch}, time {time}, heads {heads}, d {d}",
        TARGET,
        inputs,
        {"zoo": Contestant(ours), FLA: peer("fla.ops.rwkv6:chunk_rwkv6", theirs)},
        {FORWARD: forward, BOTH: forward + backward},
        Part(
            same("batch time heads d", "r", "k", "v", "w", "out") | {"u": "heads d"},
            lambda **given: ours(**given, impl="reference"),
        ),
    )


def _seven(setting: Setting, batch: int, time: int, heads: int, d: int) -> Task:
    def ours(r: Any, w: Any, k: Any, v: Any, a: Any, b: Any, impl: str = "auto") -> Any:
        return ops.delta_rule(r, k, v, log_decay=w, erase=(a, b), impl=impl)[0]

    values = batch * time * heads * d
    moved = values * torch.finfo(setting.dtype).bits // 8
    flops = values * (10 * d + 9 * CHUNK)
    forward, backward = Work(7 * moved, flops, values), Work(13 * moved, 2 * flops, values)
    key = normalize(setting.normal(batch, time, heads, d), dim=-1)
    inputs = {each: setting.normal(batch, time, heads, d) for each in ("r", "k", "v")}
    inputs |= {"w": _gate(setting, batch, time, heads, d), "a": -key, "b": key * setting.normal(*key.shape).sigmoid()}

    def theirs(function: Any) -> Contestant:
        return Contestant(lambda r, w, k, v, a, b: function(r, w, k, v, a, b, scale=1.0)[0])

    return Task(
        "wkv, RWKV-7 (delta_rule that erases)",
        f"batch {batch}, time {time}, heads {heads}, d {d}",
        TARGET,
        inputs,
        {"zoo": Contestant(ours), FLA: peer("fla.ops.rwkv7:chunk_rwkv7", theirs)},
        {FORWARD: forward, BOTH: forward + backward},
        Part(
            same("batch time heads d", "r", "w", "k", "v", "a", "b", "out"),
            lambda **given: ours(**given, impl="reference"),
        ),
    )
