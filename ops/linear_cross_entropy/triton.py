"""linear_cross_entropy on a GPU: cuBLAS's matrix products, and one Triton program a row for the softmax between them,
which reads the row's products twice and writes their gradient once."""

import torch
import triton
from torch import Tensor

from ops.linear_cross_entropy import triton_kernels
from ops.linear_cross_entropy.common import in_pieces

BLOCK = 4096  # logits that a program holds at once


def losses(
    products: Tensor, targets: Tensor, ignore_index: int, scale: float, softcap: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    rows, vocab = products.shape
    nats = products.new_empty(rows, dtype=torch.float32)
    if rows:
        triton_kernels.losses[(rows,)](
            products,
            targets.contiguous(),
            nats,
            products.stride(0),
            vocab,
            ignore_index,
            scale,
            softcap,
            GRADIENT=gradient,
            CAPPED=softcap != 0,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
            num_warps=8,  # pyright: ignore[reportCallIssue]
        )
    return nats, products


linear_cross_entropy = in_pieces("linear_cross_entropy_triton", losses)
