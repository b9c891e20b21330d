"""What each mixer learns, at equal parameters, data and steps: `python -m benchmarks.quality`.

Trains a small language model of each mixer (models.py) on tasks that separate the families (tasks.py): selective
copying, induction heads, associative recall. A finished run is kept and not made again, so the command can be stopped
and started at will; `--mixers`, `--tasks`, `--rates` and `--seeds` choose. At the end it writes
benchmarks/results/quality.json and quality.md; `--report` does only that. One thread; a run is one to three minutes.
"""

import argparse
from itertools import product

import torch

from benchmarks.quality import store
from benchmarks.quality.models import MIXERS
from benchmarks.quality.training import RATES, SETTINGS, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description="What each mixer learns.")
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--report", action="store_true", help="only gather the finished runs")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    done = store.load()
    # Rates and seeds outermost: each round is a whole table.
    wanted = product(chosen.seeds, chosen.rates, chosen.mixers, chosen.tasks)
    for seed, rate, mixer, task in wanted if not chosen.report else ():
        if (task, mixer, rate, seed) in done:
            continue
        row = run(task, mixer, rate, seed)
        store.save(row)
        scores = "  ".join(f"{name}: {100 * each:.1f}" for name, each in row["accuracy"].items())
        print(f"{task} {mixer} rate {rate:g} seed {seed} in {row['seconds']:.0f} s: {scores}", flush=True)
    store.merge()


if __name__ == "__main__":
    main()
