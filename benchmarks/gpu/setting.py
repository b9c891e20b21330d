"""How a run is made (sizes, device, time left) and the roof that its rows are held against."""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

# An NVIDIA H200: bytes a second through its memory, bfloat16 operations a second in a matrix product, exponentials (and
# other special functions) a second. The rates measured on the machine at hand stand beside them in the report.
BANDWIDTH, MATRIX, SPECIAL = 4.3e12, 790e12, 4e12
CYCLES = 2e6  # of its clock in a millisecond, about


class Work(NamedTuple):
    """The least that a task must do: bytes moved, operations in matrix products, special functions."""

    bytes: float
    flops: float = 0.0
    special: float = 0.0

    def seconds(self) -> float:
        return max(self.bytes / BANDWIDTH, self.flops / MATRIX, self.special / SPECIAL)

    def __add__(self, other: tuple) -> "Work":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class Setting:
    """`smoke`: tiny sizes, two runs of each, on the CPU too. `repeats`: timed runs of each contestant, 0 to compile
    alone. `minutes`: no new task begins later."""

    def __init__(self, *, smoke: bool = False, repeats: int = 20, minutes: float | None = None):
        self.smoke = smoke
        self.repeats = min(repeats, 2) if smoke else repeats
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self._flush = torch.empty(2**28 if self.gpu else 2**10, device=self.device, dtype=torch.int8)

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.smoke else full

    @property
    def over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end

    def flush(self) -> None:
        """Put other bytes, several times its size, into the L2 cache."""
        self._flush.zero_()

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.rand(*shape, device=self.device, dtype=dtype or self.dtype)


def measured_roof(setting: Setting) -> dict[str, float]:
    """What this machine does: bytes a second of a copy (read and written), operations a second of a matrix product of
    random numbers (zeros run faster), exponentials a second."""
    count, side = setting.size(2**30, 2**16), setting.size(8192, 64)
    source = setting.normal(count)
    target = torch.empty_like(source)
    a, b = setting.normal(side, side), setting.normal(side, side)
    copied = 2 * count * source.element_size() / seconds(setting, lambda: target.copy_(source))
    product = 2 * side**3 / seconds(setting, lambda: a @ b)
    return {"copy_bytes_per_s": copied, "matmul_flops_per_s": product}


def seconds(setting: Setting, run: Any, repeats: int = 10) -> float:
    """The least of several runs after three that do not count."""
    for _ in range(3):
        run()
    return min(timed(setting, run)[0] for _ in range(2 if setting.smoke else repeats)) / 1e3


def timed(setting: Setting, run: Any, lead: float = 1.0) -> tuple[float, float]:
    """Milliseconds of one run on the device, and until Python had asked for all of it.

    The device is kept waiting for `lead` milliseconds meanwhile, so that it then finds the kernels in its queue: its
    time is theirs, not Python's between them. (A run that waits for the device itself shows that in its time.)
    """
    setting.flush()
    if not setting.gpu:
        started = time.perf_counter()
        run()
        taken = 1e3 * (time.perf_counter() - started)
        return taken, taken
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(lead * CYCLES))
    start.record()
    started = time.perf_counter()
    run()
    asked = 1e3 * (time.perf_counter() - started)
    end.record()
    end.synchronize()
    return start.elapsed_time(end), asked
