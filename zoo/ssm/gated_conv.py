"""The gated short convolution of LFM2 (2511.23404): two gates around a causal convolution over a few tokens."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.block import Block, Out, enter, leave, tag
from zoo.layers.checks import integer
from zoo.layers.conv import ShortConvolution
from zoo.layers.linear import Linear


class GatedConvState(NamedTuple):
    """Constant size: (conv_width - 1) · width numbers and a document id a row."""

    conv: Float[Tensor, "batch taps_1 width"]  # the last inputs of the convolution, oldest first
    segment: Int[Tensor, " batch"]


class GatedConvolution(Block):
    """Gated short convolution: y = W_out (C ⊙ conv(B ⊙ u)) with [B, C, u] = W_in x (LFM2, 2511.23404).

    conv is causal and depthwise, over `conv_width` tokens of the document, without an activation: a token sees itself
    and the conv_width - 1 before it, so a model needs blocks that look further among these. in_proj holds the rows of
    B, C and u.

    `bias`: of both projections and of the convolution.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 + T D conv_width)
        train memory: O(T D)
        prefill: O(T D^2 + T D conv_width)
        decode: O(D^2 + D conv_width) a token, whatever the context
        state bytes: (conv.taps - 1)*D*b + 8
    """

    def __init__(self, width: int, conv_width: int = 3, bias: bool = False):
        super().__init__(width)
        if not isinstance(bias, bool):
            raise ValueError(f"bias={bias!r} must be true or false")
        self.in_proj = Linear(width, 3 * width, bias=bias)
        self.conv = ShortConvolution(width, integer("conv_width", conv_width), bias=bias, activation=None)
        self.out_proj = Linear(width, width, bias=bias)
        for projection in (self.in_proj, self.out_proj) if bias else ():
            tag(projection, "bias", weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> GatedConvState:
        return GatedConvState(
            self.conv.init_state(batch, device=device, dtype=dtype or self.in_proj.weight.dtype),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def flops_per_token(self, context: int) -> int:
        """The matrices, the convolution, and the two products of the gates."""
        return super().flops_per_token(context) + 2 * self.width

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: GatedConvState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        carried = state
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach weights' gradients
            if state is not None:
                fresh = self.init_state(len(x), device=x.device, dtype=state.conv.dtype)
                carried = enter(state, fresh, segments)
        B, C, u = self.in_proj(x).chunk(3, -1)
        y, conv = self.conv(B * u, None if carried is None else carried.conv, segments)
        y = self.out_proj(C * y)
        if segments is not None and self.out_proj.bias is not None:
            y = torch.where((segments != 0)[..., None], y, 0)
        if state is None:
            return Out(y, None, {})
        return Out(y, GatedConvState(conv, leave(state.segment, segments)), {})
