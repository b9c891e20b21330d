"""The native (numba, CPU) Cauchy sum: the loops of `native_kernels.py` over channels in threads."""

import numpy as np
import torch
from jaxtyping import Complex
from torch import Tensor

from ops.native_array import array
from ops.native_threads import run_blocks
from ops.ssm_kernel import chunked, native_kernels
from ops.ssm_kernel.autograd import cauchy_op


def cauchy(
    weights: Complex[Tensor, "channels n"],
    z: Complex[Tensor, " length"],
    poles: Complex[Tensor, "channels n"],
    conjugate: bool = True,
) -> Complex[Tensor, "channels length"]:
    """See `ops.cauchy`. complex64 alone."""
    return _cauchy(weights, z, poles, conjugate)


def _parts(value: Complex[Tensor, "*shape"]) -> tuple[np.ndarray, np.ndarray]:
    return array(value.real.double().contiguous()), array(value.imag.double().contiguous())


def _pairs(value: Complex[Tensor, "*shape"]) -> np.ndarray:
    return array(torch.view_as_real(value.resolve_conj()).double().contiguous())


def _forward(weights: Tensor, z: Tensor, poles: Tensor, conjugate: bool) -> Tensor:
    out = torch.empty(len(weights), len(z), 2)
    run_blocks(native_kernels.cauchy, len(weights), _pairs(weights), *_parts(z), _pairs(poles), conjugate, out.numpy())
    return torch.view_as_complex(out)


def _backward(
    dK: Tensor, weights: Tensor, z: Tensor, poles: Tensor, conjugate: bool, need_z: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `chunked`."""
    ones, twos = (torch.empty(*weights.shape, 2) for _ in range(2))
    found = ones.numpy(), twos.numpy()
    run_blocks(native_kernels.cauchy_backward, len(weights), *_parts(dK), *_parts(z), _pairs(poles), conjugate, *found)
    dz = chunked.cauchy_places(dK, weights, z, poles, conjugate) if need_z else None
    return torch.view_as_complex(ones), weights.conj_physical() * torch.view_as_complex(twos), dz


_cauchy = cauchy_op("native", _forward, _backward)
