"""How prefill time, time of one more token and bytes of state grow with the context: `python -m benchmarks.growth
[KIND ...]`.

Each causal mixer of the zoo, one block of the same width, batch 1, float32, one thread. The context is really read, in
chunks, and its time added up; after each size on the way the state is set aside and 32 tokens are decoded from a copy
of it. Kept are the time of all chunks so far, the median time of a token, and the bytes that the state's tensors hold,
and of each the slope of its logarithm over the context's beside what the block's docstring claims. With kinds named,
only their rows are made again. Writes benchmarks/results/growth.json, growth.md and growth.png.
"""

import json
import statistics
import sys
import time
from math import log
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import zoo
from benchmarks.measure import RESULTS, machine
from zoo.block import Block, leaves, map_state
from zoo.describe import cost_table

WIDTH, CHUNK, DECODED = 256, 1024, 32
CONTEXTS = [1024 * 2**n for n in range(7)]
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        "gqa": {"heads": 4, "kv_heads": 1},
        "gqa, window": {"heads": 4, "kv_heads": 1, "window": 1024},
        "mla": {"heads": 4},
        "linear_attention": {},
        "performer": {},
        "rfa": {},
        "polysketch": {},
        "sparse": {"heads": 4, "pattern": {"kind": "streaming", "window": 256, "sinks": 4}},
    },
    "state space": {
        "s4": {},
        "s4d": {},
        "s5": {},
        "mamba": {},
        "mamba2": {},
        "mamba3": {},
        "h3": {},
        "gss": {},
        "hyena": {"length": CONTEXTS[-1] + DECODED},
        "hyena_modal": {},
        "bst": {},
    },
    "recurrence": {
        "aft": {"variant": "simple"},
        "rwkv4": {},
        "rwkv6": {},
        "rwkv7": {"layers": 1},
        "retnet": {},
        "gla": {},
        "hgrn2": {},
        "delta_net": {},
        "gated_delta_net": {},
        "kda": {},
        "rg_lru": {},
        "mlstm": {},
        "slstm": {},
    },
}
KINDS = {name: options for members in FAMILIES.values() for name, options in members.items()}
QUANTITIES = {"prefill_ms": "prefill", "decode_ms": "decode", "state_bytes": "state bytes"}


def decode(block: Block, state: Any) -> float:
    """Median milliseconds of a token, of DECODED ones after `state`, which is left as it is."""
    state, times = map_state(lambda leaf: leaf.clone(), state), []
    for token in torch.randn(DECODED, 1, 1, block.width):
        started = time.perf_counter()
        state = block(token, state).state
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def measure(name: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    block = zoo.block(name.split(",")[0], WIDTH, **KINDS[name]).eval()
    block(torch.randn(1, CHUNK, WIDTH), block.init_state(1))  # compiles what is compiled on first use
    state, rows, spent = block.init_state(1), [], 0.0
    for read in range(CHUNK, CONTEXTS[-1] + 1, CHUNK):
        x = torch.randn(1, CHUNK, WIDTH)
        started = time.perf_counter()
        state = block(x, state).state
        spent += 1e3 * (time.perf_counter() - started)
        if read in CONTEXTS:
            held = sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))
            row = {"kind": name, "context": read, "prefill_ms": spent, "decode_ms": decode(block, state)}
            rows.append(row | {"state_bytes": held})
    return rows


def exponent(rows: list[dict[str, Any]], quantity: str) -> float:
    """Slope of log(value) over log(context), by least squares: 0 is constant, 1 linear, 2 quadratic."""
    x, y = ([log(row[each]) for row in rows] for each in ("context", quantity))
    middle = statistics.mean(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def table(rows: list[dict[str, Any]]) -> str:
    """For each quantity one line a kind: values at the contexts, the slope, and the claim."""
    lines = [
        f"# Growth\n\nOne block of width {WIDTH}, batch 1, float32, one CPU thread; the context is read in chunks of "
        f"{CHUNK}. Slope: of log(value) over log(context), 0 is constant, 1 linear, 2 quadratic. Claim: the block's "
        "docstring.\n"
    ]
    units = {"prefill_ms": "Prefill, milliseconds", "decode_ms": "One more token, milliseconds"}
    for quantity, line in QUANTITIES.items():
        lines.append(f"## {units.get(quantity, 'State, bytes')}\n")
        lines.append("| kind | " + " | ".join(f"{each // 1024}k" for each in CONTEXTS) + " | slope | claim |")
        lines.append("|---|" + "---|" * (len(CONTEXTS) + 2))
        for name in KINDS:
            mine = [row for row in rows if row["kind"] == name]
            if not mine:
                continue
            shape = "{:,}" if quantity == "state_bytes" else "{:,.2f}"
            cells = [shape.format(row[quantity]) for row in mine]
            slope = round(exponent(mine, quantity), 2) + 0.0
            claim = cost_table(name.split(",")[0])[line].replace("|", "\\|")
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {slope:.2f} | {claim} |")
        lines.append("")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(len(FAMILIES), len(QUANTITIES), figsize=(15, 12), sharex=True)
    for line, (family, members) in zip(axes, FAMILIES.items(), strict=True):
        for axis, quantity in zip(line, QUANTITIES, strict=True):
            axis.set_prop_cycle(color=plt.get_cmap("tab20").colors[: len(members)])
            for name in members:
                mine = [row for row in rows if row["kind"] == name]
                axis.loglog([row["context"] for row in mine], [row[quantity] for row in mine], marker=".", label=name)
            axis.set_title(f"{family}: {quantity.replace('_', ' ')}")
            axis.set_xlabel("tokens of context")
        line[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(RESULTS / "growth.png", dpi=80)


@torch.inference_mode()
def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    path = RESULTS / "growth.json"
    kept = json.loads(path.read_text())["rows"] if names and path.exists() else []
    rows = [row for row in kept if row["kind"] not in names]
    for name in names or KINDS:
        made = measure(name)
        rows += made
        print(
            name,
            {each: round(exponent(made, each), 2) + 0.0 for each in QUANTITIES},
            f"{made[-1]['prefill_ms']:.0f} ms",
        )
    setting = {"width": WIDTH, "options": KINDS, "batch": 1, "dtype": "float32", "decoded": DECODED}
    where = machine() | {"threads": 1}
    path.write_text(json.dumps({"machine": where, "setting": setting, "rows": rows}, indent=1) + "\n")
    (RESULTS / "growth.md").write_text(table(rows))
    draw(rows)


if __name__ == "__main__":
    unknown = [each for each in sys.argv[1:] if each not in KINDS]
    if unknown:
        sys.exit(f"unknown {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    main(sys.argv[1:])
