"""Writes docs/checkpoints.md: for each published format that `zoo.convert` reads and writes, what it becomes, what is
varied in its tests, what is refused, and how far logits are from transformers' own on the same random weights.

Run from the repository's root: python -m docs.checkpoints
"""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

from tests.convert.peer import differences
from zoo.convert.published import FAMILIES, family
from zoo.hf import hide_progress

HERE = Path(__file__).parent
HEAD = f"""# Published checkpoints

`zoo.convert.load` reads these formats, `zoo.convert.save` writes them, and `zoo convert --from DIR --to DIR` does both
with files. An option without a counterpart, a tensor that is missing, not expected or of another shape, and pickled
weights are errors that name it.

Difference: the largest between a logit of ours and of transformers' model of the same random weights, as a share of the
largest logit, over all cases of the format's tests, each with a plain and a right-padded batch (left-padded ones are
compared in the tests, row by row alone where transformers reads the padding). Greedy generation is the same token for
token, and tensors and configuration come back bitwise the same; the tests say so for every case.

Written by `python -m docs.checkpoints` with torch {torch.__version__.split("+")[0]} and transformers
{transformers.__version__}.

| format | becomes | cases | difference in float64 | in float32 |
|---|---|---|---|---|
"""


def cases() -> Iterator[tuple[ModuleType, str, dict[str, Any]]]:
    """Every case of the tests: its module, the name of its configuration's class, and its options."""
    for path in sorted((HERE.parent / "tests" / "convert").glob("test_*.py")):
        module = importlib.import_module(f"tests.convert.{path.stem}")
        for name, options in getattr(module, "CASES", {}).values():
            yield module, name, options


def measure() -> dict[str, dict[str, Any]]:
    """What there is to tell of each model_type."""
    found: dict[str, dict[str, Any]] = {
        name: {"cases": 0, "options": set(), "blocks": {}, torch.float64: 0.0, torch.float32: 0.0} for name in FAMILIES
    }
    for module, name, options in cases():
        # Of the experts' implementations only this one takes float64.
        config = module.config_of(name, options, experts_implementation="eager")
        row = found[config.model_type]
        row["cases"] += 1
        row["options"] |= set(options)
        for dtype in (torch.float64, torch.float32):
            torch.manual_seed(0)
            errors, _, ours = differences(config, dtype)
            row[dtype] = max(row[dtype], errors["plain"], errors["right"])
        row["blocks"] |= dict.fromkeys(spec.kind for spec in ours.config.model_config.blocks())
        print(config.model_type, name, errors, flush=True)
    return found


def details(name: str, row: dict[str, Any]) -> str:
    """A format's section: what its file says of it, and the options that its tests vary."""
    kind = family(name)
    about = inspect.getdoc(importlib.import_module(FAMILIES[name].split(":")[0])) or ""
    _, _, reading = (inspect.getdoc(kind.read) or "").partition("\n\n")
    beside = ", ".join(f"`{each}`" for each in kind.beside)
    parts = [
        f"## {name}",
        about,
        reading,
        f"Left out with a warning: {beside}." if beside else "",
        f"Varied in its tests: {', '.join(f'`{each}`' for each in sorted(row['options']))}.",
    ]
    return "\n\n".join(each for each in parts if each) + "\n"


def main() -> None:
    hide_progress()
    found, lines = measure(), []
    for name, row in found.items():
        assert row["cases"], f"{name} has no case"
        both = " | ".join(f"{row[dtype]:.0e}" for dtype in (torch.float64, torch.float32))
        lines.append(f"| [{name}](#{name}) | {', '.join(row['blocks'])} | {row['cases']} | {both} |\n")
    sections = "\n".join(details(name, row) for name, row in found.items())
    (HERE / "checkpoints.md").write_text(HEAD + "".join(lines) + "\n" + sections)


if __name__ == "__main__":
    main()
