"""LSSL (Gu et al., 2110.13985): the linear state space layer with HiPPO's dense A, the model that S4 makes fast."""

from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.layers.checks import integer
from zoo.layers.spelling import nearest
from zoo.ssm.block import SSMBlock
from zoo.ssm.dense import DenseLTI, Squares
from zoo.ssm.hippo import transition
from zoo.ssm.lti import tag_system, widened

MEASURES = ("legs", "lagt")


class Bilinear(NamedTuple):
    """A discretised system (see `zoo.ssm.dense.Dense`) and what one step of it needs."""

    A: Squares
    B: Float[Tensor, "channels n"]
    C: Float[Tensor, "channels each n"]
    left: Float[Tensor, "channels n n"]  # 1 - ΔA/2
    right: Float[Tensor, "channels n n"]  # 1 + ΔA/2


class LSSLSystem(DenseLTI):
    """dh/dt = A h + B u, y = C h + D u with one A and B of HiPPO for all channels, a step Δ and C a channel.

    Bilinear (2110.13985, eq. 3 with α = 1/2): Ā = (1 - ΔA/2)⁻¹ (1 + ΔA/2), B̄ = (1 - ΔA/2)⁻¹ ΔB. Each channel has
    `outputs` M outputs (section 3.3). A starts as that of `measure`, "legs" or "lagt": lower triangular with a negative
    diagonal, and stays of that form where it is trained: so a step is one triangular solve, O(N²), and no choice of A
    is unstable. With `fixed` (the paper's LSSL-f) A and B are constants.
    """

    A_log_diagonal: Tensor
    A_lower: Tensor
    B: Tensor

    def __init__(
        self,
        channels: int,
        state_size: int = 64,
        measure: str = "legs",
        outputs: int = 1,
        fixed: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        learning_rate: float | None = 1e-3,
        skip: bool = True,
    ):
        if measure not in MEASURES:
            raise ValueError(
                f"measure={measure!r} is unknown to LSSL{nearest(str(measure), MEASURES)}; choose from "
                f"{', '.join(MEASURES)}: those with a triangular A, whose steps are cheap"
            )
        super().__init__(channels, (integer("state_size", state_size),), dt_min, dt_max, skip, outputs)
        self.state_size = state_size
        A, B = transition(measure, state_size)
        lower = A[_below(state_size, "cpu")]
        for name, value in (("A_log_diagonal", (-A.diagonal()).log()), ("A_lower", lower), ("B", B)):
            made = torch.empty(value.shape)
            made.copy_(value)
            if fixed:
                self.register_buffer(name, made)
            else:
                self.register_parameter(name, nn.Parameter(made))
        self.C = nn.Parameter(torch.randn(channels, outputs, state_size))
        names = () if fixed else ("A_log_diagonal", "A_lower", "B")
        tag_system(self, "log_step", *names, learning_rate=learning_rate)

    def matrix(self) -> Float[Tensor, "n n"]:
        """A, float64."""
        below = _below(self.state_size, self.A_lower.device)
        lower = self.A_lower.new_zeros(below.shape, dtype=torch.float64).masked_scatter(below, self.A_lower.double())
        return lower - torch.diag(self.A_log_diagonal.double().exp())

    def discrete(self) -> Bilinear:
        step = self.log_step.double().exp()[:, None]
        half = step[..., None] * self.matrix() / 2
        eye = torch.eye(self.state_size, dtype=half.dtype, device=half.device)
        left, right = eye - half, eye + half
        B = torch.linalg.solve_triangular(left, (step * self.B.double())[..., None], upper=False)[..., 0]
        A = Squares(lambda: torch.linalg.solve_triangular(left, right, upper=False))
        dtype = widened(self.log_step).dtype
        return Bilinear(A, B, self.C.double(), left.to(dtype), right.to(dtype))

    def step(
        self, system: Bilinear, h: Float[Tensor, "batch channels n"], u: Float[Tensor, "batch channels"]
    ) -> Float[Tensor, "batch channels n"]:
        moved = einsum(system.right.to(h.dtype), h, "c n k, b c k -> c n b")
        moved = torch.linalg.solve_triangular(system.left.to(h.dtype), moved, upper=False)
        return moved.permute(2, 0, 1) + system.B.to(h.dtype) * u[..., None]

    def flops_per_token(self) -> int:
        """Two triangular matrices, the input, the outputs and the skip."""
        return self.channels * (2 * self.state_size * (self.state_size + 1 + self.outputs) + 2 * self.outputs)


def _below(state_size: int, device: Any) -> Bool[Tensor, "n n"]:
    return torch.ones(state_size, state_size, dtype=torch.bool, device=device).tril(-1)


class LSSL(SSMBlock):
    """LSSL: linear state space layer with HiPPO's dense state matrix (Gu et al., 2110.13985).

    y = W gelu(SSM(u)) + b, W [width, outputs · width]: SSM by a convolution with the Krylov filter K_l = C Āˡ B̄ for a
    sequence and by its recurrence for a token; see `LSSLSystem`, whose options these are, and `SSMBlock`.

    Args:
        width: features of x.
        state_size: N, real states a feature.
        measure: HiPPO's, "legs" or "lagt".
        outputs: M of every feature's system, mixed by W.
        fixed: A and B stay HiPPO's (the paper's LSSL-f).
        dt_min, dt_max: steps start log-uniform between them.
        activation: between the SSM and the mixing.
        gated: GLU on the mixing.
        learning_rate: of A, B and the step; None: the optimizer's.

    Cost (T tokens, D = width, N = state_size, M = outputs, b bytes a number):
        train time: O(T M D^2 + T M D log T + T M D N + D N^3 log T), the last for the filter, once a batch
        train memory: O(T M D + D N^2 log T + D N sqrt(T))
        prefill: O(T M D^2 + T M D log T + T D N^2 + D N^3 log T)
        decode: O(M D^2 + D N^2) a token, whatever the context
        state bytes: D*lti.state_size*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        state_size: int = 64,
        measure: str = "legs",
        outputs: int = 1,
        fixed: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        activation: str = "gelu",
        gated: bool = False,
        learning_rate: float | None = 1e-3,
    ):
        system = LSSLSystem(width, state_size, measure, outputs, fixed, dt_min, dt_max, learning_rate)
        super().__init__(width, system, activation, gated)
