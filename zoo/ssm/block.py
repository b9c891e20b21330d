"""The layer that time-invariant state space models are put in (S4, 2111.00396, section 3.4): mixing of features."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import glu

from zoo.block import Block, Out, State, tag
from zoo.layers.ffn import activation_function
from zoo.layers.linear import Linear
from zoo.ssm.lti import LTI


class SSMBlock(Block):
    """y = GLU(W activation(lti(u)) + b), W [2 width, width]; without `gated`, W [width, width] and no GLU.

    `lti` works on each feature alone, W mixes them. A kind is a subclass that makes its `LTI`. The state is the LTI's.
    """

    def __init__(self, width: int, lti: LTI, activation: str = "gelu", gated: bool = True):
        super().__init__(width)
        if lti.channels != width:
            raise ValueError(f"the state space model has channels={lti.channels}, but the block width={width}")
        self.lti = lti
        self.activation = activation_function(activation)
        self.gated = bool(gated)
        self.out_proj = Linear(width * lti.outputs, 2 * width if gated else width)
        tag(self.out_proj, "bias", weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        return self.lti.init_state(batch, device=device, dtype=dtype or self.out_proj.weight.dtype)

    def flops_per_token(self, context: int) -> int:
        return 2 * self.out_proj.weight.numel() + self.lti.flops_per_token()

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        y, state = self.lti(x, state, segments)
        y = self.out_proj(self.activation(y))
        if self.gated:
            y = glu(y, -1)
        if segments is not None:
            y = torch.where((segments != 0)[..., None], y, 0)  # the bias
        return Out(y, state, {})
