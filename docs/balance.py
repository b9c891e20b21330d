"""Draws docs/balance.png and writes docs/balance.md: how evenly each router of `moe` loads its experts while a small
model learns the Python standard library's source, byte by byte, from a start at which most tokens want one expert.

Run from the repository's root: python docs/balance.py
"""

import math
import sysconfig
from pathlib import Path
from typing import Any, cast

import matplotlib
import torch
from torch.nn.functional import cross_entropy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import zoo
from zoo.block import add_sums
from zoo.model import losses
from zoo.moe.moe import MoE

EXPERTS, STEPS, BATCH, LENGTH = 8, 400, 8, 128
SHOWN = (1, 10, 50, 100, 200, 400)
ROUTERS: dict[str, dict[str, Any]] = {
    "top_k, no loss": {"load_balance": 0.0},
    "top_k, load_balance 0.01": {},
    "loss_free": {"router": {"kind": "loss_free", "update_rate": 0.01}, "load_balance": 0.0},
    "sinkhorn": {"router": "sinkhorn", "top_k": 1, "load_balance": 0.0},
    "base": {"router": "base", "top_k": 1, "load_balance": 0.0},
    "expert_choice": {"router": {"kind": "expert_choice", "allow_lookahead": True}, "load_balance": 0.0},
    "stable": {"router": {"kind": "stable", "stage_steps": 200}, "top_k": 1},
    "smoe_dropout": {"router": {"kind": "smoe_dropout", "steps": STEPS}, "load_balance": 0.0},
}


def text() -> torch.Tensor:
    """About 4 MB of the standard library, as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = b"\n".join(each.read_bytes() for each in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def batch(data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    start = torch.randint(len(data) - LENGTH - 1, (BATCH, 1), generator=generator)
    return data[start + torch.arange(LENGTH + 1)]


@torch.no_grad()
def skew(model: zoo.LanguageModel, tokens: torch.Tensor) -> None:
    """Turn each router so that the first expert's logit is about 4 above the others for whatever it reads."""
    for module in model.modules():
        if isinstance(module, MoE):
            seen: list[torch.Tensor] = []
            hook = module.router.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            model.eval()(tokens)
            hook.remove()
            x = seen[0].flatten(0, 1)
            constant = torch.linalg.lstsq(x, torch.ones(len(x), 1)).solution[:, 0]
            cast(torch.Tensor, module.router.weight)[0] += 4 * constant


def entropy(counts: torch.Tensor) -> float:
    """Of the experts' shares of all choices, relative to that of equal shares: 1 is even, 0 is all on one."""
    share = counts.double() / counts.sum()
    return float(-torch.xlogy(share, share).sum() / math.log(len(share)))


def train(options: dict[str, Any], data: torch.Tensor) -> tuple[list[float], float, float]:
    """Entropy in the first mixture after each step; at the end in eval mode; bits a byte at the end."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    mixture = {"kind": "moe", "experts": EXPERTS, "hidden": 64, **options}
    stack = [{"kind": "gqa", "heads": 4}, mixture, {"kind": "gqa", "heads": 4}, mixture]
    model = zoo.LanguageModel({"vocab_size": 256, "width": 64, "stack": stack})
    skew(model, batch(data, generator)[:, :-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    course, late = [], []
    for step in range(1, STEPS + 1):
        tokens = batch(data, generator)
        out = model.train()(tokens[:, :-1])
        loss = cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + losses(out.aux)).backward()
        optimizer.step()
        sums: dict[str, torch.Tensor] = {}
        add_sums(sums, out.aux)
        model.after_step(step, sums)
        course.append(entropy(sums["blocks.1/sum/choices"]))
        late.append(loss.item() / math.log(2))
    with torch.no_grad():
        out = model.eval()(batch(data, generator)[:, :-1])
    return course, entropy(out.aux["blocks.1/stat/load"]), sum(late[-50:]) / 50


def main() -> None:
    data = text()
    figure, axis = plt.subplots(figsize=(7, 4), dpi=90)
    lines = [
        "Entropy of the experts' shares of the tokens, relative to equal shares (1: even, 0: all on one expert), in",
        f"the first of two mixtures of {EXPERTS} experts, trained from a skewed start on the Python standard library's",
        "source; after so many steps, and of the trained model in eval mode. Bits a byte are the mean of the last 50",
        "steps. Expert choice looks at later tokens, so its bits are not comparable.",
        "Made by `python docs/balance.py`.",
        "",
        f"| router | {' | '.join(f'step {each}' for each in SHOWN)} | eval | bits a byte |",
        "|---|" + "---|" * (len(SHOWN) + 2),
    ]
    for name, options in ROUTERS.items():
        course, after, bits = train(options, data)
        cells = [f"{course[step - 1]:.3f}" for step in SHOWN]
        lines.append(f"| {name} | {' | '.join(cells)} | {after:.3f} | {bits:.2f} |")
        print(lines[-1], flush=True)
        axis.plot(range(1, STEPS + 1), course, label=name, linewidth=1)
    axis.set(
        xlabel="optimizer step", ylabel="entropy of load / log experts", ylim=(0, 1.02), title="Balance of the experts"
    )
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"))
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n\n![Entropy over training](balance.png)\n")


if __name__ == "__main__":
    main()
