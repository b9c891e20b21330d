"""H3, Hungry Hungry Hippos (Fu et al., 2212.14052): a shift and a diagonal state space model between products."""

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from ops import long_conv
from zoo.block import Block, Out, tag
from zoo.layers.checks import integer
from zoo.layers.linear import Linear
from zoo.ssm.lti import LTI, LTIState, tag_system, widened
from zoo.ssm.s4d import S4DSystem


class ShiftForm(NamedTuple):
    """What a shift system is made of: h = S h + B u, y = C h, S moves every number of h to the next place."""

    B: Float[Tensor, "channels n"]
    C: Float[Tensor, "channels n"]


class ShiftSystem(LTI):
    """The shift SSM (2212.14052, section 3.1): h_t[0] = B_0 u_t, h_t[i] = h_{t-1}[i-1] + B_i u_t, y = C h + D u.

    With B = e_1, which it starts as, h holds the last `n` inputs, the newest first, and C is a filter over them. B is
    learned too, as is C (uniform in ± 1/√n); B is kept out of weight decay and has its own `learning_rate`. What has
    been shifted n times is gone: Āⁿ = 0, and the filter K_l = Σ_i C_{i+l} B_i has n taps.
    """

    views = ("convolution", "recurrence")
    paired = False

    def __init__(self, channels: int, n: int, learning_rate: float | None = 1e-3, skip: bool = True):
        super().__init__(channels, (n,), skip)
        self.n = n
        self.B = nn.Parameter(torch.zeros(channels, n))
        self.C = nn.Parameter(torch.empty(channels, n).uniform_(-(n**-0.5), n**-0.5))
        with torch.no_grad():
            self.B[:, 0] = 1
        tag_system(self, "B", learning_rate=learning_rate)

    def discrete(self) -> ShiftForm:
        return ShiftForm(widened(self.B), widened(self.C))

    def kernel(self, length: int) -> Float[Tensor, "channels length"]:
        kernel = super().kernel(length)
        return pad(kernel, (0, length - kernel.shape[1]))

    def filter(self, system: ShiftForm, length: int) -> Float[Tensor, "channels taps"]:
        """K up to its last tap, the n-th: a correlation, which is a convolution with C from its end."""
        backwards = long_conv(rearrange(system.C.flip(1), "c n -> 1 n c"), system.B)
        return rearrange(backwards, "1 n c -> c n").flip(1)[:, :length]

    def step(
        self, system: ShiftForm, h: Float[Tensor, "batch channels n"], u: Float[Tensor, "batch channels"]
    ) -> Float[Tensor, "batch channels n"]:
        return pad(h[..., :-1], (1, 0)) + system.B * u[..., None]

    def read(self, system: ShiftForm, h: Float[Tensor, "... channels n"]) -> Float[Tensor, "... channels"]:
        return (system.C * h).sum(-1)

    def respond(
        self, system: ShiftForm, h: Float[Tensor, "batch channels n"], length: int
    ) -> Float[Tensor, "batch length channels"]:
        """Σ_i C_{i+t+1} h_i: C's convolution with nothing after h, which stands there as inputs, the oldest first."""
        reach = min(length, self.n - 1)
        if reach == 0:
            return h.new_zeros(len(h), length, self.channels)
        past = rearrange(h.flip(-1), "b c n -> b n c")
        y = long_conv(h.new_zeros(len(h), reach, self.channels), system.C.to(h.dtype), history=past)
        return pad(y, (0, 0, 0, length - reach))

    def absorb(self, system: ShiftForm, u: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch channels n"]:
        """h_i = Σ_{j<=i} B_{i-j} u_{T-1-j}: B's convolution with the last n inputs, the newest first."""
        newest = u[:, -self.n :].flip(1)
        newest = pad(newest, (0, 0, 0, self.n - newest.shape[1]))
        return rearrange(long_conv(newest, system.B), "b n c -> b c n")

    def advance(
        self, system: ShiftForm, h: Float[Tensor, "batch channels n"], count: Int[Tensor, " batch"], most: int
    ) -> Float[Tensor, "batch channels n"]:
        origin = (torch.arange(self.n, device=h.device) - count[:, None])[:, None].expand_as(h)
        return torch.where(origin >= 0, h.gather(2, origin.clamp_min(0)), 0)

    def flops_per_token(self) -> int:
        """A step of the recurrence: 2 for S h + B u, 2 for C h of every number; the skip."""
        return self.channels * (4 * self.n + 2)


class H3State(NamedTuple):
    """Constant size: width · (shift_size + head_dim · state_size) numbers and an id a row; float32 at least."""

    shift: Float[Tensor, "batch width n"]  # of the shift system: with B = e_1 the last inputs k, the newest first
    diagonal: Float[Tensor, "batch head_dim head_dim heads n 2"]  # of k vᵀ of every head; complex as real pairs
    segment: Int[Tensor, " batch"]


class H3(Block):
    """H3: q ⊙ SSM_diagonal(SSM_shift(k) ⊙ v), which recalls and compares tokens (Fu et al., 2212.14052).

    q, k, v = W_q u, W_k u, W_v u;  k̄ = SSM_shift(k), a system a feature;  in every head, of head_dim features each:
    S = SSM_diagonal(k̄ vᵀ), one system a head for all head_dim² products;  o = Sᵀ q;  y = W_o o   (algorithm 1).

    The shift system holds the last `shift_size` k (`ShiftSystem`), the diagonal one sums over all tokens (`S4DSystem`,
    whose options the others are). Between them numbers are float32 at least, as in the published code. That code has
    o's features in the order (head_dim heads); here it is (heads head_dim), and W_o's columns with it, which is the
    same for head_dim = 1. `in_proj` makes q, k and v, in this order.

    Args:
        width: features of x.
        head_dim: features of a head; 1, as in the published models: no outer product.
        state_size: N of the diagonal systems, even; N/2 complex states.
        shift_size: numbers that a shift system holds: how far it looks back.
        init: of the diagonal systems: "lin", "inv" or "legs".
        discretisation: of the diagonal systems: "bilinear" or "zoh".
        dt_min, dt_max: the diagonal systems' steps start log-uniform between them.
        learning_rate: of A, B and the steps; None: the optimizer's.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 + T D head_dim log T + T D state_size / head_dim), the last for the filter, once a batch
        train memory: O(T D head_dim)
        prefill: O(T D^2 + T D head_dim (log T + state_size))
        decode: O(D^2 + D (shift_size + head_dim state_size)) a token, whatever the context
        state bytes: D*shift_size*max(4, b) + 2*D*head_dim*diagonal.n*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        head_dim: int = 1,
        state_size: int = 64,
        shift_size: int = 64,
        init: str = "lin",
        discretisation: str = "bilinear",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        learning_rate: float | None = 1e-3,
    ):
        super().__init__(width)
        if width % integer("head_dim", head_dim):
            raise ValueError(f"head_dim={head_dim} must divide width={width}; try {math.gcd(head_dim, width)}")
        self.head_dim, self.heads = head_dim, width // head_dim
        self.shift_size = integer("shift_size", shift_size)
        self.in_proj = Linear(width, 3 * width)
        self.shift = ShiftSystem(width, shift_size, learning_rate)
        self.diagonal = S4DSystem(self.heads, state_size, init, discretisation, dt_min, dt_max, learning_rate)
        self.out_proj = Linear(width, width)
        for projection in (self.in_proj, self.out_proj):
            tag(projection, "bias", weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> H3State:
        dtype = dtype or self.in_proj.weight.dtype
        shift = self.shift.init_state(batch, device=device, dtype=dtype)
        products = self.head_dim * self.head_dim
        diagonal = self.diagonal.init_state(batch * products, device=device, dtype=dtype).h
        diagonal = diagonal.unflatten(0, (batch, self.head_dim, self.head_dim))
        return H3State(shift.h, diagonal, shift.segment)

    def flops_per_token(self, context: int) -> int:
        """Both matrices, a step of every system, and the products with v (1) and with q (2) of every number between."""
        matrices = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        systems = self.shift.flops_per_token() + self.head_dim**2 * self.diagonal.flops_per_token()
        return matrices + systems + 3 * self.width * self.head_dim

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: H3State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach W's gradient
        q, k, v = self.in_proj(x).chunk(3, -1)
        given = None if state is None else LTIState(state.shift, state.segment)
        k, shift = self.shift(k.to(torch.promote_types(k.dtype, torch.float32)), given, segments)
        # Each of a head's head_dim² products is a row of its own, so that they share the head's system.
        k = rearrange(k, "b t (h p) -> b p 1 t h", p=self.head_dim)
        v = rearrange(v, "b t (h r) -> b 1 r t h", r=self.head_dim)
        products = self.head_dim * self.head_dim
        if state is not None:
            given = LTIState(state.diagonal.flatten(0, 2), _repeat(state.segment, products))
        rows = None if segments is None else _repeat(segments, products)
        y, diagonal = self.diagonal((k * v).flatten(0, 2), given, rows)
        heads = (len(x), self.head_dim, self.head_dim)
        # Products and a sum: a matrix product of so few numbers is slower, and autocast would make it in bfloat16.
        y = (y.unflatten(0, heads) * rearrange(q, "b t (h p) -> b p 1 t h", p=self.head_dim)).sum(1)
        y = self.out_proj(rearrange(y, "b r t h -> b t (h r)").to(q.dtype))
        if segments is not None:
            y = torch.where((segments != 0)[..., None], y, 0)  # the bias
        if state is None:
            return Out(y, None, {})
        return Out(y, H3State(shift.h, diagonal.h.unflatten(0, heads), shift.segment), {})


def _repeat(rows: Tensor, times: int) -> Tensor:
    return rows if times == 1 else rows.repeat_interleave(times, 0)
