"""S5 (Smith et al., 2208.04933): one state space model with many inputs and outputs for all features, run by a scan."""

from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn.functional import glu

from ops import linear_recurrence
from zoo.block import Block, Out, State, each_document, tag
from zoo.layers.checks import integer
from zoo.layers.ffn import activation_function
from zoo.layers.linear import Linear
from zoo.layers.spelling import nearest
from zoo.ssm.hippo import nplr
from zoo.ssm.lti import LTI, LTIState, expm1, log1p, powers, step_parameter, tag_system, widened

DISCRETISATIONS = ("zoh", "bilinear")
GATES = ("full", "half", "half_linear")
LARGEST = -1e-4  # of Re Λ, where clipped; the authors' choice
TRUNCATED = 0.87962566103423978  # standard deviation of a standard normal cut off at ±2


class Modes(NamedTuple):
    """The system, discretised: h_t = exp(log_a) h_{t-1} + scale (B u_t), y_t = 2 Re(C h_t). Numbers as real pairs."""

    log_a: Complex[Tensor, " n"]
    scale: Complex[Tensor, " n"]  # B̄ = scale B: made for n numbers and not for n · channels
    B: Float[Tensor, "n channels 2"]
    C: Float[Tensor, "channels n 2"]


class S5System(LTI):
    """dh/dt = Λ h + B u, y = 2 Re(C h) + D u (2208.04933, section 3): all channels drive n shared modes, all read them.

    Zero-order hold: Λ̄ = exp(ΛΔ), B̄ = (exp(ΛΔ) - 1)/Λ · B. Bilinear: Λ̄ = (1 + ΛΔ/2)/(1 - ΛΔ/2),
    B̄ = Δ/(1 - ΛΔ/2) · B. Each mode has its own step Δ = exp(log_step).
    `state_size` P counts conjugate pairs as two: n = P/2 modes are held.

    Start (appendix B.1): Λ = the eigenvalues of `blocks` equal blocks of HiPPO-N, HiPPO-LegS's normal
    part of size P/blocks, with eigenvectors V; B = V⁻¹ B' with a real B', C = C' V with a complex C', both of a normal
    distribution cut off at 2 standard deviations, of variance 1/P (each part of C'). D is standard normal.

    With `clip` Re Λ is kept at or below -10⁻⁴, as the authors advise for sequences without end: a mode whose parameter
    is above has no gradient in it until the parameter is brought back. Without it a mode may learn to grow.

    Λ, B and the step are kept out of weight decay and have their own `learning_rate`, as the authors have it.

    Views: "scan" is the normal one, the recurrence that of one token. "convolution", with a filter [channels,
    channels] a lag, is there to be compared with: for it costs O(T channels²) memory a row.
    """

    def __init__(
        self,
        channels: int,
        state_size: int = 256,
        blocks: int = 8,
        discretisation: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        clip: bool = True,
        learning_rate: float | None = 1e-3,
    ):
        if integer("state_size", state_size, 2) % (2 * integer("blocks", blocks)):
            raise ValueError(
                f"state_size={state_size} must be a multiple of 2 * blocks = {2 * blocks}: a block has conjugate "
                f"pairs; try {-(-state_size // (2 * blocks)) * 2 * blocks}"
            )
        if discretisation not in DISCRETISATIONS:
            hint = nearest(str(discretisation), DISCRETISATIONS)
            raise ValueError(
                f"discretisation={discretisation!r} is unknown{hint}; choose from {', '.join(DISCRETISATIONS)}"
            )
        super().__init__(channels, (state_size // 2,))
        self.n, self.discretisation, self.clip = state_size // 2, discretisation, bool(clip)
        self.log_step = step_parameter(self.n, dt_min, dt_max)
        self.A_real = nn.Parameter(torch.full((self.n,), -0.5))
        self.A_imag = nn.Parameter(torch.empty(self.n))
        self.B = nn.Parameter(torch.empty(self.n, channels, 2))
        self.C = nn.Parameter(torch.empty(channels, self.n, 2))
        self._start(state_size, blocks)
        tag_system(self, "log_step", "A_real", "A_imag", "B", learning_rate=learning_rate)

    @torch.no_grad()
    def _start(self, state_size: int, blocks: int) -> None:
        form = nplr("legs", state_size // blocks)
        self.A_imag.copy_(form.Lambda.imag.repeat(blocks))
        V = form.V.to(torch.complex64).to(self.B.device)
        # C' and B' as they are in HiPPO's own basis, a block's states in a run.
        B = _truncated_normal((blocks, state_size // blocks, self.channels), state_size**-0.5)
        B = einsum(V.conj(), B.to(V.dtype), "i n, j i c -> j n c")
        C = _truncated_normal((self.channels, blocks, state_size // blocks, 2), state_size**-0.5)
        C = einsum(torch.view_as_complex(C), V, "c j i, i n -> c j n")
        self.B.copy_(torch.view_as_real(rearrange(B, "j n c -> (j n) c").resolve_conj()))
        self.C.copy_(torch.view_as_real(rearrange(C, "c j n -> c (j n)")))

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> LTIState:
        """h [batch, n, 2]: one state for all channels."""
        dtype = self.state_dtype(dtype or self.B.dtype)
        h = torch.zeros(batch, self.n, 2, device=device, dtype=dtype)
        return LTIState(h, torch.zeros(batch, device=device, dtype=torch.long))

    def discrete(self) -> Modes:
        step = torch.exp(widened(self.log_step))
        real = widened(self.A_real)
        A = torch.complex(real.clamp(max=LARGEST) if self.clip else real, widened(self.A_imag))
        B, C = widened(self.B), widened(self.C)
        if self.discretisation == "zoh":
            return Modes(step * A, expm1(step * A) / A, B, C)
        half = step * A / 2
        return Modes(log1p(half) - log1p(-half), step / (1 - half), B, C)

    def flops_per_token(self) -> int:
        """B u and Re(C h), 4 a number each; scale, Ā h and the sum, 14 a mode; the skip."""
        return 8 * self.n * self.channels + 14 * self.n + 2 * self.channels

    def step(
        self, system: Modes, h: Complex[Tensor, "batch n"], u: Float[Tensor, "batch channels"]
    ) -> Complex[Tensor, "batch n"]:
        return torch.exp(system.log_a) * h + self._drive(system, u)

    def read(self, system: Modes, h: Complex[Tensor, "*rows n"]) -> Float[Tensor, "*rows channels"]:
        pairs = torch.view_as_real(h)
        C = system.C.to(pairs.dtype)
        real = einsum(pairs[..., 0], C[..., 0], "... n, c n -> ... c")
        return 2 * (real - einsum(pairs[..., 1], C[..., 1], "... n, c n -> ... c"))

    def scan(
        self,
        system: Modes,
        u: Float[Tensor, "batch time channels"],
        h: Complex[Tensor, "batch n"] | None,
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time channels"], Complex[Tensor, "batch n"]]:
        x = self._drive(system, u)
        states, last = linear_recurrence(x, torch.exp(system.log_a), initial_state=h, segments=segments)
        return self.read(system, states), last

    def _auto(
        self, system: Modes, u: Tensor, h: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        view = self._recurrence if u.shape[1] == 1 else self._scan
        return view(system, u, h, segments)

    def _drive(self, system: Modes, u: Float[Tensor, "*rows channels"]) -> Complex[Tensor, "*rows n"]:
        """B̄ u."""
        parts = einsum(u.to(system.B.dtype), system.B, "... c, n c two -> ... n two")
        return system.scale * torch.view_as_complex(parts.contiguous())

    # The convolution view --------------------------------------------------------------------------------------

    def filter(self, system: Modes, length: int) -> Float[Tensor, "outputs inputs length"]:
        """K_l = 2 Re(C Λ̄ˡ B̄)."""
        B, C = (torch.view_as_complex(each.contiguous()) for each in (system.B, system.C))
        lags = powers(system.log_a, torch.arange(length, device=B.device))
        return 2 * einsum(C, lags, system.scale[:, None] * B, "o n, n l, n i -> o i l").real

    def convolve(
        self,
        u: Float[Tensor, "batch time channels"],
        kernel: Float[Tensor, "outputs inputs time"],
        response: Float[Tensor, "batch time outputs"] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time outputs"]:
        wide = u.to(kernel.dtype)

        def run(rows: Tensor, _: Tensor | None = None) -> Tensor:
            time = rows.shape[1]
            spectra = torch.fft.rfft(rows, 2 * time, 1), torch.fft.rfft(kernel[..., :time], 2 * time)
            product = einsum(*spectra, "b f i, o i f -> b f o")
            return torch.fft.irfft(product, 2 * time, 1)[:, :time]

        y = self._skip(run(wide) if segments is None else each_document(run, wide, segments), wide)
        return (y if response is None else y + response).to(u.dtype)

    def respond(
        self, system: Modes, h: Complex[Tensor, "batch n"], length: int
    ) -> Float[Tensor, "batch length channels"]:
        later = powers(system.log_a, 1 + torch.arange(length, device=h.device))
        return self.read(system, einsum(h, later, "b n, n t -> b t n"))

    def absorb(self, system: Modes, u: Float[Tensor, "batch time channels"]) -> Complex[Tensor, "batch n"]:
        later = powers(system.log_a, torch.arange(u.shape[1] - 1, -1, -1, device=u.device))
        return einsum(self._drive(system, u), later, "b t n, n t -> b n")

    def advance(
        self, system: Modes, h: Complex[Tensor, "batch n"], count: Int[Tensor, " batch"], most: int
    ) -> Complex[Tensor, "batch n"]:
        return h * powers(system.log_a, count).mT


def _truncated_normal(shape: tuple[int, ...], std: float) -> Tensor:
    """Of standard deviation `std` after the cut at 2 standard deviations of the whole."""
    whole = std / TRUNCATED
    return nn.init.trunc_normal_(torch.empty(shape), std=whole, a=-2 * whole, b=2 * whole)


class S5(Block):
    """S5: one diagonal state space model for all features, by an associative scan (Smith et al., 2208.04933).

    z = f(SSM(x)) with f = gelu; then, by `gate`, σ the logistic function (the authors' name for it in brackets):

        "half"         y = z · σ(W z + b)                    (half_glu1)
        "half_linear"  y = SSM(x) · σ(W z + b)               (half_glu2)
        "full"         y = (W z + b) · σ(W' z + b')          (full_glu)
        None           y = z                                 (gelu)

    The SSM mixes features itself. Its states do not grow with the width; see `S5System`, whose options these are.

    Args:
        width: features of x.
        state_size: P, for all features together; P/2 complex states.
        blocks: of HiPPO-N at the start; state_size is a multiple of 2 blocks.
        discretisation: "zoh" or "bilinear".
        dt_min, dt_max: steps start log-uniform between them.
        clip: no mode may grow.
        activation: f; the authors' code has "gelu_tanh".
        gate: "half", "half_linear", "full" or None.
        learning_rate: of Λ, B and the step; None: the optimizer's.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 + T D state_size)
        train memory: O(T (D + state_size))
        prefill: O(T D^2 + T D state_size)
        decode: O(D^2 + D state_size) a token, whatever the context
        state bytes: 2*lti.n*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        state_size: int = 256,
        blocks: int = 8,
        discretisation: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        clip: bool = True,
        activation: str = "gelu",
        gate: str | None = "half",
        learning_rate: float | None = 1e-3,
    ):
        super().__init__(width)
        if gate is not None and gate not in GATES:
            raise ValueError(
                f"gate={gate!r} is unknown{nearest(str(gate), GATES)}; choose from {', '.join(GATES)}, or None"
            )
        self.lti = S5System(width, state_size, blocks, discretisation, dt_min, dt_max, clip, learning_rate)
        self.activation, self.gate = activation_function(activation), gate
        self.out_proj = None if gate is None else Linear(width, 2 * width if gate == "full" else width)
        if self.out_proj is not None:
            tag(self.out_proj, "bias", weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        return self.lti.init_state(batch, device=device, dtype=dtype)

    def flops_per_token(self, context: int) -> int:
        mixing = 0 if self.out_proj is None else 2 * self.out_proj.weight.numel()
        return mixing + self.lti.flops_per_token()

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        y, state = self.lti(x, state, segments)
        z = self.activation(y)
        if self.out_proj is None:
            return Out(z, state, {})
        gates = self.out_proj(z)
        if self.gate != "full":
            return Out((z if self.gate == "half" else y) * torch.sigmoid(gates), state, {})
        y = glu(gates, -1)
        if segments is not None:
            y = torch.where((segments != 0)[..., None], y, 0)  # the bias
        return Out(y, state, {})
