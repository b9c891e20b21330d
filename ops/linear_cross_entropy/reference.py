"""Cross entropy of all logits at once."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def logits_of(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What stands in the softmax: float32 at least."""
    wide = products.to(torch.promote_types(products.dtype, torch.float32))
    wide = wide if scale == 1 else wide * scale
    return wide if softcap is None else softcap * torch.tanh(wide / softcap)


def whole(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: float, softcap: float | None) -> Tensor:
    """By torch's own operations, which can be differentiated any number of times."""
    logits = logits_of(linear(x, weight), scale, softcap)
    return cross_entropy(logits, targets.long(), ignore_index=ignore_index, reduction="sum")


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: float, softcap: float | None
) -> Tensor:
    """The formula, in float32 at least from the products on."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = logits_of(x.to(wide) @ weight.to(wide).T, scale, softcap)
    counts = targets != ignore_index
    chosen = logits.gather(1, torch.where(counts, targets, 0).long()[:, None])[:, 0]
    return torch.where(counts, logits.logsumexp(1) - chosen, 0.0).sum()
