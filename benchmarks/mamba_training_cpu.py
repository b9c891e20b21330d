"""Training Mamba on the CPU beside transformers, whose loop takes minutes a step: part of
`python -m benchmarks --slow`; alone `python -m benchmarks.mamba_training_cpu`.

The scan alone with its backward pass (transformers' loop is that of its MambaMixer; the same inputs as in `ops_cpu`),
and a language model of one layer of width 512 with 32,000 tokens, whose other layers would take as long again each. One
step of transformers is measured where it takes minutes, several of ours.

Everything twice: as PyTorch is installed, where the C library maps large tensors anew each time (the loop keeps
gigabytes of states, so it is mostly that), and with memory kept as the `zoo` command does, which helps peers too.
"""

import warnings

import torch
import transformers

from benchmarks import models_cpu, ops_cpu
from benchmarks.measure import write
from ops.native_memory import keep_freed_memory


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    theirs, ours = models_cpu.pair("mamba", num_hidden_layers=1)
    rows = []
    for memory in ("as installed", "freed memory kept"):
        if memory != "as installed":
            keep_freed_memory()
        found = ops_cpu.selective_scan(slow=True)
        for each in models_cpu.training("mamba, 1 layer,", theirs, ours, slow=True):
            found += each
        rows += [row | {"task": f"{row['task']}, {memory}"} for row in found]
    write("mamba_training_cpu", "# Training Mamba on the CPU", rows)


if __name__ == "__main__":
    main()
