"""The shapes that signatures declare hold: laws run again with jaxtyping checking every annotated call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Blocks that reach every op: implementations take long, and each op's are the same for all its blocks.
OPS = (
    *("aft", "gqa", "sparse", "mamba", "mamba2", "mamba3", "s4", "s4d", "hyena", "gla", "gated_delta_net", "rwkv4"),
    *("rwkv6", "rwkv7", "rg_lru", "slstm", "moe", "linformer"),
)
BOTH = ("implementations", "interpreted")
IMPLEMENTATIONS = " or ".join(f"test_law[{kind}-{law}-float32]" for kind in OPS for law in BOTH)
LAWS = f"((contract or chunks or packed) and float32) or {IMPLEMENTATIONS}"
SHARES = 2  # so that the processes which run the tests have something to share


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "tests.typecheck", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_laws_hold_with_every_shape_checked(share):
    done = run("tests/test_laws.py", "-k", LAWS, "--share", f"{share}/{SHARES}")
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def test_a_wrong_shape_is_seen(tmp_path):
    file = tmp_path / "test_wrong.py"
    file.write_text(
        "import torch\nfrom ops.segments import runs\n\ndef test_it():\n    runs(torch.ones(2, 3, 4).long())\n"
    )
    done = run(str(file))
    assert done.returncode == 1
    assert "type-check" in done.stdout
