"""GSS, gated state spaces (Mehta et al., 2206.13947): a gated unit around a diagonal SSM of few channels."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.block import Block, Out, State, tag
from zoo.layers.checks import integer
from zoo.layers.ffn import activation_function
from zoo.layers.linear import Linear
from zoo.layers.norm import LayerNorm
from zoo.ssm.lti import DiagonalLTI, Modes, expm1, tag_system, widened


class GSSSystem(DiagonalLTI):
    """K_l = Re Σ_n C_n (e^(λ_n) - 1)/λ_n · e^(λ_n l), λ = -exp(log_A_real) + i exp(log_A_imag) (2206.13947, sec. 3.2).

    DSS's zero-order hold, simplified: a step of 1, for it is absorbed by λ, whose modes all channels share, and random
    starts in place of HiPPO: both logarithms standard normal. C starts complex normal with a variance of 1/n a part, so
    that outputs are about as large as inputs however many modes there are.

    λ is kept out of weight decay and has its own `learning_rate`.
    """

    def __init__(self, channels: int, state_size: int = 512, learning_rate: float | None = 1e-3, skip: bool = True):
        super().__init__(channels, integer("state_size", state_size), conjugate=False, skip=skip)
        self.log_A_real = nn.Parameter(torch.randn(self.n))
        self.log_A_imag = nn.Parameter(torch.randn(self.n))
        self.C = nn.Parameter(torch.randn(channels, self.n, 2) * self.n**-0.5)
        tag_system(self, "log_A_real", "log_A_imag", learning_rate=learning_rate)

    def discrete(self) -> Modes:
        A = torch.complex(-torch.exp(widened(self.log_A_real)), torch.exp(widened(self.log_A_imag)))
        weights = torch.view_as_complex(widened(self.C)) * (expm1(A) / A)
        return Modes(A.expand(self.channels, -1), weights)


class GSS(Block):
    """GSS: a gated unit whose context comes from a diagonal state space model (Mehta et al., 2206.13947).

        v = f(W_v x)   [hidden]      u = f(W_u x)   [reduced]        f = gelu
        o = W_o (W_c SSM(norm(u)) · v)                               (section 3.2 and its pseudocode)

    The state space model, whose convolution is what costs most, works on `reduced` channels only; the layer's
    parameters are in the gated unit. Norm of x and residual are the model's. See `GSSSystem`.

    Args:
        width: features of x, the paper's E.
        hidden: of the gate, F; default 4 width.
        reduced: channels of the state space model, H; default width/4, at least 2.
        state_size: N complex states a channel.
        activation: f.
        bias: of the four linear maps.
        learning_rate: of λ; None: the optimizer's.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T (D + reduced) hidden + T reduced (log T + state_size)), the last for the filter, once a batch
        train memory: O(T (D + hidden))
        prefill: O(T (D + reduced) hidden + T reduced (log T + state_size))
        decode: O((D + reduced) hidden + reduced state_size) a token, whatever the context
        state bytes: 2*lti.channels*lti.n*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        reduced: int | None = None,
        state_size: int = 512,
        activation: str = "gelu",
        bias: bool = False,
        learning_rate: float | None = 1e-3,
    ):
        super().__init__(width)
        hidden = 4 * width if hidden is None else integer("hidden", hidden)
        reduced = max(2, width // 4) if reduced is None else integer("reduced", reduced, 2, ": a norm of one is 0")
        self.sizes = (hidden, reduced)
        self.activation = activation_function(activation)
        self.in_proj = Linear(width, hidden + reduced, bias=bias)  # W_v and W_u
        self.norm = LayerNorm(reduced)
        self.lti = GSSSystem(reduced, state_size, learning_rate)
        self.context_proj = Linear(reduced, hidden, bias=bias)
        self.out_proj = Linear(hidden, width, bias=bias)
        for each in (self.in_proj, self.context_proj, self.out_proj) if bias else ():
            tag(each, "bias", weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        return self.lti.init_state(batch, device=device, dtype=dtype or self.in_proj.weight.dtype)

    def flops_per_token(self, context: int) -> int:
        matrices = sum(each.weight.numel() for each in (self.in_proj, self.context_proj, self.out_proj))
        return 2 * matrices + self.lti.flops_per_token()

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        valid = None if segments is None else (segments != 0)[..., None]
        if valid is not None:
            x = torch.where(valid, x, 0)  # a NaN at padding would reach the gradient of in_proj's weight
        v, u = self.activation(self.in_proj(x)).split(self.sizes, -1)
        y, state = self.lti(self.norm(u), state, segments)
        y = self.out_proj(self.context_proj(y) * v)
        if valid is not None and self.out_proj.bias is not None:
            y = torch.where(valid, y, 0)
        return Out(y, state, {})
