"""Losses and statistics of routing. All are means over valid tokens: padding counts nowhere.

`counts` [experts] says how many choices fell on each expert, `valid` [tokens] which tokens are not padding (None:
all are). Sums are in the dtype of the arguments, which routers keep at float32 or more.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def count_sorted(chosen: Int[Tensor, " choices"], experts: int) -> Int[Tensor, " experts"]:
    """How often 0 ... experts-1 occur in a sorted list (larger numbers are not counted). No host synchronisation."""
    bounds = torch.arange(experts + 1, device=chosen.device, dtype=chosen.dtype)
    return torch.searchsorted(chosen, bounds).diff()


def mean(values: Float[Tensor, " tokens *rest"], valid: Bool[Tensor, " tokens"] | None) -> Float[Tensor, " *rest"]:
    """Mean over the valid tokens; 0 if there is none."""
    if valid is None:
        return values.mean(0)
    kept = torch.where(valid.reshape(-1, *[1] * (values.ndim - 1)), values, 0.0)
    return kept.sum(0) / valid.sum().clamp_min(1)


def shares(counts: Int[Tensor, " experts"], dtype: torch.dtype) -> Float[Tensor, " experts"]:
    """Each expert's share of all choices; they sum to 1 (to 0 if nothing was chosen)."""
    return counts.to(dtype) / counts.sum().clamp_min(1)


def load_balance(
    probabilities: Float[Tensor, "tokens experts"],
    counts: Int[Tensor, " experts"],
    valid: Bool[Tensor, " tokens"] | None,
) -> Float[Tensor, ""]:
    """E · Σ_e f_e P_e (Switch Transformer, 2101.03961, eq. 4-6), with f_e the share of all choices that fell on
    expert e, dropped ones included, and P_e the mean probability of e. 1 at uniform routing, E if all go to one.

    f carries no gradient: it is a count. With top_k choices some libraries divide by tokens instead of by choices,
    which makes the loss top_k times this one.
    """
    share = shares(counts, probabilities.dtype)
    return probabilities.shape[-1] * (share * mean(probabilities, valid)).sum()


def router_z(logits: Float[Tensor, "tokens experts"], valid: Bool[Tensor, " tokens"] | None) -> Float[Tensor, ""]:
    """Mean of logsumexp(logits)² (ST-MoE, 2202.08906, eq. 5): keeps the router's logits small."""
    return mean(logits.logsumexp(-1).square(), valid)


def entropy(probabilities: Float[Tensor, "tokens experts"], valid: Bool[Tensor, " tokens"] | None) -> Float[Tensor, ""]:
    """Mean entropy of the router's probabilities in nats: log(experts) when it does not know, 0 when it is sure."""
    return -mean(torch.xlogy(probabilities, probabilities).sum(-1), valid)
