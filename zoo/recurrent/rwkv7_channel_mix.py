"""RWKV-7's channel mix (Peng et al., 2503.14456): a squared-ReLU feed-forward block with a state, the last token."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ops import relu2, token_mix
from zoo.block import tag
from zoo.layers.checks import integer, place
from zoo.layers.linear import Linear
from zoo.recurrent.channel_mix import ChannelMix


class RWKV7ChannelMix(ChannelMix):
    """RWKV-7 channel mix (2503.14456): a squared-ReLU feed-forward block that also sees the last token.

    o[t] = W_v max(W_k (x[t] + μ ⊙ (x[t-1] - x[t])), 0)²: RWKV-6's without its gate. μ is kept out of weight decay. At
    the start W_v is 0, as published: a new block adds nothing.

    Options:
        hidden: None: 4 width, as published.
        layer, layers: the block's place in its model, from 0; a model fills them in. They set the initial μ alone.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D hidden)
        train memory: O(T (D + hidden))
        prefill: O(T D hidden)
        decode: O(D hidden) a token, whatever the context
        state bytes: D*b + 8
    """

    def __init__(self, width: int, hidden: int | None = None, layer: int = 0, layers: int = 1):
        super().__init__(width)
        place(layer, layers)
        self.hidden = 4 * width if hidden is None else integer("hidden", hidden, otherwise=f"; None means {4 * width}")
        self.layer, self.layers = layer, layers
        self.mix_key = nn.Parameter(torch.empty(width))
        tag(self, "mix_key", weight_decay=False)
        self.key = Linear(width, self.hidden, bias=False)
        self.value = Linear(self.hidden, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initial values (BlinkDL's RWKV-LM)."""
        spot = torch.arange(self.width, dtype=torch.float64) / self.width
        self.mix_key.copy_(1 - spot ** ((1 - self.layer / self.layers) ** 4))
        nn.init.uniform_(self.key.weight, -0.5 / self.width**0.5, 0.5 / self.width**0.5)
        self.value.weight.zero_()

    def feed(
        self, x: Float[Tensor, "batch time width"], before: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        (mixed,) = token_mix(x, before, self.mix_key[None])
        return self.value(relu2(self.key(mixed)))

    def flops_per_token(self, context: int) -> int:
        """The matrices; the mix 3 a channel, relu² 2 a hidden unit."""
        return super().flops_per_token(context) + 3 * self.width + 2 * self.hidden

    def extra_repr(self) -> str:
        return f"{self.width}, hidden={self.hidden}, layer={self.layer}, layers={self.layers}"
