"""Training a whole Mamba of eight layers on the CPU beside transformers: part of `python -m benchmarks --slow`; alone
`python -m benchmarks.mamba_model_cpu`. About half an hour, nearly all of it one step of transformers at 2048 tokens.

Twice, as in `mamba_training_cpu`: as PyTorch is installed, and with freed memory kept.
"""

import warnings

import torch
import transformers

from benchmarks import models_cpu
from benchmarks.measure import write
from ops.native_memory import keep_freed_memory


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    theirs, ours = models_cpu.pair("mamba")
    rows = []
    for memory in ("as installed", "freed memory kept"):
        if memory != "as installed":
            keep_freed_memory()
        for found in models_cpu.training("mamba", theirs, ours, slow=True):
            rows += [row | {"task": f"{row['task']}, {memory}"} for row in found]
    write("mamba_model_cpu", "# Training a whole Mamba on the CPU", rows)


if __name__ == "__main__":
    main()
