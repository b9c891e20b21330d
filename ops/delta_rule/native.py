"""The delta rule on the CPU: as `chunked`, with pairs under a decay a key channel in compiled loops."""

from typing import Any

from torch import Tensor

from ops.delta_rule.chunked import chunked
from ops.linear_attention.native import native_pairs
from ops.linear_attention.pairs import pairs


def native(**arguments: Any) -> tuple[Tensor, Tensor]:
    """See `ops.delta_rule`. Keeps what `chunked` keeps."""
    return chunked(**arguments, pairs=_pairs)


def _pairs(q: Tensor | None, k: Tensor | None, log_decay: Tensor, read: Tensor, itself: bool) -> tuple[Tensor, ...]:
    if q is None or k is None:
        return pairs(q, k, log_decay, read, itself)
    # Here a head is a group of one.
    q, k, log_decay, read = (each.unsqueeze(-3) for each in (q[:, 0], k[0], log_decay[0, 0], read[0, 0]))
    seen, *weights = native_pairs(q, k, log_decay, read, itself)
    return seen.squeeze(-3), *(each.squeeze(-3)[None, None] for each in weights)
