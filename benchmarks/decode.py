"""Cost of one more token, and bytes of state, after 1k to 128k tokens: `python -m benchmarks.decode [KIND ...]`.

Each recurrence of the zoo beside grouped-query attention, one block of the same width, batch 1, float32, one thread.
The context is really read, in chunks; after each size on the way the state is set aside, 32 tokens are decoded from a
copy of it; kept are the median time of one and the bytes that the state's tensors hold. With kinds named, only their
rows are made again. Writes benchmarks/results/decode.json and decode.md.
"""

import json
import statistics
import sys
import time
from math import log
from typing import Any

import torch

import zoo
from benchmarks.ops_cpu import RESULTS, machine
from zoo.block import Block, leaves, map_state

WIDTH, CHUNK, DECODED = 256, 1024, 32
CONTEXTS = [1024 * 2**n for n in range(8)]
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"heads": 4, "kv_heads": 1},
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
}


def decode(block: Block, state: Any) -> float:
    """Median milliseconds of a token, of DECODED ones after `state`, which is left as it is."""
    state, times = map_state(lambda leaf: leaf.clone(), state), []
    for token in torch.randn(DECODED, 1, 1, block.width):
        started = time.perf_counter()
        state = block(token, state).state
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def measure(kind: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    block = zoo.block(kind, WIDTH, **KINDS[kind]).eval()
    state, rows = block.init_state(1), []
    for chunk in range(CHUNK, CONTEXTS[-1] + 1, CHUNK):
        state = block(torch.randn(1, CHUNK, WIDTH), state).state
        if chunk in CONTEXTS:
            held = sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))
            rows.append({"kind": kind, "context": chunk, "state_bytes": held, "decode_ms": decode(block, state)})
    return rows


def exponent(rows: list[dict[str, Any]], name: str) -> float:
    """Slope of log(value) over log(context), by least squares: 0 is constant, 1 linear."""
    x, y = ([log(row[each]) for row in rows] for each in ("context", name))
    middle = statistics.mean(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def table(rows: list[dict[str, Any]]) -> str:
    """One line a kind: milliseconds a token and bytes of state at the contexts, and both slopes."""
    lines = [
        f"One block of width {WIDTH}, batch 1, float32, one CPU thread: milliseconds for one more token / bytes of "
        "state, after so many tokens. The slopes are of log(value) over log(context): 0 is constant, 1 grows alike.",
        "",
        "| kind | " + " | ".join(f"{each // 1024}k" for each in CONTEXTS) + " | slope of time | of state |",
        "|---|" + "---|" * (len(CONTEXTS) + 2),
    ]
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        if not mine:
            continue
        cells = [f"{row['decode_ms']:.2f} / {row['state_bytes']:,}" for row in mine]
        slopes = [f"{round(exponent(mine, name), 2) + 0.0:.2f}" for name in ("decode_ms", "state_bytes")]
        lines.append(f"| {kind} | " + " | ".join(cells + slopes) + " |")
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def main(kinds: list[str]) -> None:
    torch.set_num_threads(1)
    path = RESULTS / "decode.json"
    kept = json.loads(path.read_text())["rows"] if kinds and path.exists() else []
    rows = [row for row in kept if row["kind"] not in kinds]
    for kind in kinds or KINDS:
        rows += measure(kind)
        print(table(rows[-len(CONTEXTS) :]).splitlines()[-1], flush=True)
    setting = {"width": WIDTH, "options": KINDS, "batch": 1, "dtype": "float32", "decoded": DECODED}
    path.write_text(
        json.dumps({"machine": machine() | {"threads": 1}, "setting": setting, "rows": rows}, indent=1) + "\n"
    )
    (RESULTS / "decode.md").write_text(table(rows))


if __name__ == "__main__":
    unknown = [each for each in sys.argv[1:] if each not in KINDS]
    if unknown:
        sys.exit(f"unknown {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    main(sys.argv[1:])
