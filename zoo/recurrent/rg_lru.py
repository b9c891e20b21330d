"""RG-LRU and Griffin's recurrent block (De et al., 2402.19427): a gated diagonal linear recurrence of real numbers."""

import math
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ops import linear_recurrence, step
from ops import segments as seg
from ops.step import Around
from zoo.block import Block, Out, Step, enter, leave, stay, tag
from zoo.layers.checks import integer, number
from zoo.layers.conv import ShortConvolution
from zoo.layers.linear import Linear, plain

STEEPEST = 1000.0  # bound of the square root's slope (2402.19427, appendix A)


class RGLRUState(NamedTuple):
    """Constant size: conv_width · inner numbers and a document id a row."""

    conv: Float[Tensor, "batch taps_1 inner"]  # the last inputs of the convolution, oldest first
    h: Float[Tensor, "batch inner"]  # float32 at least
    segment: Int[Tensor, " batch"]


class _Root(torch.autograd.Function):
    """√x with a slope of at most STEEPEST: at a = 1 the true one is infinite, and gradients through it are NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grads[0] / (2 * root).clamp_min(1 / STEEPEST)


class BlockDiagonal(nn.Module):
    """A linear map in `heads` blocks: a head sees its own features alone. weight [heads in out], bias [heads out]."""

    def __init__(self, heads: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, size, size) * size**-0.5)
        self.bias = nn.Parameter(torch.zeros(heads, size))
        tag(self, "bias", weight_decay=False)

    def forward(self, x: Float[Tensor, "batch time inner"]) -> Float[Tensor, "batch time inner"]:
        heads = rearrange(x, "b t (h i) -> b t h i", h=len(self.weight))
        return (einsum(heads, self.weight, "b t h i, h i o -> b t h o") + self.bias).flatten(-2)


class RGLRU(Block):
    """RG-LRU in Griffin's recurrent block: y = W_out (gelu(W_y x) ⊙ RG-LRU(conv(W_x x)))   (2402.19427, section 2.4).

    r_t = σ(W_a u_t + b_a), i_t = σ(W_i u_t + b_i), a_t = a^(c r_t), h_t = a_t h_{t-1} + √(1 - a_t²) (i_t ⊙ u_t)
    (eq. 1 to 4; c = 8) with a = exp(-softplus(Λ)) a channel and block-diagonal W_a, W_i. A document's first token is
    not scaled down: its input is all that h has. Λ starts where a^c is uniform in [decay_min, decay_max]; it is kept
    out of weight decay.

    `inner`: channels of the recurrence, default width (Griffin: 4/3 of it). `heads`: blocks of the two gates, default
    as many as leave each 64 channels or more. `bias`: of the three projections.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D inner + T inner^2 / heads)
        train memory: O(T inner)
        prefill: O(T D inner + T inner^2 / heads)
        decode: O(D inner + inner^2 / heads) a token, whatever the context
        state bytes: (conv.taps - 1)*inner*b + inner*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        inner: int | None = None,
        heads: int | None = None,
        conv_width: int = 4,
        c: float = 8.0,
        decay_min: float = 0.9,
        decay_max: float = 0.999,
        bias: bool = True,
    ):
        super().__init__(width)
        self.inner = width if inner is None else integer("inner", inner)
        self.heads = _heads(self.inner) if heads is None else integer("heads", heads)
        if self.inner % self.heads:
            raise ValueError(
                f"heads={heads} must divide inner={self.inner}; try {math.gcd(self.inner, self.heads)}, or leave it out"
            )
        if number("c", c) <= 0:
            raise ValueError(f"c={c} must be positive: it is how much faster than a the gates can forget")
        if not 0 < number("decay_min", decay_min) <= number("decay_max", decay_max) < 1:
            raise ValueError(
                f"decay_min={decay_min} and decay_max={decay_max} must satisfy 0 < decay_min <= decay_max < 1"
            )
        self.c = c
        self.y_proj = Linear(width, self.inner, bias=bias)
        self.x_proj = Linear(width, self.inner, bias=bias)
        self.conv = ShortConvolution(self.inner, integer("conv_width", conv_width), activation=None)
        self.input_gate = BlockDiagonal(self.heads, self.inner // self.heads)
        self.decay_gate = BlockDiagonal(self.heads, self.inner // self.heads)
        self.Lambda = nn.Parameter(torch.empty(self.inner))
        self.out_proj = Linear(self.inner, width, bias=bias)
        with torch.no_grad():
            rate = -torch.empty(self.inner).uniform_(decay_min, decay_max).log() / c
            self.Lambda.copy_(rate + torch.log(-torch.expm1(-rate)))  # softplus⁻¹, exact for a small rate
        tag(self, "Lambda", weight_decay=False)
        for projection in (self.y_proj, self.x_proj, self.out_proj) if bias else ():
            tag(projection, "bias", weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> RGLRUState:
        dtype = dtype or self.x_proj.weight.dtype
        return RGLRUState(
            self.conv.init_state(batch, device=device, dtype=dtype),
            torch.zeros(batch, self.inner, device=device, dtype=torch.promote_types(dtype, torch.float32)),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def flops_per_token(self, context: int) -> int:
        """The matrices and the convolution, and 9 a channel: gates, decay, scale, update, product of the branches."""
        matrices = (self.y_proj, self.x_proj, self.out_proj, self.input_gate, self.decay_gate, self.conv)
        return sum(2 * each.weight.numel() for each in matrices) + 9 * self.inner

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: RGLRUState | None = None,
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
        u, conv = self.conv(self.x_proj(x), None if carried is None else carried.conv, segments)
        a, scaled = self.recurrence(u, _firsts(x, carried, segments))
        h, last = linear_recurrence(scaled, a, initial_state=None if carried is None else carried.h, segments=segments)
        y = self.out_proj(F.gelu(self.y_proj(x), approximate="tanh") * h.to(x.dtype))
        if segments is not None and self.out_proj.bias is not None:
            y = torch.where((segments != 0)[..., None], y, 0)
        if state is None:
            return Out(y, None, {})
        return Out(y, RGLRUState(conv, last.to(state.h.dtype), leave(state.segment, segments)), {})

    def bind_step(self, around: Around) -> Step | None:
        if not plain(self.y_proj, self.x_proj, self.out_proj):
            return None
        maps = (self.y_proj, self.x_proj, self.conv, self.out_proj)
        weights, biases = tuple(each.weight for each in maps), tuple(each.bias for each in maps)
        gate, decay = self.input_gate, self.decay_gate
        gates = ((gate.weight, gate.bias), (decay.weight, decay.bias))
        rest = (*gates[0], *gates[1], self.Lambda, around.weight, around.bias)
        if not step.fits(*weights, *biases, *rest):
            return None
        from ops.step.rg_lru import rg_lru

        run = rg_lru(weights, biases, gates, self.Lambda, self.c, around)
        width, before, inner = self.width, self.conv.taps - 1, self.inner

        def one(x: Tensor, state: Any) -> Out | None:
            if not (
                type(state) is RGLRUState
                and step.takes(x, width)
                and step.holds(state.conv, len(x), before, inner)
                and step.holds(state.h, len(x), inner)
            ):
                return None
            y, conv, h = run(x, state.conv, state.h, state.segment == 0)
            return Out(y, RGLRUState(conv, h, stay(state.segment)), {})

        return one

    def recurrence(
        self, u: Float[Tensor, "batch time inner"], first: Bool[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, "batch time inner"], Float[Tensor, "batch time inner"]]:
        """a_t and √(1 - a_t²) (i_t ⊙ u_t), float32 at least: bfloat16 has no number between 0.996 and 1."""
        wide = torch.promote_types(u.dtype, torch.float32)
        rate = self.c * F.softplus(self.Lambda.to(wide))
        log_a = -rate * torch.sigmoid(self.decay_gate(u).to(wide))
        scale = torch.where(first[..., None], 1, _Root.apply(-torch.expm1(2 * log_a)))
        return log_a.exp(), scale * torch.sigmoid(self.input_gate(u).to(wide)) * u.to(wide)


def _firsts(
    x: Float[Tensor, "batch time width"], state: RGLRUState | None, segments: Int[Tensor, "batch time"] | None
) -> Bool[Tensor, "batch time"]:
    """Where documents begin. `state` has been entered: a row that begins another document has seen nothing."""
    batch, time, _ = x.shape
    new = torch.ones(batch, 1, dtype=torch.bool, device=x.device) if state is None else (state.segment == 0)[:, None]
    if segments is None:
        return new & (torch.arange(time, device=x.device) == 0)
    found = seg.runs(segments)
    return found.start | (new & found.valid & (found.previous < 0))


def _heads(inner: int) -> int:
    """The most blocks of 64 channels or more that divide inner."""
    return next(heads for heads in range(max(1, inner // 64), 0, -1) if inner % heads == 0)
