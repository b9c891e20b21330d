"""What Hyena and its distilled form share: projections, the short convolution, gates around long convolutions."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.block import Block, enter, tag
from zoo.layers.checks import integer
from zoo.layers.conv import ShortConvolution
from zoo.layers.linear import Linear


class Short(NamedTuple):
    """The part of a state that the short convolution needs."""

    conv: Float[Tensor, "batch taps_1 inner"]
    segment: Int[Tensor, " batch"]


class GatedConvolutions(Block):
    """(x_0, ..., x_{N-1}, v) = conv(W_in u), conv short, depthwise and causal; a subclass convolves v between gates:

        v = x_{N-1} ⊙ v;  for s = 0 ... N-2:  v = x_{N-2-s} ⊙ (h^s ∗ v + D^s ⊙ v);  y = W_out v.

    `order` N: N gates and N - 1 long convolutions a channel.
    """

    def __init__(self, width: int, order: int, conv_width: int):
        super().__init__(width)
        self.order = integer("order", order, 2, ": between two gates stands one long convolution")
        self.conv_width = integer("conv_width", conv_width)
        inner = (order + 1) * width
        self.in_proj = Linear(width, inner)
        self.conv = ShortConvolution(inner, conv_width, activation=None)
        self.out_proj = Linear(width, width)
        tag(self.in_proj, "bias", weight_decay=False)
        tag(self.out_proj, "bias", weight_decay=False)

    @property
    def stages(self) -> int:
        """Long convolutions one after another."""
        return self.order - 1

    @property
    def channels(self) -> int:
        """Filters: one a feature and stage."""
        return self.stages * self.width

    def stage(self, index: int) -> slice:
        """The channels of one stage."""
        return slice(index * self.width, (index + 1) * self.width)

    def outer_flops(self) -> int:
        """Of one token, but for the long convolutions."""
        matrices = self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv.weight.numel()
        return 2 * matrices + self.order * self.width

    def project(
        self, x: Float[Tensor, "batch time width"], short: Short | None, segments: Int[Tensor, "batch time"] | None
    ) -> tuple[Float[Tensor, "batch time width"], list[Tensor], Tensor]:
        """The first stage's input, the gate behind each stage, and the short convolution's state."""
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach in_proj's gradient
        carried = None
        if short is not None:
            carried = enter(short, Short(torch.zeros_like(short.conv), short.segment), segments).conv
        inner, conv = self.conv(self.in_proj(x), carried, segments)
        *gates, v = inner.chunk(self.order + 1, -1)
        return v * gates[-1], gates[-2::-1], conv

    def finish(
        self, v: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None
    ) -> Float[Tensor, "batch time width"]:
        y = self.out_proj(v)
        return y if segments is None else torch.where((segments != 0)[..., None], y, 0)  # the bias
