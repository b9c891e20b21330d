"""BiGS (Wang et al., 2212.10544): bidirectional gated state space models, for masked language models."""

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops import long_conv, vandermonde
from zoo.block import Block, Out, State, tag
from zoo.layers.checks import integer
from zoo.layers.ffn import activation_function
from zoo.layers.linear import Linear
from zoo.layers.spelling import nearest
from zoo.ssm.hippo import low_rank, transition
from zoo.ssm.lti import expm1, step_parameter, tag_system, widened

INITS = ("legs", "lin", "inv")
SLOWEST = -1e-4  # Re A is kept at or below it, as published: at 0 a mode would never forget


class SharedSystem(nn.Module):
    """One diagonal state space model for all features: y = K * u + D u, causal.

    K_l = Re Σ_n C_n (e^(ΔA_n) - 1)/A_n e^(lΔA_n): S4D by zero-order hold (2206.11893, eq. 2) with B = 1 and all n in
    the sum, conjugates not implied, as in the authors' code. N modes start with Re A = -1/2 and Im A of `init`: "legs"
    the eigenvalues of HiPPO-LegS's normal part, "lin" πn, "inv" N/π (N/(2n+1) - 1); C starts normal, D at 1.

    A and the step are kept out of weight decay and have their own `learning_rate`.
    """

    def __init__(self, n: int, init: str, dt_min: float, dt_max: float, learning_rate: float | None):
        super().__init__()
        self.log_step = step_parameter(1, dt_min, dt_max)
        self.A_real = nn.Parameter(torch.full((n,), -0.5))
        self.A_imag = nn.Parameter(torch.empty(n))
        self.C = nn.Parameter(torch.randn(n, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.ones(1))
        with torch.no_grad():
            self.A_imag.copy_(_imaginary(init, n))
        tag(self, "D", weight_decay=False)
        tag_system(self, "log_step", "A_real", "A_imag", learning_rate=learning_rate)

    def kernel(self, length: int) -> Float[Tensor, "1 length"]:
        """K_l, l = 0 ... length - 1, without D; float32 at least."""
        A = torch.complex(widened(self.A_real).clamp_max(SLOWEST), widened(self.A_imag))
        log_a = torch.exp(widened(self.log_step)) * A
        weights = torch.view_as_complex(widened(self.C)) * expm1(log_a) / A
        return vandermonde(weights[None], log_a[None], length, conjugate=False)

    def forward(
        self, u: Float[Tensor, "batch time width"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time width"]:
        """y in u's dtype, zero at padding."""
        kernel = self.kernel(u.shape[1]).expand(u.shape[2], -1)
        return long_conv(u, kernel, self.D.expand(u.shape[2]), segments=segments)


def _imaginary(init: str, n: int) -> Float[Tensor, " n"]:
    """Im A, float64 on the CPU."""
    index = torch.arange(n, dtype=torch.float64, device="cpu")
    if init == "legs":
        A, P = transition("legs", n)[0], low_rank("legs", n)
        return torch.linalg.eigvalsh(-1j * (A + P.mT @ P + torch.eye(n, dtype=A.dtype, device="cpu") / 2))
    if init == "lin":
        return math.pi * index
    if init == "inv":
        return n / math.pi * (n / (2 * index + 1) - 1)
    raise ValueError(f"init={init!r} is unknown{nearest(str(init), INITS)}; choose from {', '.join(INITS)}")


class BiGS(Block):
    """BiGS: a forward and a backward state space model inside a multiplicative gate (Wang et al., 2212.10544).

    V = σ(W_v X), F = σ(W_f X), B = σ(W_b flip(X));  U = σ(W_u (W_u1 SSM_f(F) ⊗ flip(W_u2 SSM_b(B))));
    Y = W_o (U ⊗ V)   (section 3), each W with a bias, σ an activation, V and U of expand · width features.

    A direction's SSM is one system for all features (`SharedSystem`, whose options these are). A layer of the published
    models is this block alone, without a feed-forward block: {"kind": "bigs"} as often as there are layers.
    flip reverses the tokens of each document by themselves. Bidirectional: for masked language models, no state.

    Args:
        width: features of x.
        expand: features of the gate for each of x.
        state_size: complex modes of each direction's system.
        init: of the systems: "legs", "lin" or "inv".
        activation: σ; the weights published for JAX were trained with "gelu_tanh".
        dt_min, dt_max: steps start log-uniform between them.
        learning_rate: of A and the step; None: the optimizer's.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 expand + T D log T + T state_size), the last for the filters, once a batch
        train memory: O(T D expand)
        prefill: O(T D^2 expand + T D log T + T state_size), without a state
        decode: none, it is bidirectional
        state bytes: 0
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        width: int,
        expand: int = 3,
        state_size: int = 64,
        init: str = "legs",
        activation: str = "gelu",
        dt_min: float = 1e-2,
        dt_max: float = 1.0,
        learning_rate: float | None = 1e-3,
    ):
        super().__init__(width)
        self.inner = integer("expand", expand) * width
        integer("state_size", state_size)
        self.activation = activation_function(activation)
        self.gate_proj = Linear(width, self.inner)  # W_v
        self.forward_in, self.backward_in = Linear(width, width), Linear(width, width)  # W_f, W_b
        self.forward_ssm = SharedSystem(state_size, init, dt_min, dt_max, learning_rate)
        self.backward_ssm = SharedSystem(state_size, init, dt_min, dt_max, learning_rate)
        self.forward_out, self.backward_out = Linear(width, width), Linear(width, width)  # W_u1, W_u2
        self.mix_proj = Linear(width, self.inner)  # W_u
        self.out_proj = Linear(self.inner, width)  # W_o
        for each in self.modules():
            if isinstance(each, nn.Linear):
                tag(each, "bias", weight_decay=False)

    def flops_per_token(self, context: int) -> int:
        """Every matrix; of both convolutions two real transforms (5/2 n log n) over twice the tokens and a product."""
        matrices = sum(2 * each.weight.numel() for each in self.modules() if isinstance(each, nn.Linear))
        return matrices + 2 * self.width * (10 * (2 * max(1, context)).bit_length() + 8)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        backwards = None
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach the weights' gradients
            backwards = segments.flip(1)  # documents and padding read from the end: each is reversed by itself
        ahead = self.forward_ssm(self.activation(self.forward_in(x)), segments)
        behind = self.backward_ssm(self.activation(self.backward_in(x)).flip(1), backwards).flip(1)
        mixed = self.activation(self.mix_proj(self.forward_out(ahead) * self.backward_out(behind)))
        y = self.out_proj(mixed * self.activation(self.gate_proj(x)))
        if segments is not None:
            y = torch.where((segments != 0)[..., None], y, 0)  # the biases
        return Out(y, None, {})
