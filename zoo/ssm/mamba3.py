"""Mamba-3 (Lahoti et al., 2603.15569, section 3): trapezoidal steps, turning states, several inputs at a time."""

import math
from typing import Any, NamedTuple, overload

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from zoo.block import Block, Out, enter, leave, tag
from zoo.layers.checks import integer, number
from zoo.layers.gated_norm import GatedRMSNorm
from zoo.layers.linear import Linear
from zoo.layers.norm import RMSNorm
from zoo.ssm.mamba2 import fit_heads
from zoo.ssm.trapezoid import Trapezoid, angles, trapezoid, turn


class Mamba3State(NamedTuple):
    """Constant size: h, the last token's turned B and its x, and how far each pair of states has turned."""

    trapezoid: Trapezoid
    angle: Float[Tensor, "batch heads pairs"]  # radians within ±π, float32 at least
    segment: Int[Tensor, " batch"]


class Mamba3(Block):
    """Mamba-3 (2603.15569): state space heads whose states turn, with a trapezoidal step and no convolution.

    z, x, B, C, dt, a, l, θ = W_in u;  dt = softplus(dt + b_dt);  A = -max(f(a), A_floor);  λ = sigmoid(l);
    φ_t = φ_{t-1} + π dt_t tanh(θ_t) (modulo 2π);  B, C turned by φ_t after an RMSNorm and a bias of each head;
    h_t = α_t h_{t-1} + (1 - λ_t) dt_t α_t B_{t-1} x_{t-1}ᵀ + λ_t dt_t B_t x_tᵀ,  α_t = exp(dt_t A_t);
    y = W_out ((C_tᵀ h_t + D x_t) · silu(z)), for each head;  f(a) = 1 + a, below zero 1 / (1 - a).

    That is the real form of complex states that turn by a data-dependent angle, so a head can count modulo a number:
    parity of a bit string is half a turn a one, which no decay between 0 and 1 can do. The first `rope_fraction` of
    `state_size` turn, in pairs (2i, 2i + 1), all heads by one θ times their own dt.

    inner = expand · width channels in heads of head_dim (default as in Mamba-2), `groups` of heads share B and C before
    the biases, which start at 1. softplus(b_dt) starts log-uniform in [dt_min, dt_max]. b_dt, D, norms and biases are
    kept out of weight decay.

    `rank` R > 1: the multi-input, multi-output form. R pairs of B and C a token; input r is x · mimo_x[r], the gate of
    output r is z · mimo_z[r], and the outputs are summed with weights mimo_o: R times the work on the same state.
    `out_norm`: RMSNorm of each head before the gate. Parameters have the names and shapes of the authors' code, whose
    kernels for R > 1 pair states i and i + state_size / 2 instead: a permutation of B and C.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D inner + T inner rank state_size + T heads rank^2 (state_size + head_dim))
        train memory: O(T heads rank (state_size + head_dim)) and one state a chunk of 64 / rank tokens
        prefill: O(T D inner + T inner rank state_size)
        decode: O(D inner + inner rank state_size) a token, whatever the context
        state bytes: heads*(state_size*head_dim + pairs)*max(4, b) + heads*(rank*state_size + head_dim)*b + 8
    """

    def __init__(
        self,
        width: int,
        expand: int = 2,
        state_size: int = 128,
        head_dim: int | None = None,
        groups: int = 1,
        rank: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        A_floor: float = 1e-4,
        out_norm: bool = False,
    ):
        super().__init__(width)
        for name, value in (("expand", expand), ("state_size", state_size), ("rank", rank)):
            integer(name, value)
        self.inner, self.state_size, self.rank = expand * width, state_size, rank
        self.head_dim, self.heads, self.groups = fit_heads(self.inner, head_dim, groups)
        if not 0 < number("rope_fraction", rope_fraction) <= 1:
            raise ValueError(f"rope_fraction={rope_fraction} must be above 0 and at most 1")
        self.pairs = int(state_size * rope_fraction) // 2
        if self.pairs == 0:
            raise ValueError(
                f"state_size={state_size} and rope_fraction={rope_fraction} leave no pair of states to turn; "
                f"state_size must be at least {math.ceil(2 / rope_fraction)}"
            )
        if not 0 < number("dt_min", dt_min) <= number("dt_max", dt_max):
            raise ValueError(f"dt_min={dt_min} and dt_max={dt_max} must satisfy 0 < dt_min <= dt_max")
        if number("A_floor", A_floor) < 0:
            raise ValueError(f"A_floor={A_floor} must not be negative: the state would grow without bound")
        self.A_floor = A_floor
        shared = rank * groups * state_size
        # z; x; B; C; dt; a; l; θ
        self.sizes = (self.inner, self.inner, shared, shared, self.heads, self.heads, self.heads, self.pairs)
        self.in_proj = Linear(width, sum(self.sizes), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.B_norm, self.C_norm = RMSNorm(state_size, eps=1e-5), RMSNorm(state_size, eps=1e-5)
        self.B_bias = nn.Parameter(torch.ones(self.heads, rank, state_size))
        self.C_bias = nn.Parameter(torch.ones(self.heads, rank, state_size))
        many = rank > 1
        self.mimo_x = nn.Parameter(torch.full((self.heads, rank, self.head_dim), 1 / rank)) if many else None
        self.mimo_z = nn.Parameter(torch.ones(self.heads, rank, self.head_dim)) if many else None
        self.mimo_o = nn.Parameter(torch.full((self.heads, rank, self.head_dim), 1 / rank)) if many else None
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(self.inner, self.heads, before_gate=True) if out_norm else None
        self.out_proj = Linear(self.inner, width, bias=False)
        with torch.no_grad():  # b_dt = softplus⁻¹(dt) = log(e^dt - 1), written to be exact for a small dt
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        for name in ("D", "dt_bias", "B_bias", "C_bias"):
            tag(self, name, weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> Mamba3State:
        dtype = dtype or self.in_proj.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        h = torch.zeros(batch, self.heads, self.state_size, self.head_dim, device=device, dtype=wide)
        k = torch.zeros(batch, self.rank, self.heads, self.state_size, device=device, dtype=dtype)
        x = torch.zeros(batch, self.heads, self.head_dim, device=device, dtype=dtype)
        return Mamba3State(
            Trapezoid(h, k, x),
            torch.zeros(batch, self.heads, self.pairs, device=device, dtype=wide),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def flops_per_token(self, context: int) -> int:
        """Both projections, and for each number of the state its decay and, R times, two inputs and one output."""
        matrices = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        return matrices + (1 + 6 * self.rank) * self.inner * self.state_size

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: Mamba3State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        carried = None
        if state is not None:
            carried = state if segments is None else enter(state, self._initial(state, x), segments)
        if segments is not None:  # a NaN at padding would reach the gradient of in_proj's weight
            x = torch.where((segments != 0)[..., None], x, 0)
        z, x, B, C, dt, a, trap, theta = self.in_proj(x).split(self.sizes, -1)
        # float32: A dt and the angles are summed over time, and bfloat16's 8 bits would be 8 bits of those sums.
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = softplus(dt.to(wide) + self.dt_bias.to(wide))
        log_decay = -_rate(a.to(wide)).clamp_min(self.A_floor) * dt
        gamma = torch.sigmoid(trap.to(wide)) * dt
        turns = math.pi * dt[..., None] * torch.tanh(theta.to(wide))[:, :, None]
        angle, last_angle = angles(turns, None if carried is None else carried.angle, segments)
        rotation = angle.cos()[:, :, None], angle.sin()[:, :, None]
        x = rearrange(x, "b t (h p) -> b t h p", p=self.head_dim)
        y, last = trapezoid(
            self._turned(C, self.C_norm, self.C_bias, *rotation),
            self._turned(B, self.B_norm, self.B_bias, *rotation),
            x,
            log_decay,
            gamma,
            dt - gamma,
            _ranks_first(self.mimo_x),
            None if carried is None else carried.trapezoid,
            segments,
        )
        y = self.out_proj(self._gated(y, x, z))
        if state is None or last is None:
            return Out(y, None, {})
        return Out(y, Mamba3State(last, last_angle, leave(state.segment, segments)), {})

    def _turned(
        self,
        x: Float[Tensor, "batch time shared"],
        norm: RMSNorm,
        bias: Float[Tensor, "heads rank n"],
        cos: Float[Tensor, "batch time 1 heads pairs"],
        sin: Float[Tensor, "batch time 1 heads pairs"],
    ) -> Float[Tensor, "batch time rank heads n"]:
        """B or C of every head: its group's, normed, plus its own bias, turned; in x's dtype."""
        normed = norm(rearrange(x, "b t (r g n) -> b t r g 1 n", r=self.rank, g=self.groups)).to(cos.dtype)
        each = (normed + rearrange(bias, "(g i) r n -> r g i n", g=self.groups)).flatten(3, 4)
        return turn(each, cos, sin).to(x.dtype)

    def _gated(
        self,
        y: Float[Tensor, "batch time rank heads head_dim"],
        x: Float[Tensor, "batch time heads head_dim"],
        z: Float[Tensor, "batch time inner"],
    ) -> Float[Tensor, "batch time inner"]:
        """The skip, the norm, the gate, and the sum over ranks."""
        gate = rearrange(z, "b t (h p) -> b t 1 h p", p=self.head_dim)
        values = x[:, :, None]
        if self.mimo_x is not None and self.mimo_z is not None:
            values, gate = values * _ranks_first(self.mimo_x), gate * _ranks_first(self.mimo_z)
        y = y + self.D[:, None].to(y.dtype) * values
        if self.norm is None:
            y = y * silu(gate)
        else:
            y = self.norm(y.flatten(-2), gate.flatten(-2)).unflatten(-1, (self.heads, self.head_dim))
        if self.mimo_o is None:
            return y[:, :, 0].flatten(-2)
        return einsum(y, self.mimo_o.to(y.dtype), "b t r h p, h r p -> b t h p").flatten(-2)

    def _initial(self, state: Mamba3State, x: Tensor) -> Mamba3State:
        """What a row begins another document with, in the given state's own dtypes."""
        return self.init_state(x.shape[0], device=x.device, dtype=state.trapezoid.x.dtype)


def _rate(a: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """-A before its floor: 1 + a above zero, 1 / (1 - a) below, with one slope where they meet."""
    return a.clamp_min(0) + torch.reciprocal(1 - a.clamp_max(0))


@overload
def _ranks_first(weight: None) -> None: ...
@overload
def _ranks_first(weight: Float[Tensor, "heads rank head_dim"]) -> Float[Tensor, "rank heads head_dim"]: ...
def _ranks_first(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.transpose(0, 1)
