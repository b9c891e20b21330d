"""sLSTM of xLSTM (Beck et al., 2405.04517): an LSTM with exponential gates whose heads mix their memories."""

from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ops import slstm
from zoo.block import Block, Out, enter, leave, tag
from zoo.layers.checks import integer, number, place
from zoo.layers.conv import ShortConvolution
from zoo.layers.heads import up_to_four


class SLSTMState(NamedTuple):
    """Constant size: (conv_width + 3) · width numbers and a document id a row."""

    conv: Float[Tensor, "batch taps_1 width"]  # the last inputs of the convolution, oldest first
    h: Float[Tensor, "batch width"]  # this and the next three as in `ops.slstm`, float32 at least
    c: Float[Tensor, "batch width"]
    n: Float[Tensor, "batch width"]
    m: Float[Tensor, "batch width"]
    segment: Int[Tensor, " batch"]


class SLSTM(Block):
    """sLSTM (2405.04517): exponential gates, a normaliser, and recurrent weights within each head.

    i = exp(ĩ), f = σ(f̃), z = tanh(z̃), o = σ(õ), each logit W u_t + R h_{t-1} + b;  c_t = f c_{t-1} + i z;
    n_t = f n_{t-1} + i;  h_t = o c_t / n_t  (eq. 8 to 17);  y = norm(h), LayerNorm over each head, weights but no bias.

    W and R are block-diagonal, a block a head (figure 10). i and f see u = silu(conv(x)), z and o see u = x. The gated
    feed-forward that follows in the paper is the model's. Nothing runs in parallel over time: h feeds back through tanh
    and the gates. b starts at 0, but a head's forget gates from 5 down to -7, as in the authors' code: most of a head
    remembers long, the more so the deeper the block. R starts uniform in ± 1/√width; b and the norm's weight are kept
    out of weight decay.

    Options:
        heads: None: 4 as in the paper, or fewer where 4 do not divide the width.
        conv_width: tokens under the convolution.
        layer, layers: the block's place in its model, from 0; a model fills them in.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 / heads), T steps one after another
        train memory: O(T D)
        prefill: O(T D^2 / heads), T steps one after another
        decode: O(D^2 / heads) a token, whatever the context
        state bytes: (conv.taps - 1)*D*b + 4*D*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        conv_width: int = 4,
        layer: int = 0,
        layers: int = 1,
        norm_eps: float = 1e-5,
    ):
        super().__init__(width)
        self.heads = up_to_four(heads, width=width)
        place(layer, layers)
        if number("norm_eps", norm_eps) < 0:
            raise ValueError(f"norm_eps={norm_eps} must not be negative")
        self.norm_eps = norm_eps
        size = width // self.heads
        self.conv = ShortConvolution(width, integer("conv_width", conv_width))
        # To the logits of i, f, z and o, in this order.
        self.W = nn.Parameter(torch.randn(self.heads, size, 4, size) * (2 / (5 * width)) ** 0.5)
        self.R = nn.Parameter(torch.empty(self.heads, size, 4, size).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.zeros(4, width))
        self.norm_weight = nn.Parameter(torch.ones(width))
        depth = layer / max(1, layers - 1)
        with torch.no_grad():
            forget = 5 - 12 * torch.linspace(0, 1, size) ** (0.3 + 1.3 * depth)
            self.bias[1].copy_(forget.repeat(self.heads))
        tag(self, "bias", weight_decay=False)
        tag(self, "norm_weight", weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> SLSTMState:
        dtype = dtype or self.W.dtype
        wide = torch.promote_types(dtype, torch.float32)
        h, c, n, m = (torch.zeros(batch, self.width, device=device, dtype=wide) for _ in range(4))
        conv = self.conv.init_state(batch, device=device, dtype=dtype)
        return SLSTMState(conv, h, c, n, m, torch.zeros(batch, device=device, dtype=torch.long))

    def flops_per_token(self, context: int) -> int:
        """The matrices and the convolution; 30 a channel for gates, memory and norm."""
        return 2 * (self.conv.weight.numel() + self.W.numel() + self.R.numel()) + 30 * self.width

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: SLSTMState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        carried = state
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach weights' gradients
            if state is not None:
                fresh = self.init_state(len(x), device=x.device, dtype=state.conv.dtype)
                carried = enter(state, fresh, segments)
        seen, conv = self.conv(x, None if carried is None else carried.conv, segments)
        wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has 8 bits, an exponent needs more
        logits = torch.cat([self._mix(seen, self.W[:, :, :2]), self._mix(x, self.W[:, :, 2:])], 2).to(wide)
        h, last = slstm(
            logits + self.bias.to(wide),
            self.R,
            initial_state=None if carried is None else (carried.h, carried.c, carried.n, carried.m),
            segments=segments,
        )
        heads = h.unflatten(-1, (self.heads, -1))
        y = F.layer_norm(heads, heads.shape[-1:], eps=self.norm_eps).flatten(-2) * self.norm_weight.to(wide)
        if state is None:
            return Out(y.to(x.dtype), None, {})
        h, c, n, m = (each.to(state.h.dtype) for each in last)
        return Out(y.to(x.dtype), SLSTMState(conv, h, c, n, m, leave(state.segment, segments)), {})

    def _mix(
        self, x: Float[Tensor, "batch time width"], W: Float[Tensor, "heads size gates size"]
    ) -> Float[Tensor, "batch time gates width"]:
        """W x, each head's channels by themselves."""
        heads = rearrange(x, "b t (h i) -> b t h i", h=self.heads)
        return einsum(heads, W, "b t h i, h i g o -> b t g h o").flatten(-2)
