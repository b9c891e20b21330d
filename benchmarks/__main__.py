"""All speed measurements of this machine in one run: `python -m benchmarks [--slow]`.

On a CPU: the ops, mixtures of experts, long convolutions, training of every family, whole models beside transformers'.
With a GPU the groups of `benchmarks.gpu` come after them (docs/gpu.md). Writes JSON and Markdown under
benchmarks/results. `--slow` adds the peers that take minutes a step. Growth with the context is
`python -m benchmarks.growth`.
"""

import importlib
import sys

import torch


def main() -> None:
    importlib.import_module("benchmarks.ops_cpu").main([])
    for name in ("moe_cpu", "convolutions_cpu", "training_cpu"):
        importlib.import_module(f"benchmarks.{name}").main()
    importlib.import_module("benchmarks.models_cpu").main([])
    if "--slow" in sys.argv:
        for name in ("mamba_training_cpu", "mamba_model_cpu"):
            importlib.import_module(f"benchmarks.{name}").main()
    if torch.cuda.is_available():
        importlib.import_module("benchmarks.gpu.__main__").main([])


if __name__ == "__main__":
    main()
