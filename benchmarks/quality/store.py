"""Finished runs on disk, and the results and table made of them.

Each run is a file of its own under runs/quality as soon as it ends, so that an interrupted benchmark goes on where it
stopped; `merge` gathers them into benchmarks/results/quality.json, beside what that file holds already.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS
from benchmarks.quality.models import MIXERS, PARAMETERS, TOLERANCE, WIDTH
from benchmarks.quality.training import SETTINGS, described

RUNS = Path(__file__).parents[2] / "runs" / "quality"
Row = dict[str, Any]


def key(row: Row) -> tuple[str, str, float, int]:
    return row["task"], row["mixer"], row["rate"], row["seed"]


def current(row: Row) -> bool:
    """Whether a row is of the settings and options that hold now; else it is to be made again."""
    task, mixer = row["task"], row["mixer"]
    if task not in SETTINGS or mixer not in MIXERS:
        return False
    return row["setting"] == described(SETTINGS[task]) and row["options"] == MIXERS[mixer]


def write(path: Path, text: str) -> None:
    """All of the file or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def save(row: Row, runs: Path = RUNS) -> None:
    name = f"{row['task']}-{row['mixer']}-{row['rate']:g}-{row['seed']}.json"
    write(runs / name, json.dumps(row, indent=2) + "\n")


def load(runs: Path = RUNS, results: Path = RESULTS) -> dict[tuple[str, str, float, int], Row]:
    """Every finished run that is current, by its key; the runs' own files before the results'."""
    merged = results / "quality.json"
    rows: list[Row] = json.loads(merged.read_text())["rows"] if merged.exists() else []
    rows += [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
    return {key(row): row for row in rows if current(row)}


def merge(runs: Path = RUNS, results: Path = RESULTS) -> None:
    """Write quality.json and quality.md."""
    rows = sorted(load(runs, results).values(), key=order)
    write(results / "quality.json", json.dumps({"parameters": PARAMETERS, "rows": rows}, indent=1) + "\n")
    write(results / "quality.md", table(rows))


def order(row: Row) -> tuple[int, int, float, int]:
    return list(SETTINGS).index(row["task"]), list(MIXERS).index(row["mixer"]), row["rate"], row["seed"]


def best(rows: Iterable[Row]) -> list[Row]:
    """Of each mixer and seed, the run of the learning rate with the best validation accuracy."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows:
        mine = row["mixer"], row["seed"]
        if mine not in found or row["validation"] > found[mine]["validation"]:
            found[mine] = row
    return list(found.values())


def table(rows: list[Row]) -> str:
    """Markdown: a table a task, a line a mixer."""
    lines = [
        "# What small models learn, by mixer",
        "",
        f"Two layers of width {WIDTH}, each the mixer and a SwiGLU; {PARAMETERS:,} parameters beside embedding and "
        f"head, equal to within {TOLERANCE:.0%} by the SwiGLU's hidden width. Same data, steps and optimizer; of the "
        "rates tried (last column) the one with the best validation accuracy. Accuracy in percent over held-out rows; "
        "state bytes are of the whole model, float32, a row. `python -m benchmarks.quality` makes this file, "
        "quality.json has all of it.",
        "",
        "Steps, weight decay and initial scale of each task were chosen in pilot runs of mamba, mamba2, gqa and s4d, "
        "which favours these; a mixer with one rate in the last column was not tuned. One seed is one draw of when "
        "a model leaves its plateau.",
    ]
    for task, setting in SETTINGS.items():
        mine = [row for row in rows if row["task"] == task]
        if mine:
            lines += ["", *section(task, setting.training.steps, mine)]
    return "\n".join(lines) + "\n"


def section(task: str, steps: int, rows: list[Row]) -> list[str]:
    setting, tests = SETTINGS[task], list(rows[0]["accuracy"])
    longer = [name for name, size in setting.task.tests.items() if size not in setting.task.trained]
    head = ["mixer", *tests, "state bytes", "parameters", "seed", "rate", "of rates"]
    lines = [
        f"## {task.replace('_', ' ').capitalize()}",
        "",
        f"{(setting.task.__doc__ or '').splitlines()[0]} {steps} steps of {setting.training.tokens} tokens, "
        f"weight decay {setting.training.weight_decay:g}, embedding's standard deviation {setting.training.init_std:g}"
        + (f"; {', '.join(longer)} are longer than any trained on" if longer else "")
        + f"; a guess is right in {100 * rows[0]['chance']:.1f} %.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" + "|---:" * (len(head) - 1) + "|",
    ]
    for row in sorted(best(rows), key=order):
        scores = [f"{100 * row['accuracy'][test]:.1f}" for test in tests]
        size = list(row["state_bytes"].values())
        state = f"{size[0]:,}" if size[0] == size[-1] else f"{size[0]:,} to {size[-1]:,}"
        tried = [f"{each['rate']:g}" for each in rows if (each["mixer"], each["seed"]) == (row["mixer"], row["seed"])]
        rates = [f"{row['rate']:g}", " ".join(sorted(tried))]
        cells = [row["mixer"], *scores, state, f"{row['parameters']:,}", str(row["seed"]), *rates]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
