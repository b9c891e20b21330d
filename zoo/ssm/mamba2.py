"""Mamba-2 (Dao & Gu, 2405.21060, section 7.1 and figure 6): a gated block around state space duality."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from ops import ssd, step
from ops.step import Around
from zoo.block import Block, Out, Step, enter, leave, stay, tag
from zoo.layers.checks import integer, number
from zoo.layers.conv import ShortConvolution
from zoo.layers.gated_norm import GatedRMSNorm
from zoo.layers.linear import Linear, plain


class Mamba2State(NamedTuple):
    """Constant size: (conv_width - 1) · (inner + 2 groups · state_size) + inner · state_size numbers, an id a row."""

    conv: Float[Tensor, "batch taps_1 channels"]  # the last inputs of the convolution (x, B, C), oldest first
    ssd: Float[Tensor, "batch heads n head_dim"]  # h, float32 at least
    segment: Int[Tensor, " batch"]


class Mamba2(Block):
    """Mamba-2 (2405.21060): selective state space heads with one decay each, computed by matrix products.

    z, x, B, C, dt = W_in u;  x, B, C = silu(conv(x, B, C));  dt = softplus(dt + b_dt);
    h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)ᵀ;  y = W_out norm((C_tᵀ h_t + D x_t) · silu(z)), for each head.

    inner = expand · width channels in heads of head_dim, each with a state [state_size, head_dim]; `groups` of heads
    share B and C. A = -exp(A_log) starts uniform in [-16, -1], softplus(b_dt) log-uniform in [dt_min, dt_max]. A_log, D
    and the biases are kept out of weight decay.

    `head_dim`: default 64, or in narrow models the largest size that makes two heads a group or more. `dt_limit`: steps
    are clamped to this range after softplus; a range [least, None] has no upper end. `norm_before_gate`: norm(y) ·
    silu(z) instead of norm(y · silu(z)). `norm_groups`: runs of channels normed each by itself, default `groups`;
    `norm_eps`: added under that norm's root. `bias`: of W_in and W_out; `conv_bias`: of the convolution over
    `conv_width` tokens.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D inner + T inner state_size)
        train memory: O(T (inner + chunk heads)) and one state a chunk of 64 tokens
        prefill: O(T D inner + T inner state_size)
        decode: O(D inner + inner state_size) a token, whatever the context
        state bytes: (conv.taps - 1)*(inner + 2*groups*state_size)*b + inner*state_size*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        expand: int = 2,
        state_size: int = 128,
        head_dim: int | None = None,
        groups: int = 1,
        conv_width: int = 4,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_limit: Sequence[float | None] | None = None,
        norm_before_gate: bool = False,
        norm_groups: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__(width)
        for name, value in (("expand", expand), ("state_size", state_size), ("conv_width", conv_width)):
            integer(name, value)
        self.inner, self.state_size = expand * width, state_size
        self.head_dim, self.heads, self.groups = fit_heads(self.inner, head_dim, groups)
        self.norm_groups = self.groups if norm_groups is None else integer("norm_groups", norm_groups)
        if self.inner % self.norm_groups:
            raise ValueError(
                f"norm_groups={norm_groups} must divide expand * width = {self.inner}; "
                f"try {math.gcd(self.norm_groups, self.inner)}"
            )
        if number("norm_eps", norm_eps) < 0:
            raise ValueError(f"norm_eps={norm_eps} must not be negative")
        if not 0 < number("dt_min", dt_min) <= number("dt_max", dt_max):
            raise ValueError(f"dt_min={dt_min} and dt_max={dt_max} must satisfy 0 < dt_min <= dt_max")
        self.dt_limit = _limit(dt_limit)
        self.sizes = (self.inner, self.inner + 2 * groups * state_size, self.heads)  # of z; x, B and C; dt
        self.in_proj = Linear(width, sum(self.sizes), bias=bias)
        self.conv = ShortConvolution(self.sizes[1], conv_width, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(self.inner, self.norm_groups, norm_before_gate, norm_eps)
        self.out_proj = Linear(self.inner, width, bias=bias)
        with torch.no_grad():  # b_dt = softplus⁻¹(dt) = log(e^dt - 1), written to be exact for a small dt
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        for name in ("A_log", "D", "dt_bias"):
            tag(self, name, weight_decay=False)
        for projection in (self.in_proj, self.out_proj) if bias else ():
            tag(projection, "bias", weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> Mamba2State:
        dtype = dtype or self.in_proj.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return Mamba2State(
            self.conv.init_state(batch, device=device, dtype=dtype),
            torch.zeros(batch, self.heads, self.state_size, self.head_dim, device=device, dtype=wide),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def flops_per_token(self, context: int) -> int:
        """Every matrix and the convolution, and 5 a number of the state: decay, outer product, sum, read-out."""
        matrices = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv.weight.numel())
        return matrices + 5 * self.inner * self.state_size

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: Mamba2State | None = None,
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
        gate, channels, dt = self.in_proj(x).split(self.sizes, -1)
        channels, conv = self.conv(channels, None if carried is None else carried.conv, segments)
        shared = self.groups * self.state_size
        channels, B, C = channels.split([self.inner, shared, shared], -1)
        # float32: A dt is an exponent, and bfloat16's 8 bits of it would be 8 bits of the decay over many tokens.
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = softplus(dt.to(wide) + self.dt_bias.to(wide))
        if self.dt_limit is not None:
            dt = dt.clamp(*self.dt_limit)
        y, last = ssd(
            rearrange(channels, "b t (h p) -> b t h p", p=self.head_dim),
            dt,
            -torch.exp(self.A_log.to(wide)),
            rearrange(B, "b t (g n) -> b t g n", n=self.state_size),
            rearrange(C, "b t (g n) -> b t g n", n=self.state_size),
            self.D,
            initial_state=None if carried is None else carried.ssd,
            segments=segments,
        )
        y = self.out_proj(self.norm(rearrange(y, "b t h p -> b t (h p)"), gate))
        if self.out_proj.bias is not None:
            y = _mask(y, segments)
        if state is None:
            return Out(y, None, {})
        return Out(y, Mamba2State(conv, last, leave(state.segment, segments)), {})

    def bind_step(self, around: Around) -> Step | None:
        if not plain(self.in_proj, self.out_proj):
            return None
        linears = (self.in_proj, self.conv, self.out_proj)
        weights, biases = tuple(each.weight for each in linears), tuple(each.bias for each in linears)
        heads = (self.A_log, self.D, self.dt_bias)
        if not step.fits(*weights, *biases, *heads, self.norm.weight, around.weight, around.bias):
            return None
        from ops.step.mamba2 import mamba2

        low, high = (0.0, None) if self.dt_limit is None else self.dt_limit
        limit = (low, math.inf if high is None else high)
        norm = (self.norm.weight, self.norm.groups, self.norm.before_gate, self.norm.eps)
        run = mamba2(weights, biases, heads, self.groups, limit, norm, around)
        width, before, channels = self.width, self.conv.taps - 1, self.sizes[1]
        sums = (self.heads, self.state_size, self.head_dim)

        def one(x: Tensor, state: Any) -> Out | None:
            if not (
                type(state) is Mamba2State
                and step.takes(x, width)
                and step.holds(state.conv, len(x), before, channels)
                and step.holds(state.ssd, len(x), *sums)
            ):
                return None
            y, conv, last = run(x, state.conv, state.ssd)
            return Out(y, Mamba2State(conv, last, stay(state.segment)), {})

        return one

    def _initial(self, state: Mamba2State, x: Tensor) -> Mamba2State:
        """What a row begins another document with, in the given state's own dtypes."""
        return self.init_state(x.shape[0], device=x.device, dtype=state.conv.dtype)


def _mask(x: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None) -> Tensor:
    return x if segments is None else torch.where((segments != 0)[..., None], x, 0)


def fit_heads(inner: int, head_dim: int | None, groups: int) -> tuple[int, int, int]:
    """head_dim, heads and groups that fit together, or an error that says which would."""
    integer("groups", groups)
    if inner % groups:
        raise ValueError(f"groups={groups} must divide expand * width = {inner}; try {math.gcd(groups, inner)}")
    fitting = [each for each in range(1, inner // groups + 1) if inner // groups % each == 0]
    if head_dim is None:
        few = max(1, min(64, inner // groups // 2))
        head_dim = max(each for each in fitting if each <= few)
    integer("head_dim", head_dim)
    if head_dim not in fitting:
        nearest = min(fitting, key=lambda each: abs(each - head_dim))
        raise ValueError(
            f"head_dim={head_dim} must divide expand * width / groups = {inner // groups}, the channels of a group; "
            f"try {nearest}"
        )
    return head_dim, inner // head_dim, groups


def _limit(limit: Sequence[float | None] | None) -> tuple[float, float | None] | None:
    if limit is None:
        return None
    if isinstance(limit, str) or not isinstance(limit, Sequence) or len(limit) != 2:
        raise ValueError(f"dt_limit={limit!r} must be two numbers, the least and the greatest step; None for no limit")
    low = number("dt_limit", limit[0])
    if limit[1] is None:
        if low <= 0:
            raise ValueError(f"dt_limit={list(limit)} limits no step, they are positive; None is no limit")
        return low, None
    high = number("dt_limit", limit[1])
    if not 0 <= low < high:
        raise ValueError(f"dt_limit={list(limit)} must satisfy 0 <= least < greatest")
    return low, high
