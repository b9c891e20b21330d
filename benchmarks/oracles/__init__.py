"""Authors' reference code run beside ours, where it cannot be installed: one script a repository.

`python -m benchmarks.oracles.NAME --source PATH` takes a checkout of the repository that the script names, gives both
sides the same weights and inputs in float64, and prints the largest differences of each comparison, relative to the
largest number compared. What can be installed (transformers) is compared in the tests instead.
"""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def source(about: str | None) -> Path:
    """The checkout given with --source; `about` is shown by --help."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--source", type=Path, required=True, help="a checkout of the authors' repository")
    path: Path = parser.parse_args().source
    if not path.is_dir():
        sys.exit(f"--source {path} is no folder; clone the repository named in this script's first lines there")
    return path


def stand_in(name: str, **contents: Any) -> types.ModuleType:
    """An importable module of this name that holds `contents` alone, for what the authors' code imports and does not
    need here (pytorch_lightning, a configuration library)."""
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module
    return module


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest |found - wanted|, relative to the largest |wanted|."""
    if found.shape != wanted.shape:
        raise ValueError(f"shapes {tuple(found.shape)} and {tuple(wanted.shape)} differ")
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def report(what: str, **differences: float) -> None:
    print(f"{what}: " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()), flush=True)


def perturb(module: torch.nn.Module, by: float) -> None:
    """Away from special values of the start, such as ones and zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))
