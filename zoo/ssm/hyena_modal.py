"""Hyena with filters of a few modes (Massaroli et al., 2310.18780): a state of constant size."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from zoo.block import Out, leave, tag
from zoo.layers.checks import integer
from zoo.ssm.hyena_gates import GatedConvolutions, Short
from zoo.ssm.lti import DiagonalLTI, LTIState, Modes, widened


class HyenaModalState(NamedTuple):
    """Constant size: the modes of every filter and a document id a row."""

    conv: Float[Tensor, "batch taps_1 inner"]  # the last inputs of the short convolution, oldest first
    h: Float[Tensor, "batch channels n 2"]  # complex, stage after stage; float32 at least
    segment: Int[Tensor, " batch"]


class ModalFilter(DiagonalLTI):
    """h_l = 2 Re Σ_n R_n λ_nˡ for l >= 0, and D at lag 0 besides (2310.18780, eq. 3.2): λ = exp(-exp(a) + iω), so that
    |λ| < 1 whatever is learned. R, a and ω are the parameters.

    At the start the modes are S4D-Lin's (2206.11893, eq. 9) with time scales log-uniform from 10 to `length` tokens.
    """

    def __init__(self, channels: int, modes: int, length: int):
        super().__init__(channels, modes)
        dt = torch.empty(channels, 1).uniform_(-math.log(length), -math.log(min(10, length))).exp()
        self.log_decay = nn.Parameter((dt / 2).log().repeat(1, modes))
        self.angle = nn.Parameter(dt * math.pi * torch.arange(modes, dtype=dt.dtype))
        self.residue = nn.Parameter(dt[..., None] * torch.randn(channels, modes, 2))
        for name in ("log_decay", "angle", "residue"):
            tag(self, name, weight_decay=False)

    def discrete(self) -> Modes:
        log_a = torch.complex(-torch.exp(widened(self.log_decay)), widened(self.angle))
        return Modes(log_a, torch.view_as_complex(widened(self.residue).contiguous()))

    @torch.no_grad()
    def assign(
        self,
        log_a: Complex[Tensor, "channels n"],
        residue: Complex[Tensor, "channels n"],
        D: Float[Tensor, " channels"],
    ) -> None:
        """Take over fitted modes."""
        assert self.D is not None
        self.log_decay.copy_(torch.log(-log_a.real))
        self.angle.copy_(log_a.imag)
        self.residue.copy_(torch.view_as_real(residue.resolve_conj()))
        self.D.copy_(D)


class HyenaModal(GatedConvolutions):
    """Hyena with each filter a sum of decaying oscillations (2310.18780): decodes from a state of constant size.

    As `Hyena`, whose `distill` makes such a block, but for the filters: h_l = 2 Re Σ_n R_n λ_nˡ, `ModalFilter`. Whole
    sequences are convolved, a token is one step of a diagonal recurrence. It can be trained from its own start as well.

    `modes`: complex modes a filter, each with its conjugate. `length`: the longest time scale at the start, in tokens.
    `order`, `conv_width`: as in `Hyena`.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 order + T D order (log T + modes))
        train memory: O(T D order)
        prefill: O(T D^2 order + T D order (log T + modes))
        decode: O(D^2 order + D order modes) a token, whatever the context
        state bytes: (conv_width - 1)*(order + 1)*D*b + 2*modes*(order - 1)*D*max(4, b) + 8
    """

    def __init__(self, width: int, order: int = 2, modes: int = 16, length: int = 1024, conv_width: int = 3):
        super().__init__(width, order, conv_width)
        self.modes = integer("modes", modes)
        integer("length", length, 2, ": the longest time scale at the start, in tokens")
        self.filters = nn.ModuleList(ModalFilter(width, modes, length) for _ in range(self.stages))

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> HyenaModalState:
        dtype = dtype or self.in_proj.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return HyenaModalState(
            self.conv.init_state(batch, device=device, dtype=dtype),
            torch.zeros(batch, self.channels, self.modes, 2, device=device, dtype=wide),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def flops_per_token(self, context: int) -> int:
        return self.outer_flops() + sum(each.flops_per_token() for each in self._stages())

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: HyenaModalState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        short = None if state is None else Short(state.conv, state.segment)
        v, gates, conv = self.project(x, short, segments)
        after = []
        for index, (each, gate) in enumerate(zip(self._stages(), gates, strict=True)):
            before = None if state is None else LTIState(state.h[:, self.stage(index)], state.segment)
            y, end = each(v, before, segments)
            after += [] if end is None else [end.h]
            v = y * gate
        y = self.finish(v, segments)
        if state is None:
            return Out(y, None, {})
        h = torch.cat(after, 1)
        return Out(y, HyenaModalState(conv.to(state.conv.dtype), h, leave(state.segment, segments)), {})

    def _stages(self) -> list[ModalFilter]:
        """The filters, typed."""
        return [each for each in self.filters if isinstance(each, ModalFilter)]
