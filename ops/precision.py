"""In which precision sums are made, whatever the inputs' dtypes and autocast say."""

import contextlib
from functools import reduce

import torch
from torch import Tensor

# Devices that have autocast (meta has none). Asked once: older torch.compile cannot trace the question.
_AUTOCAST = frozenset(each for each in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(each))


def state_dtype(*inputs: Tensor | None) -> torch.dtype:
    """The dtype states are summed in: float32 (complex64) at least, since they sum T updates
    and bfloat16 keeps 8 bits."""
    return reduce(torch.promote_types, (each.dtype for each in inputs if each is not None), torch.float32)


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for this device."""
    return device.type in _AUTOCAST and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Turns autocast off: it would make the sums' products in bfloat16."""
    return torch.autocast(device.type, enabled=False) if autocasting(device) else contextlib.nullcontext()
