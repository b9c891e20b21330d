"""Others' kernels, each an optional import: a missing one is told of in its row."""

import importlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

FLA = "flash-linear-attention"
BARE = ("mamba_ssm",)
INSTALL = {
    "fla": "pip install flash-linear-attention",
    "accelerated_scan": "pip install accelerated-scan",
    "mamba_ssm": "see docs/gpu.md",
    "causal_conv1d": "see docs/gpu.md",
    "flash_attn": "pip install flash-attn --no-build-isolation",
}


def peer(place: str, use: Callable[[Any], Any]) -> Any:
    """`use` of the object at "module:name", or a line that says why there is none."""
    module, name = place.split(":")
    _bare(module.split(".")[0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever goes wrong in somebody else's import
        root = module.split(".")[0]
        logging.getLogger(__name__).debug("%s", place, exc_info=True)
        return f"not here ({first_line(error)}); {INSTALL.get(root, root)}"
    return use(found)


def _bare(root: str) -> None:
    """Let a package's modules be imported without its __init__: mamba-ssm's imports models that want much else."""
    if root in sys.modules or root not in BARE:
        return
    spec = importlib.util.find_spec(root)
    if spec is not None and spec.submodule_search_locations:
        package = types.ModuleType(root)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[root] = package


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
