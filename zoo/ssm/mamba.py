"""Mamba (Gu & Dao, 2312.00752, section 3.4 and figure 3): a gated block around the selective scan."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from ops import selective_scan, step
from ops.step import Around
from zoo.block import Block, Out, Step, enter, leave, stay, tag
from zoo.layers.checks import integer, number
from zoo.layers.conv import ShortConvolution
from zoo.layers.linear import Linear, plain
from zoo.layers.norm import RMSNorm
from zoo.layers.wide import WideLinear


class MambaState(NamedTuple):
    """Constant size: (conv_width - 1 + state_size) · inner numbers and a document id a row."""

    conv: Float[Tensor, "batch taps_1 inner"]  # the last inputs of the convolution, oldest first
    scan: Float[Tensor, "batch inner n"]  # h, float32 at least
    segment: Int[Tensor, " batch"]


class Mamba(Block):
    """Selective state space model (2312.00752): step, input and output matrices depend on the token.

    x, z = W_in u;  x = silu(conv(x));  dt, B, C = W_x x;  dt = softplus(W_dt dt + b_dt);
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y = W_out ((<C_t, h_t> + D x_t) · silu(z)).

    inner = expand · width channels with state_size states each; A = -exp(A_log) starts at -(n + 1) (S4D-Real, section
    3.6) and softplus(b_dt) log-uniform in [dt_min, dt_max]: the time scales a channel remembers over. A_log, D and the
    biases are kept out of weight decay.

    `dt_rank`: rank of dt's projection, default ceil(width / 16). `bias`: of W_in and W_out. `conv_bias`: of the
    convolution over `conv_width` tokens. `inner_norm`: RMSNorm on dt, B and C, as in Jamba (2403.19887, section 6.4);
    "weightless" has no parameters (Falcon Mamba, 2410.05355). `inner_norm_eps`: added under those norms' root, default
    1e-6.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D inner + T inner state_size)
        train memory: O(T inner); the scan's states are computed again in the backward pass
        prefill: O(T D inner + T inner state_size)
        decode: O(D inner + inner state_size) a token, whatever the context
        state bytes: (conv.taps - 1)*inner*b + inner*state_size*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        expand: int = 2,
        state_size: int = 16,
        conv_width: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bias: bool = False,
        conv_bias: bool = True,
        inner_norm: bool | str = False,
        inner_norm_eps: float | None = None,
    ):
        super().__init__(width)
        dt_rank = -(-width // 16) if dt_rank is None else dt_rank
        for name, value in (("expand", expand), ("state_size", state_size), ("conv_width", conv_width)):
            integer(name, value)
        inner = expand * width
        if not isinstance(dt_rank, int) or not 1 <= dt_rank <= inner:
            raise ValueError(f"dt_rank={dt_rank!r} must be an integer from 1 to expand * width = {inner}")
        if not 0 < number("dt_min", dt_min) <= number("dt_max", dt_max):
            raise ValueError(f"dt_min={dt_min} and dt_max={dt_max} must satisfy 0 < dt_min <= dt_max")
        self.inner, self.state_size, self.dt_rank = inner, state_size, dt_rank
        self.in_proj = Linear(width, 2 * inner, bias=bias)
        self.conv = ShortConvolution(inner, conv_width, bias=conv_bias)
        self.x_proj = Linear(inner, dt_rank + 2 * state_size, bias=False)
        self.inner_norm_eps = _eps(inner_norm, inner_norm_eps)
        self.dt_norm, self.B_norm, self.C_norm = (
            _norm(inner_norm, size, self.inner_norm_eps) for size in (dt_rank, state_size, state_size)
        )
        self.dt_proj = WideLinear(dt_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, width, bias=bias)
        self._reset_dt(dt_min, dt_max)
        tag(self, "A_log", weight_decay=False)
        tag(self, "D", weight_decay=False)
        tag(self.dt_proj, "bias", weight_decay=False)
        for projection in (self.in_proj, self.out_proj) if bias else ():
            tag(projection, "bias", weight_decay=False)

    @torch.no_grad()
    def _reset_dt(self, low: float, high: float) -> None:
        """b_dt = softplus⁻¹(dt), dt log-uniform in [low, high]; W_dt keeps the variance of its input (section 3.6)."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(low), math.log(high)).exp()
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # log(e^dt - 1), exact for a small dt

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> MambaState:
        dtype = dtype or self.in_proj.weight.dtype
        return MambaState(
            self.conv.init_state(batch, device=device, dtype=dtype),
            torch.zeros(
                batch, self.inner, self.state_size, device=device, dtype=torch.promote_types(dtype, torch.float32)
            ),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def flops_per_token(self, context: int) -> int:
        """Every matrix and the convolution, and 9 a state: decay, update, output (the exponential counts as one)."""
        linears = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        matrices = sum(2 * each.weight.numel() for each in linears)
        return matrices + 2 * self.conv.weight.numel() + 9 * self.A_log.numel()

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: MambaState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if x.shape[1] == 1 and segments is None:
            stepped = self.one_token(x, state)
            if stepped is not None:
                return stepped
        carried = None
        if state is not None:
            carried = state if segments is None else enter(state, self._initial(state, x), segments)
        x = _mask(x, segments)  # a NaN at padding would reach the gradient of in_proj's weight
        channels, gate = self.in_proj(x).chunk(2, -1)
        channels, conv = self.conv(channels, None if carried is None else carried.conv, segments)
        dt, B, C = self.x_proj(channels).split([self.dt_rank, self.state_size, self.state_size], -1)
        # float32: A dt is an exponent, and bfloat16's 8 bits of it would be 8 bits of the decay over many tokens.
        dt = softplus(self.dt_proj(self.dt_norm(dt)))
        y, scan = selective_scan(
            channels,
            dt,
            -torch.exp(self.A_log.to(dt.dtype)),
            self.B_norm(B),
            self.C_norm(C),
            self.D,
            gate,
            initial_state=None if carried is None else carried.scan,
            segments=segments,
        )
        y = self.out_proj(y)
        if self.out_proj.bias is not None:
            y = _mask(y, segments)
        if state is None:
            return Out(y, None, {})
        return Out(y, MambaState(conv, scan, leave(state.segment, segments)), {})

    def bind_step(self, around: Around) -> Step | None:
        if not plain(self.in_proj, self.x_proj, self.out_proj, wide=(self.dt_proj,)):
            return None
        norms = None
        if self.inner_norm_eps is not None:
            norms = tuple(_weight(each) for each in (self.dt_norm, self.B_norm, self.C_norm))
        linears = (self.in_proj, self.conv, self.x_proj, self.dt_proj, self.out_proj)
        weights = tuple(each.weight for each in linears)
        biases = tuple(each.bias for each in linears)
        if not step.fits(*weights, *biases, self.A_log, self.D, *(norms or ()), around.weight, around.bias):
            return None
        from ops.step.mamba import mamba

        run = mamba(weights, biases, self.A_log, self.D, norms, self.inner_norm_eps or 0.0, around)
        width, before, inner, state_size = self.width, self.conv.taps - 1, self.inner, self.state_size

        def one(x: Tensor, state: Any) -> Out | None:
            if not (
                type(state) is MambaState
                and step.takes(x, width)
                and step.holds(state.conv, len(x), before, inner)
                and step.holds(state.scan, len(x), inner, state_size)
            ):
                return None
            y, conv, scan = run(x, state.conv, state.scan)
            return Out(y, MambaState(conv, scan, stay(state.segment)), {})

        return one

    def _initial(self, state: MambaState, x: Tensor) -> MambaState:
        """What a row begins another document with, in the given state's own dtypes."""
        return self.init_state(x.shape[0], device=x.device, dtype=state.conv.dtype)


def _eps(inner_norm: bool | str, eps: float | None) -> float | None:
    """The eps of the inner norms; None where there are none."""
    if not isinstance(inner_norm, bool) and inner_norm != "weightless":
        raise ValueError(f"inner_norm={inner_norm!r} must be true, false or 'weightless'")
    if inner_norm is False:
        if eps is not None:
            raise ValueError(
                f"inner_norm_eps={eps} needs norms of dt, B and C; set inner_norm to true or 'weightless', or leave it "
                "out"
            )
        return None
    if eps is not None and number("inner_norm_eps", eps) < 0:
        raise ValueError(f"inner_norm_eps={eps} must not be negative")
    return 1e-6 if eps is None else eps


def _norm(inner_norm: bool | str, width: int, eps: float | None) -> nn.Module:
    if eps is None:
        return nn.Identity()
    return RMSNorm(width, eps) if inner_norm is True else nn.RMSNorm(width, eps=eps, elementwise_affine=False)


def _weight(norm: nn.Module) -> Tensor:
    if isinstance(norm, RMSNorm):
        return norm.weight
    assert isinstance(norm, nn.RMSNorm)
    return torch.ones(norm.normalized_shape)


def _mask(x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None) -> Tensor:
    return x if segments is None else torch.where((segments != 0)[..., None], x, 0)
