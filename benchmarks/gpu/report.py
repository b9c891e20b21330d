"""The rows as JSON and as Markdown: one file of each, a section a group, kept when another group is measured again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.setting import BANDWIDTH, MATRIX, SPECIAL
from benchmarks.measure import machine

COLUMNS = ("pass", "who", "ms", "of roof", "times ours", "TB/s", "TFLOP/s", "host ms", "peak GB", "error")


def where(roof: Mapping[str, float]) -> dict[str, Any]:
    """What the rows of a group hold for."""
    import triton

    found = machine() | {"triton": triton.__version__, **roof}
    if torch.cuda.is_available():
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def write(
    folder: Path, group: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], complete: bool
) -> None:
    """gpu.json and gpu.md with this group's rows in place of what they held of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    data[group] = {"machine": dict(facts), "complete": complete, "rows": list(rows)}
    path.write_text(json.dumps(data, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(data))


def markdown(data: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "# On a GPU\n\nMedians of device time, the L2 cache flushed before each run, contestants in turns. Roof: the "
        f"largest of bytes / {BANDWIDTH / 1e12:g} TB/s, operations / {MATRIX / 1e12:g} TFLOP/s and special functions / "
        f"{SPECIAL / 1e12:g} T/s that the task needs at least. Times ours: this time over that of the first row. Host: "
        "until Python had asked for the work; above the device's time, launches are what takes the time. Peak: memory "
        "beside the inputs. Error: relative to the norm, against the reference in float64; ours the largest of values "
        "and gradients, others' of values.\n"
    ]
    for group, held in data.items():
        facts = ", ".join(f"{name} {_short(value)}" for name, value in held["machine"].items())
        lines.append(f"## {group}\n\n{facts}.{'' if held['complete'] else ' Cut off: the time was over.'}\n")
        for task, shape, target in dict.fromkeys((r["task"], r["shape"], r["target"]) for r in held["rows"]):
            rows = [row for row in held["rows"] if (row["task"], row["shape"]) == (task, shape)]
            lines.append(f"{task}, {shape}. Target: {target}.\n")
            lines.append(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
            lines += [_line(row, rows) for row in rows]
            chosen = {row["who"]: row["kernels"] for row in rows if row.get("kernels")}
            for who, kernels in chosen.items():
                lines.append(f"\n{who}: " + "; ".join(f"`{name}` {text}" for name, text in kernels.items()))
            lines.append("")
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    who = row["who"] + (f" ({row['impl']})" if row.get("impl") else "")
    if "absent" in row:
        return f"| {row['pass']} | {who} | {row['absent'].replace('|', '/')} |{' |' * (len(COLUMNS) - 3)}"
    ms = row["ms"]
    first = next((r for r in rows if r["pass"] == row["pass"] and r["who"].startswith("zoo") and "ms" in r), None)
    cells = [row["pass"], who, f"{ms:.4g}", f"{100 * row['roof_ms'] / ms:.0f}%"]
    cells.append("" if first is None or first is row else f"{ms / first['ms']:.2f}")
    cells += [f"{row['bytes'] / ms / 1e9:.2f}", f"{row['flops'] / ms / 1e9:.0f}" if row["flops"] else ""]
    cells += [f"{row['host_ms']:.3g}", "" if row.get("peak_gb") is None else f"{row['peak_gb']:.2f}"]
    same = f"{row['same_tokens']:.0%} of tokens equal" if "same_tokens" in row else ""
    cells.append(f"{row['checked']:.1e}" if "checked" in row else same)
    return f"| {' | '.join(cells)} |"


def _short(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value
