"""Hyena's implicit filters (Poli et al., 2302.10866, section 3.3): a small network of the position, times a window."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ops.precision import full_precision
from zoo.block import tag
from zoo.layers.checks import integer, number
from zoo.layers.spelling import nearest
from zoo.layers.wide import WideLinear

WINDOW: Mapping[str, float] = {"fast": 0.3, "slow": 1.5, "target": 0.01, "shift": 0.0}


class ImplicitFilter(nn.Module):
    """h_l = window(t) · W_out sin(f · (... sin(f · (W_in z(t) + b)) ...)), t = l / (length - 1); eq. 7.

    z(t) is t and `bands` complex exponentials exp(-2πi k l / length), k evenly from 0 to bands - 1, as cosines and
    sines; f, one learned frequency a hidden feature, is shared by all layers and starts at `frequency`: high ones make
    filters that are not smooth at the start. The window of channel c is exp(-δ_c t) + shift, δ_c evenly spaced so that
    it falls to `target` at t = slow (first channel) ... fast (last).

    A filter has a value at every lag. `length` is only the lag at which t is 1: beyond it the same formulas go on
    (the exponentials repeat, the window keeps falling), and no input is refused. So z stays what the equation says; the
    published code can learn its values, at `length` lags and no other.

    `stages` filters are made for each of `channels` channels; feature `c * stages + s` of the network is stage s of
    channel c, as in the published weights.
    """

    def __init__(
        self,
        channels: int,
        stages: int,
        length: int,
        hidden: int,
        layers: int,
        bands: int,
        frequency: float,
        window: Mapping[str, float] | None,
    ):
        super().__init__()
        self.channels, self.stages, self.window = channels, stages, check_window(window)
        self.length = integer("length", length, 2, ": the lag at which the filters' time is 1")
        self.bands = integer("bands", bands)
        integer("filter_width", hidden)
        integer("filter_layers", layers, 0)
        sizes = [2 * bands + 1, *[hidden] * (layers + 1)]
        self.layers = nn.ModuleList(WideLinear(*pair) for pair in pairwise(sizes))
        self.out = WideLinear(hidden, stages * channels, bias=False)
        self.frequency = nn.Parameter(torch.full((hidden,), float(number("frequency", frequency))))
        tag(self, "frequency", weight_decay=False)
        tag(self.out, "weight", weight_decay=False)
        for each in self.layers:
            tag(each, "weight", weight_decay=False)
            tag(each, "bias", weight_decay=False)

    def flops(self) -> int:
        """For one lag of all filters."""
        matrices = [cast(nn.Linear, each).weight for each in (*self.layers, self.out)]
        return sum(2 * each.numel() for each in matrices) + 3 * self.out.weight.shape[0]

    def forward(self, length: int) -> Float[Tensor, "filters length"]:
        """Lags 0 ... length - 1 of every filter, stage after stage; in float32 at least. Also under autocast: bfloat16
        keeps 8 bits, and frequencies multiply errors."""
        weight = self.out.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        with full_precision(weight.device):
            lag = torch.arange(length, device=weight.device, dtype=wide)
            x = self._features(lag)
            for layer in self.layers:
                x = torch.sin(self.frequency.to(wide) * layer(x))
            h = self.out(x)
            if self.window is not None:
                h = h * self._window(lag)
        return rearrange(h, "l (c s) -> (s c) l", s=self.stages)

    def _features(self, lag: Float[Tensor, " length"]) -> Float[Tensor, "length features"]:
        # The published code's lowest frequency is not quite 0.
        k = torch.linspace(1e-4, self.bands - 1, self.bands, device=lag.device, dtype=lag.dtype)
        angle = 2 * math.pi / self.length * lag[:, None] * k
        return torch.cat([lag[:, None] / (self.length - 1), torch.cos(angle), -torch.sin(angle)], 1)

    def _window(self, lag: Float[Tensor, " length"]) -> Float[Tensor, "length features"]:
        assert self.window is not None
        fall = -math.log(self.window["target"])
        delta = torch.linspace(
            fall / self.window["slow"],
            fall / self.window["fast"],
            self.out.weight.shape[0],
            device=lag.device,
            dtype=lag.dtype,
        )
        return torch.exp(-delta * lag[:, None] / (self.length - 1)) + self.window["shift"]


def check_window(window: Mapping[str, Any] | None) -> dict[str, float] | None:
    """A whole window from a part of its options. Raises ValueError that names what is wrong."""
    if window is None:
        return None
    if not isinstance(window, Mapping):
        raise ValueError(f"window={window!r} must be a mapping with some of {', '.join(WINDOW)}, or null for none")
    for name in window:
        if name not in WINDOW:
            raise ValueError(f"window has no option {name!r}{nearest(str(name), WINDOW)}. Options: {', '.join(WINDOW)}")
    whole = {**WINDOW, **window}
    for name, value in whole.items():
        number(f"window.{name}", value)
    if not 0 < whole["fast"] <= whole["slow"]:
        raise ValueError(
            f"window.fast={whole['fast']} and window.slow={whole['slow']} must satisfy 0 < fast <= slow: they are the "
            "times at which the fastest and the slowest channel have fallen to target"
        )
    if not 0 < whole["target"] < 1:
        raise ValueError(f"window.target={whole['target']} must be between 0 and 1")
    return whole
