"""Imports go one way, cost little, and touch nothing heavy."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Layers from the ground up; a module may import from its own layer's module and from those before it.
FAMILIES = ("zoo.attention", "zoo.ssm", "zoo.recurrent", "zoo.moe")
LAYERS = [
    ("ops",),
    ("zoo.kept",),
    ("zoo.block",),
    ("zoo.layers", "zoo.registry"),  # the registry names blocks as strings; a block of blocks builds them by it
    FAMILIES,
    ("zoo.config",),
    ("zoo.model",),
    ("zoo.describe", "zoo.graphs", "zoo.hf"),
    ("zoo.convert",),
    ("train", "zoo.cli"),
]
OWNERS = {
    "transformers": ("zoo.hf", "zoo.convert"),
    "lightning": ("train",),
    "triton": ("ops",),
    "numba": ("ops",),
    "jsonargparse": ("train",),
    "lm_eval": ("zoo.hf",),
    "torchao": ("zoo.hf",),
    "peft": ("zoo.hf",),
}


def modules():
    for package in ("zoo", "ops", "train"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imported(path: Path, name: str):
    """Every absolute name imported anywhere in a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


def inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer(name: str) -> int | None:
    for index, prefixes in enumerate(LAYERS):
        if any(inside(name, prefix) for prefix in prefixes):
            return index
    return None


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_arrows_run_one_way(name, path):
    if name == "zoo":
        return  # the front: names of every layer, imported when asked for
    mine = layer(name)
    assert mine is not None, f"{name} has no layer; add it to LAYERS"
    for other in imported(path, name):
        theirs = layer(other)
        assert theirs is None or theirs <= mine, f"{name} imports {other}, which stands above it"
        for family in FAMILIES:
            if inside(other, family) and not inside(name, family):
                assert not any(inside(name, each) for each in FAMILIES), f"{name} imports its sibling {other}"
        root = other.split(".")[0]
        if root in OWNERS:
            assert any(inside(name, owner) for owner in OWNERS[root]), f"{name} imports {root}; only {OWNERS[root]} may"
        assert not (inside(name, "zoo") and inside(other, "train")), f"{name} imports train"


def test_the_test_sees_an_arrow_that_runs_back(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from zoo.model import LanguageModel\n")
    with pytest.raises(AssertionError, match="stands above"):
        test_arrows_run_one_way("ops.bad", file)


def newly_imported(package: str) -> list[str]:
    """Modules that importing a package adds to those of torch, in a fresh process."""
    code = f"import json, sys, torch; old = set(sys.modules); import {package}; "
    code += "print(json.dumps([*set(sys.modules) - old]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("package", ["zoo", "ops"])
def test_import_touches_nothing_heavy(package):
    """What costs time is named, instead of a clock, which lies in CI: all that is imported is on a short list."""
    roots = {name.split(".")[0] for name in newly_imported(package)}
    extra = {name for name in roots if name not in sys.stdlib_module_names}
    assert extra <= {"zoo", "ops", "jaxtyping", "wadler_lindig", "yaml", "_yaml", "einops", "torch", "numpy"}, extra


def test_import_defines_names_only():
    """No op's kernels and no block's file are loaded before they are asked for."""
    new = newly_imported("zoo")
    assert not [name for name in new if name.endswith((".triton", ".native", ".chunked"))]
    assert not [name for name in new if name.startswith(("zoo.attention.", "zoo.ssm.", "zoo.moe.", "zoo.recurrent."))]


def test_blocks_are_first_imported_on_any_device():
    """`zoo describe` builds on meta, where a module that computes a number with tensors as it is imported fails."""
    code = (
        "import torch\nfrom zoo.registry import block_class, kinds\n"
        "with torch.device('meta'):\n    for kind in kinds():\n        block_class(kind)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
