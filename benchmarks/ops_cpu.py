"""Time of the ops' CPU implementations beside peers, forward and with backward: part of `python -m benchmarks`; alone
`python -m benchmarks.ops_cpu [GROUP ...]`.

float32, all of torch's threads, medians of one process with the contestants in turns. Peers are the loops and chunked
forms of transformers, mambapy's parallel scan and torch's own operations. The backward pass of transformers' loop of
the selective scan takes minutes and is in `mamba_training_cpu`. Roof: the bytes of inputs and outputs (and of their
gradients), each once, and the arithmetic of the recurrence, an exponential counted as one operation.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, cross_entropy, scaled_dot_product_attention, silu

import ops
from benchmarks.measure import OURS, Work, contest, write

Run = Callable[..., Tensor]
Rows = list[dict[str, Any]]


def peer(module: str, name: str, use: Callable[[Any], Run]) -> Run | str:
    """What `use` makes of a peer's function, or why it is not there."""
    try:
        return use(getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError) as error:
        return f"absent: {error}"


def versus(
    task: str,
    shape: str,
    inputs: list[Tensor],
    runs: Mapping[str, Run | str],
    flops: float,
    slow: Mapping[str, str] | None = None,
    repeats: int = 7,
) -> Rows:
    """Rows of the forward pass alone, and with the gradients of the output's sum. `slow`: who is left out of the
    latter, and why."""
    moved = 4 * sum(each.numel() for each in inputs)
    with torch.no_grad():
        made = next(run for run in runs.values() if not isinstance(run, str))(*inputs)
    moved += 4 * made.numel()

    @torch.no_grad()
    def forward(run: Run) -> None:
        run(*inputs)

    def both(run: Run) -> None:
        leaves = [each.detach().requires_grad_() for each in inputs]
        torch.autograd.grad(run(*leaves).sum(), leaves)

    def calls(of: Callable[[Run], None], without: Mapping[str, str]) -> dict[str, Callable[[], None] | str]:
        return {
            name: without[name] if name in without else run if isinstance(run, str) else lambda run=run: of(run)
            for name, run in runs.items()
        }

    rows = contest(f"{task} forward", shape, calls(forward, {}), work=Work(flops, moved), repeats=repeats)
    # Backward reads inputs and the output's gradient and writes the inputs' gradients.
    work = Work(3 * flops, 3 * moved)
    return rows + contest(f"{task} with backward", shape, calls(both, slow or {}), work=work, repeats=repeats)


def selective_scan(slow: bool = False) -> Rows:
    batch, length, channels, n = 2, 2048, 1024, 16
    x, z = torch.randn(2, batch, length, channels)
    dt = torch.rand(batch, length, channels) * 0.1
    A, D = -torch.arange(1.0, n + 1).repeat(channels, 1), torch.ones(channels)
    B, C = torch.randn(2, batch, length, n)

    def loop(function: Any) -> Run:
        return lambda x, dt, A, B, C, D, z: function(x.mT, dt.mT, A, B.mT, C.mT, D, z.mT).mT

    def parallel(pscan: Any) -> Run:
        def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
            states = pscan(torch.exp(dt[..., None] * A), dt[..., None] * B[:, :, None] * x[..., None])
            return ((states @ C[..., None])[..., 0] + D * x) * silu(z)

        return run

    runs = {
        OURS: lambda *a: ops.selective_scan(*a)[0],
        "zoo, chunked": lambda *a: ops.selective_scan(*a, impl="chunked")[0],
        "transformers, loop": peer("transformers.models.mamba.modeling_mamba", "mamba_selective_scan", loop),
        "mambapy, pscan": peer("mambapy.pscan", "pscan", parallel),
    }
    shape = f"batch {batch}, time {length}, channels {channels}, states {n}"
    left_out = {} if slow else {"transformers, loop": "takes minutes: see mamba_training_cpu"}
    flops = 9 * batch * length * channels * n
    return versus("selective_scan", shape, [x, dt, A, B, C, D, z], runs, flops, left_out, 5)


def wkv() -> Rows:
    batch, length, channels = 2, 2048, 1024
    k, v = torch.randn(2, batch, length, channels)
    decay, bonus = torch.rand(channels), torch.randn(channels)

    def loop(function: Any) -> Run:
        return lambda k, v, decay, bonus: function(decay, bonus, k, v)[0]

    runs = {
        OURS: lambda k, v, decay, bonus: ops.wkv(k, v, -decay.exp(), bonus)[0],
        "zoo, chunked": lambda k, v, decay, bonus: ops.wkv(k, v, -decay.exp(), bonus, impl="chunked")[0],
        "transformers, loop": peer("transformers.models.rwkv.modeling_rwkv", "rwkv_linear_attention_cpu", loop),
    }
    shape = f"batch {batch}, time {length}, channels {channels}"
    return versus("wkv", shape, [k, v, decay, bonus], runs, 17 * k.numel(), repeats=5)


def linear_recurrence() -> Rows:
    batch, length, channels = 2, 2048, 1024
    x, a = torch.randn(batch, length, channels), torch.rand(batch, length, channels)

    def loop(rglru: Any) -> Run:
        first = torch.zeros(batch, length, 1, dtype=torch.bool)
        return lambda x, a: rglru._rnn_scan(None, x, a, first, None)[0]

    module = "transformers.models.recurrent_gemma.modeling_recurrent_gemma"
    runs = {
        OURS: lambda x, a: ops.linear_recurrence(x, a)[0],
        "zoo, chunked": lambda x, a: ops.linear_recurrence(x, a, impl="chunked")[0],
        "transformers, loop": peer(module, "RecurrentGemmaRglru", loop),
    }
    return versus(
        "linear_recurrence",
        f"batch {batch}, time {length}, channels {channels}",
        [x, a],
        runs,
        2 * x.numel(),
        repeats=5,
    )


def causal_conv1d() -> Rows:
    batch, length, channels = 2, 2048, 1024
    x, weight, bias = torch.randn(batch, length, channels), torch.randn(channels, 4), torch.randn(channels)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return silu(conv1d(x.mT, weight[:, None], bias, padding=3, groups=channels)[..., :length].mT)

    runs = {
        OURS: lambda *a: ops.causal_conv1d(*a, activation="silu")[0],
        "zoo, chunked": lambda *a: ops.causal_conv1d(*a, activation="silu", impl="chunked")[0],
        "torch, conv1d": plain,
    }
    shape = f"batch {batch}, time {length}, channels {channels}, taps 4"
    return versus("causal_conv1d", shape, [x, weight, bias], runs, 11 * x.numel())


def delta_rule() -> Rows:
    batch, length, heads, d = 2, 1024, 8, 64
    q, k, v = torch.nn.functional.normalize(torch.randn(3, batch, length, heads, d), dim=-1)
    beta, decay = torch.rand(batch, length, heads), -torch.rand(batch, length, heads)

    def chunks(function: Any) -> Run:
        return lambda q, k, v, beta, decay: function(q, k, v, decay, beta)[0]

    module = "transformers.models.qwen3_next.modeling_qwen3_next"
    runs = {
        OURS: lambda q, k, v, beta, decay: ops.delta_rule(q, k, v, beta, log_decay=decay, scale=d**-0.5)[0],
        "transformers, chunks": peer(module, "torch_chunk_gated_delta_rule", chunks),
    }
    flops = 7 * batch * length * heads * d * d
    shape = f"batch {batch}, time {length}, heads {heads}, d {d}"
    return versus("delta_rule, a decay a head", shape, [q, k, v, beta, decay], runs, flops, repeats=5)


def ssd() -> Rows:
    batch, length, heads, p, n = 2, 1024, 16, 64, 128
    x, dt = torch.randn(batch, length, heads, p), torch.rand(batch, length, heads) * 0.1
    A, B, C = -torch.rand(heads) - 1, *torch.randn(2, batch, length, 1, n)

    def chunks(function: Any) -> Run:
        def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            found = function(x, dt, A, B, C, 64)
            return found[0] if isinstance(found, tuple) else found

        return run

    module = "transformers.models.mamba2.modeling_mamba2"
    runs = {
        OURS: lambda *a: ops.ssd(*a)[0],
        "transformers, chunks of 64": peer(module, "mamba2_chunk_scan", chunks),
    }
    shape = f"batch {batch}, time {length}, heads {heads}, p {p}, n {n}"
    return versus("ssd", shape, [x, dt, A, B, C], runs, 5 * batch * length * heads * p * n, repeats=5)


def windows() -> Rows:
    batch, length, heads, d, window = 8, 512, 4, 32, 128
    q, k, v = torch.randn(3, batch, length, heads, d)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = (distance >= 0) & (distance < window)

    def masked(*tensors: Tensor) -> Tensor:
        return scaled_dot_product_attention(*(each.transpose(1, 2) for each in tensors), attn_mask=mask)

    runs = {OURS: lambda *a: ops.attention(*a, window=window), "torch, sdpa with a mask": masked}
    shape = f"batch {batch}, time {length}, heads {heads}, d {d}, window {window}"
    return versus("attention, window", shape, [q, k, v], runs, 4 * q.numel() * window, repeats=11)


def linear() -> Rows:
    x, weights = torch.randn(1, 512), torch.randn(4, 32000, 512)  # four, so that none is in the cache
    turn = iter(range(10**9))
    work = Work(2 * weights[0].numel(), 4 * weights[0].numel())
    calls = {
        OURS: torch.no_grad()(lambda: ops.linear(x, weights[next(turn) % 4])),
        "torch, linear": torch.no_grad()(lambda: torch.nn.functional.linear(x, weights[next(turn) % 4])),
    }
    return contest("linear, one row", "outputs 32000, inputs 512", calls, work=work, repeats=21)


def linear_cross_entropy() -> Rows:
    """The head of a language model and its loss."""
    rows, width, vocab = 1024, 512, 32000
    x, weight = torch.randn(rows, width), 0.05 * torch.randn(vocab, width)
    targets = torch.randint(vocab, (rows,))
    runs: dict[str, Run | str] = {
        OURS: lambda x, weight: ops.linear_cross_entropy(x, weight, targets),
        "torch, all logits": lambda x, weight: cross_entropy(x @ weight.T, targets, reduction="sum"),
    }
    shape = f"rows {rows}, width {width}, vocab {vocab}"
    return versus("linear_cross_entropy", shape, [x, weight], runs, 2 * rows * width * vocab)


def gated_norm() -> Rows:
    """At the end of most recurrent blocks: Gated DeltaNet's order over heads, and Mamba-2's over all channels."""
    rows: Rows = []
    for first, heads, width, module, name in (
        (False, 8, 128, "qwen3_next.modeling_qwen3_next", "Qwen3NextRMSNormGated"),
        (True, 1, 1024, "mamba2.modeling_mamba2", "MambaRMSNormGated"),
    ):
        x, gate = torch.randn(2, 2, 512, heads, width)
        weight = torch.rand(width)

        def module_of(kind: Any, width: int = width, first: bool = first) -> Run:
            norm = kind(width, width) if first else kind(width)
            return lambda *given: torch.func.functional_call(norm, {"weight": given[2]}, given[:2])

        runs = {
            OURS: lambda x, gate, weight, first=first: ops.gated_norm(x, gate, weight, gate_first=first),
            "transformers": peer(f"transformers.models.{module}", name, module_of),
        }
        shape = f"batch 2, time 512, heads {heads}, width {width}"
        rows += versus(
            f"gated_norm, gate {'before' if first else 'after'}", shape, [x, gate, weight], runs, 10 * x.numel()
        )
    return rows


def token_mix() -> Rows:
    """RWKV-6's five mixes, moved by the data, and their sum."""
    x, before = torch.randn(2, 2, 512, 512)
    tensors = [x, before, torch.rand(5, 512), torch.randn(5, 2, 512, 512)]

    def chain(x: Tensor, before: Tensor, weight: Tensor, moved: Tensor) -> Tensor:
        return sum((x + (before - x) * (weight[:, None, None] + moved)).unbind(), torch.zeros(()))

    runs = {OURS: lambda *given: sum(ops.token_mix(*given), torch.zeros(())), "torch": chain}
    return versus("token_mix, 5 mixes", "batch 2, time 512, width 512", tensors, runs, 15 * x.numel())


def relu2() -> Rows:
    x = torch.randn(2, 512, 2048)
    runs = {OURS: ops.relu2, "torch": lambda x: torch.relu(x).square()}
    return versus("relu2", "batch 2, time 512, hidden 2048", [x], runs, 2 * x.numel())


GROUPS: dict[str, Callable[[bool], Rows]] = {
    each.__name__: each
    for each in (
        *(selective_scan, wkv, linear_recurrence, causal_conv1d, delta_rule, ssd, windows, linear),
        linear_cross_entropy,
        gated_norm,
        token_mix,
        relu2,
    )
}


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    rows = [row for name in names or GROUPS for row in GROUPS[name]()]
    if not names:
        write("ops_cpu", "# Ops on the CPU", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
