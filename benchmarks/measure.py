"""What the measurements share: a contest between ours and peers, the machine and its roof, JSON and tables."""

import gc
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
OURS = "zoo"
# Of a call: the share of its time that the host may take from the processors together, and seconds that are long enough
# for once.
TRIES, BEARABLE, LONG = 3, 0.03, 20.0


class Work(NamedTuple):
    """What a task must do at least: floating-point operations and bytes moved."""

    flops: float
    bytes: float


class Roof(NamedTuple):
    """What the machine can do: bytes a second copied, float32 operations a second in a matrix product."""

    bandwidth: float
    flops: float

    def seconds(self, work: Work) -> float:
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


def measure_roof() -> Roof:
    """Copy bandwidth of 256 MB (read and written bytes) and the rate of a 2048-cubed product: the best of several."""
    source, target = torch.ones(2, 32 * 2**20)
    a, b, c = torch.ones(3, 2048, 2048)
    copy = min(_times(lambda: target.copy_(source), 5))
    product = min(_times(lambda: torch.mm(a, b, out=c), 3))
    return Roof(2 * source.numel() * 4 / copy, 2 * 2048**3 / product)


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def contest(
    task: str,
    shape: str,
    runs: Mapping[str, Callable[[], Any] | str],
    *,
    work: Work | None = None,
    tokens: int | None = None,
    repeats: int = 7,
    budget: float = 30.0,
) -> list[dict[str, Any]]:
    """A row for each of `runs`, in turns, so that what else the machine does hits all alike.

    A string in the place of a call says why a peer does not run. The first call of each is not counted unless it alone
    takes `budget` seconds; a contestant leaves when it has had that many. A call in which a virtual machine's host took
    the processor away is made again, see `_call`. The roof of these rows is the better of what
    is measured before and after them: what other guests of the machine leave to it changes within minutes.
    """
    rows: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    for name, run in runs.items():
        rows[name] = {"task": task, "shape": shape, "who": name}
        if isinstance(run, str):
            rows[name]["absent"] = run
            continue
        first = _times(run, 1)
        times[name] = first if first[0] > budget else []
    before = measure_roof()
    for _ in range(repeats):
        for name, taken in times.items():
            run = runs[name]
            if sum(taken) < budget and not isinstance(run, str):
                taken += _times(run, 1)
    roof = Roof(*map(max, before, measure_roof()))
    for name, taken in times.items():
        rows[name] |= {
            "ms": 1e3 * statistics.median(taken),
            "spread_ms": 1e3 * (max(taken) - min(taken)),
            "runs": len(taken),
            "tokens_per_s": None if tokens is None else tokens / statistics.median(taken),
            "flops": None if work is None else work.flops,
            "bytes": None if work is None else work.bytes,
            "bandwidth": roof.bandwidth,
            "rate": roof.flops,
            "roof_ms": None if work is None else 1e3 * roof.seconds(work),
        }
    for row in rows.values():
        told = row["absent"] if "absent" in row else f"{row['ms']:10.2f} ms of {row['runs']}"
        print(f"{task:36s} {shape:44s} {row['who']:28s} {told}", flush=True)
    return list(rows.values())


def _times(run: Callable[[], Any], count: int) -> list[float]:
    return [_call(run) for _ in range(count)]


def _call(run: Callable[[], Any]) -> float:
    """Seconds of a call: of up to TRIES (one, if it is long), the one of which the host of a virtual machine took the
    least share."""
    best = (math.inf, 0.0)
    for _ in range(TRIES):
        gc.collect()
        synchronise()
        stolen, started = stolen_seconds(), time.perf_counter()
        run()
        synchronise()
        taken = time.perf_counter() - started
        best = min(best, ((stolen_seconds() - stolen) / taken, taken))
        if best[0] < BEARABLE or taken > LONG:
            break
    return best[1]


def stolen_seconds() -> float:
    """What the host has taken from all processors of this machine since it started; 0 where nothing tells."""
    path = Path("/proc/stat")
    fields = path.read_text().split("\n", 1)[0].split() if path.exists() else []
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0


def synchronise() -> None:
    """Wait for a GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write(name: str, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """results/<processor>/<name>.json and .md: what holds on one maker's processors may not on another's. Rows of one
    task and shape stand together: our time, and each peer's over ours."""
    where = machine()
    folder = RESULTS / slug(where["cpu"])
    folder.mkdir(parents=True, exist_ok=True)
    data = {"machine": where, "rows": list(rows)}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(title, rows, where))


def slug(cpu: str) -> str:
    """A folder's name of a processor's: "Intel(R) Xeon(R) Processor" is intel_xeon."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)|processor|cpu|@.*", " ", cpu.lower()))
    return "_".join(words) or "cpu"


def table(title: str, rows: Sequence[dict[str, Any]], where: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in where.items())
    lines = [
        f"{title}\n",
        f"{facts}. {_range(rows, 'bandwidth')} GB/s copied, {_range(rows, 'rate')} GFLOP/s in a matrix product.\n",
        "Medians; behind a peer's time how many times ours it is. Of roof: the least time that the work's bytes and "
        "FLOPs take, at the rates measured beside that row, over the time taken.\n",
        "| task | shape | who | ms | tokens/s | of roof | times ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['task']} | {row['shape']} | {row['who']} |"
        if "absent" in row:
            lines.append(f"{head} {row['absent']} | | | |")
            continue
        ours = next((each.get("ms") for each in rows if _same(each, row) and each["who"].startswith(OURS)), None)
        rate = "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}"
        share = ""
        if row["roof_ms"] is not None:
            share = f"{100 * row['roof_ms'] / row['ms']:.0f}%"
        times = "" if ours is None or row["who"].startswith(OURS) else f"{row['ms'] / ours:.2f}"
        lines.append(f"{head} {row['ms']:.2f} | {rate} | {share} | {times} |")
    return "\n".join(lines) + "\n"


def _range(rows: Sequence[dict[str, Any]], name: str) -> str:
    found = [row[name] / 1e9 for row in rows if name in row]
    return f"{min(found):.0f} to {max(found):.0f}" if found else "no"


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (one["task"], one["shape"]) == (other["task"], other["shape"])
