"""S4 (Gu et al., 2111.00396): a state space model with A = diagonal + rank one, whose filter is a few Cauchy sums."""

import math
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Complex, Float
from torch import Tensor, nn

from ops import cauchy
from zoo.ssm.block import SSMBlock
from zoo.ssm.dense import DenseLTI, Squares, doublings
from zoo.ssm.hippo import nplr
from zoo.ssm.lti import tag_system, widened


class Terms(NamedTuple):
    """What one step needs, [channels n] complex for a mode of each conjugate pair: with p* x = 2 Re Σ conj(P) x,
    h' = (2/Δ - A)⁻¹ ((2/Δ + A) h + 2 B u), where (2/Δ - A)⁻¹ g = D g - W (p* D g) by Woodbury."""

    E: Complex[Tensor, "channels n"]  # 2/Δ + Λ
    D: Complex[Tensor, "channels n"]  # 1 / (2/Δ - Λ)
    W: Complex[Tensor, "channels n"]  # D P / (1 + p* D P)
    P: Complex[Tensor, "channels n"]
    B: Complex[Tensor, "channels n"]
    Lambda: Complex[Tensor, "channels n"]


class LowRank(NamedTuple):
    """A discretised system: as real matrices (see `zoo.ssm.dense.Dense`, float64), and as it computes."""

    A: Squares
    B: Float[Tensor, "channels n"]
    C: Float[Tensor, "channels one n"]
    terms: Terms
    step: Float[Tensor, "channels 1"]


class S4System(DenseLTI):
    """dh/dt = (Λ - P P*) h + B u, y = C h + D u, bilinear with a step Δ = exp(log_step) a channel.

    Λ = -exp(log_A_real) + i A_imag. All starts as HiPPO-LegS in the basis of its normal part (2111.00396, theorem 1),
    where B is real and P = B/√2; C normal. Of every conjugate pair of modes one is held: n = N/2, hence 2 Re at the
    output. The low rank part is -P P*, not -P Q*: no choice of P is then unstable (the authors' later code).

    The filter (2111.00396, algorithm 1 and appendix C.3): its generating function, cut off after L terms, is
    K̂(ω) = C̃ (1 - Ā ω)⁻¹ B̄ with C̃ = C (1 - Āᴸ); at the L-th roots of unity it is four Cauchy sums and Woodbury's
    formula, and their inverse transform is K. Here L is the power of two from the input's length up, C itself is the
    parameter and C̃ is made for each call's L: the authors train C̃ of one L, from which C is a linear solve away.

    Λ, P, B and the step are kept out of weight decay and have their own `learning_rate`.
    """

    def __init__(
        self,
        channels: int,
        state_size: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        learning_rate: float | None = 1e-3,
        skip: bool = True,
    ):
        form = nplr("legs", state_size)
        self.n = state_size // 2
        super().__init__(channels, (self.n, 2), dt_min, dt_max, skip)
        self.log_A_real = nn.Parameter(torch.empty(channels, self.n))
        self.A_imag = nn.Parameter(torch.empty(channels, self.n))
        self.P = nn.Parameter(torch.empty(channels, self.n, 2))
        self.B = nn.Parameter(torch.empty(channels, self.n, 2))
        self.C = nn.Parameter(torch.randn(channels, self.n, 2) * math.sqrt(0.5))
        with torch.no_grad():
            self.log_A_real.copy_((-form.Lambda.real).log())
            self.A_imag.copy_(form.Lambda.imag)
            self.P.copy_(torch.view_as_real(form.P[0].resolve_conj()))
            self.B.copy_(torch.view_as_real(form.B.resolve_conj()))
        tag_system(self, "log_step", "log_A_real", "A_imag", "P", "B", learning_rate=learning_rate)

    def pack(self, h: Float[Tensor, "batch channels n"]) -> Float[Tensor, "batch channels m 2"]:
        return h.unflatten(-1, (-1, 2))

    def unpack(self, h: Float[Tensor, "batch channels m 2"]) -> Float[Tensor, "batch channels n"]:
        return h.flatten(-2)

    def discrete(self) -> LowRank:
        step = self.log_step.double().exp()[:, None]
        Lambda = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        P, B, C = (torch.view_as_complex(each.double()) for each in (self.P, self.B, self.C))
        D = 1 / (2 / step - Lambda)
        W = D * P / (1 + 2 * (P.conj() * D * P).real.sum(-1, keepdim=True))
        terms = Terms(2 / step + Lambda, D, W, P, B, Lambda)
        dtype = widened(self.log_step).dtype
        narrow = torch.promote_types(dtype, torch.complex32)  # its complex dtype, in words that torch.compile knows
        return LowRank(
            A=Squares(lambda: _matrix(terms)),
            B=_real(_solve(terms, 2 * B)),
            C=2 * _real(C.conj())[:, None],
            terms=Terms(*[each.to(narrow) for each in terms]),
            step=step.to(dtype),
        )

    def step(
        self, system: LowRank, h: Float[Tensor, "batch channels n"], u: Float[Tensor, "batch channels"]
    ) -> Float[Tensor, "batch channels n"]:
        """O(N), by Woodbury's formula (2111.00396, appendix C.2)."""
        return _real(_solve(system.terms, _push(system.terms, _complex(h)) + 2 * system.terms.B * u[..., None]))

    def filter(self, system: LowRank, length: int) -> Float[Tensor, "channels length"]:
        level = doublings(length)
        nodes = 1 << level
        C = system.C[:, 0]
        C = _complex(C - _RowPower.apply(C, system.A[0], level)).conj() / 2  # C̃, of one mode of each pair
        # ω = exp(-iθ): 2 (1 - ω)/(1 + ω) = 2i tan(θ/2) and 2/(1 + ω) = 1 + i tan(θ/2), both infinite at ω = -1.
        half = torch.arange(max(1, nodes // 2), device=C.device, dtype=torch.float64) * (math.pi / nodes)
        z = torch.complex(torch.zeros_like(half), 2 * torch.tan(half)).to(system.terms.P.dtype)
        P, B = system.step * system.terms.P, system.step * system.terms.B
        C, Q = C.to(P.dtype), system.terms.P.conj()
        weights = torch.stack([C * B, C * P, Q * B, Q * P])
        poles = (system.step * system.terms.Lambda).expand_as(weights)
        CB, CP, QB, QP = cauchy(weights.flatten(0, 1), z, poles.flatten(0, 1)).unflatten(0, (4, -1))
        response = (1 + z / 2) * (CB - CP * QB / (1 + QP))
        if nodes > 1:  # at ω = -1, C̃ (1 + Ā)⁻¹ B̄ = C̃ ΔB/2
            response = torch.cat([response, (C * B).real.sum(-1, keepdim=True).to(response.dtype)], 1)
        return torch.fft.irfft(response, n=nodes)[:, :length]

    def flops_per_token(self) -> int:
        """A step of every mode: 14 for (2/Δ + A) h, 4 for the input, 14 for (2/Δ - A)⁻¹, 4 for C h; the skip."""
        return self.channels * (36 * self.n + 4)


def _complex(h: Float[Tensor, "... n"]) -> Complex[Tensor, "... m"]:
    return torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous())


def _real(h: Complex[Tensor, "... m"]) -> Float[Tensor, "... n"]:
    return torch.view_as_real(h.resolve_conj()).flatten(-2)


def _inner(P: Tensor, h: Complex[Tensor, "... channels m"]) -> Float[Tensor, "... channels 1"]:
    """p* h = 2 Re Σ conj(P) h."""
    return 2 * (P.real * h.real + P.imag * h.imag).sum(-1, keepdim=True)


def _solve(terms: Terms, g: Complex[Tensor, "... channels m"]) -> Complex[Tensor, "... channels m"]:
    """(2/Δ - A)⁻¹ g."""
    g = terms.D * g
    return g - terms.W * _inner(terms.P, g)


def _push(terms: Terms, h: Complex[Tensor, "... channels m"]) -> Complex[Tensor, "... channels m"]:
    """(2/Δ + A) h."""
    return terms.E * h - terms.P * _inner(terms.P, h)


def _matrix(terms: Terms) -> Float[Tensor, "channels n n"]:
    """Ā over real and imaginary parts: the step of every unit vector."""
    channels, m = terms.P.shape
    units = torch.eye(2 * m, dtype=terms.P.real.dtype, device=terms.P.device)
    columns = _real(_solve(terms, _push(terms, _complex(units)[:, None].expand(-1, channels, -1))))
    return columns.permute(1, 2, 0)


class _RowPower(torch.autograd.Function):
    """x A^(2^level) a channel. Keeps A alone for the backward pass, not the squares, which it makes again."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "channels n"], A: Float[Tensor, "channels n n"], level: int) -> Tensor:
        ctx.save_for_backward(x, A)
        ctx.level = level
        for _ in range(level):
            A = A @ A
        return einsum(x, A, "c n, c n k -> c k")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, A = ctx.saved_tensors
        squares = [A]
        for _ in range(ctx.level):
            squares.append(squares[-1] @ squares[-1])
        dx = einsum(squares[-1], grads[0], "c n k, c k -> c n")
        dA = x[..., None] * grads[0][:, None]
        for square in reversed(squares[:-1]):
            dA = square.mT @ dA + dA @ square.mT
        return dx, dA, None


class S4(SSMBlock):
    """S4: structured state space models, one a feature (Gu et al., 2111.00396), and a gated mixing of features.

    y = GLU(W gelu(SSM(u)) + b), SSM by a convolution for a sequence and by its recurrence for a token; see `S4System`,
    whose options these are, and `SSMBlock`.

    Args:
        width: features of x.
        state_size: N, even; N/2 complex states a feature.
        dt_min, dt_max: steps start log-uniform between them.
        activation: between the SSM and the mixing.
        gated: GLU on the mixing; False: a plain linear map.
        learning_rate: of A, B and the step; None: the optimizer's.

    Cost (T tokens, D = width, N = state_size, b bytes a number):
        train time: O(T D^2 + T D log T + T D N + D N^3 log T), the last two for the filter, once a batch
        train memory: O(T D + D N^2)
        prefill: O(T D^2 + T D log T + T D N^2 + D N^3 log T)
        decode: O(D^2 + D N) a token, whatever the context
        state bytes: 2*D*lti.n*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        state_size: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        activation: str = "gelu",
        gated: bool = True,
        learning_rate: float | None = 1e-3,
    ):
        super().__init__(width, S4System(width, state_size, dt_min, dt_max, learning_rate), activation, gated)
