"""Long convolutions and the kernels of linear state space models on the CPU, beside torch.fft and the materialised
sums: part of `python -m benchmarks`; alone `python -m benchmarks.convolutions_cpu`.

float32 (complex64), forward and with backward. Roof: bytes of inputs and outputs, each once; for the sums their FLOPs,
a complex multiply-add counted as 8.
"""

from math import pi

import torch
from torch import Tensor

import ops
from benchmarks.measure import OURS, write
from benchmarks.ops_cpu import Rows, versus
from ops.native_memory import keep_freed_memory


def long_conv(length: int, channels: int, batch: int = 2) -> Rows:
    x, gate = torch.randn(2, batch, length, channels)
    kernel, D = torch.randn(channels, length) * torch.exp(-torch.arange(length) / 64), torch.randn(channels)

    def last(x: Tensor, kernel: Tensor, D: Tensor, gate: Tensor) -> Tensor:
        """[batch, channels, time], as the authors of S4 and Hyena hold it; the inputs come so."""
        spectrum = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(kernel, 2 * length)
        return (torch.fft.irfft(spectrum, 2 * length)[..., :length] + D[:, None] * x) * gate

    def first(x: Tensor, kernel: Tensor, D: Tensor, gate: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, 2 * length, dim=1) * torch.fft.rfft(kernel.T, 2 * length, dim=0)
        return (torch.fft.irfft(spectrum, 2 * length, dim=1)[:, :length] + D * x) * gate

    shape = f"batch {batch}, time {length}, channels {channels}"
    runs = {OURS: ops.long_conv, "torch.fft, channels last": first}
    rows = versus("long_conv, gated", shape, [x, kernel, D, gate], runs, 0, repeats=7)
    swapped = [x.mT.contiguous(), kernel, D, gate.mT.contiguous()]
    return rows + versus("long_conv, gated", shape, swapped, {"torch.fft, time last": last}, 0, repeats=7)


def vandermonde(length: int, channels: int = 512, n: int = 32) -> Rows:
    weights = torch.randn(channels, n, dtype=torch.complex64)
    log_a = torch.complex(-torch.rand(channels, n) * 0.1, torch.rand(channels, n) * pi)

    def whole(weights: Tensor, log_a: Tensor) -> Tensor:
        powers = torch.exp(log_a[..., None] * torch.arange(length))
        return 2 * torch.einsum("c n, c n l -> c l", weights, powers).real

    shape = f"channels {channels}, n {n}, length {length}"
    runs = {OURS: lambda *inputs: ops.vandermonde(*inputs, length=length), "torch, materialised": whole}
    return versus("vandermonde", shape, [weights, log_a], runs, 8 * channels * n * length, repeats=5)


def cauchy(length: int, channels: int = 256, n: int = 32) -> Rows:
    weights = torch.randn(channels, n, dtype=torch.complex64)
    poles = torch.complex(-torch.rand(channels, n) - 0.1, torch.randn(channels, n) * 10)
    z = torch.polar(torch.ones(length), torch.linspace(0.1, pi, length))

    def whole(weights: Tensor, z: Tensor, poles: Tensor) -> Tensor:
        one = torch.einsum("c n, c n l -> c l", weights, 1 / (z - poles[..., None]))
        return one + torch.einsum("c n, c n l -> c l", weights.conj(), 1 / (z - poles.conj()[..., None]))

    def real(function):
        """versus sums what comes back."""
        return lambda *inputs: torch.view_as_real(function(*inputs).resolve_conj())

    shape = f"channels {channels}, n {n}, length {length}"
    runs = {OURS: real(ops.cauchy), "torch, materialised": real(whole)}
    return versus("cauchy", shape, [weights, z, poles], runs, 2 * 8 * channels * n * length, repeats=5)


def main() -> None:
    torch.manual_seed(0)
    keep_freed_memory()
    rows = [row for length, channels in ((1024, 512), (2048, 1024), (8192, 512)) for row in long_conv(length, channels)]
    rows += [row for length in (1024, 8192) for row in vandermonde(length)]
    rows += [row for length in (1024, 8192) for row in cauchy(length)]
    write("convolutions_cpu", "# Long convolutions and kernels on the CPU", rows)


if __name__ == "__main__":
    main()
