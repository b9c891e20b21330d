"""Liquid-S4 (Hasani et al., 2209.12951): S4 whose transition depends on the input, cut off at products of p inputs."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.block import State, enter
from zoo.layers.checks import integer
from zoo.layers.shift import token_shift
from zoo.layers.spelling import nearest
from zoo.ssm.block import SSMBlock
from zoo.ssm.lti import LTI, LTIState
from zoo.ssm.s4 import S4System

KERNELS = ("pb", "kb")


class LiquidState(NamedTuple):
    """Constant size: S4's states, the last `degree` - 1 inputs and a document id a row."""

    h: Float[Tensor, "batch channels modes 2"]
    inputs: Float[Tensor, "batch past channels"]  # the latest first
    segment: Int[Tensor, " batch"]


class LiquidS4System(LTI):
    """dh/dt = (A + B 1ᵀ u) h + B u, y = C h + D u: h_t = (Ā + B̄ 1ᵀ u_t) h_{t-1} + B̄ u_t   (2209.12951, section 3.1).

    Unrolled, h holds products of inputs with powers of B̄: (B̄ 1ᵀ)^(p-1) B̄ = s^(p-1) B̄, s = 1ᵀ B̄. Of these the layer
    keeps the products of up to `degree` p consecutive inputs (section 3.2):

        v_t = u_t + s u_t u_{t-1} + ... + s^(p-1) u_t u_{t-1} ... u_{t-p+1}
        kernel "kb":  y = K * v + D u                  new terms fade as S4's do
        kernel "pb":  y = K * u + C B̄ (v - u) + D u    Ā = 0 in the new terms: they act on their own token alone

    Every new term enters along B̄, so one state of S4 carries them all; decoding needs p - 1 past inputs besides.
    `degree` 1 is S4. 1ᵀ sums over the modes of A's diagonal part, conjugates too, as in the authors' code. That code
    differs otherwise: it reverses the products in time, so that they show the future; its B̄ leaves out A's low rank;
    from one degree to the next it squares products and B̄; and for "kb" it multiplies spectra of different lengths.
    """

    def __init__(
        self,
        channels: int,
        state_size: int = 64,
        degree: int = 2,
        kernel: str = "pb",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        learning_rate: float | None = 1e-3,
    ):
        if kernel not in KERNELS:
            raise ValueError(
                f"kernel={kernel!r} is unknown{nearest(str(kernel), KERNELS)}; choose from {', '.join(KERNELS)}"
            )
        # S4's own skip would act on v.
        s4 = S4System(channels, state_size, dt_min, dt_max, learning_rate, skip=False)
        super().__init__(channels, s4.state_shape)
        self.s4 = s4
        self.degree, self.kernel_kind = integer("degree", degree), kernel

    def kernel(self, length: int) -> Float[Tensor, "channels length"]:
        """S4's, without the new terms."""
        return self.s4.kernel(length)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        dtype = dtype or self.s4.log_step.dtype
        h, segment = self.s4.init_state(batch, device=device, dtype=dtype)
        inputs = torch.zeros(batch, self.degree - 1, self.channels, device=device, dtype=dtype)
        return LiquidState(h, inputs, segment)

    def forward(
        self,
        u: Float[Tensor, "batch time channels"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time channels"], State | None]:
        """See `LTI.forward`; the state is a `LiquidState`."""
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        if segments is not None:
            wide = torch.where((segments != 0)[..., None], wide, 0)
            if state is not None:
                fresh = self.init_state(len(u), device=u.device, dtype=state.inputs.dtype)
                state = enter(state, fresh, segments)
        system = self.s4.discrete()
        s = 2 * system.B[:, ::2].sum(-1).to(wide.dtype)
        extra, inputs = self._products(wide, s, state, segments)
        inner = None if state is None else LTIState(state.h, state.segment)
        self.s4.view = self.view
        y, inner = self.s4(wide + extra if self.kernel_kind == "kb" else wide, inner, segments)
        if self.kernel_kind == "pb":
            y = y + (system.C[:, 0] * system.B).sum(-1).to(y.dtype) * extra
        y = self._skip(y, wide).to(u.dtype)
        if state is None or inner is None:
            return y, None
        return y, LiquidState(inner.h, inputs.to(state.inputs.dtype), inner.segment)

    def _products(
        self,
        u: Float[Tensor, "batch time channels"],
        s: Float[Tensor, " channels"],
        state: State | None,
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch past channels"]]:
        """v - u by Horner's rule, and the inputs to keep."""
        start = u.new_zeros(len(u), self.degree - 1, self.channels) if state is None else state.inputs.to(u.dtype)
        before, earlier, kept = u, [], []
        for past in start.unbind(1):
            before, last = token_shift(before, past, segments)
            earlier.append(before)
            kept.append(last)
        total = torch.zeros_like(u)
        for each in reversed(earlier):
            total = s * each * (1 + total)
        return u * total, torch.stack(kept, 1) if kept else start

    def flops_per_token(self) -> int:
        """S4's step, the polynomial and its use."""
        return self.s4.flops_per_token() + self.channels * (3 * self.degree + 2)


class LiquidS4(SSMBlock):
    """Liquid-S4: S4 with an input-dependent transition, as products of inputs (Hasani et al., 2209.12951).

    y = GLU(W gelu(SSM(u)) + b), SSM by a convolution for a sequence and by its recurrence for a token; see
    `LiquidS4System`, whose options these are, and `SSMBlock`.

    Args:
        width: features of x.
        state_size: N, even; N/2 complex states a feature.
        degree: p, inputs in the longest product; 1 is S4.
        kernel: "pb" or "kb".
        dt_min, dt_max: steps start log-uniform between them.
        activation: between the SSM and the mixing.
        gated: GLU on the mixing; False: a plain linear map.
        learning_rate: of A, B and the step; None: the optimizer's.

    Cost (T tokens, D = width, N = state_size, p = degree, b bytes a number):
        train time: O(T D^2 + T D log T + T D N + T D p + D N^3 log T)
        train memory: O(T D p + D N^2)
        prefill: O(T D^2 + T D log T + T D N^2 + T D p + D N^3 log T)
        decode: O(D^2 + D N + D p) a token, whatever the context
        state bytes: 2*D*lti.s4.n*max(4, b) + (lti.degree - 1)*D*b + 8
    """

    def __init__(
        self,
        width: int,
        state_size: int = 64,
        degree: int = 2,
        kernel: str = "pb",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        activation: str = "gelu",
        gated: bool = True,
        learning_rate: float | None = 1e-3,
    ):
        system = LiquidS4System(width, state_size, degree, kernel, dt_min, dt_max, learning_rate)
        super().__init__(width, system, activation, gated)
