"""linear_cross_entropy a piece of the rows at a time by torch's operations, on any device."""

import torch
from torch import Tensor

from ops.linear_cross_entropy.common import in_pieces


def losses(
    products: Tensor, targets: Tensor, ignore_index: int, scale: float, softcap: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(products.dtype, torch.float32)
    logits = products.to(wide, copy=gradient)
    if scale != 1:
        logits = logits.mul_(scale) if gradient else logits * scale
    bent = None
    if softcap:
        bent = torch.tanh(logits / softcap)
        logits = softcap * bent
    counts = targets != ignore_index
    place = torch.where(counts, targets, 0).long()[:, None]
    total = logits.logsumexp(1)
    nats = torch.where(counts, total - logits.gather(1, place)[:, 0], 0.0)
    if not gradient:
        return nats, products
    slopes = logits.sub_(total[:, None]).exp_()
    slopes.scatter_add_(1, place, slopes.new_full(place.shape, -1.0))
    if bent is not None:
        slopes *= 1 - bent.square()
    if scale != 1:
        slopes *= scale
    return nats, products.copy_(slopes.masked_fill_(~counts[:, None], 0.0))


linear_cross_entropy = in_pieces("linear_cross_entropy_chunked", losses)
