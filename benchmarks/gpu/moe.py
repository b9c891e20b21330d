"""Grouped matrix products, and a whole layer of experts."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import ops
import zoo
from benchmarks.gpu.checking import Pairs
from benchmarks.gpu.contest import BOTH, FORWARD, Contestant, Inputs, Task, rows_of
from benchmarks.gpu.setting import Setting, Work

SHAPES = ((128, 2048, 768, 8), (64, 4096, 1024, 4))  # experts, width, hidden of an expert, experts a token visits
TOKENS = 32768
TARGET = "forward >= 400 TFLOP/s, forward+backward >= 330, >= 1.3 times F.grouped_mm with permutes"


def rows(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    return rows_of(tasks(setting), setting)


def tasks(setting: Setting) -> Iterator[Task]:
    tokens = setting.size(TOKENS, 96)
    for experts, width, hidden, visits in [(5, 32, 16, 2)] if setting.smoke else SHAPES:
        sizes = _sizes(setting, tokens * visits, experts)
        yield _product(setting, "up", sizes, width, 2 * hidden)
        yield _product(setting, "down", sizes, hidden, width)
        yield _layer(setting, tokens, experts, width, hidden, visits)


def _sizes(setting: Setting, count: int, experts: int) -> Tensor:
    """How many rows each expert gets when tokens choose at random, some experts more often than others."""
    chosen = torch.multinomial((0.3 * torch.randn(experts)).exp(), count, replacement=True)
    return torch.bincount(chosen, minlength=experts).to(setting.device)


def _product(setting: Setting, name: str, sizes: Tensor, k: int, n: int) -> Task:
    count, groups = int(sizes.sum()), len(sizes)
    x, weight = setting.normal(count, k), setting.normal(groups, k, n) / k**0.5
    size, flops = x.element_size(), 2 * count * k * n
    moved = (x.numel() + weight.numel() + count * n) * size
    forward, backward = Work(moved, flops), Work(2 * moved, 2 * flops)
    ends = sizes.cumsum(0, dtype=torch.int32)

    def check(run: Callable[..., Any]) -> Pairs:
        return _check_product(run, x, weight, sizes)

    return Task(
        f"grouped_mm, {name}",
        f"rows {count}, groups {groups}, k {k}, n {n}",
        TARGET,
        {"x": x, "weight": weight},
        {
            "zoo": Contestant(lambda x, weight: ops.grouped_mm(x, weight, sizes)),
            "F.grouped_mm": Contestant(lambda x, weight: F.grouped_mm(x, weight, offs=ends)),
        },
        {FORWARD: forward, BOTH: forward + backward},
        check,
    )


def _check_product(run: Callable[..., Any], x: Tensor, weight: Tensor, sizes: Tensor) -> Pairs:
    """The rows and matrices of the first and the last group and one between, of the whole product."""
    groups = len(sizes)
    picked = [0, groups // 2, groups - 1]
    expert = torch.repeat_interleave(torch.arange(groups, device=x.device), sizes)
    mine = torch.isin(expert, torch.tensor(picked, device=x.device)).nonzero()[:, 0]
    leaves = [each.detach().requires_grad_() for each in (x, weight)]
    wide = a, b = x[mine].double().requires_grad_(), weight[picked].double().requires_grad_()
    y, wanted = run(*leaves), ops.grouped_mm(a, b, sizes[picked], impl="reference")
    direction = torch.randn_like(wanted)
    got = torch.autograd.grad(y, leaves, torch.zeros_like(y).index_copy_(0, mine, direction.to(y.dtype)))
    exact = torch.autograd.grad(wanted, wide, direction)
    return {"out": (y[mine], wanted), "dx": (got[0][mine], exact[0]), "dweight": (got[1][picked], exact[1])}


def _layer(setting: Setting, tokens: int, experts: int, width: int, hidden: int, visits: int) -> Task:
    block: Any = zoo.block("moe", width, experts=experts, top_k=visits, hidden=hidden, load_balance=0.0)
    block = block.to(setting.device, setting.dtype)
    inputs = {"x": setting.normal(1, tokens, width)}
    inputs |= {name: getattr(block.experts, name).detach() for name in ("up", "down")}

    def ours(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return functional_call(block, {"experts.up": up, "experts.down": down}, (x,)).y

    def plain(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return _permuted(block.router(x), x, up, down)

    size, flops = inputs["x"].element_size(), 6 * tokens * visits * width * hidden
    weights = sum(inputs[name].numel() for name in ("up", "down"))
    moved = (2 * tokens * width + weights) * size
    forward, backward = Work(moved, flops), Work(2 * moved, 2 * flops)
    return Task(
        "moe, the whole layer",
        f"tokens {tokens}, experts {experts}, width {width}, hidden {hidden}, top_k {visits}",
        TARGET,
        inputs,
        {"zoo": Contestant(ours), "F.grouped_mm with permutes": Contestant(plain)},
        {FORWARD: forward, BOTH: forward + backward},
        lambda run: _check_layer(run, block, inputs),
    )


def _permuted(routing: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The layer as it is usually written: sort the choices, gather the rows, two products, weigh, add them up."""
    tokens = x.flatten(0, 1)
    chosen, order = routing.experts.flatten().sort(stable=True)
    index = order // routing.experts.shape[1]
    ends = torch.searchsorted(chosen, torch.arange(len(up), device=x.device), right=True).int()
    gate, value = F.grouped_mm(tokens[index], up, offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * value, down, offs=ends)
    y = y * routing.weights.flatten()[order, None].to(y.dtype)
    return torch.zeros_like(tokens).index_add_(0, index, y).view_as(x)


def _check_layer(run: Callable[..., Any], block: Any, inputs: Inputs, count: int = 48) -> Pairs:
    """The last tokens, one by one, in float64, without those whose choice of experts bfloat16 decides otherwise."""
    x = inputs["x"]
    count = min(count, x.shape[1])
    wide = {name: each.double().requires_grad_() for name, each in inputs.items() if name != "x"}
    ups, downs = (wide[name].unbind() for name in ("up", "down"))
    last = x[:, -count:].double().requires_grad_()
    routing = copy.deepcopy(block.router).double()(last)
    with torch.no_grad():
        taken = block.router(x).experts[-count:]
    same = (taken.sort(-1).values == routing.experts.sort(-1).values).all(-1)
    assert same.float().mean() > 0.7, "the routers of both dtypes must mostly agree"
    picked = same.nonzero()[:, 0]
    wanted = torch.stack([
        sum_of(
            weight * _expert(last[0, token], ups[e], downs[e])
            for e, weight in zip(routing.experts[token].tolist(), routing.weights[token], strict=True)
        )
        for token in picked.tolist()
    ])  # fmt: skip
    leaves = {name: each.detach().requires_grad_() for name, each in inputs.items()}
    y = run(**leaves)
    direction, full = torch.randn_like(wanted), torch.zeros_like(y)
    full[0, picked - count] = direction.to(y.dtype)
    found = {"out": (y[0, picked - count], wanted)}
    got = torch.autograd.grad(y, list(leaves.values()), full)
    exact = torch.autograd.grad(wanted, [last, wide["up"], wide["down"]], direction)
    found["dx"] = got[0][:, -count:], exact[0]
    return found | {"dup": (got[1], exact[1]), "ddown": (got[2], exact[2])}


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _expert(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = (x @ up).chunk(2, -1)
    return (F.silu(gate) * value) @ down
