"""`python -m benchmarks.gpu [GROUP ...]`: measure ours against others' kernels on the GPU of this machine."""

import argparse
import contextlib
import importlib
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

GROUPS = (
    "convolution", "scan", "linear_attention", "delta_rule", "wkv", "moe", "long_conv", "attention", "decode", "loss",
    "norm",
)  # fmt: skip
RESULTS = Path(__file__).parent.parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parsed(arguments)
    if given.warm:
        _warm(given)
    import torch

    import ops
    from benchmarks.gpu import report
    from benchmarks.gpu.setting import Setting, measured_roof

    setting = Setting(smoke=given.smoke, repeats=0 if given.compile else given.repeats, minutes=given.minutes)
    if not setting.gpu and not given.smoke:
        sys.exit("there is no CUDA GPU here; --smoke runs every row at a tiny size on the CPU")
    facts = report.where({} if given.compile else measured_roof(setting))
    print(facts, flush=True)
    preferred = given.impl or ("chunked" if not setting.gpu else None)
    for group in given.groups:
        torch.manual_seed(0)
        module = importlib.import_module(f"benchmarks.gpu.{group}")
        rows, complete = [], True
        if setting.over:
            print(f"{group}: not begun, the time is over", flush=True)
            continue
        with ops.use(preferred) if preferred else contextlib.nullcontext():
            try:
                for made in module.rows(setting):
                    rows += made
                    complete = not setting.over
                    if not given.compile:
                        report.write(given.out, group, facts, rows, complete)
            except Exception:  # one group's inputs may not fit: the others' numbers are wanted all the same
                traceback.print_exc()
    print(f"written to {given.out}/gpu.md and gpu.json" if not given.compile else "compiled", flush=True)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; none: all")
    parser.add_argument("--minutes", type=float, help="begin no new row after so many minutes")
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.md; default benchmarks/results")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each contestant")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one run of each; runs on a CPU too")
    parser.add_argument("--impl", help="prefer this implementation of ours where it can run")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="first compile all groups, in N processes")
    parser.add_argument("--compile", action="store_true", help="only run each call so that its kernels are compiled")
    given = parser.parse_args(arguments)
    unknown = [each for each in given.groups if each not in GROUPS]
    if unknown:
        parser.error(f"unknown group {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    given.groups = given.groups or list(GROUPS)
    # A smoke run's numbers mean nothing and do not replace measured ones.
    given.out = given.out or (Path("runs/gpu_smoke") if given.smoke else RESULTS)
    return given


def _warm(given: argparse.Namespace) -> None:
    """Compiling takes most of the time and one core: do it beside one another. What autotuning finds there is not kept,
    since the GPU is shared meanwhile, only compiled kernels are (Triton's cache on disk). The groups that are not done
    after half the minutes are ended."""
    begin = time.monotonic()
    flags = ["--compile", *(["--smoke"] if given.smoke else []), *(["--impl", given.impl] if given.impl else [])]
    waiting, running = list(given.groups), []
    while waiting or running:
        while waiting and len(running) < given.warm:
            command = [sys.executable, "-m", "benchmarks.gpu", waiting.pop(0), *flags]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        time.sleep(0.2)
        running = [each for each in running if each.poll() is None]
        if given.minutes is not None and time.monotonic() - begin > 30 * given.minutes:
            for each in running:
                each.kill()
                each.wait()
            break
    if given.minutes is not None:
        given.minutes -= (time.monotonic() - begin) / 60


if __name__ == "__main__":
    main()
