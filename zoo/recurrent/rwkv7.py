"""RWKV-7, Goose (Peng et al., 2503.14456): layers of a generalised delta rule that share the values of the first."""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.block import Block, Out, enter, leave
from zoo.layers.checks import integer, number
from zoo.layers.heads import choose_heads
from zoo.layers.low_rank import choose_rank
from zoo.layers.norm import LayerNorm
from zoo.layers.shift import token_shift
from zoo.recurrent.rwkv7_channel_mix import RWKV7ChannelMix
from zoo.recurrent.rwkv7_time_mix import TimeMix


class RWKV7LayerState(NamedTuple):
    """What one layer carries: the last tokens, normed, of its two halves and the matrices."""

    shift: Float[Tensor, "batch width"]
    S: Float[Tensor, "batch heads head_dim head_dim"]  # [key, value]; float32 at least
    channel_shift: Float[Tensor, "batch width"]


class RWKV7State(NamedTuple):
    """Constant size: every layer's state and the document they belong to (0: none yet)."""

    layers: tuple[RWKV7LayerState, ...]
    segment: Int[Tensor, " batch"]


class RWKV7Layer(nn.Module):
    """x + TimeMix(LayerNorm(x)), then x + ChannelMix(LayerNorm(x))."""

    def __init__(self, time_mix: TimeMix, channel_mix: RWKV7ChannelMix):
        super().__init__()
        self.time_norm, self.channel_norm = LayerNorm(time_mix.width), LayerNorm(time_mix.width)
        self.time_mix, self.channel_mix = time_mix, channel_mix

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        first: Float[Tensor, "batch time width"] | None,
        state: RWKV7LayerState | None,
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[Tensor, Tensor, RWKV7LayerState]:
        """x after the layer, layer 0's values (`first`, None in layer 0) and the layer's state."""
        shift, S, channel_shift = (None, None, None) if state is None else state
        y, values, shift, last = self.time_mix(_valid(self.time_norm(x), segments), first, shift, S, segments)
        x = x + _valid(y, segments)
        u = _valid(self.channel_norm(x), segments)
        before, channel_shift = token_shift(u, channel_shift, segments)
        x = x + self.channel_mix.feed(u, before)
        return x, values, RWKV7LayerState(shift, last if S is None else last.to(S.dtype), channel_shift)


class RWKV7(Block):
    """RWKV-7 layers (2503.14456): a delta rule with a learning rate a channel, and values mixed with layer 0's.

    Time mix, with m_□ = x[t] + μ_□ ⊙ (x[t-1] - x[t]) and l_□ of low rank:

        r, k, v = W_□ m_□;  w = exp(-e^-½ σ(l_w(m_w)));  α = σ(l_a(m_a));  g = l_g(m_g)
        v ← v + σ(l_v(m_v)) ⊙ (v of layer 0 - v), not in layer 0
        κ̂ = ξ ⊙ k, of length 1 in each head;  k ← k ⊙ (1 + (α - 1) ⊙ c)
        S_t = (Diag(w) - (α ⊙ κ̂) κ̂ᵀ) S_{t-1} + k vᵀ;  o = rᵀ S_t, for each head
        y = W_o (g ⊙ (LayerNorm_heads(o) + (Σ r ρ k) v))

    then `rwkv7_channel_mix`. The paper's state is the transpose. Since layers read layer 0's values, this is a
    composite block: it owns `layers` layers with their norms and residuals, and a model has one of it. Layer 0 has no
    l_v (the author's training code makes one there that nothing reads). As published all but the large matrices is kept
    out of weight decay, and W_o and the channel mix's last matrix start at 0: a new block passes x on.

    w lies between 0.545 and 1, so ln w is computed in float32 at least and never overflows.

    Options:
        layers: time and channel mixes, one of each a layer.
        heads: None: of 64 channels as released, or about four in a small width.
        decay_rank, rate_rank, value_rank, gate_rank: of l_w, l_a, l_v, l_g; None: 2.5, 2.5, 1.7 and 5 sqrt(width), to
            a multiple of 32, at least 32 as released, or what a narrow model's matrix has at most.
        hidden: of the channel mixes; None: 4 width.
        norm_eps: of the heads' norm.

    Cost (T tokens, D = width, b bytes a number; ranks = the sum of the four):
        train time: O(layers T D (D + hidden + ranks + head_dim))
        train memory: O(layers T (D + hidden)) and one state a chunk
        prefill: O(layers T D (D + hidden + ranks + head_dim))
        decode: O(layers D (D + hidden + ranks + head_dim)) a token, whatever the context
        state bytes: layers*(2*D*b + D*head_dim*max(4, b)) + 8
    """

    residual = False

    def __init__(
        self,
        width: int,
        layers: int = 2,
        heads: int | None = None,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        hidden: int | None = None,
        norm_eps: float = 64e-5,
    ):
        super().__init__(width)
        self.layers = integer("layers", layers)
        if number("norm_eps", norm_eps) < 0:
            raise ValueError(f"norm_eps={norm_eps} must not be negative")
        self.heads = choose_heads(width, heads)
        self.head_dim = width // self.heads
        self.decay_rank = choose_rank("decay_rank", decay_rank, _usual(2.5, width), width)
        self.rate_rank = choose_rank("rate_rank", rate_rank, _usual(2.5, width), width)
        self.value_rank = choose_rank("value_rank", value_rank, _usual(1.7, width), width)
        self.gate_rank = choose_rank("gate_rank", gate_rank, _usual(5.0, width), width)
        ranks = self.decay_rank, self.rate_rank, self.value_rank, self.gate_rank
        made = [
            RWKV7Layer(
                TimeMix(width, self.heads, ranks, layer, layers, norm_eps),
                RWKV7ChannelMix(width, hidden, layer, layers),
            )
            for layer in range(layers)
        ]
        self.stack = nn.ModuleList(made)
        self.hidden = made[0].channel_mix.hidden

    @property
    def each_layer(self) -> list[RWKV7Layer]:
        """The layers, typed."""
        return cast("list[RWKV7Layer]", list(self.stack))

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> RWKV7State:
        dtype = dtype or self.each_layer[0].time_mix.key.weight.dtype
        sums = torch.promote_types(dtype, torch.float32)

        def one() -> RWKV7LayerState:
            return RWKV7LayerState(
                torch.zeros(batch, self.width, device=device, dtype=dtype),
                torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device, dtype=sums),
                torch.zeros(batch, self.width, device=device, dtype=dtype),
            )

        segment = torch.zeros(batch, device=device, dtype=torch.long)
        return RWKV7State(tuple(one() for _ in range(self.layers)), segment)

    def flops_per_token(self, context: int) -> int:
        return sum(
            each.time_mix.flops_per_token() + each.channel_mix.flops_per_token(context) for each in self.each_layer
        )

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: RWKV7State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        carried = state
        if segments is not None and state is not None:
            fresh = self.init_state(len(x), device=x.device, dtype=state.layers[0].shift.dtype)
            carried = enter(state, fresh, segments)
        x, first = _valid(x, segments), None
        after = []
        for index, layer in enumerate(self.each_layer):
            x, first, own = layer(x, first, None if carried is None else carried.layers[index], segments)
            after.append(own)
        if state is None:
            return Out(x, None, {})
        return Out(x, RWKV7State(tuple(after), leave(state.segment, segments)), {})

    def extra_repr(self) -> str:
        return f"{self.width}, layers={self.layers}, heads={self.heads}, hidden={self.hidden}"


def _valid(x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None) -> Tensor:
    """x with 0 at padding, where a norm's bias, or a NaN, would reach weights' gradients."""
    return x if segments is None else torch.where((segments != 0)[..., None], x, 0)


def _usual(factor: float, width: int) -> int:
    """The released rank for a width."""
    return max(32, round(factor * width**0.5 / 32) * 32)
