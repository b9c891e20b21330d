"""A mixture-of-experts layer on the CPU beside transformers' experts implementations of the same weights: part of
`python -m benchmarks`; alone `python -m benchmarks.moe_cpu`.

Width 512, float32, router and experts, 1024 tokens and one. Roof: FLOPs of the chosen experts and the router; for one
token the bytes of their matrices, of which there are more than a cache holds. "torch, one dense product" does the same
FLOPs in one matrix product of as many rows: what a layer without routing could reach.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

import zoo
from benchmarks.measure import OURS, Work, contest, write
from ops.native_memory import keep_freed_memory
from zoo.model import Residual

WIDTH, TOKENS = 512, 1024
# experts, chosen, hidden
SIZES = ((8, 2, 704), (8, 2, 1408), (64, 8, 64), (64, 8, 128))
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
GATHERS = "absent: copies the weights of its experts for every token (2.3 s a pass at the smallest size)"


def theirs(experts: int, top_k: int, hidden: int, implementation: str) -> nn.Module:
    config = transformers.OlmoeConfig(
        hidden_size=WIDTH,
        intermediate_size=hidden,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        experts_implementation=implementation,
    )
    return OlmoeSparseMoeBlock(config)


def fill(block: Any, peer: Any) -> None:
    """Our weights from theirs, which are stored output by input."""
    with torch.no_grad():
        for each in peer.parameters():
            nn.init.normal_(each, std=0.04)
        block.router.weight.copy_(peer.gate.weight)
        block.experts.up.copy_(peer.experts.gate_up_proj.transpose(1, 2))
        block.experts.down.copy_(peer.experts.down_proj.transpose(1, 2))


def train(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Callable[[], None]:
    leaf = x.clone().requires_grad_()
    dy = torch.randn_like(run(leaf))

    def both() -> None:
        run(leaf).backward(dy)
        leaf.grad = None
        module.zero_grad(set_to_none=True)

    return both


def measure(experts: int, top_k: int, hidden: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    options = {"experts": experts, "top_k": top_k, "hidden": hidden, "load_balance": 0.0}
    block = zoo.block("moe", WIDTH, **options)
    peers = {name: theirs(experts, top_k, hidden, name) for name in IMPLEMENTATIONS}
    for peer in peers.values():
        torch.manual_seed(1)
        fill(block, peer)
    x = torch.randn(1, TOKENS, WIDTH)
    rows = TOKENS * top_k
    dense = nn.Sequential(nn.Linear(WIDTH, 3 * hidden, bias=False))
    wide = torch.randn(rows, WIDTH)
    flops = block.flops_per_token(0) * TOKENS
    moved = 4 * sum(each.numel() for each in block.parameters())
    shape = f"E {experts}, top {top_k}, hidden {hidden}, {TOKENS} tokens"
    calls: dict[str, Any] = {OURS: train(lambda x: block(x).y, block, x)}
    calls |= {
        f"transformers, {name}": GATHERS if name == "batched_mm" else train(peer, peer, x)
        for name, peer in peers.items()
    }
    calls["torch, one dense product"] = train(dense, dense, wide)
    with torch.no_grad():
        found = block(x).y
        for name in ("eager", "grouped_mm"):
            torch.testing.assert_close(peers[name](x), found, rtol=1e-3, atol=1e-4)
        forward: dict[str, Any] = {OURS: lambda: block(x)}
        forward |= {
            f"transformers, {name}": GATHERS if name == "batched_mm" else lambda peer=peer: peer(x)
            for name, peer in peers.items()
        }
        forward["torch, one dense product"] = lambda: dense(wide)
        made = contest("moe forward", shape, forward, work=Work(flops, moved))
    made += contest("moe with backward", shape, calls, work=Work(3 * flops, 3 * moved))
    return made + one_token(block.eval(), peers, f"E {experts}, top {top_k}, hidden {hidden}, 1 token")


@torch.no_grad()
def one_token(block: Any, peers: dict[str, Any], shape: str, copies: int = 8) -> list[dict[str, Any]]:
    """Each call another copy's weights and another token, as in a model: nothing is in the cache."""
    import copy

    norm = nn.RMSNorm(WIDTH)
    stacks: dict[str, list[Any]] = {}
    stacks[OURS] = [
        Residual(copy.deepcopy(block), zoo.layers.norm.norm("rms", WIDTH), "pre", 0.0).eval() for _ in range(copies)
    ]
    for name, peer in peers.items():
        stacks[f"transformers, {name}"] = [copy.deepcopy(peer).eval() for _ in range(copies)]
    tokens = torch.randn(copies, 1, 1, WIDTH)

    def run(name: str) -> None:
        for token, layer in zip(tokens, stacks[name], strict=True):
            layer(token) if name == OURS else token + layer(norm(token))

    moved = copies * 4 * (block.router.weight.numel() + block.router.top_k * 3 * WIDTH * block.experts.hidden)
    calls = {name: lambda name=name: run(name) for name in stacks}
    return contest(f"moe, {copies} layers, with norm and residual", shape, calls, work=Work(0, moved), repeats=21)


def main() -> None:
    keep_freed_memory()
    write("moe_cpu", "# Mixtures of experts on the CPU", [row for size in SIZES for row in measure(*size)])


if __name__ == "__main__":
    sys.exit(main())
