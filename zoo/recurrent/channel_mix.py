"""What RWKV's channel mixes share: feed-forward blocks with a state, since they also see the token before."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.block import Block, Out, State, enter, leave
from zoo.layers.shift import token_shift


class ChannelMixState(NamedTuple):
    """The last token and the document it belongs to (0: none yet)."""

    shift: Float[Tensor, "batch width"]
    segment: Int[Tensor, " batch"]


class ChannelMix(Block):
    """A feed-forward block of each token and the one before in its document. A subclass says which (`feed`)."""

    key: nn.Linear

    def feed(
        self, x: Float[Tensor, "batch time width"], before: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        """The output for tokens and those before them; 0 where both are 0, as they are at padding."""
        raise NotImplementedError(f"{type(self).__name__} defines no feed")

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> ChannelMixState:
        shift = torch.zeros(batch, self.width, device=device, dtype=dtype or self.key.weight.dtype)
        return ChannelMixState(shift, torch.zeros(batch, device=device, dtype=torch.long))

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if x.shape[1] == 1 and segments is None:
            stepped = self.one_token(x, state)
            if stepped is not None:
                return stepped
        if state is not None:
            fresh = self.init_state(x.shape[0], device=x.device, dtype=state.shift.dtype)
            state = enter(state, fresh, segments)
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach weights' gradients
        before, shift = token_shift(x, None if state is None else state.shift, segments)
        y = self.feed(x, before)
        if state is None:
            return Out(y, None, {})
        return Out(y, ChannelMixState(shift, leave(state.segment, segments)), {})
