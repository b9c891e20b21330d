"""Training of every recurrent and linear mixer on the CPU: one stack each, alike but for the mixer. Part of
`python -m benchmarks`; alone `python -m benchmarks.training_cpu [KIND ...]`.

Width 512, 8 layers of a mixer and a SwiGLU of 1408, a vocabulary of 32,000, float32, random weights; RWKV-7 brings a
channel mix of its own besides. A training step is forward, cross-entropy and backward, without an optimizer. Roof:
FLOPs of the products and the recurrences, as `flops_per_token` counts them. malloc keeps freed memory
(`ops.native_memory`). Softmax attention in the same stack is there to compare with. What a mixer costs beside its stack
is told by the rows of one mixer, its norm and residual alone.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.measure import OURS, Work, contest, write
from ops.native_memory import keep_freed_memory
from zoo.model import LanguageModel

WIDTH, LAYERS, VOCABULARY, HIDDEN = 512, 8, 32000, 1408
SHAPES = ((2, 512), (1, 2048))
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"heads": 8, "kv_heads": 2},
    "linear_attention": {"heads": 8},
    "retnet": {},
    "gla": {},
    "hgrn2": {},
    "mlstm": {},
    "delta_net": {},
    "gated_delta_net": {},
    "kda": {},
    "rwkv4": {},
    "rwkv6": {},
    "rwkv7": {"layers": 1},
    "rg_lru": {},
    "mamba": {},
    "mamba2": {},
    "mamba3": {},
    "s5": {},
}


def stack(kind: str) -> LanguageModel:
    """The language model of this mixer."""
    torch.manual_seed(0)
    blocks = [{"kind": kind, **KINDS[kind]}, {"kind": "swiglu", "hidden": HIDDEN}]
    stacked = [{"repeat": LAYERS, "blocks": blocks}]
    return LanguageModel({"vocab_size": VOCABULARY, "width": WIDTH, "stack": stacked, "tied_embeddings": False})


def flops(model: LanguageModel, time: int) -> float:
    """Forward FLOPs of a token, in the middle of `time` of them."""
    head = 2 * model.head.weight.numel()
    return head + sum(each.block.flops_per_token(time // 2) for each in model.residuals)


def step(model: LanguageModel, tokens: torch.Tensor) -> Callable[[], None]:
    """Forward, loss and backward."""

    def run() -> None:
        nats = model(tokens[:, :-1], targets=tokens[:, 1:]).nats
        (nats / tokens[:, 1:].numel()).backward()
        model.zero_grad(set_to_none=True)

    return run


def alone(mixer: nn.Module, batch: int, time: int) -> Callable[[], None]:
    """Forward and backward of one mixer in its norm and residual."""
    x, dy = torch.randn(2, batch, time, WIDTH)
    x.requires_grad_()

    def run() -> None:
        mixer(x).y.backward(dy)
        mixer.zero_grad(set_to_none=True)
        x.grad = None

    return run


def measure(kind: str, whole: bool = True) -> list[dict[str, Any]]:
    """The rows of one mixer."""
    model, rows = stack(kind).train(), []
    mixer = model.residuals[2]  # the second: some first layers do without a part
    for batch, time in SHAPES:
        shape, common = f"{batch}x{time}", {"tokens": batch * time, "repeats": 3, "budget": 60.0}
        if whole:
            tokens = torch.randint(VOCABULARY, (batch, time + 1))
            work = Work(3 * flops(model, time) * batch * time, 0)
            rows += contest(f"{kind} train", shape, {OURS: step(model, tokens)}, work=work, **common)
        work = Work(3 * mixer.block.flops_per_token(time // 2) * batch * time, 0)
        rows += contest(f"{kind} mixer alone", shape, {OURS: alone(mixer, batch, time)}, work=work, **common)
    return rows


def main(kinds: list[str] | None = None) -> None:
    keep_freed_memory()  # as a program that trains does
    rows = [row for kind in kinds or KINDS for row in measure(kind)]
    if not kinds:
        write("training_cpu", "# Training of mixers on the CPU", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
