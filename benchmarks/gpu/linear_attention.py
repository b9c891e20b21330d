"""Linear attention without a decay, with one a head, one a head and token, one a key channel and token."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import logsigmoid

import ops
from benchmarks.gpu.checking import Part, same
from benchmarks.gpu.contest import BOTH, FORWARD, Contestant, Task, rows_of
from benchmarks.gpu.peers import FLA, peer
from benchmarks.gpu.setting import Setting, Work

SHAPES = ((1, 8192, 96, 128), (2, 16384, 16, 128))  # batch, time, heads, channels of a key and of a value
CHUNK = 64  # tokens of a chunk, for the count of operations


def rows(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    return rows_of(tasks(setting), setting)


def shapes(setting: Setting) -> list[tuple[int, int, int, int]]:
    return [(1, 70, 3, 16)] if setting.smoke else list(SHAPES)


def tasks(setting: Setting) -> Iterator[Task]:
    for shape in shapes(setting):
        for name in ("no decay", "retention", "scalar gate", "key-channel gate"):
            yield _task(setting, name, *shape)


def _decay(setting: Setting, name: str, batch: int, time: int, heads: int, d: int) -> torch.Tensor | None:
    if name == "no decay":
        return None
    if name == "retention":
        return torch.log1p(-(2.0 ** -torch.linspace(5, 9, heads))).to(setting.device)
    if name == "scalar gate":
        return logsigmoid(setting.normal(batch, time, heads, dtype=torch.float32) + 3)
    return logsigmoid(setting.normal(batch, time, heads, d)) / 16  # as GLA's layer makes it, in its dtype


def peers(name: str, scale: float) -> Contestant | str:
    """flash-linear-attention's own function for each."""
    uses: dict[str, tuple[str, Callable[[Any], Callable[..., Any]]]] = {
        "no decay": (
            "fla.ops.linear_attn:chunk_linear_attn",
            lambda f: lambda q, k, v: f(q, k, v, scale=scale, normalize=False)[0],
        ),
        "retention": (
            "fla.ops.simple_gla:chunk_simple_gla",
            lambda f: lambda q, k, v, log_decay: f(q, k, v, g_gamma=log_decay, scale=scale)[0],
        ),
        "scalar gate": (
            "fla.ops.simple_gla:chunk_simple_gla",
            lambda f: lambda q, k, v, log_decay: f(q, k, v, g=log_decay, scale=scale)[0],
        ),
        "key-channel gate": (
            "fla.ops.gla:chunk_gla",
            lambda f: lambda q, k, v, log_decay: f(q, k, v, log_decay, scale=scale)[0],
        ),
    }
    place, use = uses[name]
    return peer(place, lambda f: Contestant(use(f)))


def work(setting: Setting, decay: torch.Tensor | None, batch: int, time: int, heads: int, d: int) -> dict[str, Work]:
    """4 d² operations a token and head for the state, and half the pairs of a chunk; exponentials of decays."""
    size = torch.finfo(setting.dtype).bits // 8
    values, gates = batch * time * heads * d, 0 if decay is None or decay.ndim == 1 else decay.numel()
    flops = batch * time * heads * (4 * d * d + 2 * CHUNK * d)
    gate_bytes = 0 if decay is None else gates * decay.element_size()
    forward = Work(4 * values * size + gate_bytes, flops, gates)
    backward = Work(7 * values * size + 2 * gate_bytes, 2 * flops, gates)  # q, k, v, dy; dq, dk, dv
    return {FORWARD: forward, BOTH: forward + backward}


def _task(setting: Setting, name: str, batch: int, time: int, heads: int, d: int) -> Task:
    decay = _decay(setting, name, batch, time, heads, d)
    inputs = {each: setting.normal(batch, time, heads, d) for each in ("q", "k", "v")}
    if decay is not None:
        inputs["log_decay"] = decay
    scale = d**-0.5

    def ours(impl: str = "auto", **given: Any) -> Any:
        return ops.linear_attention(**given, scale=scale, impl=impl)[0]

    dims = same("batch time heads d", "q", "k", "v", "out")
    ndim = 0 if decay is None else decay.ndim
    dims["log_decay"] = {0: "", 1: "heads", 3: "batch time heads", 4: "batch time heads d"}[ndim]
    return Task(
        f"linear_attention, {name}",
        f"batch {batch}, time {time}, heads {heads}, d {d}",
        "forward >= 1.5 times flash-linear-attention and >= 30% of the roof, forward+backward >= 1.3 times",
        inputs,
        {"zoo": Contestant(ours), FLA: peers(name, scale)},
        work(setting, decay, batch, time, heads, d),
        Part(dims, lambda **given: ours("reference", **given)),
        constants=("log_decay",) if name == "retention" else (),
    )
