"""A norm and a gate, at the end of most recurrent blocks."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

import ops
from benchmarks.gpu import checking
from benchmarks.gpu.contest import BOTH, FORWARD, Contestant, Task, rows_of
from benchmarks.gpu.peers import FLA, peer
from benchmarks.gpu.setting import Setting, Work

EPS = 1e-6
TARGET = "no slower than flash-linear-attention or mamba-ssm; forward >= 80% of bandwidth"


def rows(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    return rows_of(tasks(setting), setting)


def tasks(setting: Setting) -> Iterator[Task]:
    tokens = setting.size(16384, 40)
    # Gated DeltaNet's heads, whose gate comes behind the norm, and Mamba-2's groups, whose gate comes before it.
    for first, groups, width in ((False, 32, setting.size(128, 12)), (True, 8, setting.size(1024, 24))):
        shape = (1, tokens, groups, width)
        x, gate = setting.normal(*shape), setting.normal(*shape)
        weight = 1 + 0.1 * setting.normal(*((groups, width) if first else (width,)))
        numbers, size = x.numel(), x.element_size()
        options = {"eps": EPS, "gate_first": first}
        yield Task(
            f"gated_norm, gate {'before' if first else 'after'}",
            f"tokens {tokens}, groups {groups}, width {width}",
            TARGET,
            {"x": x, "gate": gate, "weight": weight},
            _runs(first, width),
            {FORWARD: Work(3 * numbers * size, 0, numbers), BOTH: Work(8 * numbers * size, 0, 2 * numbers)},
            lambda run, given=(x, gate, weight), options=options: _check(run, given, options),
        )


def _runs(first: bool, width: int) -> dict[str, Contestant | str]:
    def chain(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        opened = silu(gate.float())
        y = rms_norm(x.float() * opened if first else x.float(), (width,), eps=EPS) * weight
        return (y if first else y * opened).to(x.dtype)

    def mamba(function: Any) -> Contestant:
        def run(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
            whole = (each.flatten(-2) for each in (x, weight.expand(x.shape[-2:]), gate))
            values, scales, doors = whole
            y = function(values, scales, None, doors, EPS, group_size=width, norm_before_gate=not first)
            return y.view(x.shape)

        return Contestant(run)

    runs: dict[str, Contestant | str] = {
        "zoo": Contestant(
            lambda x, gate, weight: ops.gated_norm(x, gate, weight, eps=EPS, gate_first=first),
        )
    }
    if not first:
        runs[FLA] = peer(
            "fla.modules.fused_norm_gate:rms_norm_gated",
            lambda f: Contestant(lambda x, gate, weight: f(x, gate, weight, None, eps=EPS)),
        )
    runs["mamba-ssm"] = peer("mamba_ssm.ops.triton.layernorm_gated:rmsnorm_fn", mamba)
    runs["torch, a chain"] = Contestant(chain)
    runs["torch.compile"] = Contestant(torch.compile(chain) if torch.cuda.is_available() else chain)
    return runs


def _check(run: Any, given: tuple[Tensor, ...], options: dict[str, Any]) -> checking.Pairs:
    """Beside the reference in float64."""
    leaves = [each.detach().requires_grad_() for each in given]
    y = run(*leaves)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, dy)
    exact = [each.detach().double().requires_grad_() for each in given]
    wanted = ops.gated_norm(*exact, **options, impl="reference")
    slopes = torch.autograd.grad(wanted, exact, dy.double())
    names = ("dx", "dgate", "dweight")
    return {"y": (y, wanted), **{name: pair for name, *pair in zip(names, found, slopes, strict=True)}}
