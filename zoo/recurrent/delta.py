"""What the delta rule's blocks share: projections, short convolution, keys of length 1, state and its update."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from ops import delta_rule, step
from ops.step import Around
from zoo.block import Block, Out, Step, enter, leave, stay, tag
from zoo.layers.checks import integer, number
from zoo.layers.conv import ShortConvolution
from zoo.layers.linear import Linear, plain


class DeltaState(NamedTuple):
    """Constant size: (conv_width - 1) · channels + heads · k_dim · v_dim numbers and a document id a row."""

    conv: Float[Tensor, "batch taps_1 channels"]  # the last inputs of the convolution (q, k, v), oldest first
    S: Float[Tensor, "batch heads k_dim v_dim"]  # float32 at least
    segment: Int[Tensor, " batch"]


class DeltaBlock(Block):
    """A mixer on `ops.delta_rule`; a kind says how its heads forget (`log_decay`) and how they are read (`read`).

    q, k, v = silu(conv(W x)); q and k over their length in each head; β = σ(W_β x), or 2 σ(W_β x); then the delta rule
    with queries over √k_dim. `key_heads` of q and k serve heads / key_heads consecutive heads of v each.
    in_proj holds the rows of q, k, v and β, and then those of the kind's own `parts`.
    """

    def __init__(
        self,
        width: int,
        sizes: tuple[int, int, int, int],  # heads, key_heads, k_dim, v_dim
        parts: tuple[int, ...] = (),
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__(width)
        self.heads, self.key_heads, self.k_dim, self.v_dim = sizes
        self.head_dim, self.value_head_dim = self.k_dim, self.v_dim  # as the options are called that chose them
        if not isinstance(negative_eigenvalues, bool):
            raise ValueError(f"negative_eigenvalues={negative_eigenvalues!r} must be true or false")
        if number("norm_eps", norm_eps) < 0:
            raise ValueError(f"norm_eps={norm_eps} must not be negative")
        self.negative_eigenvalues = negative_eigenvalues
        self.key_dim, self.value_dim = self.key_heads * self.k_dim, self.heads * self.v_dim
        channels = 2 * self.key_dim + self.value_dim
        self.sizes = (channels, self.heads, *parts)  # of q, k and v; β; the kind's own
        self.in_proj = Linear(width, sum(self.sizes), bias=False)
        self.conv = ShortConvolution(channels, integer("conv_width", conv_width), bias=False)
        self.out_proj = Linear(self.value_dim, width, bias=False)

    def log_decay(self, x: Float[Tensor, "batch time width"], parts: list[Tensor]) -> Tensor | None:
        """ln of the decay as `ops.delta_rule` takes it, float32 at least; None for no decay."""
        return None

    def read(
        self, o: Float[Tensor, "batch time heads v_dim"], x: Float[Tensor, "batch time width"], parts: list[Tensor]
    ) -> Float[Tensor, "batch time heads v_dim"]:
        """What out_proj is given for the heads' outputs."""
        raise NotImplementedError(f"{type(self).__name__} defines no read")

    def native(self) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, float, bool]] | None:
        """What `ops.step.delta` takes of the kind's own: its decay, and weight, eps and gate of its norm; None where
        the kind has more than these."""
        return None

    def bind_step(self, around: Around) -> Step | None:
        own = self.native()
        if own is None or not plain(self.in_proj, self.out_proj):
            return None
        decay, norm = own
        weights = (self.in_proj.weight, self.conv.weight, self.out_proj.weight)
        if not step.fits(*weights, *(decay or ()), norm[0], around.weight, around.bias):
            return None
        from ops.step.delta import delta

        strength = 2.0 if self.negative_eigenvalues else 1.0
        run = delta(weights, self.key_heads, strength, decay, norm, around)
        width, before, channels = self.width, self.conv.taps - 1, self.conv.channels
        sums = (self.heads, self.k_dim, self.v_dim)

        def one(x: Tensor, state: Any) -> Out | None:
            if not (
                type(state) is DeltaState
                and step.takes(x, width)
                and step.holds(state.conv, len(x), before, channels)
                and step.holds(state.S, len(x), *sums)
            ):
                return None
            y, conv, S = run(x, state.conv, state.S)
            return Out(y, DeltaState(conv, S, stay(state.segment)), {})

        return one

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> DeltaState:
        dtype = dtype or self.in_proj.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return DeltaState(
            self.conv.init_state(batch, device=device, dtype=dtype),
            torch.zeros(batch, self.heads, self.k_dim, self.v_dim, device=device, dtype=wide),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def flops_per_token(self, context: int) -> int:
        """The matrices and the convolution; 7 a number of the state (decay, what the key holds, outer product, sum,
        read-out); 3 a channel of q and k for their lengths, 5 a value for norm and gate."""
        state = 7 * self.heads * self.k_dim * self.v_dim
        return super().flops_per_token(context) + state + 6 * self.key_dim + 5 * self.value_dim

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: DeltaState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if x.shape[1] == 1 and segments is None:
            stepped = self.one_token(x, state)
            if stepped is not None:
                return stepped
        carried = state
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach weights' gradients
            if state is not None:
                fresh = self.init_state(len(x), device=x.device, dtype=state.conv.dtype)
                carried = enter(state, fresh, segments)
        channels, beta, *parts = self.in_proj(x).split(self.sizes, -1)
        channels, conv = self.conv(channels, None if carried is None else carried.conv, segments)
        q, k, v = channels.split([self.key_dim, self.key_dim, self.value_dim], -1)
        beta = torch.sigmoid(beta.to(torch.promote_types(x.dtype, torch.float32)))
        o, last = delta_rule(
            unit(q.unflatten(-1, (self.key_heads, -1))),
            unit(k.unflatten(-1, (self.key_heads, -1)), never_longer=self.negative_eigenvalues),
            v.unflatten(-1, (self.heads, -1)),
            2 * beta if self.negative_eigenvalues else beta,
            log_decay=self.log_decay(x, parts),
            scale=self.k_dim**-0.5,
            initial_state=None if carried is None else carried.S,
            segments=segments,
        )
        y = self.out_proj(self.read(o, x, parts).flatten(-2))
        if state is None:
            return Out(y, None, {})
        return Out(y, DeltaState(conv, last.to(state.S.dtype), leave(state.segment, segments)), {})


def unit(
    x: Float[Tensor, "batch time key_heads k_dim"], never_longer: bool = False, eps: float = 1e-6
) -> Float[Tensor, "batch time key_heads k_dim"]:
    """x / √(Σ x² + eps) in each head, summed in float32 at least.

    Rounding to bfloat16 may leave a vector longer than 1 by 2^-8, and with a writing strength of 2 the state would grow
    by as much a token; `never_longer` shortens it by that first, which is less than rounding may do.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    if never_longer and wide.dtype != x.dtype:
        scale = scale * (1 - torch.finfo(x.dtype).eps / 2)
    return (wide * scale).to(x.dtype)


def fit_heads(channels: int, heads: int | None, head_dim: int | None, size: int) -> tuple[int, int]:
    """Heads and their size, together about `channels`: what is not given follows from the other; with neither given,
    heads of about `size`, but two or more."""
    if head_dim is not None:
        integer("head_dim", head_dim)
    if heads is None:
        heads = max(2, round(channels / size)) if head_dim is None else max(1, round(channels / head_dim))
    integer("heads", heads)
    return heads, max(1, channels // heads) if head_dim is None else head_dim


def decay_parameters(block: Block, heads: int, biases: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A_log [heads] and dt_bias [biases], Mamba's parameters of a decay exp(-exp(A_log) softplus(· + dt_bias)), to be
    the block's attributes of these names; tagged free of weight decay. exp(A_log) starts uniform in [1, 16],
    softplus(dt_bias) log-uniform in [0.001, 0.1]."""
    for name in ("A_log", "dt_bias"):
        tag(block, name, weight_decay=False)
    dt = torch.empty(biases).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    bias = dt + torch.log(-torch.expm1(-dt))  # softplus⁻¹, exact for a small dt
    return nn.Parameter(torch.empty(heads).uniform_(1, 16).log()), nn.Parameter(bias)


def steps(x: Float[Tensor, "batch time biases"], dt_bias: Float[Tensor, " biases"]) -> Tensor:
    """softplus(x + dt_bias), float32 at least: an exponent's 8 bits would be 8 bits of the decay over many tokens."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return softplus(x.to(wide) + dt_bias.to(wide))
