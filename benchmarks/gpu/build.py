"""Install peers from their source archives: `python -m benchmarks.gpu.build FOLDER TARGET`.

mamba-ssm and causal-conv1d compile for up to nine architectures and read no TORCH_CUDA_ARCH_LIST; here for that of this
machine's GPU alone. FOLDER holds source archives (.tar.gz) and wheels; what is made of them is installed into TARGET,
to be put on PYTHONPATH. Nothing is downloaded.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# Two lines of a setup.py that add an architecture.
ARCHITECTURE = re.compile(r'cc_flag\.append\("-gencode"\)\n( *)cc_flag\.append\("arch=compute_(\d+),code=sm_\d+"\)')
FLAGS = ("MAMBA_FORCE_BUILD", "MAMBA_KEEP_CUDA_BUILD", "CAUSAL_CONV1D_FORCE_BUILD")  # build, look for no ready wheel


def narrowed(setup: str, capability: str) -> str:
    """A setup.py that compiles for one architecture ("90")."""

    def keep(found: re.Match[str]) -> str:
        return found.group() if found.group(2) == capability else f"pass\n{found.group(1)}pass"

    return ARCHITECTURE.sub(keep, setup)


def install(target: Path, *what: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--upgrade"]
    environment = {"MAX_JOBS": str(os.cpu_count()), **dict.fromkeys(FLAGS, "TRUE"), **os.environ}
    subprocess.run([*command, "--target", str(target), *map(str, what)], env=environment, check=True)


def main(folder: Path, target: Path, capability: str) -> None:
    if wheels := sorted(folder.glob("*.whl")):
        install(target, *wheels)  # at once: two of them have a folder in common, which a second call would replace
    for archive in sorted(folder.glob("*.tar.gz")):
        with tempfile.TemporaryDirectory() as scratch:
            with tarfile.open(archive) as packed:
                packed.extractall(scratch, filter="data")
            (root,) = (each for each in Path(scratch).iterdir() if each.is_dir())
            setup = root / "setup.py"
            setup.write_text(narrowed(setup.read_text(), capability))
            try:
                install(target, root)
            except subprocess.CalledProcessError as error:
                print(f"{archive.name} could not be built ({error}); its rows will say that it is absent")


if __name__ == "__main__":
    import torch

    if len(sys.argv) != 3:
        sys.exit("python -m benchmarks.gpu.build FOLDER TARGET")
    major, minor = torch.cuda.get_device_capability()
    main(Path(sys.argv[1]), Path(sys.argv[2]), f"{major}{minor}")
