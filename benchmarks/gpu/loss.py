"""The head of a language model and its loss."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import ops
from benchmarks.gpu.checking import Pairs
from benchmarks.gpu.contest import BOTH, FORWARD, Contestant, Task, rows_of
from benchmarks.gpu.peers import FLA, peer
from benchmarks.gpu.setting import Setting, Work

SHAPES = ((16384, 2048, 32000), (8192, 4096, 128256))  # tokens, width, vocabulary
TARGET = "no slower than all logits at once or flash-linear-attention, in memory that does not grow with the tokens"


def rows(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    return rows_of(tasks(setting), setting)


def tasks(setting: Setting) -> Iterator[Task]:
    for tokens, width, vocab in [(96, 32, 200)] if setting.smoke else SHAPES:
        targets = torch.randint(vocab, (tokens,), device=setting.device)
        x, weight = setting.normal(tokens, width), setting.normal(vocab, width) / width**0.5
        size, flops = x.element_size(), 2 * tokens * width * vocab
        moved = (x.numel() + weight.numel()) * size
        forward, both = Work(moved, flops, tokens * vocab), Work(2 * moved, 3 * flops, tokens * vocab)
        yield Task(
            "linear_cross_entropy",
            f"tokens {tokens}, width {width}, vocab {vocab}",
            TARGET,
            {"x": x, "weight": weight},
            _runs(targets),
            {FORWARD: forward, BOTH: both},
            lambda run, x=x, weight=weight, targets=targets: _check(run, x, weight, targets),
        )


def _runs(targets: Tensor) -> dict[str, Contestant | str]:
    def whole(x: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy((x @ weight.T).float(), targets)

    return {
        "zoo": Contestant(lambda x, weight: ops.linear_cross_entropy(x, weight, targets, reduction="mean")),
        FLA: peer(
            "fla.modules.fused_linear_cross_entropy:fused_linear_cross_entropy_loss",
            lambda f: Contestant(lambda x, weight: f(x, targets, weight)),
        ),
        "torch, all logits": Contestant(whole),
        "torch.compile, all logits": Contestant(torch.compile(whole) if targets.is_cuda else whole, same=False),
    }


def _check(run: Callable[..., Any], x: Tensor, weight: Tensor, targets: Tensor, piece: int = 1024) -> Pairs:
    """Beside torch's cross entropy in float64, some rows at a time."""
    leaves = [each.detach().requires_grad_() for each in (x, weight)]
    nats = run(*leaves)
    found = torch.autograd.grad(nats, leaves)
    a, b = (each.double().requires_grad_() for each in (x, weight))
    exact = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows, asked in zip(a.split(piece), targets.split(piece), strict=True):
        part = cross_entropy(rows @ b.T, asked, reduction="sum") / len(targets)
        part.backward()
        exact += part.detach()
    assert a.grad is not None and b.grad is not None
    return {"nats": (nats, exact), "dx": (found[0], a.grad), "dweight": (found[1], b.grad)}
