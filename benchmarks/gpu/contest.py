"""A task and its contestants, and the rows that come of them."""

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ops
from benchmarks.gpu import checking
from benchmarks.gpu.peers import first_line
from benchmarks.gpu.setting import Setting, Work, timed

Inputs = dict[str, Tensor]
LONG = 3000.0  # milliseconds after which a contestant has had its runs, three at least
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


class Contestant(NamedTuple):
    """`run` takes the inputs by name; `prepare` brings them into a layout of its own, `finish` the output into ours for
    the comparison. Neither is timed. `same`: it computes what the task says, not another thing to time beside it."""

    run: Callable[..., Any]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    finish: Callable[[Any], Any] = lambda output: output
    work: Mapping[str, Work] | None = None  # where it is another than the task's
    same: bool = True


class Task(NamedTuple):
    """`work` by pass: which passes are timed. Contestants whose names begin with "zoo" are ours: they are checked, and
    others' times are divided by the first one's. A string in a contestant's place says why it is absent."""

    name: str
    shape: str
    target: str
    inputs: Inputs
    runs: Mapping[str, Contestant | str]
    work: Mapping[str, Work]
    part: checking.Part | Callable[[Callable[..., Any]], checking.Pairs]
    constants: tuple[str, ...] = ()  # inputs without a gradient
    graph: bool = False  # replay a CUDA graph of the call: for calls shorter than their launches


def rows_of(tasks: Iterator[Task], setting: Setting) -> Iterator[list[dict[str, Any]]]:
    """The rows of one task after another. None begins when the time is over."""
    for task in tasks:
        if setting.over:
            return
        print(f"{task.name}, {task.shape}", flush=True)
        yield rows(task, setting)


def rows(task: Task, setting: Setting) -> list[dict[str, Any]]:
    """A row for each pass and contestant, the contestants in turns."""
    base = {"task": task.name, "shape": task.shape, "target": task.target}
    absent: list[dict[str, Any]] = []
    alive: dict[str, Contestant] = {}
    facts: dict[str, dict[str, Any]] = {}
    for who, each in task.runs.items():
        reason = each if isinstance(each, str) else "not begun: the time was over" if setting.over else None
        if reason is None:
            try:
                facts[who] = _enter(task, who, each, setting)  # pyright: ignore[reportArgumentType]
                reason = facts[who].get("wrong")
            except Exception as error:  # a peer's failure is a row, ours too
                reason = f"failed: {first_line(error)}"
            _clear(setting)
        if reason is None:
            alive[who] = each  # pyright: ignore[reportArgumentType]
        else:
            print(f"  {who}: {reason}", flush=True)
            absent.append(base | {"pass": "all", "who": who, "absent": reason})
    found: list[dict[str, Any]] = []
    for way, work in task.work.items() if setting.repeats else ():
        found += [base | row for row in _pass(task, way, work, alive, facts, setting)]
    return found + absent


def _enter(task: Task, who: str, each: Contestant, setting: Setting) -> dict[str, Any]:
    """Run all passes until kernels are compiled and tuned; check ours."""
    inputs = each.prepare(task.inputs)
    for way in task.work:
        call = _call(way, each, inputs, task)
        for _ in range(1 if setting.smoke else 2):
            call()
        del call
    facts: dict[str, Any] = {}
    if not who.startswith("zoo"):
        if each.same and setting.repeats:
            facts["checked"] = _agreement(task, each)
            print(f"  {who}: differs by {facts['checked']:.2g} of the norm from the reference", flush=True)
        return facts
    if setting.gpu:
        facts["kernels"] = told = {}
        with launches(told):
            for way in task.work:
                _call(way, each, inputs, task)()
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        facts["impl"] = ops.explain(each.run, **inputs).chosen
    if setting.repeats:
        facts |= _checked(task, each)
    print(f"  {who}: {facts}", flush=True)
    return facts


def _agreement(task: Task, each: Contestant) -> float:
    """Whether a peer computes the same: how far its values lie from the reference's."""
    if not isinstance(task.part, checking.Part):
        return max(checking.errors(task.part(each.run)).values())
    with torch.no_grad():
        found = checking.values(each.finish(each.run(**each.prepare(task.inputs))), task.inputs, task.part)
    return max(checking.errors(found).values())


def _checked(task: Task, each: Contestant) -> dict[str, Any]:
    """The largest relative error, and whether that is one."""
    grad = FORWARD not in task.work or len(task.work) > 1
    with checking.poisoned(), torch.set_grad_enabled(grad):
        if isinstance(task.part, checking.Part):
            pairs = checking.pairs(each.run, task.inputs, task.constants, task.part)
        else:
            pairs = task.part(each.run)
        found = checking.errors(pairs)
    dtype = next(iter(pairs.values()))[0].dtype
    worst = max(found, key=lambda name: found[name])
    facts: dict[str, Any] = {"checked": found[worst], "errors": found}
    if not found[worst] <= checking.TOLERANCE[dtype]:
        facts["wrong"] = f"WRONG: {worst} is off by {found[worst]:.2g} of its norm"
    return facts


def _call(way: str, each: Contestant, inputs: Inputs, task: Task) -> Callable[[], Any]:
    """What is timed in a pass."""
    if way == FORWARD:
        return torch.no_grad()(lambda: each.run(**inputs))
    leaves = {
        name: value.detach().requires_grad_(value.is_floating_point() and name not in task.constants)
        for name, value in inputs.items()
    }
    wanted = [value for value in leaves.values() if value.requires_grad]
    y = each.run(**leaves)
    dy = torch.randn_like(y)
    if way == BACKWARD:
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)
    return lambda: torch.autograd.grad(each.run(**leaves), wanted, dy)


def _pass(
    task: Task,
    way: str,
    work: Work,
    alive: Mapping[str, Contestant],
    facts: Mapping[str, dict],
    setting: Setting,
) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, float | None] = {}
    broken: dict[str, str] = {}
    for who, each in alive.items():
        try:
            calls[who], peaks[who] = _ready(task, way, each, setting)
        except Exception as error:
            calls.pop(who, None)
            broken[who] = f"failed: {first_line(error)}"
            _clear(setting)
    times: dict[str, list[tuple[float, float]]] = {who: [] for who in calls}
    for _ in range(setting.repeats):
        for who, call in calls.items():
            if len(times[who]) >= 3 and sum(each[0] for each in times[who]) > LONG:
                continue
            asked = times[who][-1][1] if times[who] else 10.0
            times[who].append(timed(setting, call, min(50.0, 0.2 + 1.5 * asked)))
    found = [{"pass": way, "who": who, "absent": reason} for who, reason in broken.items()]
    for who, taken in times.items():
        device = [each[0] for each in taken]
        own = alive[who].work
        least = work if own is None else own[way]
        row = {"pass": way, "who": who, "ms": statistics.median(device), "spread_ms": max(device) - min(device)}
        row |= {"host_ms": statistics.median(each[1] for each in taken), "runs": len(taken), "peak_gb": peaks[who]}
        row |= {"bytes": least.bytes, "flops": least.flops, "special": least.special, "roof_ms": 1e3 * least.seconds()}
        found.append(row | facts.get(who, {}))
        print(f"  {way:18s} {who:34s} {row['ms']:10.4f} ms, roof {row['roof_ms']:.4f} ms", flush=True)
    calls.clear()
    _clear(setting)
    return found


def _ready(task: Task, way: str, each: Contestant, setting: Setting) -> tuple[Callable[[], Any], float | None]:
    """The call that is timed, run once, and the gigabytes that it allocated at most beside what was there before."""
    call = _call(way, each, each.prepare(task.inputs), task)
    peak = None
    if setting.gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    if task.graph and setting.gpu:
        call = captured(call)
    call()
    return call, peak


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextlib.contextmanager
def launches(found: dict[str, str]) -> Iterator[None]:
    """Notes which Triton kernels are launched and with what constants and warps, as autotuning or the op chose them."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    before = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        told = {n: v for n, v in kwargs.items() if n.startswith("num_") or (n.isupper() and type(v) is int)}
        name, text = self.fn.__name__, " ".join(f"{n}={v}" for n, v in told.items())
        while name in found and found[name] != text:
            name += "'"
        found[name] = text
        return before(self, *args, **kwargs)

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = before


def _clear(setting: Setting) -> None:
    if setting.gpu:
        gc.collect()
        torch.cuda.empty_cache()
