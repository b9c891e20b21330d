"""RWKV-4 (Peng et al., 2305.13048): the time mix, a recurrent average of values, and the channel mix, a stateful FFN.

Both look at a mix of the current and the last token, μ ⊙ x[t] + (1 - μ) ⊙ x[t-1] with a learned μ for each channel
(eq. 11-13, 17-18), so both carry the last token in their state.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops import relu2, step, token_mix
from ops.step import Around
from ops.wkv import empty_state, wkv
from zoo.block import Block, Out, State, Step, enter, leave, stay, tag
from zoo.layers.checks import integer, place
from zoo.layers.linear import Linear, plain
from zoo.layers.shift import token_shift
from zoo.recurrent.channel_mix import ChannelMix, ChannelMixState


class RWKV4State(NamedTuple):
    """The last token, the sums of `ops.wkv` (float32 at least), and the document they belong to (0: none yet)."""

    shift: Float[Tensor, "batch width"]
    numerator: Float[Tensor, "batch width"]
    denominator: Float[Tensor, "batch width"]
    maximum: Float[Tensor, "batch width"]
    segment: Int[Tensor, " batch"]


class RWKV4(Block):
    """RWKV-4 time mix (2305.13048): an exponentially decaying average of values, weighted by keys.

    o[t] = W_o (σ(r[t]) ⊙ wkv[t]), r, k, v linear in mixes of x[t] and x[t-1] (eq. 11-15).

    The decay of a channel is exp(-exp(time_decay)), the bonus of the current token time_first (`ops.wkv`).
    `layer` (from 0) of `layers` only set the initial decays, bonus and mixes, as published: a fast and a slow end
    over the channels, bent with depth. `impl` is that of `ops.wkv`.
    State: the last token and three float32 numbers a channel, whatever the context. Work a token does not grow with it.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2)
        train memory: O(T D)
        prefill: O(T D^2)
        decode: O(D^2) a token, whatever the context
        state bytes: D*b + 3*D*max(4, b) + 8
    """

    def __init__(self, width: int, *, layer: int = 0, layers: int = 1, impl: str = "auto"):
        super().__init__(width)
        place(layer, layers)
        self.layer, self.layers, self.impl = layer, layers, impl
        self.time_decay = nn.Parameter(torch.empty(width))
        self.time_first = nn.Parameter(torch.empty(width))
        self.time_mix_key = nn.Parameter(torch.empty(width))
        self.time_mix_value = nn.Parameter(torch.empty(width))
        self.time_mix_receptance = nn.Parameter(torch.empty(width))
        for name in ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance"):
            tag(self, name, weight_decay=False)
        self.key = Linear(width, width, bias=False)
        self.value = Linear(width, width, bias=False)
        self.receptance = Linear(width, width, bias=False)
        self.output = Linear(width, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initial decays, bonus and mixes (appendix E); matrices are nn.Linear's own."""
        depth = self.layer / max(self.layers - 1, 1)  # 0 ... 1
        rest = 1.0 - self.layer / self.layers  # 1 ... almost 0
        index = torch.arange(self.width, dtype=torch.float64)
        speed = (index / max(self.width - 1, 1)) ** (0.7 + 1.3 * depth)
        self.time_decay.copy_(-5 + 8 * speed)
        zigzag = 0.5 * ((index + 1) % 3 - 1)
        self.time_first.copy_(math.log(0.3) + zigzag)
        place = index / self.width
        self.time_mix_key.copy_(place**rest)
        self.time_mix_value.copy_(place**rest + 0.3 * depth)
        self.time_mix_receptance.copy_(place ** (0.5 * rest))

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> RWKV4State:
        dtype = dtype or self.key.weight.dtype
        shift = torch.zeros(batch, self.width, device=device, dtype=dtype)
        # float32: the sums take T updates, bfloat16 keeps 8 bits.
        sums = empty_state(batch, self.width, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return RWKV4State(shift, *sums, torch.zeros(batch, device=device, dtype=torch.long))

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
        mixes = torch.stack([self.time_mix_key, self.time_mix_value, self.time_mix_receptance])
        for_key, for_value, for_receptance = token_mix(before, x, mixes)
        key, value, receptance = self.key(for_key), self.value(for_value), self.receptance(for_receptance)
        log_decay = -torch.exp(self.time_decay.to(torch.promote_types(self.time_decay.dtype, torch.float32)))
        sums = None if state is None else (state.numerator, state.denominator, state.maximum)
        average, final = wkv(
            key, value, log_decay, self.time_first, initial_state=sums, segments=segments, impl=self.impl
        )
        y = self.output(torch.sigmoid(receptance) * average)
        if state is None:
            return Out(y, None, {})
        numerator, denominator, maximum = (each.to(state.numerator.dtype) for each in final)
        return Out(y, RWKV4State(shift, numerator, denominator, maximum, leave(state.segment, segments)), {})

    def bind_step(self, around: Around) -> Step | None:
        linears = (self.key, self.value, self.receptance, self.output)
        if self.impl not in ("auto", "native") or not plain(*linears):
            return None
        weights = tuple(each.weight for each in linears)
        mixes = (self.time_mix_key, self.time_mix_value, self.time_mix_receptance)
        if not step.fits(*weights, *mixes, self.time_decay, self.time_first, around.weight, around.bias):
            return None
        from ops.step.rwkv4 import time_mix

        run, width = time_mix(weights, mixes, self.time_decay, self.time_first, around), self.width

        def one(x: Tensor, state: Any) -> Out | None:
            if type(state) is not RWKV4State or not step.takes(x, width):
                return None
            for leaf in state[:4]:
                if not step.holds(leaf, len(x), width):
                    return None
            y, shift, sums = run(x, state.shift, state[1:4])
            return Out(y, RWKV4State(shift, sums[0], sums[1], sums[2], stay(state.segment)), {})

        return one

    def flops_per_token(self, context: int) -> int:
        """Four matrices; each mix 3 a channel; wkv 17 (two averages of numerator and denominator, a division, two
        exponentials and their arguments); the gate 2. Nothing depends on the context."""
        return 4 * 2 * self.width**2 + (3 * 3 + 17 + 2) * self.width

    def extra_repr(self) -> str:
        return f"{self.width}, layer={self.layer}, layers={self.layers}"


class RWKV4ChannelMix(ChannelMix):
    """RWKV-4 channel mix (2305.13048): a gated feed-forward block that also sees the last token.

    o[t] = σ(W_r m_r[t]) ⊙ W_v max(W_k m_k[t], 0)², m mixes of x[t] and x[t-1] (eq. 17-18).

    An FFN with state: the last token. `hidden` is 4 · width unless told; `layer` (from 0) of `layers` only set
    the initial mixes, as published.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D (hidden + D))
        train memory: O(T (D + hidden))
        prefill: O(T D (hidden + D))
        decode: O(D (hidden + D)) a token, whatever the context
        state bytes: D*b + 8
    """

    def __init__(self, width: int, *, hidden: int | None = None, layer: int = 0, layers: int = 1):
        super().__init__(width)
        place(layer, layers)
        remedy = f"; None means 4 * width = {4 * width}"
        self.hidden = 4 * width if hidden is None else integer("hidden", hidden, otherwise=remedy)
        self.layer, self.layers = layer, layers
        self.time_mix_key = nn.Parameter(torch.empty(width))
        self.time_mix_receptance = nn.Parameter(torch.empty(width))
        for name in ("time_mix_key", "time_mix_receptance"):
            tag(self, name, weight_decay=False)
        self.key = Linear(width, self.hidden, bias=False)
        self.receptance = Linear(width, width, bias=False)
        self.value = Linear(self.hidden, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initial mixes (appendix E); matrices are nn.Linear's own."""
        place = torch.arange(self.width, dtype=torch.float64) / self.width
        mix = place ** (1.0 - self.layer / self.layers)
        self.time_mix_key.copy_(mix)
        self.time_mix_receptance.copy_(mix)

    def feed(
        self, x: Float[Tensor, "batch time width"], before: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        mixes = torch.stack([self.time_mix_key, self.time_mix_receptance])  # the share of the token itself
        for_key, for_receptance = token_mix(before, x, mixes)
        key = relu2(self.key(for_key))
        return torch.sigmoid(self.receptance(for_receptance)) * self.value(key)

    def bind_step(self, around: Around) -> Step | None:
        linears = (self.key, self.receptance, self.value)
        if not plain(*linears):
            return None
        weights, mixes = tuple(each.weight for each in linears), (self.time_mix_key, self.time_mix_receptance)
        if not step.fits(*weights, *mixes, around.weight, around.bias):
            return None
        from ops.step.rwkv4 import channel_mix

        run, width = channel_mix(weights, mixes, around), self.width

        def one(x: Tensor, state: Any) -> Out | None:
            if type(state) is not ChannelMixState or not step.takes(x, width):
                return None
            if not step.holds(state.shift, len(x), width):
                return None
            y, shift = run(x, state.shift)
            return Out(y, ChannelMixState(shift, stay(state.segment)), {})

        return one

    def flops_per_token(self, context: int) -> int:
        """Three matrices; each mix 3 a channel, relu² 2 a hidden unit, the gate 2 a channel."""
        return 2 * self.width * (2 * self.hidden + self.width) + (2 * 3 + 2) * self.width + 2 * self.hidden

    def extra_repr(self) -> str:
        return f"{self.width}, hidden={self.hidden}, layer={self.layer}, layers={self.layers}"
