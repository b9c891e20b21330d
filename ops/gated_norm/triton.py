"""norm and gate on a GPU, one Triton kernel each way."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ops.gated_norm import triton_kernels
from ops.gated_norm.common import groups_of, rows_of, with_gradient

TILE = 4096  # values that a program holds of each tensor at once
PROGRAMS = 1024  # at most in the backward pass: each sums the gradients of weight and bias for itself


class _Plan(NamedTuple):
    """x and gate [tokens, groups · width], and what both kernels are told of them."""

    x: Tensor
    gate: Tensor
    kept: int  # groups with a weight of their own
    groups: int
    lines: int  # rows that share a weight
    options: dict[str, Any]


def _plan(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    gate_first: bool,
    center: bool,
) -> _Plan:
    width = x.shape[-1]
    kept, groups = groups_of(x, weight, bias)
    values, doors = rows_of(x, groups * width), rows_of(gate, groups * width)
    inner = groups // kept
    block = triton.next_power_of_2(width)
    options = {
        "INNER": inner,
        "SILU": activation == "silu",
        "FIRST": gate_first,
        "CENTER": center,
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "ROWS": max(1, TILE // block),
        "BLOCK": block,
        "num_warps": 8 if block >= TILE else 4,
    }
    return _Plan(values, doors, kept, groups, len(values) * inner, options)


def _weights(plan: _Plan, width: int, *given: Tensor | None) -> list[Tensor]:
    """[kept, width] each; x in the place of one that is not there, which no kernel reads."""
    return [plan.x if each is None else each.expand(plan.kept, width).contiguous() for each in given]


def _launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


def _forward(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    plan, width = _plan(x, gate, weight, bias, *options), x.shape[-1]
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    means, rates = x.new_empty(2, len(plan.x) * plan.groups, dtype=torch.float32)
    _launch(
        triton_kernels.forward,
        (triton.cdiv(plan.lines, plan.options["ROWS"]), plan.kept),
        plan.x,
        plan.gate,
        *_weights(plan, width, weight, bias),
        y,
        means,
        rates,
        plan.lines,
        plan.groups,
        width,
        plan.x.stride(0),
        plan.gate.stride(0),
        eps,
        **plan.options,
    )
    return y, means, rates


def _backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    means: Tensor,
    rates: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    plan, width = _plan(x, gate, weight, bias, *options), x.shape[-1]
    slopes = rows_of(dy, plan.groups * width)
    dx, dgate = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (x, gate))
    programs = max(1, min(triton.cdiv(plan.lines, plan.options["ROWS"]), PROGRAMS // plan.kept))
    sums = x.new_empty(programs, 2, plan.kept, width, dtype=torch.float32)
    _launch(
        triton_kernels.backward,
        (programs, plan.kept),
        slopes,
        plan.x,
        plan.gate,
        *_weights(plan, width, weight, bias),
        means,
        rates,
        dx,
        dgate,
        sums,
        plan.lines,
        plan.groups,
        width,
        slopes.stride(0),
        plan.x.stride(0),
        plan.gate.stride(0),
        **plan.options,
    )
    found = tuple(
        None if each is None else sums[:, place].sum(0).sum_to_size(each.shape).to(each.dtype)
        for place, each in enumerate((weight, bias))
    )
    return dx, dgate, found[0], found[1]


gated_norm = with_gradient(_forward, _backward)
