"""RWKV-6's channel mix (Peng et al., 2404.05892): a gated feed-forward block with a state, the last token."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ops import relu2, token_mix
from zoo.block import tag
from zoo.layers.checks import integer, place
from zoo.layers.initial import orthogonal_
from zoo.layers.linear import Linear
from zoo.recurrent.channel_mix import ChannelMix


class RWKV6ChannelMix(ChannelMix):
    """RWKV-6 channel mix (2404.05892): a gated feed-forward block that also sees the last token.

    m = x[t] + μ ⊙ (x[t-1] - x[t]), one for r and one for k;  o[t] = σ(W_r m_r[t]) ⊙ W_v max(W_k m_k[t], 0)².

    RWKV-4's but for its hidden size and its initial values. μ, `mix_key` and `mix_receptance`, is the share of the last
    token, as released (RWKV-4's is that of the current one), and is kept out of weight decay. At the start W_v and W_r
    are 0 and W_k is orthogonal, as published: a new block adds nothing.

    Options:
        hidden: None: 3.5 width, down to a multiple of 32 where that leaves any, as published.
        layer, layers: the block's place in its model, from 0; a model fills them in. They set the initial μ alone.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D (hidden + D))
        train memory: O(T (D + hidden))
        prefill: O(T D (hidden + D))
        decode: O(D (hidden + D)) a token, whatever the context
        state bytes: D*b + 8
    """

    def __init__(self, width: int, hidden: int | None = None, layer: int = 0, layers: int = 1):
        super().__init__(width)
        place(layer, layers)
        usual = int(3.5 * width) // 32 * 32 or int(3.5 * width)
        self.hidden = usual if hidden is None else integer("hidden", hidden, otherwise=f"; None means {usual}")
        self.layer, self.layers = layer, layers
        self.mix_key = nn.Parameter(torch.empty(width))
        self.mix_receptance = nn.Parameter(torch.empty(width))
        for name in ("mix_key", "mix_receptance"):
            tag(self, name, weight_decay=False)
        self.key = Linear(width, self.hidden, bias=False)
        self.receptance = Linear(width, width, bias=False)
        self.value = Linear(self.hidden, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initial values (BlinkDL's RWKV-LM)."""
        spot = torch.arange(self.width, dtype=torch.float64) / self.width
        for mix in (self.mix_key, self.mix_receptance):
            mix.copy_(1 - spot ** (1 - self.layer / self.layers))
        orthogonal_(self.key.weight)
        self.receptance.weight.zero_()
        self.value.weight.zero_()

    def feed(
        self, x: Float[Tensor, "batch time width"], before: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        mixes = torch.stack([self.mix_key, self.mix_receptance])
        for_key, for_receptance = token_mix(x, before, mixes)
        key = relu2(self.key(for_key))
        return torch.sigmoid(self.receptance(for_receptance)) * self.value(key)

    def flops_per_token(self, context: int) -> int:
        """The matrices; each mix 3 a channel, relu² 2 a hidden unit, the gate 2 a channel."""
        return super().flops_per_token(context) + (2 * 3 + 2) * self.width + 2 * self.hidden

    def extra_repr(self) -> str:
        return f"{self.width}, hidden={self.hidden}, layer={self.layer}, layers={self.layers}"
