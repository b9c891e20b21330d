"""linear_cross_entropy on a CPU: torch's matrix products, and numba for the softmax between them, which reads and
writes a row of logits while it is in the cache."""

import numpy as np
import torch
from torch import Tensor

from ops.linear_cross_entropy import kernels
from ops.linear_cross_entropy.common import in_pieces
from ops.native_array import array
from ops.native_threads import run_blocks


def losses(
    products: Tensor, targets: Tensor, ignore_index: int, scale: float, softcap: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    nats = products.new_empty(len(products))
    short = products.dtype == torch.float32
    kind, bits = (np.float32, torch.int32) if short else (np.float64, torch.int64)
    arrays = [array(each) for each in (products, products.view(bits), targets.long().contiguous(), nats)]
    run_blocks(kernels.losses, len(products), *arrays, kind(scale), kind(softcap), gradient)
    return nats, products


linear_cross_entropy = in_pieces("linear_cross_entropy_native", losses)
